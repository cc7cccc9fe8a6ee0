"""Downloads against a real server on this machine: whole, resumed byte for byte, or refused with what to do."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import gdown
import httpx
import pytest
import requests
from requests.adapters import HTTPAdapter

from mshub import drive as drive_module
from mshub import http_file
from mshub.errors import ChecksumMismatch, DownloadError, StoreError
from mshub.fetch import fetch_drive_file, fetch_drive_folder, fetch_file, fetch_weights

WEIGHTS = hashlib.shake_256(b"weights").digest(300_007)
OTHER = hashlib.shake_256(b"other weights").digest(300_007)
LARGE = hashlib.shake_256(b"large weights").digest(1_300_021)  # gdown keeps what it got in chunks of 512 KiB
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILE_ID = "1file_" + "a" * 27
FOLDER_ID = "1folder_" + "b" * 25


@dataclass
class Page:
    """What the server answers under one path: `faults` first, one per request, then the body."""

    body: bytes = WEIGHTS
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"v1"'})
    ranges: bool = True
    honours_if_range: bool = True
    length: bool = True
    faults: list[int | tuple[str, int]] = field(default_factory=list)
    """An int answers with that status, ("cut", k) closes the connection after k bytes of the body."""


@dataclass
class Site:
    base: str = ""
    pages: dict[str, Page] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def url(self, path: str = "/weights.zip") -> str:
        return self.base + path

    def ranges(self) -> list[str | None]:
        return [headers.get("range") for _, headers in self.seen]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.site.seen.append((self.path, headers))
        page = self.site.pages.get(self.path)
        if page is None:
            return self._send(404, b"no such page", {})
        fault = page.faults.pop(0) if page.faults else ("cut", sys.maxsize)
        if isinstance(fault, int):
            return self._send(fault, b"a fault", {})
        offset = self._offset(page, headers)
        if offset is None:
            return self._send(page.status, page.body, page.headers, fault[1], length=page.length)
        if offset >= len(page.body):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(page.body)}"})
        span = {"Content-Range": f"bytes {offset}-{len(page.body) - 1}/{len(page.body)}"}
        return self._send(206, page.body[offset:], page.headers | span, fault[1])

    def _offset(self, page: Page, headers: dict[str, str]) -> int | None:
        match = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
        current = (page.headers.get("ETag"), page.headers.get("Last-Modified"))
        same = "if-range" not in headers or headers["if-range"] in current or not page.honours_if_range
        return int(match[1]) if match and page.ranges and same else None

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int = sys.maxsize, length=True) -> None:
        self.send_response(status)
        length_header = {"Content-Length": str(len(body))} if length else {"Connection": "close"}
        for name, value in ({"Content-Type": "application/octet-stream"} | length_header | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = cut < len(body) or not length

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


@pytest.fixture
def site() -> Iterator[Site]:
    state = Site()
    server = Server(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": state}))
    state.base = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def page(site: Site) -> Page:
    site.pages["/weights.zip"] = Page()
    return site.pages["/weights.zip"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "downloads" / "weights.zip"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def get(site: Site, target: Path, **options) -> Path:
    return fetch_file(site.url(), target, **({"wait_s": 0.0} | options))


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class TestWholeFile:
    def test_the_bytes_arrive_and_nothing_else_stays(self, site, page, target):
        assert get(site, target, sha256=SHA256.upper()) == target
        assert target.read_bytes() == WEIGHTS
        assert names(target.parent) == ["weights.zip"]

    def test_a_body_without_length_arrives(self, site, page, target):
        page.length = False
        seen = []
        get(site, target, progress=lambda done, total: seen.append((done, total)))
        assert target.read_bytes() == WEIGHTS
        assert seen[-1] == (len(WEIGHTS), None)

    def test_progress_grows_to_the_total(self, site, page, target):
        seen = []
        get(site, target, progress=lambda done, total: seen.append((done, total)))
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
        assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))
        assert {total for _, total in seen} == {len(WEIGHTS)}

    def test_a_redirect_is_followed(self, site, page, target):
        site.pages["/latest"] = Page(b"", 302, {"Location": "/weights.zip"})
        fetch_file(site.url("/latest"), target)
        assert target.read_bytes() == WEIGHTS

    def test_a_file_that_is_there_already_is_not_downloaded_again(self, site, page, target):
        get(site, target, sha256=SHA256)
        get(site, target, sha256=SHA256)
        assert len(site.seen) == 1

    def test_a_file_that_is_there_but_wrong_is_replaced(self, site, page, target):
        target.parent.mkdir()
        target.write_bytes(OTHER)
        get(site, target, sha256=SHA256)
        assert target.read_bytes() == WEIGHTS

    def test_an_own_client_is_used_and_left_open(self, site, page, target):
        with httpx.Client(headers={"Authorization": "Bearer token"}) as client:
            get(site, target, client=client)
            assert not client.is_closed
        assert site.seen[0][1]["authorization"] == "Bearer token"


class TestResume:
    def test_a_cut_connection_is_continued_where_it_broke(self, site, page, target):
        page.faults = [("cut", 70_001), ("cut", 90_002)]
        get(site, target, sha256=SHA256)
        assert target.read_bytes() == WEIGHTS
        assert site.ranges() == [None, "bytes=70001-", "bytes=160003-"]
        assert site.seen[1][1]["if-range"] == '"v1"'

    def test_a_later_call_goes_on_from_the_part_of_an_earlier_one(self, site, page, target):
        page.faults = [("cut", 123_457)]
        with pytest.raises(DownloadError, match="123,457 bytes are kept: run the command again"):
            get(site, target, attempts=1)
        assert names(target.parent) == ["weights.zip.part", "weights.zip.part.json"]
        seen = []
        get(site, target, sha256=SHA256, progress=lambda done, total: seen.append((done, total)))
        assert target.read_bytes() == WEIGHTS
        assert site.ranges()[-1] == "bytes=123457-"
        assert seen[0][0] > 123_457
        assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))
        assert names(target.parent) == ["weights.zip"]

    def test_a_date_proves_sameness_where_there_is_no_etag(self, site, page, target):
        page.headers = {"Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
        page.faults = [("cut", 1_000)]
        get(site, target, sha256=SHA256)
        assert site.ranges() == [None, "bytes=1000-"]

    @pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
    def test_without_proof_of_sameness_the_download_starts_again(self, site, page, target, headers):
        page.headers = headers
        page.faults = [("cut", 1_000)]
        get(site, target, sha256=SHA256)
        assert site.ranges() == [None, None]

    @pytest.mark.parametrize("honours_if_range", [True, False])
    def test_a_file_that_changed_in_between_is_downloaded_whole(self, site, page, target, honours_if_range):
        page.faults = [("cut", 100_000)]
        with pytest.raises(DownloadError):
            get(site, target, attempts=1)
        page.body, page.headers, page.honours_if_range = OTHER, {"ETag": '"v2"'}, honours_if_range
        get(site, target)
        assert target.read_bytes() == OTHER

    def test_a_server_that_cannot_resume_sends_it_whole(self, site, page, target):
        page.ranges = False
        page.faults = [("cut", 100_000)]
        get(site, target, sha256=SHA256)
        assert target.read_bytes() == WEIGHTS

    def test_a_part_of_another_address_is_not_continued(self, site, page, target):
        site.pages["/v2/weights.zip"] = Page(OTHER)
        page.faults = [("cut", 100_000)]
        with pytest.raises(DownloadError):
            get(site, target, attempts=1)
        fetch_file(site.url("/v2/weights.zip"), target)
        assert target.read_bytes() == OTHER
        assert site.ranges()[-1] is None

    @pytest.mark.parametrize("state", ["", "[]", "{}", '{"validator": 1}', "nonsense"])
    def test_a_damaged_note_beside_the_part_means_start_again(self, site, page, target, state):
        target.parent.mkdir()
        Path(f"{target}.part").write_bytes(b"garbage")
        Path(f"{target}.part.json").write_text(state)
        get(site, target, sha256=SHA256)
        assert target.read_bytes() == WEIGHTS

    def test_a_part_longer_than_the_file_means_start_again(self, site, page, target):
        page.faults = [("cut", 100_000)]
        with pytest.raises(DownloadError):
            get(site, target, attempts=1)
        with Path(f"{target}.part").open("ab") as part:
            part.write(bytes(300_000))
        get(site, target, sha256=SHA256)
        assert site.ranges() == [None, "bytes=400000-", None]
        assert target.read_bytes() == WEIGHTS

    def test_a_server_that_resumes_elsewhere_is_asked_for_the_whole(self, target):
        target.parent.mkdir()
        sent = [
            (200, {"ETag": '"v1"', "Content-Length": "300007"}, WEIGHTS[:9]),
            (206, {"ETag": '"v1"', "Content-Range": "bytes 5-300006/300007"}, WEIGHTS[5:]),
            (206, {"ETag": '"v1"'}, WEIGHTS[9:]),
            (200, {}, WEIGHTS),
        ]
        answers = [httpx.Response(code, headers=headers, stream=httpx.ByteStream(body)) for code, headers, body in sent]
        with httpx.Client(transport=httpx.MockTransport(lambda request: answers.pop(0))) as client:
            fetch_file("https://host/weights.zip", target, client=client, wait_s=0.0)
        assert target.read_bytes() == WEIGHTS

    def test_a_body_shorter_than_announced_is_no_file_even_if_the_connection_ends_well(self, target):
        def answer(request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, headers={"Content-Length": "300007"}, stream=httpx.ByteStream(WEIGHTS[:9]))

        with (
            httpx.Client(transport=httpx.MockTransport(answer)) as client,
            pytest.raises(DownloadError, match="9 of 300,007 bytes arrived"),
        ):
            fetch_file("https://host/weights.zip", target, client=client, wait_s=0.0)
        assert not target.exists()

    def test_a_damaged_part_is_caught_by_the_checksum_and_removed(self, site, page, target):
        page.faults = [("cut", 100_000)]
        with pytest.raises(DownloadError):
            get(site, target, attempts=1)
        part = Path(f"{target}.part")
        part.write_bytes(bytes(100) + part.read_bytes()[100:])
        with pytest.raises(ChecksumMismatch):
            get(site, target, sha256=SHA256)
        assert names(target.parent) == []
        get(site, target, sha256=SHA256)

    def test_the_note_holds_no_secret_of_the_address(self, site, target):
        site.pages["/weights.zip?token=SECRET"] = Page(faults=[("cut", 5)])
        with pytest.raises(DownloadError) as caught:
            fetch_file(site.url("/weights.zip?token=SECRET"), target, attempts=1)
        note = Path(f"{target}.part.json").read_text()
        assert json.loads(note)["validator"] == '"v1"'
        assert "SECRET" not in note + str(caught.value)


class TestChecksum:
    def test_other_bytes_are_removed_and_both_digests_named(self, site, page, target):
        page.body = OTHER
        with pytest.raises(ChecksumMismatch) as caught:
            get(site, target, sha256=SHA256)
        assert SHA256 in str(caught.value)
        assert hashlib.sha256(OTHER).hexdigest() in str(caught.value)
        assert names(target.parent) == []

    def test_a_good_file_that_was_there_survives_a_bad_download(self, site, page, target):
        target.parent.mkdir()
        target.write_bytes(b"an older release")
        page.body = OTHER
        with pytest.raises(ChecksumMismatch):
            get(site, target, sha256=SHA256)
        assert target.read_bytes() == b"an older release"


class TestRefusals:
    @pytest.mark.parametrize("status", [401, 403])
    def test_restricted_access_is_answered_with_what_to_do(self, site, page, target, status):
        page.status = status
        with pytest.raises(DownloadError, match=f"answered {status} .*ask for access.*`mshub add MODEL_ID PATH`"):
            get(site, target)
        assert len(site.seen) == 1
        assert not target.exists()

    def test_a_missing_file_is_answered_with_check_the_card(self, site, target):
        with pytest.raises(DownloadError, match=r"404 Not Found.*check the url in the model's card"):
            get(site, target)

    @pytest.mark.parametrize("status", [204, 400, 418])
    def test_any_other_answer_is_named(self, site, page, target, status):
        page.status, page.body = status, b""
        with pytest.raises(DownloadError, match=f"answered {status}.*Expected 200 OK"):
            get(site, target)

    @pytest.mark.parametrize(
        ("body", "kind"),
        [
            (WEIGHTS, "text/html; charset=utf-8"),
            (b"<!DOCTYPE html><title>Sign in</title>", "application/octet-stream"),
            (b"\n <HTML><body>quota", ""),
        ],
    )
    def test_a_web_page_is_not_taken_for_a_file(self, site, page, target, body, kind):
        page.body, page.headers = body, {"Content-Type": kind}
        with pytest.raises(DownloadError, match=r"is a web page \(HTML\), not a file"):
            get(site, target)
        assert not target.exists()

    def test_a_server_that_recovers_is_asked_again(self, site, page, target):
        page.faults = [500, 503, 429]
        get(site, target, sha256=SHA256)
        assert len(site.seen) == 4

    def test_a_server_that_does_not_recover_is_given_up(self, site, page, target):
        page.faults = [500] * 9
        with pytest.raises(DownloadError, match="in 3 attempts: the server answered 500"):
            get(site, target, attempts=3)
        assert len(site.seen) == 3

    def test_the_pauses_between_attempts_double(self, site, page, target, monkeypatch):
        pauses = []
        monkeypatch.setattr(http_file.time, "sleep", pauses.append)
        page.faults = [500] * 9
        with pytest.raises(DownloadError):
            get(site, target, attempts=4, wait_s=0.5)
        assert pauses == [0.5, 1.0, 2.0]

    def test_nobody_listening_is_named(self, target):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{free.getsockname()[1]}/weights.zip"
        with pytest.raises(DownloadError, match=rf"{address} could not be downloaded in 2 attempts.*Try again later"):
            fetch_file(address, target, attempts=2, wait_s=0.0)

    @pytest.mark.parametrize(
        "url",
        ["file:///etc/passwd", "ftp://host/weights.zip", "weights.zip", "https://", "http://[broken", "http://h:x/"],
    )
    def test_only_http_and_https_are_addresses(self, target, url):
        with pytest.raises(DownloadError, match="Expected an address that starts with https://"):
            fetch_file(url, target)

    def test_a_redirect_to_another_protocol_is_not_followed(self, site, target):
        site.pages["/weights.zip"] = Page(b"", 302, {"Location": "ftp://127.0.0.1/weights.zip"})
        with pytest.raises(DownloadError, match="redirects to something else than http"):
            get(site, target)

    def test_endless_redirects_end(self, site, target):
        site.pages["/weights.zip"] = Page(b"", 302, {"Location": "/weights.zip"})
        with pytest.raises(DownloadError, match="redirects"):
            get(site, target)

    def test_https_is_not_given_up_by_a_redirect(self, target):
        def answer(request: httpx.Request) -> httpx.Response:
            if request.url.scheme == "https":
                return httpx.Response(302, headers={"Location": "http://host/weights.zip"})
            return httpx.Response(200, content=WEIGHTS)

        with (
            httpx.Client(transport=httpx.MockTransport(answer)) as client,
            pytest.raises(DownloadError, match="from https to http"),
        ):
            fetch_file("https://host/weights.zip", target, client=client)

    def test_a_compressed_transfer_is_refused(self, site, page, target):
        page.headers = {"Content-Encoding": "gzip"}
        with pytest.raises(DownloadError, match="gzip-compressed"):
            get(site, target)
        assert site.seen[0][1]["accept-encoding"] == "identity"

    @pytest.mark.parametrize("length", [True, False])
    def test_a_file_over_the_limit_is_refused_and_not_kept(self, site, page, target, length):
        page.length = length
        with pytest.raises(DownloadError, match="at most 100,000 are accepted"):
            get(site, target, max_bytes=100_000)
        assert names(target.parent) == []

    def test_a_full_disk_is_reported_with_both_numbers(self, site, page, target, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 8_766, 1_234))
        with pytest.raises(DownloadError, match=r"needs 300,007 more bytes; .* has 1,234 free"):
            get(site, target)

    def test_a_folder_that_cannot_be_made_is_named(self, site, page, tmp_path):
        (tmp_path / "taken").write_text("a file")
        with pytest.raises(DownloadError, match=r"cannot be written to .*taken"):
            get(site, tmp_path / "taken" / "weights.zip")


class ToSite(HTTPAdapter):
    """Carries what is meant for Google to the site of the test, as a transport adapter of requests."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base = base

    def send(self, request, *args, **kwargs):
        request.url = request.url.replace("https://drive.google.com", self.base)
        return super().send(request, *args, **kwargs)


