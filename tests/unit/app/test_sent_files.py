"""Temporary files that are answered: none is left, whatever a client asks of it and however the answer ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest
from fastapi.responses import FileResponse
from fastapi.testclient import TestClient
from monailabel.utils.others.generic import get_mime_type
from starlette.types import Message

from factories import make_image, odd_grids
from lib.app import MSHubApp
from lib.infers import results_folder
from lib.server import asgi
from lib.server.sent_files import SentOnce

RANGES = {"": 200, "bytes=2-5": 206, "bytes=2-3,5-6": 206, "bytes=999999999-": 416, "chars=1": 400, "bytes=x": 400}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(range(200)) * 1000)
    return path


@pytest.mark.parametrize(("wanted", "status"), RANGES.items())
def test_a_file_is_sent_once_whatever_range_is_asked_for(file: Path, wanted: str, status: int) -> None:
    content = file.read_bytes()
    answer = TestClient(SentOnce(file)).get("/", headers={"Range": wanted} if wanted else {})
    assert (answer.status_code, file.exists()) == (status, False)
    assert {200: content, 206: content[2:6]}.get(status, answer.content) == answer.content or "," in wanted


def test_a_file_goes_when_its_client_does(file: Path) -> None:
    sent: list[int] = []

    async def send(message: Message) -> None:
        sent.append(len(message.get("body", b"")))
        if len(sent) > 1:
            raise EOFError("gone")

    async def receive() -> Message:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "headers": [], "asgi": {"spec_version": "2.4"}}
    with pytest.raises(EOFError, match="gone"):
        asyncio.run(SentOnce(file)(scope, receive, send))
    assert (len(sent), file.exists()) == (2, False)


@pytest.fixture
def server(clinic: MSHubApp, serve: Callable[[object], TestClient], temporary: Path) -> TestClient:
    return serve(clinic)


def left(tmp_path: Path) -> list[Path]:
    folders = (tmp_path / "tmp", results_folder())
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("wanted", "status"), RANGES.items())
@pytest.mark.parametrize("path", ["/mshub/export/a", "/datastore/dataset", "/datastore/label?label=a&tag=final"])
def test_no_download_leaves_a_file(
    server: TestClient, review: Callable[..., None], tmp_path: Path, path: str, wanted: str, status: int
) -> None:
    review("a", "liver")
    before = left(tmp_path)
    answer = server.get(path, headers={"Range": wanted} if wanted else {})
    assert answer.status_code == status
    assert left(tmp_path) == before


def test_a_label_that_is_replaced_while_it_is_sent_arrives_whole(
    server: TestClient, clinic: MSHubApp, review: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    review("a", "liver")
    label = Path(clinic.datastore().get_label_uri("a", "final"))
    content, start = label.read_bytes(), FileResponse.set_stat_headers

    def replaced(answer: FileResponse, facts: os.stat_result) -> None:
        start(answer, facts)
        label.write_bytes(bytes(3))

    monkeypatch.setattr(FileResponse, "set_stat_headers", replaced)
    answer = server.get("/datastore/label?label=a&tag=final")
    assert label.read_bytes() == bytes(3)
    assert (answer.status_code, answer.content) == (200, content)
    assert answer.headers["content-disposition"] == 'attachment; filename="a.nii.gz"'
    assert answer.headers["content-type"] == get_mime_type(str(label))


def test_a_label_that_is_gone_is_a_404(
    server: TestClient,
    clinic: MSHubApp,
    review: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    review("a", "liver")
    before = left(tmp_path)
    for query in ("label=a&tag=other", "label=b&tag=final", "label=none&tag=final", "label=a&tag=../final"):
        answer = server.get(f"/datastore/label?{query}")
        assert (answer.status_code, "There is no label of" in answer.json()["detail"]) == (404, True)
    assert server.head("/datastore/label?image=a&tag=final").status_code == 200
    label = Path(clinic.datastore().get_label_uri("a", "final"))
    label.unlink()
    assert server.head("/datastore/label?image=a&tag=final").status_code == 404
    assert server.get("/datastore/label?label=a&tag=final").status_code == 404
    monkeypatch.setattr(clinic.datastore(), "_label_file", lambda *_: label)  # a share that does not know yet
    assert server.get("/datastore/label?label=a&tag=final").status_code == 404
    assert left(tmp_path) == before


def test_an_image_that_goes_before_it_is_sent_is_a_404(
    server: TestClient, clinic: MSHubApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Path(clinic.datastore().get_image_uri("a"))
    answer = server.get("/datastore/image?image=a")
    assert (answer.content, answer.headers["content-type"]) == (image.read_bytes(), get_mime_type(str(image)))
    assert answer.headers["content-disposition"] == 'attachment; filename="a.nii.gz"'

    def removed(path: str) -> str:
        Path(path).unlink()
        return "application/octet-stream"

    monkeypatch.setattr("monailabel.endpoints.datastore.get_mime_type", removed)
    answer = server.get("/datastore/image?image=a")
    assert (answer.status_code, answer.headers["X-MSHub-Error"]) == (404, "not-found")
    assert "'a.nii.gz' is not there any more" in answer.json()["detail"]


@pytest.fixture
def prediction(tmp_path: Path) -> httpx.Request:
    """A file and what is asked of it, as a client sends it."""
    scan = make_image(tmp_path / "scan.nii.gz", (29, 23, 14), odd_grids()["oblique-left-handed"]).read_bytes()
    sent = {"data": {"params": '{"device": "cpu"}'}, "files": {"file": ("scan.nii.gz", scan)}}
    return httpx.Request("POST", "http://127.0.0.1:8000/infer/tiny", **sent)


@pytest.mark.parametrize("output", ["image", "json", "all"])
@pytest.mark.parametrize("hangs_up", [False, True])
def test_no_prediction_leaves_a_file(
    server: TestClient, prediction: httpx.Request, tmp_path: Path, output: str, hangs_up: bool
) -> None:
    before, seen, bodies = left(tmp_path), [], [prediction.read()]
    scope = {
        **{"type": "http", "method": "POST", "path": "/infer/tiny", "query_string": f"output={output}".encode()},
        **{"headers": [(name.lower(), value) for name, value in prediction.headers.raw], "scheme": "http"},
        **{"server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 50000), "asgi": {"spec_version": "2.4"}},
    }

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop()}
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        seen.append(message)
        if hangs_up and message["type"] == "http.response.body":
            raise EOFError("gone")

    with pytest.raises(EOFError, match="gone") if hangs_up else nullcontext():
        asyncio.run(asgi.app(scope, receive, send))
    assert seen[0]["status"] == 200
    assert left(tmp_path) == before


def test_two_exports_are_made_at_a_time_and_those_who_wait_keep_no_thread(
    server: TestClient, clinic: MSHubApp, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    at_work, most, go_on = [0], [0], threading.Event()

    def export_of(*_: str) -> tuple[Path, dict[str, int]]:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        go_on.wait(20)
        at_work[0] -= 1
        return Path(shutil.copy(file, tempfile.mkstemp(suffix=".nrrd")[1])), {"liver": 1}

    monkeypatch.setattr(clinic, "export_of", export_of)

    async def ask_all() -> list[int]:
        transport = httpx.ASGITransport(asgi.app, client=("127.0.0.1", 50000))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as people:
            exports = [asyncio.create_task(people.get("/mshub/export/a")) for _ in range(60)]
            others = [(await people.get("/datastore/image/info?image=a")).status_code for _ in range(3)]
            go_on.set()
            return [*others, *(answer.status_code for answer in await asyncio.gather(*exports))]

    assert asyncio.run(ask_all()) == [200] * 63
    assert most == [2]
