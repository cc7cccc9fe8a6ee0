"""Digests of reviewed cases, each computed once for as long as its files stay the same."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

from mshub.atomic_file import replace_json
from mshub.cases import ReviewedCase

logger = logging.getLogger(__name__)


class Digests:
    """What `ReviewedCase.digest` is, without reading gigabytes of images each time a client asks ``/info/``.

    Parameters
    ----------
    path : Path
        JSON file to remember them in across restarts.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._known: dict[str, dict[str, Any]] | None = None

    def prepare(self, cases: list[ReviewedCase]) -> None:
        """Give each of the cases its digest, computing those not known yet."""
        with self._lock:
            known = self._read()
            changed = [case for case in cases if not _recall(case, known)]
            for case in changed:
                state = _state(case)  # before the files are read: a later change shows
                known[str(case.label)] = {"state": state, "digest": case.digest}
            if changed:
                self._write(known)

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._known is None:
            try:
                self._known = dict(json.loads(self._path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                self._known = {}
        return self._known

    def _write(self, known: dict[str, dict[str, Any]]) -> None:
        try:
            replace_json(self._path, known)
        except OSError as error:
            logger.warning("%s cannot be written (%s): digests are computed again after a restart", self._path, error)


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
