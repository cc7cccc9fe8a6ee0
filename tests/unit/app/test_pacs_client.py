"""Questions to a PACS that is down, slow, wrong or strict: a sentence within seconds, and back without a restart."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from dicom_series_factory import SeriesMaker
from lib import pacs_client, pacs_session
from lib.pacs_client import PacsClient
from lib.pacs_errors import PacsError, PacsUnreachable

pytestmark = pytest.mark.usefixtures("monailabel_here")
Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def pacs() -> Iterator[Callable[[Answer], PacsClient]]:
    """Return a function that starts a server which answers every GET as told."""
    servers: list[ThreadingHTTPServer] = []

    def started(answer: Answer, **options: float) -> PacsClient:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer(self)

            def do_POST(self) -> None:
                answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return PacsClient(f"http://127.0.0.1:{servers[-1].server_port}/dicom-web", **options)

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
    pacs: Callable[..., PacsClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs_client, "QUIET_S", 60)
    asked: list[float] = []

    def silent(handler: BaseHTTPRequestHandler) -> None:
        asked.append(time.monotonic())
        time.sleep(1.0)

    client = pacs(silent, silence_s=0.9)
    for _ in range(3):
        with pytest.raises(PacsUnreachable, match="took too long"):
            client.series(Modality="CT")
    assert len(asked) == 1


def test_it_is_asked_again_once_it_is_back(
    pacs: Callable[[Answer], PacsClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs_client, "QUIET_S", 60)
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
    client._quiet_until = 0.0
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
    monkeypatch.setattr(pacs_client, "LEAST_PAGE", 1)
    one = b'[{"0020000D": {"vr": "UI", "Value": ["1.2"]}, "0020000E": {"vr": "UI", "Value": ["1.2.3"]}}]'
    assert [str(item.SeriesInstanceUID) for item in pacs(sends(one)).series(Modality="CT")] == ["1.2.3"]


@pytest.mark.parametrize("most", [100, 500, 350])
def test_all_series_are_listed_however_many_the_pacs_gives_at_a_time(
    pacs: Callable[[Answer], PacsClient], most: int
) -> None:
    uids = [f"1.2.{number}" for number in range(350)]

    def in_pages(handler: BaseHTTPRequestHandler) -> None:
        first = int(parse_qs(urlsplit(handler.path).query).get("offset", ["0"])[0])
        page = [
            {"0020000D": {"vr": "UI", "Value": ["1.2"]}, "0020000E": {"vr": "UI", "Value": [uid]}}
            for uid in uids[first : first + most]
        ]
        sends(json.dumps(page).encode())(handler)

    assert [str(item.SeriesInstanceUID) for item in pacs(in_pages).series(Modality="CT")] == uids


@pytest.mark.parametrize("count", ["many", "", "-3", "4.5", [], {}])
def test_a_series_whose_number_of_instances_is_none_hides_no_other(
    pacs: Callable[[Answer], PacsClient], count: Any
) -> None:
    listed = [
        {
            "0020000D": {"vr": "UI", "Value": ["1.2"]},
            "0020000E": {"vr": "UI", "Value": [uid]},
            "00201209": {"vr": "IS", "Value": [number]},
        }
        for uid, number in (("1.2.3", count), ("1.2.4", 7))
    ]
    found = pacs(sends(json.dumps(listed).encode())).series(Modality="CT")
    assert [item.get("NumberOfSeriesRelatedInstances") for item in found] == [None, 7]


@pytest.mark.parametrize("number", ["1.5", "", "abc", None, {"a": 1}])
def test_a_series_with_an_attribute_nobody_can_read_hides_no_other(
    pacs: Callable[[Answer], PacsClient], number: Any
) -> None:
    listed = [
        {
            "0020000D": {"vr": "UI", "Value": ["1.2"]},
            "0020000E": {"vr": "UI", "Value": [uid]},
            "00200011": {"vr": "IS", "Value": [one]},
            "00080060": {"vr": "CS", "Value": ["CT"]},
        }
        for uid, one in (("1.2.3", number), ("1.2.4", 7))
    ]
    found = pacs(sends(json.dumps(listed).encode())).series(Modality="CT")
    assert [(item.SeriesInstanceUID, item.Modality) for item in found] == [("1.2.3", "CT"), ("1.2.4", "CT")]
    assert found[1].SeriesNumber == 7


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


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_pacs_is_asked_again_after_a_pause_and_not_for_ever(
    pacs: Callable[[Answer], PacsClient], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(pacs_session, "PAUSES_S", (0.05, 0.1))
    asked: list[float] = []

    def busy(times: int) -> Answer:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            asked.append(time.monotonic())
            (sends(b"busy", "text/plain", status) if len(asked) <= times else sends(b"[]"))(handler)

        return answer

    assert pacs(busy(2)).series(Modality="CT") == []
    assert [after - before >= 0.05 for before, after in pairwise(asked)] == [True, True]
    asked.clear()
    client = pacs(busy(1000))
    for _ in range(3):
        with pytest.raises(PacsError, match=f"HTTP {status}"):
            client.series(Modality="CT")
    assert len(asked) == 3  # the next questions get the same sentence at once


def test_a_series_that_stalls_does_not_keep_others_from_being_asked_for(pacs: Callable[..., PacsClient]) -> None:
    def slow_archive(handler: BaseHTTPRequestHandler) -> None:
        if handler.path.endswith("/series/1.3"):
            time.sleep(3.0)
        else:
            sends(b"[]")(handler)

    client = pacs(slow_archive, silence_s=1.5)
    with pytest.raises(PacsUnreachable, match="took too long"):
        list(client.files("1.2", "1.3"))
    assert client.series(Modality="CT") == []


def test_an_answer_that_ends_early_is_called_that(pacs: Callable[[Answer], PacsClient]) -> None:
    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", 'multipart/related; type="application/dicom"; boundary=b')
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"--b\r\n")
        handler.close_connection = True

    with pytest.raises(PacsError, match="hung up before the end"):
        list(pacs(cut).files("1.2", "1.3"))


def test_all_instances_are_listed_however_many_the_pacs_gives_at_a_time(pacs: Callable[[Answer], PacsClient]) -> None:
    uids = [f"1.2.{number}" for number in range(7)]

    def in_pages(handler: BaseHTTPRequestHandler) -> None:
        first = int(parse_qs(urlsplit(handler.path).query).get("offset", ["0"])[0])
        page = [{"00080018": {"vr": "UI", "Value": [uid]}} for uid in uids[first : first + 3]]
        sends(json.dumps(page).encode())(handler)

    assert list(pacs(in_pages).instance_classes("1.2", "1.3")) == uids


STORED = {"00081199": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": ["1.2.9"]}}]}}
FAILED = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [272]}}]}}


@pytest.mark.parametrize(
    ("status", "kind", "said", "listed", "stored"),
    [
        (200, "application/dicom+json", STORED, False, True),
        (202, "application/dicom+json", FAILED, False, False),
        (202, "application/dicom+json; charset=utf-8", FAILED, False, False),
        (409, "application/dicom+json", FAILED, False, False),
        (200, "text/html", "<html></html>", False, False),
        (200, "text/html", "<html></html>", True, True),
    ],
)
def test_what_the_pacs_neither_confirms_nor_lists_is_not_stored(
    pacs: Callable[[Answer], PacsClient], status: int, kind: str, said: Any, listed: bool, stored: bool
) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.command == "POST":
            handler.rfile.read(int(handler.headers["Content-Length"]))
            sends(json.dumps(said).encode(), kind, status)(handler)
        else:
            sends(json.dumps([{"00080018": {"vr": "UI", "Value": ["1.2.9"]}}] if listed else []).encode())(handler)

    seg = SeriesMaker("stored").slices()[0]
    seg.SOPInstanceUID = "1.2.9"
    with nullcontext() if stored else pytest.raises(PacsError):
        pacs(answer).store(seg)
