"""A long day: people work on a server for hours; its memory, threads and open files do not grow.

    python bench/reliability/soak.py                # 2 hours
    python bench/reliability/soak.py --minutes 20

A server with users, four people who send a request every second or so, of all kinds, some refused, some given up before
they are answered. Once a minute it is noted what the server and its children hold. After a quarter of the time, in
which caches fill, the mean of the first third of what is left is compared with that of the last third: none may have
grown by more than 5 %, and by half of one. (A median of a dozen threads jumps by 9 % with a single one that half of the
looks happen to find; files that are on their way are a tenth of one.) Figures: bench/out/reliability/soak.json.
"""

from __future__ import annotations

import argparse
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import psutil

from arena import MIB, Arena, arena, conclude, table
from traffic import Journal, Person, crowd, kinds_of, latencies, percentile

MOST_GROWTH, NOISE = 0.05, 0.5
"""Of it all, and of a thread or a file: less is none."""
PEOPLE = 4
PAUSE_S = 1.0
HANG_UP_EVERY = 20
HELD = {"rss_mb": "memory, MB", "threads": "threads", "files": "open files and sockets", "temporary": "temporary files"}


@dataclass(frozen=True)
class Sample:
    """What the server and its children hold at a moment.

    Attributes
    ----------
    minute : float
    rss_mb, threads, files, temporary : float
        `HELD` says what each is.
    """

    minute: float
    rss_mb: float
    threads: int
    files: int
    temporary: int


def sample(place: Arena, minute: float) -> Sample:
    """Look at a server."""
    rss = threads = files = 0
    for process in (place.process, *place.process.children(recursive=True)):
        try:
            with process.oneshot():
                rss, threads = rss + process.memory_info().rss, threads + process.num_threads()
                files += process.num_fds()
        except psutil.NoSuchProcess:
            continue
    return Sample(round(minute, 2), round(rss / MIB, 1), threads, files, len(place.left_over()))


def live(person: Person, ended: threading.Event) -> None:
    """Send requests of all kinds, with pauses, until something ends."""
    person.begin()
    done = 0
    while not ended.wait(person.chance.uniform(0, 2 * PAUSE_S)):
        done += 1
        person.hang_up() if done % HANG_UP_EVERY == 0 else person.one_thing()


def soak(place: Arena, minutes: float, every_s: float = 60.0) -> dict[str, Any]:
    """Let people work for so long; returns the figures."""
    journal = Journal()
    people = crowd(place, "person", PEOPLE, journal)
    samples = watched(place, people, minutes, every_s)
    info = journal.seconds["info"]
    return {
        "minutes": minutes,
        "requests": journal.requests,
        "wrong": kinds_of(journal.wrong),
        "labels": sum(len(person.labels) for person in people),
        "labels_lost": sum(person.check() for person in people),
        "info_p99_ms": round(1000 * percentile(info, 99)),
        "grown": {what: growth([getattr(one, what) for one in samples]) for what in HELD},
        "latencies": latencies(journal),
        "samples": [asdict(one) for one in samples],
    }


def watched(place: Arena, people: Sequence[Person], minutes: float, every_s: float) -> list[Sample]:
    """Return what the server held every so many seconds, while people worked on it."""
    ended, samples, started = threading.Event(), list[Sample](), time.monotonic()
    with ThreadPoolExecutor(len(people)) as pool:
        working = [pool.submit(live, person, ended) for person in people]
        try:
            while (at := time.monotonic() - started) < 60 * minutes and not any(one.done() for one in working):
                samples.append(sample(place, at / 60))
                time.sleep(every_s)
        finally:
            ended.set()
        for one in working:
            one.result()
    return samples


def growth(held: Sequence[float]) -> dict[str, float]:
    """Return means of early and late, a first quarter left out, and by how many per cent the late one is more."""
    settled = held[len(held) // 4 :]
    third = max(1, len(settled) // 3)
    early, late = fmean(settled[:third]), fmean(settled[-third:])
    return {"early": round(early, 1), "late": round(late, 1), "percent": round(100 * (late - early) / max(early, 1), 1)}


def holds(figures: dict[str, Any]) -> bool:
    """Return whether nothing grew, and nothing was lost."""
    grown = figures["grown"].values()
    flat = all(one["percent"] <= 100 * MOST_GROWTH or one["late"] - one["early"] < NOISE for one in grown)
    return flat and not figures["wrong"] and not figures["labels_lost"]


def report(figures: dict[str, Any]) -> str:
    """Return the figures as tables."""
    rows = [
        ("minutes, requests", f"{figures['minutes']}, {figures['requests']}"),
        ("requests that did not end as they should", sum(figures["wrong"].values())),
        ("labels acknowledged, lost", f"{figures['labels']}, {figures['labels_lost']}"),
        ("`/info/`: 99 of 100 within", f"{figures['info_p99_ms']} ms"),
    ]
    grown = [
        (HELD[what], found["early"], found["late"], f"{found['percent']:+} %")
        for what, found in figures["grown"].items()
    ]
    held = table(("what the server holds", "early", "late", "grown"), grown)
    return f"{table(('what', 'found'), rows)}\n\n{held}"


def main() -> None:
    """Let them work, and end with 1 if anything grew or was lost."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", str(__doc__))[0])
    parser.add_argument("--minutes", type=float, default=120)
    options = parser.parse_args()
    with arena(has_users=True) as place:
        figures = soak(place, options.minutes)
    conclude("soak", figures, report(figures), held=holds(figures))


if __name__ == "__main__":
    main()
