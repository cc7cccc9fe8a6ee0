"""Files that are the old one or the whole new one at any moment: written beside, synced, renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

_PART = re.compile(r"\.[0-9a-f]{32}\.part")


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """Write beside `path` and rename over it once everything is on disk; an error leaves the old file.

    A `private` file is one that only its owner can read, from its first byte on.
    """
    part = path.with_name(f".{uuid4().hex}.part")
    try:
        with open(part, "xb", opener=for_the_owner if private else None) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    """Remove a file that nobody will get if what is done with it in the block fails."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Bring a renaming onto the disk: without it a power cut can undo what was acknowledged."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such thing
            raise
    finally:
        os.close(opened)


def remove_unfinished(folders: Iterable[Path], unused_s: float) -> int:
    """Remove what killed writers left in folders: files that nobody wrote to for so long. Returns how many."""
    removed = 0
    for folder in folders:
        for path in folder.glob(".*.part"):
            try:
                if _PART.fullmatch(path.name) and time.time() - path.lstat().st_mtime >= unused_s:
                    path.unlink()
                    removed += 1
            except OSError:  # somebody else was faster, or may and we may not
                continue
    return removed


def for_the_owner(path: str, flags: int) -> int:
    """Open a file that only its owner can read: an ``opener`` of `open`."""
    return os.open(path, flags, 0o600)


def replace_text(path: Path, text: str, *, private: bool = False) -> None:
    """Replace a file by `text` in UTF-8; its folder is made if needed. `private` as for `replacing`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, private=private) as stream:
        stream.write(text.encode("utf-8"))


def replace_json(path: Path, content: Any, *, private: bool = False) -> None:
    """Replace a file by `content` as indented JSON; what JSON does not know is written as text."""
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", private=private)


def replace_by_copy(source: Path, target: Path) -> None:
    """Replace `target` by a copy of `source`; its folder is made if needed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, replacing(target) as written:
        shutil.copyfileobj(read, written)
