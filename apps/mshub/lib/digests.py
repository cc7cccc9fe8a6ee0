"""Digests of reviewed cases, each computed once for as long as its files stay the same.

A case is read whole for it, which takes minutes where there are many new ones: nobody who only asks waits that long.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

from mshub.atomic_file import replace_json
from mshub.cases import ReviewedCase
from mshub.errors import MSHubError

logger = logging.getLogger(__name__)

WRITE_EVERY_S = 10.0
PATIENCE_S = 1.0
"""So long somebody waits who wants digests at once."""


class Digests:
    """What `ReviewedCase.digest` is, without reading gigabytes of images each time a client asks ``/info/``.

    Parameters
    ----------
    path : Path
        JSON file to remember them in across restarts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock, self._at_work = threading.Lock(), threading.Lock()  # of what is known, and of who reads files
        self._known: dict[str, dict[str, Any]] | None = None
        self._helper: threading.Thread | None = None
        self._trouble: MSHubError | OSError | None = None

    def prepare(self, cases: list[ReviewedCase]) -> None:
        """Give each of the cases its digest, computing those not known yet.

        Raises
        ------
        StoreError, OSError
            A file is gone or cannot be read.
        """
        missing = self._missing(cases)
        written = time.monotonic()
        for case in missing:
            with self._at_work:
                if not self._missing([case]):  # somebody else read it meanwhile
                    continue
                state = _state(case)  # before the files are read: a later change shows
                entry = {"state": state, "digest": case.digest}
            with self._lock:
                self._read()[str(case.label)] = entry
                if time.monotonic() - written > WRITE_EVERY_S:
                    written = self._write()
        if missing:
            with self._lock:
                self._write()

    def prepare_soon(self, cases: list[ReviewedCase]) -> bool:
        """Do so in a thread, and wait for no more than a moment; return whether all cases have their digests.

        Raises
        ------
        StoreError, OSError
            What the thread met with.
        """
        if not self._missing(cases):
            return True
        with self._lock:
            helper = self._helper
            if helper is not None and helper.is_alive():
                return False
            self._trouble = None
            helper = self._helper = threading.Thread(target=self._help, args=(cases,), name="digests", daemon=True)
            helper.start()
        helper.join(PATIENCE_S)
        if helper.is_alive():
            return False
        if self._trouble is not None:
            raise self._trouble
        return True

    def _help(self, cases: list[ReviewedCase]) -> None:
        try:
            self.prepare(cases)
        except (MSHubError, OSError) as error:
            logger.warning("reviewed cases cannot be read: %s", error)
            self._trouble = error

    def _missing(self, cases: list[ReviewedCase]) -> list[ReviewedCase]:
        """Return the cases whose digests are not known; give the others theirs."""
        with self._lock:
            known = dict(self._read())
        return [case for case in cases if not _recall(case, known)]

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._known is None:
            try:
                self._known = dict(json.loads(self._path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                self._known = {}
        return self._known

    def _write(self) -> float:
        """Remember them across restarts; return when."""
        try:
            replace_json(self._path, self._read())
        except OSError as error:
            logger.warning("%s cannot be written (%s): digests are computed again after a restart", self._path, error)
        return time.monotonic()


def _recall(case: ReviewedCase, known: dict[str, dict[str, Any]]) -> bool:
    entry = known.get(str(case.label))
    if entry is None or entry["state"] != _state(case):
        return False
    vars(case)["digest"] = entry["digest"]  # where cached_property looks for it
    return True


def _state(case: ReviewedCase) -> list[Any]:
    """Return what changes when the digest may: files by path, size and time of change; names; what was reviewed."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (*case.images, case.label)]
    return [[list(file) for file in files], case.values, sorted(case.reviewed)]