@pytest.fixture
def drive(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Site:
    """Google Drive as gdown sees it, on this machine: gdown itself runs unchanged."""

    def session() -> requests.Session:
        made = requests.Session()
        made.trust_env = False
        made.mount("https://", ToSite(site.base))
        return made

    monkeypatch.setattr(requests, "session", session)
    monkeypatch.setattr(sys.modules["gdown.download"], "DEFAULT_COOKIES_FILE", str(tmp_path / "home" / "cookies.txt"))
    return site


def drive_file(name: str = "weights.zip", body: bytes = WEIGHTS, **options) -> Page:
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT",
    }
    return Page(body, headers=headers, **options)


def html(text: str, status: int = 200, title: str = "Drive") -> Page:
    return Page(
        f"<html><head><title>{title}</title></head>{text}</html>".encode(), status, {"Content-Type": "text/html"}
    )


def share(
    site: Site, folder_id: str, files: dict[str, Page], folders: list[str] | None = None, title: str = "model"
) -> None:
    """Share files (name -> page) and folders (ids) under a folder id; gdown takes a folder's name from its title."""
    links = []
    for name, shared in files.items():
        file_id = hashlib.sha256(f"{folder_id}{name}".encode()).hexdigest()[:33]
        site.pages[f"/uc?id={file_id}"] = shared
        links.append(f'<a href="https://drive.google.com/file/d/{file_id}/view">{name}</a>')
    links += [f'<a href="https://drive.google.com/drive/folders/{inner}">a folder</a>' for inner in folders or []]
    site.pages[f"/embeddedfolderview?id={folder_id}"] = html("\n".join(links), title=title)


