"""A PACS that cuts, stalls, refuses, lists and sends amiss: a series comes whole from it or is refused.

    python bench/reliability/pacs_faults.py            # all kinds of series and faults; some minutes
    python bench/reliability/pacs_faults.py --quick    # a part of them

A real server is asked for a series of a PACS that does one thing wrong. What counts: the answer is the whole volume,
voxel for voxel, or a 4xx, 502, 503 or 504 with a code and a sentence; what is refused leaves no copy and no temporary
file; and once the PACS is well again the next request has the whole volume. The other way round, a label is said to be
in the PACS only if it is, and is not lost. Figures: bench/out/reliability/pacs_faults.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np

from arena import MODEL, keep, table
from dicom_series_factory import SeriesMaker
from factories import make_model_folder
from live import LiveServer
from mshub.install import add_model
from mshub.store import ModelStore
from wrong_pacs import JSON, Shelf, Way, WrongPacs, cut, kept_and_cut, kept_silently, not_kept, refused, stalled
from wrong_series import FOR_EVER, KINDS, PAGE, Case, cases

SILENCE_S = 2.0
"""The time limit of the server in this run (``MSHUB_PACS_TIMEOUT``)."""
WELL_S = 20.0
"""Within so long after the PACS is well again, the server has the series."""
SEEN_S = 2.1
"""For so long the server may take what it was told for new."""
MOST_INFO_S = 1.0
QUICK = 23
"""Every so many cases are tried with ``--quick``."""
REFUSALS = {*range(400, 500), 502, 503, 504}


class Hospital:
    """A server on a PACS that can be told to misbehave.

    Parameters
    ----------
    folder : Path
        Everything is in it.
    """

    def __init__(self, folder: Path) -> None:
        self.home, self.temporary = folder / "home", folder / "tmp"
        self.temporary.mkdir(parents=True)
        add_model(ModelStore(self.home), MODEL, make_model_folder(folder / "model"))
        self.pacs = WrongPacs()
        settings = {"TMPDIR": str(self.temporary), "MSHUB_PACS_TIMEOUT": str(SILENCE_S), "MSHUB_IDLE_MINUTES": "0"}
        settings |= {"MSHUB_ENGINE": "torch", "OMP_NUM_THREADS": "1"}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            self.server = LiveServer(self.home, ["--studies", self.pacs.url], folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self.client = httpx.Client(base_url=self.server.url, timeout=120)

    def close(self) -> None:
        """Stop both."""
        self.pacs.close()
        self.server.stop()

    def image(self, series: str) -> httpx.Response:
        """Ask for the volume of a series."""
        return self.client.get("/datastore/image", params={"image": series})

    def copies(self, series: str) -> list[str]:
        """Return what the server keeps of a series."""
        return [path.name for path in (self.home / "pacs").rglob(f"{series}*")]

    def left_over(self) -> list[str]:
        """Return unfinished and temporary files."""
        places = (self.temporary, *(self.home / "pacs").glob("*.pending"))
        found = [path for place in places for path in place.rglob("*") if path.is_file()]
        return [path.name for path in (*found, *self.home.rglob("*.part"))]


@contextmanager
def hospital() -> Iterator[Hospital]:
    """Yield a `Hospital` in a temporary folder; all of it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mshub-bench-") as folder:
        opened = Hospital(Path(folder))
        try:
            yield opened
        finally:
            opened.close()


@dataclass
class Outcome:
    """What came of the cases of one group.

    Attributes
    ----------
    cases, whole, refused : int
    wrong : list of str
        What should not be.
    codes : set of str
        Statuses and codes of what was refused.
    slowest_info_s : float
        ``/info`` while an answer stalled.
    """

    cases: int = 0
    whole: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    codes: set[str] = field(default_factory=set)
    slowest_info_s: float = 0.0


def try_all(place: Hospital, chosen: Iterable[Case]) -> dict[str, Outcome]:
    """Try cases one after the other; returns what came of each group."""
    found: dict[str, Outcome] = defaultdict(Outcome)
    for case in chosen:
        outcome = found[case.group]
        outcome.cases += 1
        outcome.wrong += [f"{case.name}: {problem}" for problem in _tried(place, case, outcome)]
    return dict(found)


