"""Labels sent to a PACS that does not take them, or does not say so: none is lost, or said to be there and is not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import nibabel as nib
import numpy as np

from arena import table
from dicom_series_factory import SeriesMaker
from pacs_arena import Hospital, Outcome, patiently, unzipped, voxels_of
from pacs_case import FOR_EVER
from pacs_ways import cut, kept_and_cut, kept_silently, not_kept, refused, stalled
from wrong_answers import PAGE
from wrong_pacs import JSON, Shelf, Way

STORING: dict[str, dict[str, Way]] = {
    "keeps it": {},
    "answers 500": {"store": refused(500, FOR_EVER)},
    "answers 503": {"store": refused(503, FOR_EVER)},
    "hangs up without keeping it": {"store": cut(lambda reply: 0, "length")},
    "keeps it and hangs up": {"store": kept_and_cut},
    "answers 200, failed": {"store": not_kept(200)},
    "answers 202, failed": {"store": not_kept(202)},
    "answers 202, failed, with a charset": {"store": not_kept(202, f"{JSON}; charset=utf-8")},
    "answers 409, failed": {"store": not_kept(409)},
    "answers 200 with a page to sign in": {"store": not_kept(200, "text/html", PAGE)},
    "answers 200 with nothing, not kept": {"store": not_kept(200, "", b"")},
    "answers 200 with nothing, kept": {"store": kept_silently},
    "answers with nothing, kept, and lists nothing for a while": {
        "store": kept_silently,
        "instances": refused(500, FOR_EVER),
    },
    "stalls": {"store": stalled(None)},
}


def store_all(place: Hospital, chosen: Iterable[str] = tuple(STORING)) -> dict[str, Outcome]:
    """Submit a label while the PACS does each of `STORING`; returns what came of each."""
    found = {name: Outcome(cases=1) for name in chosen}
    makers = {name: SeriesMaker(f"stored {number}", (14, 11, 5), seed=number) for number, name in enumerate(found)}
    place.pacs.shelves = {maker.study_uid: Shelf.of(maker.slices()) for maker in makers.values()}
    place.pacs.misbehave({})
    for name, maker in makers.items():
        place.pacs.misbehave({})
        answer = patiently(lambda maker=maker: place.image(maker.uid), lambda answer: answer.is_success)
        place.pacs.misbehave(STORING[name])
        found[name].wrong += _submitted(place, maker, answer.content, found[name])
    place.pacs.misbehave({})
    for name, maker in makers.items():
        found[name].wrong += _arrived(place, maker)
    return found


def _submitted(place: Hospital, maker: SeriesMaker, image: bytes, outcome: Outcome) -> Iterator[str]:
    label = nib.Nifti1Image(_drawn(maker), nib.Nifti1Image.from_bytes(unzipped(image)).affine).to_bytes()
    params = {"label_info": [{"name": "liver", "idx": 1}], "client_id": "dr"}
    answer = place.client.put(
        "/datastore/label",
        params={"image": maker.uid, "tag": "final"},
        data={"params": json.dumps(params)},
        files={"label": ("label.nii", label)},
    )
    if not answer.is_success:
        yield f"refused: {answer.status_code} {answer.text[:200]}"
    note = _note(place, maker)
    outcome.whole, outcome.refused = int(note["stored"]), int(not note["stored"])
    if note["stored"] and not _segs(place, maker):
        yield f"said to be in the PACS, and is not: {note}"
    if not note["stored"] and len(note["message"].split()) < 4:
        yield f"not stored, without a reason: {note}"
    yield from _still_here(place, maker)


def _arrived(place: Hospital, maker: SeriesMaker) -> Iterator[str]:
    """Yield what is wrong with a label once the PACS has been well again for a while."""

    def ask() -> httpx.Response:
        return place.client.get("/info/")

    patiently(ask, lambda answer: bool(_note(place, maker)["stored"]))
    if not _note(place, maker)["stored"]:
        yield f"well again, and still not stored: {_note(place, maker)}"
    if len(_segs(place, maker)) != 1:
        yield f"{len(_segs(place, maker))} of it are in the PACS"
    yield from _still_here(place, maker)


def _still_here(place: Hospital, maker: SeriesMaker) -> Iterator[str]:
    answer = place.client.get("/datastore/label", params={"label": maker.uid, "tag": "final"})
    if not answer.is_success or not np.array_equal(voxels_of(answer), _drawn(maker)):
        yield f"THE LABEL IS LOST: {answer.status_code}"


def _drawn(maker: SeriesMaker) -> np.ndarray:
    array = np.zeros(maker.shape, np.uint8)
    array[2:6, 3:7, 1:4] = 1
    return array


def _note(place: Hospital, maker: SeriesMaker) -> dict[str, Any]:
    answer = place.client.get("/datastore/label/info", params={"label": maker.uid, "tag": "final"})
    return dict(answer.raise_for_status().json()["pacs"])


def _segs(place: Hospital, maker: SeriesMaker) -> list[str]:
    return [one.SOPInstanceUID for one in place.pacs.stored if one.StudyInstanceUID == maker.study_uid]


def storing_report(stored: dict[str, Outcome]) -> str:
    """Return a table of what came of each label."""
    rows = [(name, "stored" if one.whole else "not stored yet", len(one.wrong)) for name, one in stored.items()]
    return table(("sent a label, the PACS", "what is said of it", "wrong"), rows)