class TestDriveFile:
    def fetch(self, folder: Path, **options) -> Path:
        return fetch_drive_file(FILE_ID, folder, model_id="liver-lesion-ct", **({"retries": 0} | options))

    def test_the_file_arrives_under_its_own_name(self, drive, tmp_path):
        drive.pages[f"/uc?id={FILE_ID}"] = drive_file()
        seen = []
        path = self.fetch(tmp_path / "d", sha256=SHA256, progress=lambda done, total: seen.append((done, total)))
        assert path == tmp_path / "d" / FILE_ID / "weights.zip"
        assert path.read_bytes() == WEIGHTS
        assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))
        assert names(tmp_path) == [f"d/{FILE_ID}/weights.zip"]

    def test_nothing_is_written_in_the_home_and_nothing_printed(self, drive, tmp_path, capfd):
        drive.pages[f"/uc?id={FILE_ID}"] = drive_file()
        self.fetch(tmp_path / "d")
        assert not (tmp_path / "home").exists()
        assert capfd.readouterr() == ("", "")

    def test_a_cut_download_never_looks_complete_and_is_continued(self, drive, tmp_path):
        drive.pages[f"/uc?id={FILE_ID}"] = drive_file(body=LARGE, faults=[("cut", 700_003)])
        with pytest.raises(DownloadError, match=r"broke off.*run the command again") as caught:
            self.fetch(tmp_path / "d")
        assert f"file/d/{FILE_ID}" in str(caught.value)
        (left,) = names(tmp_path / "d")
        assert re.fullmatch(rf"{FILE_ID}\.partial/weights\.zip\w{{8}}\.part", left)
        kept = (tmp_path / "d" / left).stat().st_size
        assert kept > 500_000
        assert self.fetch(tmp_path / "d").read_bytes() == LARGE
        assert drive.ranges()[-1] == f"bytes={kept}-"
        assert names(tmp_path / "d") == [f"{FILE_ID}/weights.zip"]

    @pytest.mark.parametrize("size", [len(WEIGHTS), len(WEIGHTS) + 10])
    def test_a_part_that_cannot_be_continued_means_start_again(self, drive, tmp_path, size):
        drive.pages[f"/uc?id={FILE_ID}"] = drive_file()
        staging = tmp_path / "d" / f"{FILE_ID}.partial"
        staging.mkdir(parents=True)
        (staging / "weights.zipabcdefgh.part").write_bytes(bytes(size))
        assert self.fetch(tmp_path / "d", sha256=SHA256).read_bytes() == WEIGHTS

    def test_two_parts_of_one_file_mean_start_again(self, drive, tmp_path):
        drive.pages[f"/uc?id={FILE_ID}"] = drive_file()
        staging = tmp_path / "d" / f"{FILE_ID}.partial"
        staging.mkdir(parents=True)
        for part in ("weights.zipabcdefgh.part", "weights.zipijklmnop.part"):
            (staging / part).write_bytes(b"half")
        assert self.fetch(tmp_path / "d", sha256=SHA256).read_bytes() == WEIGHTS
        assert names(tmp_path / "d") == [f"{FILE_ID}/weights.zip"]

    def test_a_complete_download_is_used_again(self, drive, tmp_path):
        drive.pages[f"/uc?id={FILE_ID}"] = drive_file()
        first = self.fetch(tmp_path / "d")
        assert self.fetch(tmp_path / "d", sha256=SHA256) == first
        assert len(drive.seen) == 1

    def test_another_sha256_removes_the_file(self, drive, tmp_path):
        drive.pages[f"/uc?id={FILE_ID}"] = drive_file(body=OTHER)
        with pytest.raises(ChecksumMismatch, match=SHA256):
            self.fetch(tmp_path / "d", sha256=SHA256)
        assert names(tmp_path) == []

    def test_a_file_over_the_limit_is_refused(self, drive, tmp_path):
        drive.pages[f"/uc?id={FILE_ID}"] = drive_file()
        with pytest.raises(DownloadError, match="more than the 1,000 bytes"):
            self.fetch(tmp_path / "d", max_bytes=1_000)

    def test_the_page_that_asks_to_confirm_a_large_file_is_answered(self, drive, tmp_path):
        hidden = f'<input type="hidden" name="id" value="{FILE_ID}"><input type="hidden" name="confirm" value="t">'
        form = f'<form id="download-form" action="https://drive.google.com/download">{hidden}</form>'
        drive.pages[f"/uc?id={FILE_ID}"] = html(form)
        drive.pages[f"/download?id={FILE_ID}&confirm=t"] = drive_file()
        assert self.fetch(tmp_path / "d", sha256=SHA256).read_bytes() == WEIGHTS

    @pytest.mark.parametrize(
        ("page", "reason"),
        [
            (
                html('<p class="uc-error-subcaption">Too many users have viewed this file</p>'),
                "Too many users have viewed",
            ),
            (html("<form>Sign in</form>"), "Cannot retrieve the public link"),
            (html("Not found", 404), "Cannot retrieve the public link"),
            (Page(b"denied", 403, {"Content-Disposition": 'attachment; filename="x"'}), "403"),
        ],
    )
    def test_every_refusal_of_drive_says_where_to_go_and_what_to_do(self, drive, tmp_path, page, reason):
        drive.pages[f"/uc?id={FILE_ID}"] = page
        with pytest.raises(DownloadError) as caught:
            self.fetch(tmp_path / "d")
        message = str(caught.value)
        assert message.startswith(f"Google Drive refused the download of liver-lesion-ct: {reason}")
        assert f"Open https://drive.google.com/file/d/{FILE_ID}/view in a browser, ask for access" in message
        assert message.endswith("download by hand and run `mshub add liver-lesion-ct PATH`.")
        assert "gdown" not in message.lower()
        assert names(tmp_path) == []

    def test_an_id_that_is_a_link_is_refused(self, tmp_path):
        with pytest.raises(DownloadError, match="is no Google Drive id"):
            fetch_drive_file(f"https://drive.google.com/file/d/{FILE_ID}", tmp_path, model_id="m")