def _tried(place: Hospital, case: Case, outcome: Outcome) -> Iterator[str]:
    """Try one case; yields what should not be."""
    series, study, slices = case.maker.uid, case.maker.study_uid, case.maker.slices()
    shelf = case.change(case.maker.slices())
    place.pacs.shelves, place.pacs.expected = {study: shelf}, {study: slices}
    if case.before:
        place.pacs.shelves = {study: Shelf.of(slices[: case.before], count=shelf.count and str(case.before))}
        yield from _fetched_before(place, case)
        place.pacs.shelves = {study: shelf}
        time.sleep(SEEN_S)
    if case.listed_since:
        place.client.get("/datastore/", params={"output": "all"})
        time.sleep(SEEN_S)
    place.pacs.misbehave(case.ways)
    with _asking_for_info(place, outcome) if case.stalls else _nothing():
        answers = [place.image(series)]
    answers += [] if case.stalls else [place.image(series)]
    for answer in answers:
        yield from _judged(answer, case)
    outcome.whole += answers[0].is_success
    if not answers[0].is_success:
        outcome.refused += 1
        outcome.codes.add(f"{answers[0].status_code} {answers[0].headers.get('X-MSHub-Error')}")
        if not (answers[-1].is_success or case.before) and place.copies(series):
            yield f"refused, and kept: {place.copies(series)[:3]}"
    place.pacs.misbehave({})
    place.pacs.shelves = {study: Shelf.of(slices)}
    yield from _well_again(place, case)
    if left := place.left_over():
        yield f"left over: {left[:3]}"


def _fetched_before(place: Hospital, case: Case) -> Iterator[str]:
    answer = _patiently(lambda: place.image(case.maker.uid), lambda answer: answer.is_success)
    if not answer.is_success or _voxels(answer).shape[2] != case.before:
        yield f"the first {case.before} slices do not come: {answer.status_code}"


def _judged(answer: httpx.Response, case: Case) -> Iterator[str]:
    """Yield what is wrong with an answer: neither the whole volume nor a refusal that says why."""
    if answer.is_success:
        voxels, expected = _voxels(answer), case.maker.stored()
        if voxels.shape != expected.shape:
            yield f"OTHER SHAPE {voxels.shape} instead of {expected.shape}"
        elif not np.array_equal(voxels, expected):
            yield "OTHER VOXELS"
        return
    said = answer.json().get("detail", "") if "json" in answer.headers.get("content-type", "") else ""
    if answer.status_code not in REFUSALS or not answer.headers.get("X-MSHub-Error") or len(str(said).split()) < 4:
        yield f"answered {answer.status_code} {answer.headers.get('X-MSHub-Error')}: {answer.text[:200]}"


def _voxels(answer: httpx.Response) -> np.ndarray:
    return np.asanyarray(nib.Nifti1Image.from_bytes(_unzipped(answer.content)).dataobj)


def _unzipped(content: bytes) -> bytes:
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def _well_again(place: Hospital, case: Case) -> Iterator[str]:
    def is_whole(answer: httpx.Response) -> bool:
        return not list(_judged(answer, case)) and answer.is_success

    answer = _patiently(lambda: place.image(case.maker.uid), is_whole)
    if not is_whole(answer):
        said = answer.text[:200] if not answer.is_success else list(_judged(answer, case))
        yield f"well again, and still {answer.status_code}: {said}"


