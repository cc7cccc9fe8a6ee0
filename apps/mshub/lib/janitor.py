"""What piles up on a server's disk, and who sweeps it: copies of series, prepared networks, what a kill left behind."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

EVERY_S = 3600.0
ABANDONED_S = 24 * 3600.0
"""Temporary files that nobody changed for so long belong to a server that was killed."""
TEMPORARY = re.compile(r"mshub-(results|export|reading)-\w{8}(\.[a-z.]+)?")
"""What MSHub calls its temporary files and folders: a folder of somebody's own may begin with mshub as well."""


class Janitor:
    """Sweeps every hour, in a thread that ends with the process.

    Parameters
    ----------
    tasks : iterable of callable
        Each returns what it removed, as a sentence, or nothing.
    """

    def __init__(self, tasks: Iterable[Callable[[], str]]) -> None:
        self._tasks = tuple(tasks)

    def start(self) -> None:
        """Sweep now and from now on."""
        threading.Thread(target=self._work, name="janitor", daemon=True).start()

    def sweep(self) -> None:
        """Do every task; one that fails is told in the log and keeps the others from nothing."""
        for task in self._tasks:
            try:
                if said := task():
                    logger.info("swept: %s", said)
            except Exception:
                logger.exception("the janitor could not do one of its tasks")

    def _work(self) -> None:
        while True:
            self.sweep()
            time.sleep(EVERY_S)


def trim(folder: Path, most_bytes: int, unused_s: float = ABANDONED_S) -> str:
    """Remove the files of a folder that were changed longest ago, until the others take no more than `most_bytes`.

    Files that were changed within `unused_s` stay in any case.
    """
    known = [(path, path.stat()) for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
    total, removed = sum(found.st_size for _, found in known), 0
    for path, found in sorted(known, key=lambda one: one[1].st_mtime):
        if total <= most_bytes or time.time() - found.st_mtime < unused_s:
            break
        path.unlink(missing_ok=True)
        total, removed = total - found.st_size, removed + 1
    return f"{removed} files of {folder.name}" if removed else ""


def remove_abandoned(folder: Path | None = None, unused_s: float = ABANDONED_S) -> str:
    """Remove what servers that were killed left in the folder of temporary files.

    A server that lives says so of its own by changing the folder's time, see `keep`.
    """
    folder, removed = folder or Path(tempfile.gettempdir()), 0
    for path in (path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)):
        try:
            if time.time() - _changed(path) < unused_s or path.is_symlink():
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed += 1
        except OSError:  # somebody else's
            continue
    return f"{removed} temporary files" if removed else ""


def keep(folder: Path) -> str:
    """Tell the janitors of this machine that a temporary folder is in use, though nothing changes in it."""
    folder.touch()
    return ""


def _changed(path: Path) -> float:
    """Return when a file, or anything in a folder, was changed last."""
    inside = [one.lstat().st_mtime for one in path.rglob("*")] if path.is_dir() else []
    return max([path.lstat().st_mtime, *inside])