class TestDriveFolder:
    FILES: ClassVar = {
        "dataset.json": b"{}",
        "fold_0/checkpoint_final.pth": WEIGHTS,
        "fold_1/checkpoint_final.pth": OTHER,
    }

    def fetch(self, folder: Path, **options) -> Path:
        return fetch_drive_folder(FOLDER_ID, folder, model_id="liver-lesion-ct", **({"retries": 0} | options))

    def share_model(self, site: Site, **pages: Page) -> None:
        for number, body in enumerate((WEIGHTS, OTHER)):
            page = pages.get(f"fold_{number}") or drive_file("checkpoint_final.pth", body)
            share(site, f"{FOLDER_ID}{number}", {"checkpoint_final.pth": page}, title=f"fold_{number}")
        folds = [f"{FOLDER_ID}{number}" for number in range(2)]
        share(site, FOLDER_ID, {"dataset.json": drive_file("dataset.json", b"{}")}, folds)

    def contents(self, folder: Path) -> dict[str, bytes]:
        return {name: (folder / name).read_bytes() for name in names(folder)}

    def test_the_folder_arrives_with_its_subfolders(self, drive, tmp_path):
        self.share_model(drive)
        seen = []
        path = self.fetch(tmp_path / "d", progress=lambda done, total: seen.append((done, total)))
        assert path == tmp_path / "d" / FOLDER_ID
        assert self.contents(path) == self.FILES
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1] == (2 * len(WEIGHTS) + 2, None)
        assert [entry.name for entry in (tmp_path / "d").iterdir()] == [FOLDER_ID]

    def test_a_download_that_breaks_off_in_the_last_file_goes_on_there(self, drive, tmp_path):
        self.share_model(drive, fold_1=drive_file("checkpoint_final.pth", LARGE, faults=[("cut", 700_003)]))
        with pytest.raises(DownloadError, match="broke off"):
            self.fetch(tmp_path / "d")
        assert [entry.name for entry in (tmp_path / "d").iterdir()] == [f"{FOLDER_ID}.partial"]
        before = len(drive.seen)
        assert self.contents(self.fetch(tmp_path / "d")) == self.FILES | {"fold_1/checkpoint_final.pth": LARGE}
        assert [sent for sent in drive.ranges()[before:] if sent] == ["bytes=524288-"]

    def test_a_file_that_was_removed_between_two_tries_is_not_kept(self, drive, tmp_path):
        self.share_model(drive, fold_1=drive_file("checkpoint_final.pth", OTHER, faults=[("cut", 50_000)]))
        with pytest.raises(DownloadError):
            self.fetch(tmp_path / "d")
        share(drive, FOLDER_ID, {"dataset.json": drive_file("dataset.json", b"{}")})
        assert names(self.fetch(tmp_path / "d")) == ["dataset.json"]

    def test_what_nobody_predicts_with_is_left_on_the_drive(self, drive, tmp_path):
        kept = {"checkpoint_final.pth": drive_file("checkpoint_final.pth"), "LICENSE": drive_file("LICENSE", b"l")}
        left = {name: drive_file(name) for name in ("checkpoint_latest.pth", "progress.png", "a.nii.gz", ".DS_Store")}
        share(drive, f"{FOLDER_ID}v", {"summary.json": drive_file("summary.json")}, title="validation")
        share(drive, FOLDER_ID, kept | left, [f"{FOLDER_ID}v"])
        assert names(self.fetch(tmp_path / "d")) == ["LICENSE", "checkpoint_final.pth"]

    def test_a_complete_download_is_used_again(self, drive, tmp_path):
        self.share_model(drive)
        first = self.fetch(tmp_path / "d")
        before = len(drive.seen)
        assert self.fetch(tmp_path / "d") == first
        assert len(drive.seen) == before

    def test_a_sha256_is_checked_where_the_folder_holds_one_file(self, drive, tmp_path):
        share(drive, FOLDER_ID, {"model.zip": drive_file("model.zip")})
        assert names(self.fetch(tmp_path / "good", sha256=SHA256)) == ["model.zip"]
        with pytest.raises(ChecksumMismatch):
            self.fetch(tmp_path / "bad", sha256="0" * 64)
        assert names(tmp_path / "bad") == []

    def test_a_sha256_for_several_files_is_refused_before_the_download(self, drive, tmp_path):
        self.share_model(drive)
        with pytest.raises(DownloadError, match="holds 3 files and the card has one sha256"):
            self.fetch(tmp_path / "d", sha256=SHA256)
        assert names(tmp_path) == []

    def test_the_limit_counts_all_files(self, drive, tmp_path):
        self.share_model(drive)
        with pytest.raises(DownloadError, match="more than the 400,000 bytes"):
            self.fetch(tmp_path / "d", max_bytes=400_000)

    @pytest.mark.parametrize(
        ("page", "reason"),
        [
            (html("Sign in to continue"), "lists no model files, which is also what it answers for a private folder"),
            (html("", 401), "Failed to retrieve folder contents .*status code 401"),
            (html("", 404), "Failed to retrieve folder contents .*status code 404"),
            (html("", 429), "Failed to retrieve folder contents .*status code 429"),
            (Page(b"<html>no title</html>"), "Failed to parse folder contents"),
        ],
    )
    def test_every_refusal_of_drive_says_where_to_go_and_what_to_do(self, drive, tmp_path, page, reason):
        drive.pages[f"/embeddedfolderview?id={FOLDER_ID}"] = page
        with pytest.raises(
            DownloadError, match=rf"Google Drive refused the download of liver-lesion-ct: .*{reason}"
        ) as error:
            self.fetch(tmp_path / "d")
        assert f"Open https://drive.google.com/drive/folders/{FOLDER_ID} in a browser, ask for" in str(error.value)
        assert str(error.value).endswith("download by hand and run `mshub add liver-lesion-ct PATH`.")
        assert names(tmp_path) == []

    def test_a_quota_on_one_file_refuses_the_folder_and_keeps_the_rest_for_later(self, drive, tmp_path):
        quota = html('<p class="uc-error-subcaption">Too many users have viewed this file recently.</p>')
        self.share_model(drive, fold_1=quota)
        with pytest.raises(DownloadError, match=r"refused .*Too many users"):
            self.fetch(tmp_path / "d")
        assert names(tmp_path / "d") == [f"{FOLDER_ID}.partial/{name}" for name in list(self.FILES)[:2]]

    def test_too_many_files_are_refused(self, drive, tmp_path, monkeypatch):
        monkeypatch.setattr(drive_module, "MAX_DRIVE_FILES", 2)
        self.share_model(drive)
        with pytest.raises(DownloadError, match="too many files, 3; a model has at most 2"):
            self.fetch(tmp_path / "d")

    def test_two_files_of_one_name_are_refused_by_name(self, drive, tmp_path):
        links = [f'<a href="https://drive.google.com/file/d/{mark * 30}/view">plans.json</a>' for mark in "ab"]
        drive.pages[f"/embeddedfolderview?id={FOLDER_ID}"] = html("".join(links))
        with pytest.raises(DownloadError, match=r"several files of one name: plans\.json"):
            self.fetch(tmp_path / "d")

    def test_names_that_would_leave_the_folder_stay_in_it(self, drive, tmp_path):
        share(drive, FOLDER_ID, {"a/../../escaped.json": drive_file("x", b"{}")})
        assert names(self.fetch(tmp_path / "d")) == ["a_.._.._escaped.json"]
        assert names(tmp_path) == [f"d/{FOLDER_ID}/a_.._.._escaped.json"]


