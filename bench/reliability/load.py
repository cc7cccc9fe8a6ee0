"""Clients with mixed requests beside long predictions: is the server still quick to answer, and is nothing lost?

    python bench/reliability/load.py           # 8 clients x 200 requests, 4 predictions of 30 s each
    python bench/reliability/load.py --quick   # 4 clients x 25 requests, 2 predictions of 3 s each

A server with users, as many threads as it takes of itself, and the clients on the same machine. Somebody asks
``/info/`` twenty times a second for as long as the predictions run. Nothing may be lost: each request gets the answer
it should get, after a 503 with ``Retry-After`` too, and each label that was acknowledged is there afterwards, byte for
byte.
Figures: bench/out/reliability/load.json.
"""

from __future__ import annotations

import argparse
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from typing import Any

import httpx

from arena import CASES, MODEL, Arena, arena, conclude, table
from factories import make_image
from traffic import TIMEOUT_S, Journal, Person, crowd, kinds_of, latencies, percentile

MOST_INFO_S = 0.2
EVERY_S = 0.05
TRIAL_SHAPE = (48, 48, 24)


class LongPredictions:
    """Predictions of a length one chooses, each of an image of its own.

    Parameters
    ----------
    place : Arena
    count : int
    seconds : float
        How long each should take, were it alone.
    """

    def __init__(self, place: Arena, count: int, seconds: float) -> None:
        headers = {"Authorization": f"Bearer {place.token}"}
        self._client = httpx.Client(base_url=place.server.url, headers=headers, timeout=TIMEOUT_S)
        trial = self._made(place, "trial", TRIAL_SHAPE[2])
        self._predict(CASES[0])
        slices = ceil(TRIAL_SHAPE[2] * seconds / self._predict(trial))
        self.images = [self._made(place, f"long{number}", slices) for number in range(count)]
        self.seconds: list[float] = []

    def _made(self, place: Arena, name: str, slices: int) -> str:
        make_image(place.folder / f"{name}.nii.gz", (*TRIAL_SHAPE[:2], slices), seed=len(name))
        with (place.folder / f"{name}.nii.gz").open("rb") as content:
            self._client.put(f"/datastore/image?image={name}", files={"file": (f"{name}.nii.gz", content)})
        return name

    def _predict(self, name: str) -> float:
        started = time.monotonic()
        query = f"/infer/{MODEL}?image={name}&output=image"
        answer = self._client.post(query, data={"params": '{"profile": "accurate"}'})
        answer.raise_for_status()
        return time.monotonic() - started

    def run(self, name: str) -> None:
        """Predict one of `images`, and note how long it took, waiting for the others included."""
        self.seconds.append(self._predict(name))


def watch_info(place: Arena, ended: threading.Event, journal: Journal) -> None:
    """Ask for ``/info/`` until something ends."""
    with httpx.Client(base_url=place.server.url, headers={"Authorization": f"Bearer {place.token}"}) as client:
        while not ended.wait(EVERY_S):
            started = time.monotonic()
            status = client.get("/info/", timeout=TIMEOUT_S).status_code
            journal.took("info, while predictions run", time.monotonic() - started)
            if status != httpx.codes.OK:
                journal.went_wrong(f"info: {status}")


def work(place: Arena, people: Sequence[Person], requests: int, predictions: LongPredictions, journal: Journal) -> None:
    """Let all of them work at once, until the last is done."""
    ended = threading.Event()
    with ThreadPoolExecutor(len(people) + len(predictions.images) + 1) as pool:
        watching = pool.submit(watch_info, place, ended, journal)
        try:
            working = [pool.submit(predictions.run, name) for name in predictions.images]
            working += [pool.submit(person.work, requests) for person in people]
            for one in working:
                one.result()
        finally:
            ended.set()
        watching.result()


def measure(place: Arena, clients: int, requests: int, count: int, seconds: float) -> dict[str, Any]:
    """Let `clients` send so many `requests` each, and `count` predictions of `seconds` run; returns the figures."""
    journal, predictions = Journal(), LongPredictions(place, count, seconds)
    people = crowd(place, "client", clients, journal)
    started = time.monotonic()
    work(place, people, requests, predictions, journal)
    took = time.monotonic() - started
    asked = [value for kind, values in journal.seconds.items() if kind.startswith("info") for value in values]
    return {
        "clients": clients,
        "requests": journal.requests,
        "seconds": round(took),
        "long_predictions_s": [round(value, 1) for value in sorted(predictions.seconds)],
        "info_requests": len(asked),
        "info_p99_ms": round(1000 * percentile(asked, 99)),
        "info_most_ms": round(1000 * max(asked)),
        "busy": journal.busy,
        "wrong": kinds_of(journal.wrong),
        "labels": sum(len(person.labels) for person in people),
        "labels_lost": sum(person.check() for person in people),
        "latencies": latencies(journal),
    }


def holds(figures: dict[str, Any]) -> bool:
    """Return whether nothing was lost, and the server was quick to answer."""
    return not figures["wrong"] and not figures["labels_lost"] and figures["info_p99_ms"] < 1000 * MOST_INFO_S


def report(figures: dict[str, Any]) -> str:
    """Return the figures as tables."""
    rows = [
        ("clients, their requests and those for `/info/`", f"{figures['clients']}, {figures['requests']}"),
        ("long predictions, waiting for the others included", f"{figures['long_predictions_s']} s"),
        ("all of it", f"{figures['seconds']} s"),
        ("requests that did not end as they should", sum(figures["wrong"].values())),
        ("answered 503 with `Retry-After`, and sent again", figures["busy"]),
        ("labels acknowledged, lost", f"{figures['labels']}, {figures['labels_lost']}"),
        ("`/info/`: requests", figures["info_requests"]),
        ("`/info/`: 99 of 100 within, slowest", f"{figures['info_p99_ms']} ms, {figures['info_most_ms']} ms"),
    ]
    head = ("request", "times", "median ms", "99 of 100 within, ms", "most ms")
    return f"{table(('what', 'found'), rows)}\n\n{table(head, figures['latencies'])}"


def main() -> None:
    """Measure, and end with 1 if anything was lost or slow."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", str(__doc__))[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter")
    options = parser.parse_args()
    with arena(has_users=True, threads=0) as place:
        figures = measure(place, *((4, 25, 2, 3.0) if options.quick else (8, 200, 4, 30.0)))
    conclude("load_quick" if options.quick else "load", figures, report(figures), held=holds(figures))


if __name__ == "__main__":
    main()
