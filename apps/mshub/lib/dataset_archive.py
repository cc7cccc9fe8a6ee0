"""Images and their labels as one ZIP to download."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

FIRST_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def write_archive(pairs: Iterable[Mapping[str, str]], most: int, metadata: str) -> Path | None:
    """Write a new ZIP, and return it; None if there was nothing to write.

    Parameters
    ----------
    pairs : iterable of mapping
        Paths of an image and its label, by their folders in the ZIP.
    most : int
        As many pairs at most; 0: all.
    metadata : str
        What ``metadata.json`` in it says.
    """
    written = 0
    with tempfile.NamedTemporaryFile(suffix=".zip", delete=False) as file:
        path = Path(file.name)
        try:
            with zipfile.ZipFile(file, "w") as archive:
                for pair in pairs:
                    if written >= most > 0:
                        break
                    written += _add_pair(archive, pair)
                archive.writestr("metadata.json", metadata)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    if written:
        return path
    path.unlink()
    return None


def _add_pair(archive: zipfile.ZipFile, pair: Mapping[str, str]) -> bool:
    """Add an image and its label to a ZIP, or neither if one is gone; what is open may be removed meanwhile."""
    with ExitStack() as stack:
        try:
            opened = {kind: stack.enter_context(Path(path).open("rb")) for kind, path in pair.items()}
        except FileNotFoundError:
            return False
        for kind, source in opened.items():
            found, name = os.fstat(source.fileno()), f"{kind}/{Path(pair[kind]).name}"
            entry = zipfile.ZipInfo(name, max(time.localtime(found.st_mtime)[:6], FIRST_ZIP_DATE))
            entry.file_size, entry.external_attr = found.st_size, found.st_mode << 16
            with archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target)
    return True