class TestDriveErrors:
    """Every exception of gdown, and of the libraries it lets through, becomes one of ours."""

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (gdown.DownloadError("multiple temporary files"), "refused .*: multiple temporary files"),
            (gdown.DownloadError("Download is incomplete: received 5 bytes"), "broke off"),
            (gdown.FileURLRetrievalError("quota"), "refused .*: quota"),
            (gdown.DownloadCancelled("Download cancelled"), "broke off .*: Download cancelled"),
            (requests.HTTPError("500 Server Error"), "refused .*: 500 Server Error"),
            (requests.ConnectionError("no route to host"), "broke off or could not begin: no route to host"),
            (requests.exceptions.SSLError("bad certificate"), "could not begin: bad certificate"),
            (requests.exceptions.ProxyError("proxy"), "could not begin: proxy"),
            (requests.Timeout(), "could not begin: Timeout"),
            (KeyError("Content-Type"), "refused .*a page that gdown does not understand"),
            (AssertionError(), "refused .*a page that gdown does not understand"),
            (AttributeError("'NoneType'"), "refused .*a page that gdown does not understand"),
            (ValueError("no JSON"), "refused .*a page that gdown does not understand"),
            (OSError(28, "No space left on device"), "cannot be written to .*No space left"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
    )
    def test_each_is_a_download_error_with_its_cause(self, tmp_path, monkeypatch, error, expected):
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(gdown, "download", fail)
        with pytest.raises(DownloadError, match=expected) as caught:
            fetch_drive_file(FILE_ID, tmp_path, model_id="m")
        assert isinstance(caught.value.__cause__, type(error))
        if type(error) is not OSError:
            assert f"Open https://drive.google.com/file/d/{FILE_ID}/view in a browser" in str(caught.value)
            assert "`mshub add m PATH`" in str(caught.value)

    def test_every_exception_gdown_has_is_in_the_table_above(self):
        exceptions = {name for name, value in vars(gdown.exceptions).items() if isinstance(value, type)}
        assert exceptions == {"DownloadCancelled", "DownloadError", "FileURLRetrievalError"}

    @pytest.mark.parametrize("retries", [0, 2])
    def test_a_connection_that_keeps_failing_is_no_refusal_and_keeps_the_part(
        self, drive, tmp_path, monkeypatch, retries
    ):
        monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
        drive.base = "http://127.0.0.1:9"
        staging = tmp_path / f"{FILE_ID}.partial"
        staging.mkdir()
        (staging / "weights.zipabcdefgh.part").write_bytes(b"half")
        with pytest.raises(DownloadError, match="could not begin"):
            fetch_drive_file(FILE_ID, tmp_path, model_id="m", retries=retries)
        assert names(staging) == ["weights.zipabcdefgh.part"]


