"""Series of a PACS that are not what it lists, odd, or change meanwhile, as cases."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from dicom_series_factory import jpeg_2000, run_length
from pacs_case import FOR_EVER, Case, Workshop, counted, told_or_not
from pacs_ways import cut, in_frame, refused
from wrong_answers import FRAMINGS, QUESTIONS, wrong_answers
from wrong_pacs import Exchange, Reply, Shelf, Way, as_file, whole


def cases(kind: str) -> Iterator[Case]:
    """Yield every case of one kind of series (`pacs_case.KINDS`)."""
    shop = Workshop(kind)
    yield from wrong_answers(shop)
    for make in (
        *(_fewer, _fewer_in_place, _gaps, _twice, _same_place, _other_slice, _slipped_in, _truncated),
        *(_growing, _counts),
    ):
        yield from make(shop)


# -- fewer than are listed --------------------------------------------------------------------------------------------


def _fewer(shop: Workshop) -> Iterator[Case]:
    for k in shop.positions:
        for order in ("in order", "reversed", "shuffled"):
            for told in (True, False):
                yield shop.case(
                    "fewer instances than are listed",
                    f"without {k}, {order}, {counted(told)}",
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
                    f"{name}, slice {k}, {counted(told)}",
                    lambda slices, k=k, other=other, told=told: Shelf.of(
                        slices,
                        sent=[as_file(one) for one in (*slices, other(slices, k))],
                        **({} if told else {"count": None}),
                    ),
                )
                yield shop.case(
                    "one SOP instance UID twice",
                    f"{name}, slice {k}, listed twice too, {counted(told)}",
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
            some = f"{k} of {shop.n}, {counted(told)}"
            yield shop.case(group, f"{some}, while it is sent", lambda s, k=k, t=told: _few(s, k, t), _grows(shop))
            yield shop.case(group, f"{some}, after it was fetched", told_or_not(told), before=k)
            for name, ways in (
                ("cut", {"pixels": cut(lambda reply: reply.starts[-2], "closed")}),
                ("stopped by a 500", {"pixels": refused(500, FOR_EVER)}),
                ("not listed", {"instances": refused(500, FOR_EVER)}),
            ):
                yield shop.case(group, f"{some}, after it was fetched, {name}", told_or_not(told), ways, before=k)
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
