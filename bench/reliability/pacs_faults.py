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
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import httpx
import numpy as np

from arena import keep, table
from pacs_arena import Hospital, Outcome, hospital, patiently, voxels_of
from pacs_case import KINDS, Case
from storing_faults import store_all, storing_report
from wrong_pacs import Shelf
from wrong_series import cases

SEEN_S = 2.1
"""For so long the server may take what it was told for new."""
MOST_INFO_S = 1.0
QUICK = 23
"""Every so many cases are tried with ``--quick``."""
REFUSALS = {*range(400, 500), 502, 503, 504}


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
    answer = patiently(lambda: place.image(case.maker.uid), lambda answer: answer.is_success)
    if not answer.is_success or voxels_of(answer).shape[2] != case.before:
        yield f"the first {case.before} slices do not come: {answer.status_code}"


def _judged(answer: httpx.Response, case: Case) -> Iterator[str]:
    """Yield what is wrong with an answer: neither the whole volume nor a refusal that says why."""
    if answer.is_success:
        voxels, expected = voxels_of(answer), case.maker.stored()
        if voxels.shape != expected.shape:
            yield f"OTHER SHAPE {voxels.shape} instead of {expected.shape}"
        elif not np.array_equal(voxels, expected):
            yield "OTHER VOXELS"
        return
    said = answer.json().get("detail", "") if "json" in answer.headers.get("content-type", "") else ""
    if answer.status_code not in REFUSALS or not answer.headers.get("X-MSHub-Error") or len(str(said).split()) < 4:
        yield f"answered {answer.status_code} {answer.headers.get('X-MSHub-Error')}: {answer.text[:200]}"


def _well_again(place: Hospital, case: Case) -> Iterator[str]:
    def is_whole(answer: httpx.Response) -> bool:
        return not list(_judged(answer, case)) and answer.is_success

    answer = patiently(lambda: place.image(case.maker.uid), is_whole)
    if not is_whole(answer):
        said = answer.text[:200] if not answer.is_success else list(_judged(answer, case))
        yield f"well again, and still {answer.status_code}: {said}"


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
