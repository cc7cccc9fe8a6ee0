"""A PACS over real HTTP that misbehaves as it is told: what it has, what it lists, what it sends, and how.

A `Shelf` is what it has of one series: what it lists, what it sends and how many it says there are need not agree. A
`Way` is how it gives one kind of answer: whole, cut, stalled, refused, as another page. Questions are of the kinds
``series``, ``instances``, ``metadata``, ``pixels`` and ``store``.
"""

from __future__ import annotations

import io
import json
import re
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pydicom
from pydicom.dataset import Dataset

JSON = "application/dicom+json"
BOUNDARY = "a-boundary-of-this-pacs"
MULTIPART = f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'
CLOSING = f"\r\n--{BOUNDARY}--\r\n".encode()
SERIES_FACTS = ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "PatientID", "SeriesDescription")


@dataclass
class Reply:
    """An answer as it should be sent.

    Attributes
    ----------
    body : bytes
    kind : str
        Content-Type; empty: none is sent.
    status : int
    starts : list of int
        Where in the body each instance begins, its line of dashes included, and where the last one ends.
    """

    body: bytes
    kind: str = JSON
    status: int = 200
    starts: list[int] = field(default_factory=list)


Way = Callable[["Exchange", Reply], None]


@dataclass
class Shelf:
    """One series of the PACS.

    Attributes
    ----------
    listed : sequence of Dataset
        The instances it lists.
    sent : sequence of bytes
        The files it sends.
    count : str or None
        NumberOfSeriesRelatedInstances; None: it does not say.
    """

    listed: Sequence[Dataset]
    sent: Sequence[bytes]
    count: str | None

    @classmethod
    def of(cls, slices: Sequence[Dataset], **other: Any) -> Shelf:
        """Return a series that is listed and sent as it is, but for what `other` says."""
        facts = {"listed": list(slices), "sent": [as_file(one) for one in slices], "count": str(len(slices))}
        return cls(**{**facts, **other})

    def facts(self) -> dict[str, Any]:
        """Return what a search for series finds of it."""
        found = Dataset()
        for keyword in SERIES_FACTS:
            setattr(found, keyword, self.listed[0].get(keyword))
        described: dict[str, Any] = found.to_json_dict()
        if self.count is not None:
            described["00201209"] = {"vr": "IS", "Value": [self.count]}
        return described


