"""What changed since a folder's index was written whole: a line for each object, appended and synced.

To write the whole index for each change takes the longer the more images there are; a line does not. It reads

    <checksum> <index> {"image": ID, "is": what the index would say of it, or null}

with the first digits of the SHA-256 of the rest of the line, and of the index it changes: a line that was cut, or that
belongs to another index, is known by them. Of an image with files that are gone it says as well, as ``"absent"``, what
the index keeps of these. Each line tells all of its object, so one that is lost spoils no other.

Whoever reads the index reads these lines after it. It is written whole again once they are as long as it is, so that
each change has paid for its share; a last line with the digits of the new index says that all before it is in there. A
copy of an index is that index: lines go on from a backup too.

An error can come late, when what was written has its name already. What was to be written is then taken back; where
that fails as well, what the disk says decides, as it is what everybody reads from then on.

Everything here is called by whoever holds the folder's lock.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from lib.index_file import back_up_last, stamped
from mshub.atomic_file import replace_by_copy, replacing

logger = logging.getLogger(__name__)

SUFFIX = ".journal"
DIGITS = 16
LEAST_BYTES = 2**20
"""A journal that is shorter is not worth a new index."""

Facts = dict[str, Any] | None
Change = tuple[str, Facts, Facts]
"""An image, what the index says of it from now on, None if it is gone, and what it keeps of its files that are gone."""
_Entry = tuple[str, dict[str, Any]]


class IndexJournal:
    """An index and its journal, as far as they have been read.

    Parameters
    ----------
    index : Path
        The journal lies beside it.
    """

    def __init__(self, index: Path) -> None:
        self.index, self.path = index, index.with_suffix(SUFFIX)
        self._stamp: tuple[int, ...] | None = None
        self._digits = ""
        self._end = 0  # of what was read of the journal
        self._strange = self._doubtful = False

    def is_current(self) -> bool:
        """Return whether nothing was written since it was read last."""
        return _stamp(self.index) == self._stamp and _size(self.path) == self._end

    @property
    def must_be_whole(self) -> bool:
        """Whether a line would not do: there is no index to add it to, or the journal was damaged."""
        return self._stamp is None or self._doubtful or _stamp(self.index) is None

    @property
    def is_long(self) -> bool:
        """Whether it is time to write the index whole."""
        return self._stamp is not None and self._end > max(LEAST_BYTES, self._stamp[-1])

    def read_index(self) -> bytes | None:
        """Return the index, if it is another one than was read last; the journal is then read from its beginning."""
        found = _stamp(self.index)
        if found is None or found == self._stamp:
            return None
        content = self.index.read_bytes()
        digest = sha256(content).hexdigest()
        if digest[:DIGITS] == self._digits:  # only touched, or on a share that changes what it says of files
            self._stamp = found
            return None
        self._begin(found, digest)
        return content

    def forget(self) -> None:
        """Take the index for another one than was read: it is no good."""
        self._stamp, self._digits = None, ""

    def read_changes(self) -> list[Change]:
        """Return the changes that were appended since the journal was read last, the oldest first."""
        size = _size(self.path)
        if size < self._end:
            logger.error("%s was cut or removed: the index is written whole next time", self.path.name)
            self._doubtful, self._end = True, size
        if size == self._end:
            return []
        with self.path.open("rb") as stream:
            stream.seek(self._end)
            content = stream.read()
        lines = content.split(b"\n")[:-1]  # what follows the last line end was cut, and goes with the next change
        entries = [entry for entry in map(_entry, lines) if entry is not None]
        if len(entries) < len(lines):
            self._doubt(len(lines) - len(entries))
        ours = [entry for digits, entry in entries if digits == self._digits]
        if entries and not ours:
            self._strange = entries[-1][1].get("next") != self._digits
            return []
        self._end += sum(len(line) + 1 for line in lines)
        return [(entry["image"], entry["is"], entry.get("absent")) for entry in ours if "image" in entry]

    def append(self, changes: Iterable[Change]) -> None:
        """Store changes: all of them are on the disk afterwards, or none is and an `OSError` tells why."""
        self._write(b"".join(self._line(_told(*change)) for change in changes))

    def write_index(self, head: Mapping[str, Any], objects: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Write the index whole, and begin a new journal; the old index is there until the new one is.

        Parameters
        ----------
        head : mapping
            What the index says before its objects.
        objects : iterable of (str, mapping)
        """
        digest = sha256()
        try:
            with replacing(self.index) as stream:
                for part in _text(head, objects):
                    stream.write(part)
                    digest.update(part)
                if self._end:
                    self._write(self._line({"next": digest.hexdigest()[:DIGITS]}))
        except OSError as error:
            if sha256(_content(self.index)).digest() != digest.digest():
                raise
            logger.error("%s is written, though %s", self.index.name, error)
        back_up_last(self.index)
        try:
            self._retire()
        except OSError as error:  # its lines are of another index now: nobody reads them
            logger.error("%s is of no use any more, and cannot be removed: %s", self.path.name, error)
        self._begin(_stamp(self.index), digest.hexdigest())

    def _begin(self, stamp: tuple[int, ...] | None, digest: str) -> None:
        self._stamp, self._digits, self._end = stamp, digest[:DIGITS], 0
        self._strange = self._doubtful = False

    def _write(self, lines: bytes) -> None:
        if not self._end:
            self._retire()
        write = self._append if self._end else self._write_first
        try:
            write(lines)
        except BaseException as error:
            self._take_back()
            if not isinstance(error, OSError) or _content(self.path, self._end) != lines:
                raise
            logger.error("%s is written and cannot be taken back, though %s", self.path.name, error)
        self._end += len(lines)

    def _write_first(self, lines: bytes) -> None:
        with replacing(self.path) as stream:
            stream.write(lines)

    def _append(self, lines: bytes) -> None:
        with self.path.open("r+b", buffering=0) as stream:
            stream.truncate(self._end)
            stream.seek(self._end)
            _write_all(stream, lines)
            os.fsync(stream.fileno())

    def _take_back(self) -> None:
        """Let the journal be as it was before it was written to, where the disk still does that much."""
        with suppress(OSError):
            if self._end:
                os.truncate(self.path, self._end)
            else:
                self.path.unlink(missing_ok=True)

    def _line(self, entry: Mapping[str, Any]) -> bytes:
        rest = f"{self._digits} {_json(entry)}".encode()
        return b"%s %s\n" % (_checksum(rest), rest)

    def _doubt(self, lines: int) -> None:
        """Keep a damaged journal: what it told of some objects is known from earlier lines or not at all."""
        self._doubtful = True
        kept = stamped(self.path, "damaged")
        with suppress(OSError):
            replace_by_copy(self.path, kept)
        logger.error("%d lines of %s are damaged and left out; it is kept as %s", lines, self.path.name, kept.name)

    def _retire(self) -> None:
        """Remove a journal whose changes are in the index; keep one of another index under another name."""
        if self._strange:
            kept = stamped(self.path, "other")
            self.path.rename(kept)
            logger.error(
                "%s was written for another index than %s, which another program, or somebody, replaced: its changes "
                "are left out; it is kept as %s",
                *(self.path.name, self.index.name, kept.name),
            )
        self.path.unlink(missing_ok=True)
        self._strange = False


def _told(image: str, facts: Facts, absent: Facts) -> dict[str, Any]:
    return {"image": image, "is": facts, **({} if absent is None else {"absent": absent})}


def _text(head: Mapping[str, Any], objects: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[bytes]:
    """Yield an index piece by piece, an object a line."""
    yield f'{_json(head)[:-1]}, "objects": {{'.encode()
    for number, (image, facts) in enumerate(objects):
        yield f"{',' if number else ''}\n{_json(image)}: {_json(facts)}".encode()
    yield b"\n}}\n"


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, default=str)


def _entry(line: bytes) -> _Entry | None:
    """Return of which index a line is, and what it says; None for a damaged one."""
    checksum, _, rest = line.partition(b" ")
    if checksum != _checksum(rest):
        return None
    digits, _, text = rest.decode().partition(" ")
    return digits, json.loads(text)


def _checksum(rest: bytes) -> bytes:
    return sha256(rest).hexdigest()[:DIGITS].encode()


def _write_all(stream: BinaryIO | Any, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[stream.write(left) :]


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is replaced or written to, its size last; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def _content(path: Path, start: int = 0) -> bytes:
    """Return what is in a file from a byte on; nothing if it cannot be read."""
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read()
    except OSError:
        return b""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