class TestDispatch:
    def weights(self, kind: str, locator: str, folder: Path, sha256: str | None = None) -> Path:
        return fetch_weights(model_id="lung", kind=kind, locator=locator, sha256=sha256, folder=folder)

    def test_https_takes_the_name_from_the_address(self, site, tmp_path):
        site.pages["/a%20b/model%20v1.zip?download=1"] = Page()
        path = self.weights("https", site.url("/a%20b/model%20v1.zip?download=1"), tmp_path, SHA256)
        assert path == tmp_path / "model_v1.zip"
        assert path.read_bytes() == WEIGHTS

    def test_a_refusal_of_an_https_server_names_the_model_to_add_by_hand(self, site, tmp_path):
        with pytest.raises(DownloadError, match="run `mshub add lung PATH`"):
            self.weights("https", site.url("/gone.zip"), tmp_path)

    @pytest.mark.parametrize("path", ["/", "/files/", "/..%2F..%2F", "/%2e%2e"])
    def test_an_address_without_a_name_gives_the_name_of_the_model(self, site, tmp_path, path):
        site.pages[path] = Page()
        assert self.weights("https", site.url(path), tmp_path / "d") == tmp_path / "d" / "lung.zip"

    def test_drive_kinds_go_to_drive(self, drive, tmp_path):
        drive.pages[f"/uc?id={FILE_ID}"] = drive_file()
        share(drive, FOLDER_ID, {"model.zip": drive_file("model.zip")})
        assert self.weights("gdrive-file", FILE_ID, tmp_path, SHA256).name == "weights.zip"
        assert names(self.weights("gdrive-folder", FOLDER_ID, tmp_path, SHA256)) == ["model.zip"]

    def test_bundled_weights_need_no_download(self, tmp_path):
        with pytest.raises(DownloadError, match="come with MSHub"):
            self.weights("bundled", "", tmp_path)

    def test_an_unknown_kind_is_answered_with_the_known_ones(self, tmp_path):
        with pytest.raises(StoreError, match=r"kind 'torrent'\. Expected gdrive-folder, gdrive-file or https"):
            self.weights("torrent", "magnet:", tmp_path)

    def test_importing_does_not_load_gdown(self):
        import subprocess

        code = "import sys, mshub.fetch; sys.exit('gdown' in sys.modules or 'requests' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
