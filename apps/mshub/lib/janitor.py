"""What piles up on a server's disk, and who sweeps it: copies of series, prepared networks, what a kill left behind."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mshub.atomic_file import remove_unfinished

logger = logging.getLogger(__name__)

EVERY_S = 3600.0
ABANDONED_S = 24 * 3600.0
"""Temporary files that nobody changed for so long belong to a server that was killed."""
UNFINISHED_S = 3600.0
"""Files that are renamed once they are whole, and that nobody wrote to for so long, never will be."""
SERVER = "mshub-server-"
TEMPORARY = re.compile(r"mshub-(server|results|export|reading|upload|label)-\w{8}(\.[a-z.]+)?")
"""What MSHub calls its temporary files and folders: a folder of somebody's own may begin with mshub as well."""
ANYTHING = re.compile(".*")


class Janitor:
    """Sweeps every hour, or as often as is said, in a thread that ends with the process.

    Parameters
    ----------
    tasks : iterable of callable
        Each returns what it removed, as a sentence, or nothing.
    every_s : float
    """

    def __init__(self, tasks: Iterable[Callable[[], str]], every_s: float = EVERY_S) -> None:
        self._tasks, self._every_s = tuple(tasks), every_s

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
            time.sleep(self._every_s)


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


@contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """Give this process a folder for its temporary files: uploads are in nobody's way, and gone when it ends.

    One that is killed leaves its folder, which `remove_abandoned` knows by its name.
    """
    before, folder = tempfile.tempdir, Path(tempfile.mkdtemp(prefix=SERVER))
    tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


def unfinished(folders: Callable[[], Iterable[Path]]) -> str:
    """Remove what was being written when a server was killed."""
    removed = remove_unfinished(folders(), UNFINISHED_S)
    return f"{removed} unfinished files" if removed else ""


def folders_below(folder: Path) -> Iterator[Path]:
    """Yield a folder and all in it."""
    return (Path(path) for path, _, _ in os.walk(folder))


def remove_abandoned(
    folder: Path | None = None, unused_s: float = ABANDONED_S, names: re.Pattern[str] = TEMPORARY
) -> str:
    """Remove what servers that were killed left in the folder of temporary files, or in another one.

    A server that lives says so of its own by changing the time of a folder in it, see `keep`.
    """
    folder, removed = folder or _shared_temporary_folder(), 0
    for path in [path for path in folder.glob("*") if names.fullmatch(path.name)]:
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


def _shared_temporary_folder() -> Path:
    folder = Path(tempfile.gettempdir())
    return folder.parent if folder.name.startswith(SERVER) else folder


def _changed(path: Path) -> float:
    """Return when a file, or anything in a folder, was changed last."""
    inside = [one.lstat().st_mtime for one in path.rglob("*")] if path.is_dir() else []
    return max([path.lstat().st_mtime, *inside])
