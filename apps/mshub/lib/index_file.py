"""The index of a studies folder, which says whose labels are whose: backed up, and taken from there if damaged.

There is a copy of when it was last written whole, and one of each of the last days. What changed since is in its
journal (`lib.index_journal`), which goes on from such a copy as well.

What is written is whole or not written at all (`mshub.atomic_file`); damaged it is by disks, by editors and by programs
other than this one.
"""

from __future__ import annotations

import json
import logging
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mshub.atomic_file import replace_by_copy

logger = logging.getLogger(__name__)

INDEX = "datastore_v2.json"  # MONAI Label's name for it
DAYS = 7


def back_up(index: Path) -> None:
    """Keep a copy of today's index, beside those of the last days on which there was one."""
    copy = index.with_name(f"{index.stem}.{datetime.now(timezone.utc):%Y%m%d}.bak")
    if copy.exists() or not _is_readable(index):
        return
    _copy(index, copy)
    for old in _daily(index)[DAYS:]:
        old.unlink(missing_ok=True)


def back_up_last(index: Path) -> None:
    """Keep a copy of the index after it was written whole: what is known of a label stands nowhere else."""
    _copy(index, index.with_name(f"{index.stem}.last.bak"))


def recover(index: Path) -> bool:
    """Put the newest readable backup in the place of a damaged index, which is kept under another name.

    Without a backup the images are found again in the folder, and the labels by their names; what was known of them
    is not. Returns whether the index was damaged.
    """
    if not index.exists() or _is_readable(index):
        return False
    damaged = stamped(index, "damaged")
    index.rename(damaged)
    known = sorted(index.parent.glob(f"{index.stem}.*.bak"), key=lambda copy: copy.stat().st_mtime, reverse=True)
    backup = next((copy for copy in known if _is_readable(copy)), None)
    if backup is None:
        logger.error(
            "%s is damaged and there is no backup: it is %s now, and a new one is made from the files in the folder",
            index.name,
            damaged.name,
        )
        return True
    replace_by_copy(backup, index)
    logger.error("%s is damaged: it is %s now, and %s takes its place", index.name, damaged.name, backup.name)
    return True


def stamped(path: Path, why: str) -> Path:
    """Return the name under which a file is kept that is of no use as it is: with the time, and why."""
    return path.with_name(f"{path.name}.{datetime.now(timezone.utc):%Y%m%dT%H%M%S}.{why}")


def plain(value: Any) -> Any:
    """Return what JSON can hold of a value: numbers that are none become None; one of them would spoil the index."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def _copy(index: Path, copy: Path) -> None:
    try:
        replace_by_copy(index, copy)
    except OSError as error:
        logger.warning("the index is not backed up: %s", error)


def _daily(index: Path) -> list[Path]:
    """Return the backups of days, newest first."""
    return sorted(index.parent.glob(f"{index.stem}.[0-9]*.bak"), reverse=True)


def _is_readable(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("objects"), dict)
