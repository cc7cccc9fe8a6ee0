"""Requests a fuzzer found 5xx with: each is answered in words, with a code, and what is asked for rightly is there."""

from __future__ import annotations

import io
import json
import os
import re
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import HTTPException, params
from fastapi.testclient import TestClient
from starlette.routing import Match

from lib.app import MSHubApp
from lib.server import asgi
from lib.server.bodies import IN_MEMORY_BYTES
from lib.server.json_input import DEEPEST, json_object, read_json
from lib.server.permissions import PERMITTED

JSON = {"content-type": "application/json"}


@pytest.fixture
def server(clinic: MSHubApp, serve: Callable[[object], TestClient], temporary: Path) -> TestClient:
    return serve(clinic)


def refused(answer: httpx.Response, status: int = 400, code: str = "bad-request") -> str:
    assert (answer.status_code, answer.headers.get("X-MSHub-Error")) == (status, code), answer.text
    return str(answer.json()["detail"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"limit": NaN}', "nan, which JSON does not know"),
        ('{"limit": [-1e999]}', "-inf, which JSON does not know"),
        ('{"client_id": "\\ud800"}', r"\\ud800, half a character"),
        ('{"\\udfff": 1}', r"\\udfff, half a character"),
        (f'{{"limit": {2**63}}}', "of 64 bits"),
        ('{"limit": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"images": ' + "[" * DEEPEST + "]" * DEEPEST + "}", f"at most {DEEPEST} levels"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        ("{oops", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("path", ["/mshub/prelabels/tiny", "/train/tiny", "/activelearning/random", "/scoring/"])
def test_a_body_no_program_can_repeat_is_refused(server: TestClient, path: str, body: str | bytes, words: str) -> None:
    assert re.search(words, refused(server.post(path, content=body, headers=JSON)))


def test_a_field_of_a_form_may_hold_what_python_calls_no_number() -> None:
    assert str(json_object('{"a": NaN}', "params")["a"]) == "nan"
    assert json_object("", "params") == {}
    for text, words in (
        ("[]", "expected an object"),
        ('{"a": "\\ud800"}', "half a character"),
        ("[" * 100_000, "params"),
    ):
        with pytest.raises(HTTPException, match=words):
            json_object(text, "params")


def test_what_is_read_is_what_was_written() -> None:
    deepest = json.loads("[" * DEEPEST + "7" + "]" * DEEPEST)
    assert read_json(json.dumps(deepest), "it") == deepest
    content = {"a": [1, -2.5, True, None, "ä€𝄞", {"b": {}}], "n": 2**63 - 1, "m": -(2**63) + 1}
    assert read_json(json.dumps(content), "it") == content
    assert read_json(json.dumps(content).encode("utf-16"), "it") == content


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/datastore/image/info?image=a", "info"),
        ("/datastore/label/info?label=a&tag=final", "info"),
        ("/datastore/updatelabelinfo?label=a&tag=final", "params"),
    ],
)
def test_notes_are_objects(
    server: TestClient, clinic: MSHubApp, review: Callable[..., None], path: str, name: str
) -> None:
    review("a", "liver")
    for text in ("[]", "null", "NaN", '"x"', "{oops", "[" * 100_000):
        assert re.search("JSON|nested", refused(server.put(path, data={name: text})))
    assert server.put(path, data={name: '{"seen": "yes"}'}).status_code == 200
    told = (
        clinic.datastore().get_image_info("a") if "image" in path else clinic.datastore().get_label_info("a", "final")
    )
    assert told["seen"] == "yes"


def test_a_batch_has_a_number_that_can_be_one(server: TestClient) -> None:
    for method in ("GET", "DELETE", "PUT"):
        assert "path.batch" in refused(
            server.request(method, f"/mshub/prelabels/{10**30}"), 422, "unprocessable-entity"
        )
        assert "There is no batch" in refused(server.request(method, f"/mshub/prelabels/{2**63 - 1}"), 404, "not-found")


@pytest.mark.parametrize("strategy", [["random"], {"a": 1}, "astrology"])
def test_the_address_says_which_strategy(server: TestClient, strategy: Any) -> None:
    answer = server.post("/activelearning/random", json={"strategy": strategy})
    assert answer.status_code == 200
    assert answer.json()["id"]


def test_labelled_images_are_downloaded_and_leave_nothing(
    server: TestClient, review: Callable[..., None], tmp_path: Path
) -> None:
    assert "no image with a final label" in refused(server.get("/datastore/dataset"), 404, "not-found")
    review("a", "liver")
    answer = server.get("/datastore/dataset")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert {"image/a.nii.gz", "label/a.nii.gz", "metadata.json"} <= set(archive.namelist())
    assert [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()] == []


def test_a_download_holds_whole_pairs_though_images_are_removed_meanwhile(
    server: TestClient, clinic: MSHubApp, review: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = clinic.datastore()
    for image in ("a", "b"):
        review(image, "liver")
    there = {Path(pair["image"]).name[0]: pair for pair in store.datalist()}
    os.utime(there["b"]["image"], (1, 1))  # a ZIP knows no date before 1980
    sized = store._bytes_to_pack

    def removed_then(*of: Any) -> int:
        Path(there["a"]["label"]).unlink(missing_ok=True)
        return sized(*of)

    monkeypatch.setattr(store, "_bytes_to_pack", removed_then)
    answer = server.get("/datastore/dataset")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert set(archive.namelist()) == {"image/b.nii.gz", "label/b.nii.gz", "metadata.json"}
        assert archive.read("label/b.nii.gz") == Path(there["b"]["label"]).read_bytes()
        assert archive.testzip() is None
    Path(there["b"]["image"]).unlink()
    assert "there is no file b.nii.gz" in refused(server.get("/datastore/dataset"), 404, "not-found")


def test_the_folder_is_looked_at_while_images_come_and_go(clinic: MSHubApp, tmp_path: Path) -> None:
    store = clinic.datastore()
    with ThreadPoolExecutor(3) as pool:
        looking = [pool.submit(lambda: [(store.refresh(), store.list_images()) for _ in range(40)]) for _ in range(2)]
        for number in range(20):
            store.add_image(f"new{number}", store.get_image_uri("a"), {})
            store.remove_image(f"new{number}")
        assert all(len(one.result()) == 40 for one in looking)
    assert sorted(store.list_images()) == ["a", "b", "mr"]


@pytest.mark.parametrize("moment", ["note_offer", "get_image_info"])
def test_where_the_next_case_is_removed_just_now_another_one_is_offered(
    server: TestClient, clinic: MSHubApp, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    store, go_on = clinic.datastore(), getattr(clinic.datastore(), moment)
    removed: list[str] = []

    def meanwhile(image: str, *told: Any) -> Any:
        if not removed:
            removed.append(image)
            store.remove_image(image)
        return go_on(image, *told)

    monkeypatch.setattr(store, moment, meanwhile)
    answer = server.post("/activelearning/random", json={})
    assert (answer.status_code, len(removed)) == (200, 1), answer.text
    assert answer.json()["id"] in {"a", "b", "mr"} - set(removed)


def test_who_watches_the_folder_goes_on_after_a_fault(
    clinic: MSHubApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = clinic.datastore()
    store._ignore_event_count = 0
    monkeypatch.setattr(store, "_reconcile_datastore", changed_meanwhile)
    store._on_any_event(None)
    assert "not looked at again" in caplog.text


def changed_meanwhile() -> None:
    raise RuntimeError("dictionary changed size during iteration")


def test_a_machine_without_nvidia_smi_says_so(
    server: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no nvidia-smi" in refused(server.get("/logs/gpu"), 404, "not-found")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU 0\n")
    tool.chmod(0o755)
    assert server.get("/logs/gpu").text == "GPU 0\n"


@pytest.mark.parametrize("path", ["", "%00", "nothing", "a/../..", "x" * 3000])
def test_the_stock_viewer_has_its_page_for_what_is_no_file(server: TestClient, path: str) -> None:
    answer = server.get(f"/ohif/{path}")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("path", ["%2e", "%2e%2e", "assets"])
def test_a_folder_is_no_file_of_the_stock_viewer(server: TestClient, path: str) -> None:
    assert "a folder of the viewer" in refused(server.get(f"/ohif/{path}"), 404, "not-found")


def test_the_description_is_of_our_own_handlers() -> None:
    paths = asgi.app.openapi()["paths"]
    described = {(method.upper(), path) for path, found in paths.items() for method in found}
    assert {(method, path.replace(":path", "")) for method, path, *_ in asgi.ROUTES} <= described
    assert paths["/infer/{model}"]["post"]["operationId"].startswith("infer_infer")
    assert paths["/datastore/label"]["put"]["operationId"].startswith("save_label_")


def answering(method: str, path: str) -> Any:
    """Return the route of the server that answers."""
    scope = {"type": "http", "method": method, "path": path.replace("{", "").replace("}", ""), "headers": []}
    return next(route for route in asgi.app.router.routes if route.matches(scope)[0] is Match.FULL)


WITHOUT_UPLOADS = [
    (one.method, one.path)
    for one in PERMITTED
    if (field := getattr(answering(one.method, one.path), "body_field", None))
    and not isinstance(field.field_info, params.File)
    and not one.path.startswith(("/login", "/auth"))
]


def test_many_routes_take_a_body_and_no_upload() -> None:
    assert {("POST", "/train/"), ("PUT", "/datastore/label/info"), ("POST", "/scoring/{method}")} <= set(
        WITHOUT_UPLOADS
    )
    assert ("POST", "/infer/{model}") not in WITHOUT_UPLOADS


@pytest.mark.parametrize(("method", "path"), WITHOUT_UPLOADS)
def test_a_body_without_an_upload_is_a_megabyte_at_most(server: TestClient, method: str, path: str) -> None:
    ask, address = partial(server.request, method), f"{path}?image=a&label=a&tag=final"
    # A form's single field is refused earlier, with 400, where its length is not announced: its files are what counts.
    form = {"files": {"info": ("a.bin", bytes(IN_MEMORY_BYTES))}}
    unannounced = {"content": iter([bytes(IN_MEMORY_BYTES), b" "]), "headers": JSON}
    for sent in [form] if method == "PUT" else [{"content": bytes(IN_MEMORY_BYTES + 1), "headers": JSON}, unannounced]:
        assert "expected 1 MiB at most" in refused(ask(address, **sent), 413, "request-entity-too-large")


def test_a_body_of_a_megabyte_is_read_and_the_server_goes_on_meanwhile(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []

    def read(text: bytes, what: str) -> Any:
        readers.append(threading.current_thread().name)
        return read_json(text, what)

    monkeypatch.setattr("lib.server.json_input.read_json", read)
    images = json.dumps({"images": ["x"] * 170_000})
    assert IN_MEMORY_BYTES * 0.8 < len(images) < IN_MEMORY_BYTES
    assert "no image" in refused(server.post("/mshub/prelabels/tiny", content=images, headers=JSON), 404, "not-found")
    assert [name.startswith("AnyIO worker") for name in readers] == [True]
