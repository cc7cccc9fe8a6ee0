"""Files nobody may touch: what is in them, and every opening, reading and writing of them while one looks.

Linux only: inotify tells of each.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_ACCESS, _MODIFY, _ATTRIB, _WRITTEN, _OPEN = 0x1, 0x2, 0x4, 0x8, 0x20
_FROM, _TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_ALL = _ACCESS | _MODIFY | _ATTRIB | _WRITTEN | _OPEN | _FROM | _TO | _CREATE | _DELETE
_NAMES = {
    _ACCESS: "read", _MODIFY: "written", _ATTRIB: "changed", _WRITTEN: "written", _OPEN: "opened",
    _FROM: "moved", _TO: "moved here", _CREATE: "made", _DELETE: "removed",
}  # fmt: skip
_EVENT = struct.Struct("iIII")


class Watch:
    """Tells what happens in folders to what has a mark in its name.

    Parameters
    ----------
    folders : iterable of Path
        Each alone, without what is below it.
    mark : str
    """

    def __init__(self, folders: Iterable[Path], mark: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._mark = mark
        self._file = libc.inotify_init1(os.O_NONBLOCK)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "this system cannot watch files")
        self._folders = {
            libc.inotify_add_watch(self._file, os.fsencode(folder), ctypes.c_uint32(_ALL)): folder for folder in folders
        }

    def happened(self) -> list[str]:
        """Return what happened since this was asked last, such as ``opened FOLDER/canary.txt``."""
        found = []
        while True:
            try:
                block = os.read(self._file, 2**20)
            except BlockingIOError:
                return list(dict.fromkeys(found))
            found += self._told(block)

    def _told(self, block: bytes) -> Iterable[str]:
        at = 0
        while at < len(block):
            watch, mask, _, length = _EVENT.unpack_from(block, at)
            name = os.fsdecode(block[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0"))
            at += _EVENT.size + length
            if self._mark in name:
                what = next((word for bit, word in _NAMES.items() if mask & bit), hex(mask))
                yield f"{what} {self._folders[watch] / name}"

    def close(self) -> None:
        """Look no more."""
        os.close(self._file)


def snapshot(folder: Path, but: Iterable[Path] = ()) -> dict[str, str]:
    """Return what is below a folder, byte for byte, without some of its folders."""
    left_out, found = set(but), dict[str, str]()
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(place) / name not in left_out]
        for name in (*folders, *files):
            path = Path(place) / name
            if path not in left_out:
                is_file = path.is_file() and not path.is_symlink()
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else "-"
    return found
