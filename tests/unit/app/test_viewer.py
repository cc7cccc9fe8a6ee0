"""OHIF beside MONAI Label: its page, its files, MSHub's extension; and everything else as it was."""

from __future__ import annotations

import asyncio
import gzip
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lib.server.viewer import EXTENSION, OHIF_VERSION, add_viewer, viewer_folder

PAGE = "<!doctype html><title>OHIF Viewer</title>"
BUNDLE = "app.bundle.0f6159c501addfe9.js"
WASM = "5130ccb17e3f3f5b.wasm"
SECRET = "a secret beside the build"


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A folder like OHIF's published build, and a secret beside it."""
    folder = tmp_path / "viewer" / OHIF_VERSION
    files = {"index.html": PAGE, BUNDLE: "bundle", WASM: "\0asm", "app.bundle.css": "css", "app-config.js": "theirs"}
    files |= {"assets/favicon.ico": "icon", "sw.js": "worker", "_headers": "headers", "ort/esm/ort.min.js": "ort"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (tmp_path / "viewer" / "secret.txt").write_text(SECRET)
    (folder / "leak.txt").symlink_to(tmp_path / "viewer" / "secret.txt")
    return folder


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    """A server with routes like MONAI Label's, and the viewer."""
    api = FastAPI()
    api.add_api_route("/", lambda: "MONAI Label", methods=["GET"])
    api.add_api_route("/infer/{model}", lambda model: model, methods=["POST"])
    api.add_api_route("/ohif/{path:path}", lambda path: f"stock {path}", methods=["GET"])
    add_viewer(api, lambda: tmp_path)
    return TestClient(api, follow_redirects=False)


def raw(client: TestClient, path: str) -> tuple[int, str]:
    """Ask for `path` as it is, dots and escapes included, as a hostile client would; return status and body."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "headers": [],
        "query_string": b"",
    }
    scope |= {"path": unquote(path), "raw_path": path.encode(), "root_path": "", "server": ("testserver", 80)}
    asyncio.run(client.app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()


class TestPage:
    @pytest.mark.parametrize(
        "path", ["/viewer/", "/viewer/mshub", "/viewer/mshub?StudyInstanceUIDs=1.2", "/viewer/a/b"]
    )
    def test_every_address_below_viewer_is_ohifs_one_page(self, build: Path, client: TestClient, path: str) -> None:
        answer = client.get(path)
        assert (answer.status_code, answer.text) == (200, PAGE)
        assert answer.headers["content-type"] == "text/html; charset=utf-8"

    def test_without_a_slash_it_leads_to_the_study_list(self, build: Path, client: TestClient) -> None:
        assert client.get("/viewer").headers["location"] == "/viewer/"

    def test_where_ohif_is_absent_the_page_says_how_to_install_it(self, tmp_path: Path, client: TestClient) -> None:
        answer = client.get("/viewer/mshub")
        assert answer.status_code == 404
        assert all(told in answer.text for told in ("make viewer", OHIF_VERSION, "/ohif/"))
        assert str(tmp_path) not in answer.text

    def test_a_viewer_that_is_installed_later_is_served_without_a_restart(
        self, client: TestClient, request: pytest.FixtureRequest
    ) -> None:
        assert client.get("/viewer/").status_code == 404
        request.getfixturevalue("build")
        assert client.get("/viewer/").status_code == 200


class TestFilesOfTheBuild:
    @pytest.mark.parametrize(
        ("path", "media"),
        [
            (BUNDLE, "text/javascript; charset=utf-8"),
            (WASM, "application/wasm"),
            ("app.bundle.css", "text/css; charset=utf-8"),
            ("ort/esm/ort.min.js", "text/javascript; charset=utf-8"),
        ],
    )
    def test_lie_at_the_root_with_the_type_a_browser_insists_on(
        self, build: Path, client: TestClient, path: str, media: str
    ) -> None:
        answer = client.get(f"/{path}")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == media
        assert answer.headers["x-content-type-options"] == "nosniff"

    def test_with_a_hash_in_their_names_are_kept_for_a_year_and_others_asked_for_again(
        self, build: Path, client: TestClient
    ) -> None:
        kept = {path: client.get(f"/{path}").headers["cache-control"] for path in (BUNDLE, WASM, "app.bundle.css")}
        assert all("immutable" in kept[name] for name in (BUNDLE, WASM))
        assert kept["app.bundle.css"] == "no-cache"

    def test_are_sent_compressed_where_a_copy_lies_beside_and_the_browser_takes_it(
        self, build: Path, client: TestClient
    ) -> None:
        (build / f"{BUNDLE}.gz").write_bytes(gzip.compress(b"bundle, compressed"))
        small = client.get(f"/{BUNDLE}", headers={"accept-encoding": "gzip"})
        assert (small.headers["content-encoding"], small.text) == ("gzip", "bundle, compressed")
        assert small.headers["content-type"] == "text/javascript; charset=utf-8"
        plain = client.get(f"/{BUNDLE}", headers={"accept-encoding": "identity"})
        assert ("content-encoding" in plain.headers, plain.text) == (False, "bundle")

    @pytest.mark.parametrize(
        "path",
        [
            f"/..%2f..%2fviewer%2f{OHIF_VERSION}%2f..%2fsecret.txt",
            "/../secret.txt",
            "/%2e%2e/secret.txt",
            "/assets/..%2f..%2fsecret.txt",
            "/assets/../../secret.txt",
            "//etc/passwd",
            "/%2fetc%2fpasswd",
            "/leak.txt",
            "/assets%00",
            "/viewer/extension/..%2flib%2fconf.py",
            "/viewer/extension/%2e%2e/main.py",
        ],
    )
    def test_nothing_outside_of_the_build_or_the_extension_is_sent(
        self, build: Path, client: TestClient, path: str
    ) -> None:
        status, text = raw(client, path)
        assert status == 404 or text == PAGE
        assert SECRET not in text

    @pytest.mark.parametrize("name", ["a" * 300, "a" * 5000, "a%00b"])
    @pytest.mark.parametrize("folder", ["/", "/viewer/extension/"])
    def test_a_name_that_no_file_can_have_is_not_found(
        self, build: Path, client: TestClient, folder: str, name: str
    ) -> None:
        assert raw(client, folder + name)[0] == 404

    @pytest.mark.parametrize("path", ["/index.html", "/sw.js", "/_headers", "/index.html/", "/assets", "/assets/"])
    def test_pages_and_settings_of_the_build_that_are_replaced_are_not_there(
        self, build: Path, client: TestClient, path: str
    ) -> None:
        assert client.get(path).status_code == 404


class TestTheRestOfTheServer:
    def test_goes_before_the_build(self, build: Path, client: TestClient) -> None:
        assert client.get("/").json() == "MONAI Label"
        assert client.get("/ohif/app-config.js").json() == "stock app-config.js"
        assert client.post("/infer/tiny").json() == "tiny"

    @pytest.mark.parametrize(("method", "path"), [("GET", "/nothing"), ("POST", f"/{BUNDLE}"), ("PUT", "/nothing")])
    def test_says_not_found_as_before(self, build: Path, client: TestClient, method: str, path: str) -> None:
        assert client.request(method, path).status_code == 404

    def test_says_method_not_allowed_as_before(self, build: Path, client: TestClient) -> None:
        assert client.get("/infer/tiny").status_code == 405


class TestExtension:
    def test_settings_are_mshubs_and_name_files_that_are_there(self, build: Path, client: TestClient) -> None:
        settings = client.get("/app-config.js").text
        named = re.findall(r"'(/viewer/extension/[\w.-]+)'", settings)
        assert len(named) == 2
        assert all(client.get(path).headers["content-type"].startswith("text/javascript") for path in named)

    def test_every_module_it_imports_is_served(self, build: Path, client: TestClient) -> None:
        for file in EXTENSION.glob("*.js"):
            for name in re.findall(r"from '\./([\w.-]+)'", file.read_text(encoding="utf-8")):
                assert client.get(f"/viewer/extension/{name}").status_code == 200, f"{file.name} imports {name}"

    def test_its_files_are_asked_for_again_each_time(self, build: Path, client: TestClient) -> None:
        assert client.get("/viewer/extension/panel.css").headers["cache-control"] == "no-cache"

    def test_a_file_it_has_not_is_not_found(self, build: Path, client: TestClient) -> None:
        answer = client.get("/viewer/extension/nothing.js")
        assert (answer.status_code, answer.json()["detail"]) == (
            404,
            "The viewer's extension has no file 'nothing.js'.",
        )


def test_a_viewer_without_its_page_counts_as_absent(tmp_path: Path) -> None:
    (tmp_path / "viewer" / OHIF_VERSION).mkdir(parents=True)
    assert viewer_folder(tmp_path) is None
