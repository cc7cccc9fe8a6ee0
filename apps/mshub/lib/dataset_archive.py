"""Images and their labels as one ZIP to download, and what the index said of them when they were read."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mshub.atomic_file import removed_on_failure
from mshub.errors import MSHubError

logger = logging.getLogger(__name__)

FIRST_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class LabelledImage:
    """An image and its label as they were at one moment.

    Attributes
    ----------
    files : mapping of str to stream
        The image's channels and the label, opened, by their paths in the ZIP: what is open may be replaced meanwhile.
    facts : mapping
        What the index said of them then.
    """

    files: Mapping[str, BinaryIO]
    facts: Mapping[str, Any]


def write_archive(
    images: Iterable[str],
    opened: Callable[[str], AbstractContextManager[LabelledImage]],
    most: int,
    head: Mapping[str, Any],
) -> tuple[Path | None, dict[str, str]]:
    """Write a new ZIP; returns it, None if nothing can be in it, and the images that are left out, with the reason.

    Parameters
    ----------
    images : iterable of str
        Their ids.
    opened : callable
        Opens the files of an image; an `MSHubError` says why it is left out.
    most : int
        As many images at most; 0: all.
    head : mapping
        What ``metadata.json`` in the ZIP says before ``objects``, which tells of the images in it, and ``left_out``.
    """
    objects, left_out = dict[str, Mapping[str, Any]](), dict[str, str]()
    with tempfile.NamedTemporaryFile(suffix=".zip", delete=False) as file:
        path = Path(file.name)
        with removed_on_failure(path), zipfile.ZipFile(file, "w") as archive:
            for image in images:
                if len(objects) >= most > 0:
                    break
                try:
                    with opened(image) as found:
                        _add(archive, found.files)
                        objects[image] = found.facts
                except MSHubError as error:
                    left_out[image] = str(error)
            metadata = {**head, "objects": objects, "left_out": left_out}
            archive.writestr("metadata.json", json.dumps(metadata, ensure_ascii=False, default=str))
    if not objects:
        path.unlink()
    if left_out:
        reasons = "; ".join(f"{image}: {reason}" for image, reason in left_out.items())
        logger.warning(
            "%d of %d labelled images are left out of a download: %s",
            *(len(left_out), len(left_out) + len(objects), reasons),
        )
    return (path if objects else None), left_out


def _add(archive: zipfile.ZipFile, files: Mapping[str, BinaryIO]) -> None:
    for name, source in files.items():
        found = os.fstat(source.fileno())
        entry = zipfile.ZipInfo(name, max(time.localtime(found.st_mtime)[:6], FIRST_ZIP_DATE))
        entry.file_size, entry.external_attr = found.st_size, found.st_mode << 16
        with archive.open(entry, "w") as target:
            shutil.copyfileobj(source, target)
