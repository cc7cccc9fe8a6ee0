"""Kill -9 at random moments of everything the server stores, and disks that get full: nothing that was told is lost.

    python bench/reliability/kill.py               # 500 kills and 20 disk-full levels; some minutes
    python bench/reliability/kill.py --quick       # 40 kills, 5 levels
    python bench/reliability/kill.py --count 100   # so many kills

A child does one kind of work of the server's own code (labels, index, sessions, versions of models, series of a PACS)
again and again, and says through a pipe what a client would have been told. It is killed at a random moment, some of
them while it starts. Then the same folder is opened again: the index can be read, all that was told is there, byte for
byte and under its own names, and once the janitor has swept (with two days passed) nothing unfinished is left.

For the full disks a small file system in memory is filled up to a level, which takes root; without, that part is
skipped. Figures: bench/out/reliability/kill.json.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from arena import keep, table
from kill_work import KINDS, Told, Work, short_journals
from lib import free_space
from mshub.errors import MSHubError

LONGEST_S = {"save_label": 0.25, "index": 0.1, "session": 0.15, "publish": 0.5, "download": 0.4}
"""A child is killed within so many seconds after it is open."""
EARLY = 0.1
"""This share of the children is killed while it starts."""
DISK_BYTES = 24 * 2**20
LEVELS = (*(0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096),)  # KiB free
WRITES = 8
FULL = (errno.ENOSPC, errno.EDQUOT)


# -- kills ------------------------------------------------------------------------------------------------------------


@short_journals()
def work_until_killed(kind: str, folder: Path, scratch: Path, first: int, says: Connection) -> None:
    """Do one kind of work, and say what was done; the child's program."""
    work = KINDS[kind](folder, scratch)
    work.restart()
    says.send("open")
    for number in range(first, sys.maxsize):
        says.send(work.do(number))


@short_journals()
def kills(folder: Path, count: int, seed: int = 20) -> dict[str, Any]:
    """Kill `count` children, the kinds in turn; returns the figures."""
    processes = _nursery()
    chance, figures = random.Random(seed), Counter(kills=0, told=0, unreadable=0, lost=0, left=0)
    scratch = folder / "scratch"
    scratch.mkdir()
    works, told, problems = _prepared(folder, scratch), {kind: list[Told]() for kind in KINDS}, list[str]()
    moments: Counter[str] = Counter()
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        receiver, sender = processes.Pipe(duplex=False)
        child = processes.Process(
            target=work_until_killed, args=(kind, folder / kind, scratch, number * 10_000, sender)
        )
        child.start()
        sender.close()
        moments[_kill(child, receiver, chance, LONGEST_S[kind])] += 1
        new = list(_rest(receiver))
        told[kind] += new
        figures.update(kills=1, told=len(new))
        for problem in _judged(works[kind], told[kind], figures):
            problems.append(f"kill {number} of {kind}: {problem}")
    return {**figures, "moments": dict(moments), "told_of": {k: len(v) for k, v in told.items()}, "problems": problems}


def _nursery() -> Any:
    """Return what starts children that need not import anything: they are forked from a process that has."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["kill_work"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return processes


def _prepared(folder: Path, scratch: Path) -> dict[str, Work]:
    works = {kind: make(folder / kind, scratch) for kind, make in KINDS.items()}
    for work in works.values():
        work.prepare()
        work.restart()
    return works


def _kill(child: Any, receiver: Connection, chance: random.Random, longest_s: float) -> str:
    """Kill a child at a random moment; returns whether it was starting or working."""
    early = chance.random() < EARLY
    if early or (receiver.poll(60) and receiver.recv() == "open"):
        time.sleep(chance.uniform(0, longest_s))
    if child.exitcode is not None:
        raise RuntimeError(f"a child ended by itself, with {child.exitcode}")
    child.kill()
    child.join()
    return "while it started" if early else "while it worked"


def _rest(receiver: Connection) -> Iterator[Told]:
    """Yield what a child that is gone has said."""
    try:
        while receiver.poll(0):
            said = receiver.recv()
            if said != "open":
                yield said
    except (EOFError, OSError):  # the last message was cut
        return


def _judged(work: Work, told: list[Told], figures: Counter[str]) -> list[str]:
    """Open a folder again and look whether all is there; returns what is not."""
    try:
        work.restart()
    except Exception as error:
        figures.update(unreadable=1)
        return [f"it does not open: {type(error).__name__}: {error}"]
    try:
        lost = work.check(told)
    except (MSHubError, OSError, ValueError) as error:
        lost = [f"{type(error).__name__}: {error}"]
    left = work.sweep()
    figures.update(lost=len(lost), left=len(left))
    return [*lost, *(f"left: {name}" for name in left)]


# -- full disks -------------------------------------------------------------------------------------------------------


class NoSmallDisk(Exception):
    """There is no way to make a small file system here."""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Yield the mount point of a file system of `DISK_BYTES` in memory."""
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoSmallDisk("a file system in memory takes root and mount(8), which are not here") from error
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@short_journals()
def full_disks(folder: Path, levels: tuple[int, ...]) -> dict[str, Any]:
    """Fill a small disk to each level and go on storing; returns the figures.

    The server's own reserve is taken away, as if others had filled the disk after it looked.
    """
    figures, problems = Counter(levels=0, told=0, refused=0, unreadable=0, lost=0, left=0, recovered=0), list[str]()
    reserve, free_space.RESERVE_BYTES = free_space.RESERVE_BYTES, 0
    try:
        for level in levels:
            with small_disk(folder / f"disk{level}") as disk:
                problems += [f"{level} KiB free: {problem}" for problem in _one_level(disk, level, figures)]
    except NoSmallDisk as error:
        return {"skipped": str(error)}
    finally:
        free_space.RESERVE_BYTES = reserve
    return {**figures, "problems": problems}