def _patiently(ask: Callable[[], httpx.Response], enough: Callable[[httpx.Response], bool]) -> httpx.Response:
    deadline = time.monotonic() + WELL_S
    while True:
        answer = ask()
        if enough(answer) or time.monotonic() > deadline:
            return answer
        time.sleep(0.2)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _asking_for_info(place: Hospital, outcome: Outcome) -> Iterator[None]:
    """Ask the server for other things meanwhile, and note the longest it took."""
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=place.server.url, timeout=60) as client:
            while not over.wait(0.2):
                answer = client.get("/info/").raise_for_status()
                outcome.slowest_info_s = max(outcome.slowest_info_s, answer.elapsed.total_seconds())

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# -- the other way round ----------------------------------------------------------------------------------------------

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
        answer = _patiently(lambda maker=maker: place.image(maker.uid), lambda answer: answer.is_success)
        place.pacs.misbehave(STORING[name])
        found[name].wrong += _submitted(place, maker, answer.content, found[name])
    place.pacs.misbehave({})
    for name, maker in makers.items():
        found[name].wrong += _arrived(place, maker)
    return found


def _submitted(place: Hospital, maker: SeriesMaker, image: bytes, outcome: Outcome) -> Iterator[str]:
    label = nib.Nifti1Image(_drawn(maker), nib.Nifti1Image.from_bytes(_unzipped(image)).affine).to_bytes()
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

    _patiently(ask, lambda answer: bool(_note(place, maker)["stored"]))
    if not _note(place, maker)["stored"]:
        yield f"well again, and still not stored: {_note(place, maker)}"
    if len(_segs(place, maker)) != 1:
        yield f"{len(_segs(place, maker))} of it are in the PACS"
    yield from _still_here(place, maker)


def _still_here(place: Hospital, maker: SeriesMaker) -> Iterator[str]:
    answer = place.client.get("/datastore/label", params={"label": maker.uid, "tag": "final"})
    if not answer.is_success or not np.array_equal(_voxels(answer), _drawn(maker)):
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


# -- what came of it --------------------------------------------------------------------------------------------------


def holds(found: dict[str, Outcome]) -> bool:
    """Return whether every series came whole or was refused, others were answered meanwhile, and no label was lost."""
    return not any(outcome.wrong or outcome.slowest_info_s > MOST_INFO_S for outcome in found.values())


def report(found: dict[str, Outcome]) -> str:
    """Return a table of what came of each group."""
    rows = [
        (group, one.cases, one.whole, one.refused, ", ".join(sorted(one.codes)), len(one.wrong))
        for group, one in found.items()
    ]
    total = [sum(row[column] for row in rows) for column in (1, 2, 3, 5)]
    rows.append(("all", *total[:3], "", total[3]))
    return table(("what the PACS does", "cases", "whole", "refused", "as", "wrong"), rows)


def storing_report(stored: dict[str, Outcome]) -> str:
    """Return a table of what came of each label."""
    rows = [(name, "stored" if one.whole else "not stored yet", len(one.wrong)) for name, one in stored.items()]
    return table(("sent a label, the PACS", "what is said of it", "wrong"), rows)


def chosen_cases(every: int, kinds: Sequence[str] = tuple(KINDS)) -> Iterator[Case]:
    """Yield every so-manieth case of some kinds of series."""
    for number, kind in enumerate(kinds):
        yield from islice(cases(kind), number % every, None, every)


def main() -> None:
    """Try them all, and end with 1 if a series came with fewer slices, or anything else was wrong."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", str(__doc__))[0])
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK}th case")
    parser.add_argument("--every", type=int, default=1, help="only every so-manieth case")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind of series")
    options = parser.parse_args()
    started = time.monotonic()
    with hospital() as place:
        found = try_all(place, chosen_cases(QUICK if options.quick else options.every, options.kind or tuple(KINDS)))
        stored = store_all(place)
    figures = {group: vars(outcome) for group, outcome in {**found, **stored}.items()}
    path = keep(
        "pacs_faults_quick" if options.quick else "pacs_faults",
        {"seconds": round(time.monotonic() - started), "groups": figures},
    )
    print(report(found), storing_report(stored), sep="\n\n")
    print(f"slowest /info while an answer stalled: {max(one.slowest_info_s for one in found.values()):.2f} s")
    for group, outcome in {**found, **stored}.items():
        for problem in outcome.wrong[:40]:
            print(f"WRONG {group}: {problem[:400]}")
    print(f"figures: {path}")
    sys.exit(0 if holds({**found, **stored}) else 1)


if __name__ == "__main__":
    main()
