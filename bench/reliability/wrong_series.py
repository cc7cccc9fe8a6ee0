"""What a PACS may do wrong with a series, as cases: what it has, what it lists and sends, and how it answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from dicom_series_factory import SeriesMaker, jpeg_2000, oblique, run_length
from wrong_pacs import (
    JSON,
    MULTIPART,
    Exchange,
    Reply,
    Shelf,
    Way,
    as_file,
    changed,
    cut,
    in_frame,
    instead,
    redirected,
    refused,
    stalled,
    whole,
)

KINDS: dict[str, dict[str, Any]] = {
    "axial, 5": {"shape": (14, 11, 5)},
    "oblique, 20": {"shape": (12, 15, 20), "axes": oblique()},
    "MR, oblique, 9": {"shape": (13, 10, 9), "axes": oblique(5, 40, -10), "modality": "MR"},
    "axial, 60": {"shape": (16, 12, 60)},
}
FRAMINGS = ("length", "chunked", "closed")
QUESTIONS = ("series", "instances", "pixels")
FOR_EVER = 10**6
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in.</body></html>"


Change = Callable[[list[Any]], Shelf]


@dataclass(frozen=True)
class Case:
    """One thing done wrong.

    Attributes
    ----------
    group, name : str
    maker : SeriesMaker
        The series as it is.
    change : callable
        Returns what the PACS has of it, by its slices.
    ways : dict
        How it answers.
    before : int
        So many slices are there first, and are fetched; then the others arrive.
    listed_since : bool
        Whether the server has seen the others listed before the PACS goes wrong.
    """

    group: str
    name: str
    maker: SeriesMaker
    change: Change
    ways: dict[str, Way] = field(default_factory=dict)
    before: int = 0
    listed_since: bool = False

    @property
    def stalls(self) -> bool:
        """Whether an answer stalls."""
        return self.group.startswith("no byte")


_NUMBERS = count()


@dataclass(frozen=True)
class Workshop:
    """Makes cases of one kind of series."""

    kind: str

    @property
    def n(self) -> int:
        """How many slices a series has."""
        return int(KINDS[self.kind]["shape"][2])

    @property
    def positions(self) -> list[int]:
        """Return slices at both ends and in the middle."""
        return sorted({0, 1, self.n // 2, self.n - 2, self.n - 1})

    @property
    def three(self) -> tuple[int, int, int]:
        """Return the first slice, one in the middle and the last."""
        return 0, self.n // 2, self.n - 1

    def case(self, group: str, name: str, change: Change = Shelf.of, ways: Any = None, **more: Any) -> Case:
        """Return a case on a series of its own."""
        number = next(_NUMBERS)
        maker = SeriesMaker(f"faults {number}", seed=number, **KINDS[self.kind])
        return Case(group, f"{self.kind}: {name}", maker, change, ways or {}, **more)


def cases(kind: str) -> Iterator[Case]:
    """Yield every case of one kind of series."""
    shop = Workshop(kind)
    for make in (
        *(_cut_between, _cut_within, _cut_in_last, _unclosed, _fewer, _fewer_in_place, _errors, _stalls, _gaps),
        *(_twice, _same_place, _other_slice, _slipped_in, _truncated, _growing, _counts, _redirects, _other_pages),
    ):
        yield from make(shop)


def _told(told: bool) -> Change:
    return Shelf.of if told else lambda slices: Shelf.of(slices, count=None)


def _counted(told: bool) -> str:
    return "counted" if told else "not counted"


# -- answers that end early -------------------------------------------------------------------------------------------


def _cut_between(shop: Workshop) -> Iterator[Case]:
    for k in (*shop.positions, shop.n):
        for framing in FRAMINGS:
            for told in (True, False):
                way = {"pixels": cut(lambda reply, k=k: reply.starts[k], framing)}
                name = f"after {k} of {shop.n}, {framing}, {_counted(told)}"
                yield shop.case("connection cut after k of n instances", name, _told(told), way)


def _cut_within(shop: Workshop) -> Iterator[Case]:
    for k in shop.three:
        for share in (0.02, 0.3, 0.999):
            for framing in FRAMINGS:
                way = {"pixels": cut(lambda reply, k=k, share=share: _within(reply, k, share), framing)}
                yield shop.case("connection cut within an instance", f"{share} of instance {k}, {framing}", ways=way)


def _within(reply: Reply, k: int, share: float) -> int:
    return int(reply.starts[k] + share * (reply.starts[k + 1] - reply.starts[k]))


def _cut_in_last(shop: Workshop) -> Iterator[Case]:
    for step in range(20):
        way = {"pixels": cut(lambda reply, step=step: _within(reply, -2, (step + 0.5) / 20), "closed")}
        name = f"{step + 0.5} twentieths of the last, unnoticed by HTTP"
        yield shop.case("connection cut within an instance", name, _told(step % 2 == 0), way)


def _unclosed(shop: Workshop) -> Iterator[Case]:
    for framing in FRAMINGS:
        for k in (shop.n - 1, shop.n):

            def way(exchange: Exchange, reply: Reply, k: int = k, framing: str = framing) -> None:
                whole(exchange, Reply(reply.body[: reply.starts[k]], reply.kind), framing)

            yield shop.case("no closing boundary", f"after {k}, {framing}", _told(framing != "closed"), {"pixels": way})


# -- fewer than are listed --------------------------------------------------------------------------------------------


def _fewer(shop: Workshop) -> Iterator[Case]:
    for k in shop.positions:
        for order in ("in order", "reversed", "shuffled"):
            for told in (True, False):
                yield shop.case(
                    "fewer instances than are listed",
                    f"without {k}, {order}, {_counted(told)}",
                    lambda slices, k=k, order=order, told=told: _without(slices, k, order, told),
                )
    for k in (1, shop.n // 2):
        few = lambda slices, k=k: Shelf.of(slices, sent=[as_file(one) for one in slices[:k]])  # noqa: E731
        yield shop.case("fewer instances than are listed", f"the first {k}", few)
    yield shop.case("fewer instances than are listed", "none", lambda slices: Shelf.of(slices, sent=[]))


def _without(slices: list[Any], k: int, order: str, told: bool) -> Shelf:
    files = [as_file(one) for number, one in enumerate(slices) if number != k]
    if order == "reversed":
        files.reverse()
    elif order == "shuffled":
        random.Random(k).shuffle(files)
    return Shelf.of(slices, sent=files, **({} if told else {"count": None}))


def _fewer_in_place(shop: Workshop) -> Iterator[Case]:
    """Another object is sent in place of a slice: the number is right."""
    for k in shop.positions:
        for name, other in (
            ("an instance of another series", _of_another_series),
            ("the one before once more", lambda slices, k: slices[k - 1]),
            ("a slice without its size", _without_size),
            ("a slice that calls itself a report", _report),
        ):
            yield shop.case(
                "another object in place of a slice",
                f"{name}, slice {k}",
                lambda slices, k=k, other=other: Shelf.of(slices, sent=_replaced(slices, k, other(slices, k))),
            )


def _replaced(slices: Sequence[Any], k: int, other: Dataset) -> list[bytes]:
    return [as_file(other if number == k else one) for number, one in enumerate(slices)]


def _of_another_series(slices: Sequence[Any], k: int) -> Dataset:
    return _altered(slices[k], SeriesInstanceUID=generate_uid(), SOPInstanceUID=generate_uid())


def _without_size(slices: Sequence[Any], k: int) -> Dataset:
    damaged = deepcopy(slices[k])
    del damaged.Rows
    return damaged


def _report(slices: Sequence[Any], k: int) -> Dataset:
    return _altered(_without_size(slices, k), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")


def _altered(dataset: Any, **attributes: Any) -> Dataset:
    other: Dataset = deepcopy(dataset)
    for keyword, value in attributes.items():
        setattr(other, keyword, value)
    other.file_meta.MediaStorageSOPInstanceUID = other.SOPInstanceUID
    other.file_meta.MediaStorageSOPClassUID = other.SOPClassUID
    return other


# -- errors, stalls, other pages --------------------------------------------------------------------------------------


def _errors(shop: Workshop) -> Iterator[Case]:
    for question in QUESTIONS:
        for status in (500, 503, 429):
            for times in (1, 2, FOR_EVER):
                name = f"{status} {'always' if times == FOR_EVER else f'{times} times'}, asked for {question}"
                group = "500, 503, 429 for ever" if times == FOR_EVER else "500, 503, 429 once or twice"
                yield shop.case(group, name, ways={question: refused(status, times)})
        for status in (400, 401, 404, 406):
            way = {question: refused(status, FOR_EVER)}
            yield shop.case("400, 401, 404, 406", f"{status}, asked for {question}", ways=way)
    for wait in ("1", "3600", "soon"):
        way = {"pixels": refused(503, 1, Retry_After=wait)}
        yield shop.case("500, 503, 429 once or twice", f"503, Retry-After {wait}", ways=way)


def _stalls(shop: Workshop) -> Iterator[Case]:
    group = "no byte for longer than the time limit"
    for question in QUESTIONS:
        yield shop.case(group, f"before the answer, {question}", ways={question: stalled(None)})
        yield shop.case(group, f"after the head, {question}", ways={question: stalled(lambda reply: 0)})
    for k in (1, shop.n // 2, shop.n - 1):
        way = {"pixels": stalled(lambda reply, k=k: _within(reply, k, 0.5))}
        yield shop.case(group, f"within instance {k}", ways=way)


def _redirects(shop: Workshop) -> Iterator[Case]:
    for question in QUESTIONS:
        for target in ("again", "itself", "http://127.0.0.1:1/elsewhere", "/dicom-web/nowhere"):
            yield shop.case("a redirect", f"{target}, {question}", ways={question: redirected(target)})


def _other_pages(shop: Workshop) -> Iterator[Case]:
    for question in QUESTIONS:
        for name, body in (("a page to sign in", PAGE), ("nothing", b""), ("zeros", bytes(2000))):
            for kind in ("text/html; charset=utf-8", JSON, MULTIPART):
                way = {question: instead(body, kind)}
                yield shop.case("another page with 200", f"{name} as {kind.split(';')[0]}, {question}", ways=way)
        way = {question: instead(b"", "", 204)}
        yield shop.case("another page with 200", f"204, {question}", ways=way)
    for body in (b"{}", b"[{}]", b"[null]", b"[1]", b'"x"', b"null", b"[[]]", b'[{"00080018": 7}]', b"[{", b"\xff"):
        for question in ("series", "instances"):
            way = {question: instead(body, JSON)}
            yield shop.case("another page with 200", f"{body!r}, {question}", ways=way)
    for kind in ("", "text/plain", "application/dicom", "application/octet-stream", "multipart/related", "x", "/;;="):
        way = {"pixels": changed(lambda reply, kind=kind: Reply(reply.body, kind))}
        yield shop.case("a wrong content type", repr(kind), ways=way)
    for boundary in ("other", "", "-"):
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        way = {"pixels": changed(lambda reply, kind=kind: Reply(reply.body, kind))}
        yield shop.case("a wrong content type", f"the boundary {boundary!r}", _told(bool(boundary)), way)


# -- series that are odd ----------------------------------------------------------------------------------------------


def _gaps(shop: Workshop) -> Iterator[Case]:
    for k in range(1, shop.n - 1) if shop.n < 10 else shop.positions[1:-1]:
        yield shop.case(
            "a gap: neither listed nor sent", f"slice {k}", lambda slices, k=k: Shelf.of(slices[:k] + slices[k + 1 :])
        )


def _twice(shop: Workshop) -> Iterator[Case]:
    for k in shop.three:
        for name, other in (
            ("the same", lambda slices, k: slices[k]),
            ("with other pixels", lambda slices, k: _altered(slices[k], PixelData=slices[k - 1].PixelData)),
            ("at another place", lambda slices, k: _beyond(slices, SOPInstanceUID=slices[k].SOPInstanceUID)),
        ):
            for told in (True, False):
                yield shop.case(
                    "one SOP instance UID twice",
                    f"{name}, slice {k}, {_counted(told)}",
                    lambda slices, k=k, other=other, told=told: Shelf.of(
                        slices,
                        sent=[as_file(one) for one in (*slices, other(slices, k))],
                        **({} if told else {"count": None}),
                    ),
                )
                yield shop.case(
                    "one SOP instance UID twice",
                    f"{name}, slice {k}, listed twice too, {_counted(told)}",
                    lambda slices, k=k, other=other, told=told: Shelf.of(
                        [*slices, other(slices, k)], **({} if told else {"count": None})
                    ),
                )


def _beyond(slices: Sequence[Any], **attributes: Any) -> Dataset:
    """Return the last slice one further on, where a slice more would be."""
    ends = [np.array(slices[k].ImagePositionPatient, float) for k in (-1, -2)]
    return _altered(slices[-1], ImagePositionPatient=(2 * ends[0] - ends[1]).round(8).tolist(), **attributes)


def _same_place(shop: Workshop) -> Iterator[Case]:
    for k in shop.positions:
        yield shop.case(
            "one position twice, other UIDs",
            f"slice {k}",
            lambda slices, k=k: Shelf.of([*slices, _altered(slices[k], SOPInstanceUID=generate_uid())]),
        )


OTHERWISE: dict[str, dict[str, Any]] = {
    "orientation": {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
    "spacing": {"PixelSpacing": [3.1, 2.9]},
    "frame of reference": {"FrameOfReferenceUID": "1.2.3.4"},
    "patient": {"PatientID": "SOMEBODY ELSE"},
    "study": {"StudyInstanceUID": "1.2.3.5"},
    "rows": {"Rows": 4},
    "columns": {"Columns": 40},
    "no position": {"ImagePositionPatient": None},
    "no modality": {"Modality": ""},
}


def _other_slice(shop: Workshop) -> Iterator[Case]:
    for name, attributes in OTHERWISE.items():
        for k in shop.three:
            yield shop.case(
                "one slice is of another kind",
                f"{name}, slice {k}",
                lambda slices, k=k, attributes=attributes: _one_other(slices, k, attributes),
            )


def _one_other(slices: list[Any], k: int, attributes: dict[str, Any]) -> Shelf:
    odd = _altered(slices[k], **attributes)
    return Shelf.of([odd if number == k else one for number, one in enumerate(slices)])


def _slipped_in(shop: Workshop) -> Iterator[Case]:
    group = "a slice of another scan slipped in"
    for k in shop.positions:
        yield shop.case(
            group,
            f"another series', between {k} and the next",
            lambda slices, k=k: Shelf.of(slices, sent=_with(slices, k, _of_another_series(slices, k))),
        )
    for name, attributes in (
        ("another patient's", {"PatientID": "SOMEBODY ELSE"}),
        ("another study's", {"StudyInstanceUID": "1.2.3.5"}),
        ("unlisted, of the same series", {}),
    ):
        for listed in (True, False):
            yield shop.case(
                group,
                f"{name}, beyond the last, {'listed' if listed else 'not listed'}",
                lambda slices, attributes=attributes, listed=listed: _one_more(slices, attributes, listed),
            )


def _with(slices: Sequence[Any], k: int, other: Dataset) -> list[bytes]:
    return [as_file(one) for one in (*slices[: k + 1], other, *slices[k + 1 :])]


def _one_more(slices: list[Any], attributes: dict[str, Any], listed: bool) -> Shelf:
    """Return a series with one more slice, which would fit well."""
    one = _beyond(slices, SOPInstanceUID=generate_uid(), **attributes)
    return Shelf.of([*slices, one]) if listed and attributes else Shelf.of(slices, sent=_with(slices, -2, one))


def _truncated(shop: Workshop) -> Iterator[Case]:
    for k in shop.three:
        for name, encode in (("plain", list), ("RLE", run_length), ("JPEG 2000", jpeg_2000)):
            for share in (0.0, 0.3, 0.95):
                yield shop.case(
                    "pixels of a slice cut short",
                    f"{name}, {share} of slice {k}",
                    lambda slices, k=k, encode=encode, share=share: _shortened(list(encode(slices)), k, share),
                )


def _shortened(slices: list[Any], k: int, share: float) -> Shelf:
    pixels = slices[k].PixelData
    encapsulated = pixels.startswith(b"\xfe\xff\x00\xe0")
    if not encapsulated:
        left = int(share * len(pixels)) // 2 * 2
        return Shelf.of(_replaced_dataset(slices, k, pixels[:left]))
    head, stream = pixels[:8], pixels[8:]  # the empty or one-item table of offsets
    table = int.from_bytes(head[4:8], "little")
    head, stream = pixels[: 8 + table], pixels[8 + table :]
    length = int.from_bytes(stream[4:8], "little")
    left = int(share * length) // 2 * 2
    shorter = head + stream[:4] + left.to_bytes(4, "little") + stream[8 : 8 + left]
    return Shelf.of(_replaced_dataset(slices, k, shorter))


def _replaced_dataset(slices: list[Any], k: int, pixels: bytes) -> list[Any]:
    slices[k].PixelData = pixels
    return slices


# -- series that change -----------------------------------------------------------------------------------------------


def _growing(shop: Workshop) -> Iterator[Case]:
    group = "more slices arrive between two questions"
    for k in sorted({2, shop.n // 2, shop.n - 1}):
        for told in (True, False):
            some = f"{k} of {shop.n}, {_counted(told)}"
            yield shop.case(group, f"{some}, while it is sent", lambda s, k=k, t=told: _few(s, k, t), _grows(shop))
            yield shop.case(group, f"{some}, after it was fetched", _told(told), before=k)
            for name, ways in (
                ("cut", {"pixels": cut(lambda reply: reply.starts[-2], "closed")}),
                ("stopped by a 500", {"pixels": refused(500, FOR_EVER)}),
                ("not listed", {"instances": refused(500, FOR_EVER)}),
            ):
                yield shop.case(group, f"{some}, after it was fetched, {name}", _told(told), ways, before=k)
        down = dict.fromkeys((*QUESTIONS, "metadata"), cut(lambda reply: 0, "length"))
        name = f"{k} of {shop.n}, listed, and then the PACS is down"
        yield shop.case(group, name, ways=down, before=k, listed_since=True)


def _few(slices: list[Any], k: int, told: bool) -> Shelf:
    return Shelf.of(slices[:k], **({} if told else {"count": None}))


def _grows(shop: Workshop) -> dict[str, Way]:
    """Return ways in which the rest of the series is there as soon as a part of it is sent."""

    def way(exchange: Exchange, reply: Reply) -> None:
        for study, shelf in list(exchange.pacs.shelves.items()):
            if len(shelf.listed) < shop.n:
                rest = exchange.pacs.expected[study]
                exchange.pacs.shelves[study] = Shelf.of(rest, count=shelf.count and str(len(rest)))
        whole(exchange, reply)

    return {"pixels": way}


def _counts(shop: Workshop) -> Iterator[Case]:
    n = shop.n
    for told in (str(n + 1), str(n - 1), "1", "0", "-3", "many", "", str(10**30), "4.5", None):
        yield shop.case(
            "a count that is not the list's", repr(told), lambda slices, told=told: Shelf.of(slices, count=told)
        )
        for k in (0, n - 1):
            yield shop.case(
                "a count that is not the list's",
                f"{told!r}, without slice {k}",
                lambda slices, told=told, k=k: Shelf.of(slices, sent=_all_but(slices, k), count=told),
            )
    for framing in FRAMINGS:
        yield shop.case("nothing wrong", framing, ways={"pixels": in_frame(framing)})


def _all_but(slices: Sequence[Any], k: int) -> list[bytes]:
    return [as_file(one) for number, one in enumerate(slices) if number != k]
