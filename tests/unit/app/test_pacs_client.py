"""Questions to a PACS that is down, slow, wrong or strict: a sentence within seconds, and back without a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dicom_series_factory import SeriesMaker
from lib import pacs_client
from lib.pacs_client import PacsClient, PacsError, PacsUnreachable, download

pytestmark = pytest.mark.usefixtures("monailabel_here")
Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def pacs() -> Iterator[Callable[[Answer], PacsClient]]:
    """Return a function that starts a server which answers every GET as told."""
    servers: list[ThreadingHTTPServer] = []

    def started(answer: Answer) -> PacsClient:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return PacsClient(f"http://127.0.0.1:{servers[-1].server_port}/dicom-web")

    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


def sends(body: bytes, kind: str = "application/dicom+json", status: int = 200) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def test_nobody_there_is_a_sentence_at_once_and_the_next_question_is_not_even_asked() -> None:
    client = PacsClient("http://127.0.0.1:1/dicom-web")
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(PacsUnreachable, match=r"does not answer.*How to fix") as caught:
            client.series(Modality="CT")
    assert time.monotonic() - started < 2
    assert caught.value.http_status == 503
    assert "127.0.0.1:1" in client.problem


def test_a_pacs_that_says_nothing_is_given_up_and_left_alone_for_as_long_as_that_took(
    pacs: Callable[[Answer], PacsClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs_client, "ANSWER_S", 0.3)
    monkeypatch.setattr(pacs_client, "QUIET_S", 0.1)
    asked: list[float] = []

    def silent(handler: BaseHTTPRequestHandler) -> None:
        asked.append(time.monotonic())
        time.sleep(1.0)

    client = pacs(silent)
    for _ in range(3):
        with pytest.raises(PacsUnreachable, match="took too long"):
            client.series(Modality="CT")
    assert len(asked) == 1


def test_it_is_asked_again_once_it_is_back(
    pacs: Callable[[Answer], PacsClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs_client, "QUIET_S", 0.05)
    down = True

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if down:
            handler.close_connection = True
        else:
            sends(b"[]")(handler)

    client = pacs(answer)
    with pytest.raises(PacsUnreachable):
        client.series(Modality="CT")
    down = False
    time.sleep(0.3)
    assert client.series(Modality="CT") == []
    assert client.problem == ""


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (sends(b"no", "text/plain", 401), "credentials"),
        (sends(b"no", "text/plain", 403), "credentials"),
        (sends(b"oops", "text/plain", 500), "HTTP 500"),
        (sends(b"oops", "text/plain", 404), "HTTP 404"),
        (sends(b"<html>Welcome</html>", "text/html"), "no DICOMweb answer"),
        (sends(b"[1, 2]"), "no DICOMweb answer"),
    ],
)
def test_what_is_no_answer_is_a_sentence(pacs: Callable[[Answer], PacsClient], answer: Answer, message: str) -> None:
    client = pacs(answer)
    with pytest.raises(PacsError, match=message) as caught:
        client.series(Modality="CT")
    assert caught.value.http_status == 502
    assert not isinstance(caught.value, PacsUnreachable)


def test_a_pacs_that_knows_no_pages_is_asked_twice_not_for_ever(
    pacs: Callable[[Answer], PacsClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs_client, "PAGE", 1)
    one = b'[{"0020000D": {"vr": "UI", "Value": ["1.2"]}, "0020000E": {"vr": "UI", "Value": ["1.2.3"]}}]'
    assert [str(item.SeriesInstanceUID) for item in pacs(sends(one)).series(Modality="CT")] == ["1.2.3"]


def test_images_are_written_under_the_numbers_people_know(tmp_path: Path) -> None:
    slices = SeriesMaker("numbered", shape=(4, 4, 3)).slices()
    slices[1].InstanceNumber = slices[0].InstanceNumber

    class Client:
        def files(self, study: str, series: str) -> list[Any]:
            return slices

    told: list[tuple[int, int]] = []
    download(Client(), "1", "2", tmp_path / "series", 3, lambda *done: told.append(done))  # type: ignore[arg-type]
    assert {path.name for path in (tmp_path / "series").iterdir()} == {"image 3", "file 2", "image 1"}
    assert told == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(PacsError, match="lists 4 instances of the series 2 and sent 3"):
        download(Client(), "1", "2", tmp_path / "again", 4)  # type: ignore[arg-type]


def test_a_connection_that_was_just_closed_is_opened_again(pacs: Callable[[Answer], PacsClient]) -> None:
    asked: list[int] = []

    def closing_once(handler: BaseHTTPRequestHandler) -> None:
        asked.append(1)
        if len(asked) == 1:
            handler.close_connection = True  # without a word
        else:
            sends(b"[]")(handler)

    assert pacs(closing_once).series(Modality="CT") == []
    assert len(asked) == 2