class WrongPacs:
    """A DICOMweb server in memory.

    Attributes
    ----------
    shelves : dict
        StudyInstanceUID -> `Shelf`.
    expected : dict
        StudyInstanceUID -> slices that are yet to arrive.
    ways : dict
        Kind of question -> `Way`; those not named are answered well.
    stored : list of Dataset
        What was stored in it.
    asked : list of str
        Kinds of the questions so far.
    """

    def __init__(self) -> None:
        self.shelves: dict[str, Shelf] = {}
        self.expected: dict[str, Sequence[Dataset]] = {}
        self.ways: dict[str, Way] = {}
        self.stored: list[Dataset] = []
        self.asked: list[str] = []
        self.release = threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (Exchange,), {"pacs": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/dicom-web"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def misbehave(self, ways: dict[str, Way]) -> None:
        """Answer in these ways from now on; an empty dict: well."""
        self.release.set()
        self.release = threading.Event()
        self.ways = dict(ways)

    def answer(self, path: str, query: dict[str, str]) -> tuple[str, Reply]:
        """Return the kind of a question and the answer it should get."""
        match = re.fullmatch(r"(?:/studies/([\d.]+))?/series(?:/([\d.]+)(/.*)?)?", path)
        if not match:
            return "other", Reply(b"no such resource", "text/plain", 404)
        study, series, rest = match.groups()
        if series is None:
            return "series", _json(_page(self._found(study, query.get("Modality")), query))
        shelf = self.shelves.get(study)
        if shelf and series not in {one.SeriesInstanceUID for one in shelf.listed}:
            shelf = None
        files = list(shelf.sent) if shelf else [as_file(one) for one in self.stored if one.SeriesInstanceUID == series]
        listed = list(shelf.listed) if shelf else [one for one in self.stored if one.SeriesInstanceUID == series]
        if rest is None:
            return "pixels", multipart(files)
        if rest == "/instances":
            wanted = query.get("SOPInstanceUID")
            chosen = [one for one in listed if wanted in (None, one.SOPInstanceUID)]
            return "instances", _json(_page([_identity(one) for one in chosen], query))
        one = re.fullmatch(r"/instances/([\d.]+)(/metadata)?", rest)
        chosen = [item for item in listed if one is None or item.SOPInstanceUID == one[1]]
        if one and not one[2]:
            return "pixels", multipart([as_file(item) for item in chosen])
        return "metadata", _json([_described(item) for item in chosen])

    def _found(self, study: str | None, modality: str | None) -> list[dict[str, Any]]:
        stored = {str(one.SeriesInstanceUID): Shelf([one], [], "1") for one in self.stored}
        found = [shelf.facts() for shelf in (*self.shelves.values(), *stored.values())]
        return [
            facts
            for facts in found
            if modality in (None, facts["00080060"]["Value"][0]) and study in (None, facts["0020000D"]["Value"][0])
        ]


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Say nothing of connections that whoever asked has closed."""


class Exchange(BaseHTTPRequestHandler):
    """One connection, and how an answer can be given on it."""

    protocol_version = "HTTP/1.1"
    pacs: WrongPacs

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        kind, reply = self.pacs.answer(address.path.removeprefix("/dicom-web"), query)
        self._give(kind, reply)

    def do_POST(self) -> None:
        self.body = self._received()
        self._give("store", Reply(b""))

    def _give(self, kind: str, reply: Reply) -> None:
        self.pacs.asked.append(kind)
        way = self.pacs.ways.get(kind) or (kept if kind == "store" else whole)
        try:
            way(self, reply)
        except (BrokenPipeError, ConnectionResetError):  # the one who asked has hung up
            self.close_connection = True

    def _received(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def take(self) -> Dataset:
        """Keep the object that was sent; returns it."""
        content = self.body[self.body.index(b"\r\n\r\n") + 4 : self.body.rindex(b"\r\n--")]
        self.pacs.stored.append(pydicom.dcmread(io.BytesIO(content)))
        return self.pacs.stored[-1]

    def begin(self, reply: Reply, framing: str = "length", **headers: str) -> None:
        """Send the head of an answer; `framing`: by its ``length``, ``chunked``, or until it is ``closed``."""
        self.send_response(reply.status)
        if reply.kind:
            self.send_header("Content-Type", reply.kind)
        if framing == "length":
            self.send_header("Content-Length", str(len(reply.body)))
        elif framing == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send_part(self, content: bytes, framing: str) -> None:
        """Send a part of the body."""
        if framing == "chunked" and content:
            content = f"{len(content):x}\r\n".encode() + content + b"\r\n"
        self.wfile.write(content)
        self.wfile.flush()

    def finish_body(self, framing: str) -> None:
        """Say that the body is complete, where the framing can."""
        if framing == "chunked":
            self.wfile.write(b"0\r\n\r\n")

    def hang_up(self) -> None:
        """Close the connection, whatever was still to come."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def whole(exchange: Exchange, reply: Reply, framing: str = "length") -> None:
    """Give the answer as it should be."""
    exchange.begin(reply, framing)
    exchange.send_part(reply.body, framing)
    exchange.finish_body(framing)


def kept(exchange: Exchange, reply: Reply) -> None:
    """Keep the object and say so."""
    whole(exchange, Reply(told("ReferencedSOPSequence", exchange.take())))


def told(sequence: str, seg: Dataset) -> bytes:
    """Return what is said of an object that was sent."""
    item, answer = Dataset(), Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = seg.SOPClassUID, seg.SOPInstanceUID
    if sequence == "FailedSOPSequence":
        item.FailureReason = 272
    setattr(answer, sequence, [item])
    return json.dumps(answer.to_json_dict()).encode()


# -- bodies -----------------------------------------------------------------------------------------------------------


def as_file(dataset: Dataset) -> bytes:
    """Return an instance as a DICOM file."""
    stream = io.BytesIO()
    dataset.save_as(stream, write_like_original=False)
    return stream.getvalue()


def multipart(files: Sequence[bytes]) -> Reply:
    """Return the answer that sends these files."""
    body, starts = bytearray(), []
    for content in files:
        starts.append(len(body))
        body += f"\r\n--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode() + content
    starts.append(len(body))
    return Reply(bytes(body) + CLOSING, MULTIPART, starts=starts)


def _json(items: list[dict[str, Any]]) -> Reply:
    return Reply(json.dumps(items).encode())


def _page(items: list[dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
    first = int(query.get("offset", 0))
    return items[first : first + int(query.get("limit", len(items)))]


def _identity(instance: Dataset) -> dict[str, Any]:
    found = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "InstanceNumber"):
        setattr(found, keyword, instance.get(keyword))
    described: dict[str, Any] = found.to_json_dict()
    return described


def _described(instance: Dataset) -> dict[str, Any]:
    described: dict[str, Any] = instance.to_json_dict()
    return {tag: value for tag, value in described.items() if tag != "7FE00010"}
