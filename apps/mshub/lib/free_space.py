"""Space on a disk: what is asked before something is stored, so that a full disk is an answer and not half a file."""

from __future__ import annotations

import shutil
from pathlib import Path

from mshub.errors import StorageFull

RESERVE_BYTES = 256 * 2**20
"""So much stays free for indexes, logs and trainings' checkpoints."""


def free_bytes(folder: Path) -> int:
    """Return the space left where a folder is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return int(shutil.disk_usage(folder).free)


def check_space(folder: Path, nbytes: int) -> None:
    """Refuse what the disk has no room for.

    Raises
    ------
    StorageFull
        After it, less than `RESERVE_BYTES` would be left.
    """
    free = free_bytes(folder)
    if free < nbytes + RESERVE_BYTES:
        raise StorageFull(
            f"The server's disk has {free / 1e6:,.0f} MB left; this needs {nbytes / 1e6:,.0f} MB, and "
            f"{RESERVE_BYTES / 1e6:,.0f} MB have to stay. Nothing was stored: free some space and try again."
        )