def _one_level(disk: Path, level: int, figures: Counter[str]) -> list[str]:
    works, told, problems = _prepared(disk, disk.parent), {kind: list[Told]() for kind in KINDS}, list[str]()
    for kind, work in works.items():
        told[kind].append(work.do(0))
    filler = disk / "filler"
    for kind, work in works.items():
        _fill(filler, level * 1024)
        for number in range(1, WRITES):
            try:
                told[kind].append(work.do(number))
            except Exception as error:
                figures.update(refused=1)
                if not _says_full(error):
                    problems.append(f"{kind}: {type(error).__name__}: {error}")
        problems += [f"{kind}, full: {problem}" for problem in _judged(work, told[kind], figures)]
        filler.unlink()
        problems += [f"{kind}, free again: {problem}" for problem in _judged(work, told[kind], figures)]
        told[kind].append(work.do(WRITES))
        problems += [f"{kind}, after it: {problem}" for problem in _judged(work, told[kind], figures)]
        figures.update(recovered=1)
    figures.update(levels=1, told=sum(len(one) for one in told.values()))
    return problems


def _fill(filler: Path, leave: int) -> None:
    """Write a file until so many bytes are free."""
    with filler.open("wb", buffering=0) as file:
        free = free_space.free_bytes(filler.parent)
        file.write(bytes(max(0, free - leave)))


def _says_full(error: BaseException | None) -> bool:
    """Return whether an error, or one it comes from, is that of a full disk."""
    while error is not None:
        if isinstance(error, HTTPException) and error.status_code == 507:
            return True
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, MSHubError) and "space" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


# -- both -------------------------------------------------------------------------------------------------------------


def holds(figures: dict[str, Any]) -> bool:
    """Return whether nothing was lost, and every folder opened again."""
    parts = [part for part in (figures["kills"], figures["full_disks"]) if "skipped" not in part]
    return all(not part["problems"] and not (part["unreadable"] + part["lost"] + part["left"]) for part in parts)


def report(figures: dict[str, Any]) -> str:
    """Return the figures as a table."""
    killed, full = figures["kills"], figures["full_disks"]
    rows = [
        ("kill -9", killed["kills"], killed["told"], killed["unreadable"], killed["lost"], killed["left"]),
        ("full disks: skipped", full["skipped"], "", "", "", "")
        if "skipped" in full
        else ("disk-full levels", full["levels"], full["told"], full["unreadable"], full["lost"], full["left"]),
    ]
    return table(("what", "times", "told as stored", "did not open again", "lost", "unfinished files left"), rows)


def main() -> None:
    """Kill and fill, and end with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", str(__doc__))[0])
    parser.add_argument("--count", type=int, default=500, help="kills")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="40 kills, 5 levels")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mshub-bench-") as name:
        folder = Path(name)
        figures: dict[str, Any] = {
            "kills": kills(folder, 40 if options.quick else options.count, options.seed),
            "full_disks": full_disks(folder, LEVELS[::4] if options.quick else LEVELS),
        }
    figures["seconds"] = round(time.monotonic() - started)
    path = keep("kill_quick" if options.quick else "kill", figures)
    print(report(figures))
    for problem in [*figures["kills"]["problems"], *figures["full_disks"].get("problems", [])][:40]:
        print(f"WRONG {problem[:300]}")
    print(f"figures: {path}")
    sys.exit(0 if holds(figures) else 1)


if __name__ == "__main__":
    main()
