"""Images as a network takes them, kept for the next request: another fold, profile or model of the same plans.

Whoever looks at a result and asks again, with another profile say, does not wait for reading and resampling again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mshub.card_tables import InputRules
from mshub.geometry import Array, Grid
from mshub.nnunet.folder import ModelFolder

PLANS_OF_PREPROCESSING = ("image_reader_writer", "transpose_forward", "foreground_intensity_properties_per_channel")
"""What of ``plans.json`` decides how an image is prepared, beside the configuration."""


@dataclass(frozen=True)
class PreparedImage:
    """One case as the network takes it.

    Attributes
    ----------
    data : ndarray, float32, axes (channel, *network axes)
        Not to be written to.
    properties : dict
        nnU-Net's, of the way back to the reader's grid.
    grid : Grid
        Of the first input file.
    """

    data: Array
    properties: dict[str, Any]
    grid: Grid


class ImageCache:
    """Prepared images in memory, the one used longest ago dropped first when they exceed `max_bytes`.

    May be used by any number of threads.

    Parameters
    ----------
    max_bytes : int
        0 keeps none.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self._max_bytes = max_bytes
        self._images: dict[str, PreparedImage] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> PreparedImage | None:
        """Return what was kept under a key, None if nothing is."""
        with self._lock:
            image = self._images.pop(key, None)
            if image is not None:
                self._images[key] = image  # re-inserted last: a dict keeps insertion order, oldest first
            return image

    def get_or_make(self, key: str, make: Callable[[], PreparedImage]) -> PreparedImage:
        """Return what was kept under a key, or else keep what `make` returns."""
        image = self.get(key)
        if image is not None:
            return image
        image = make()
        with self._lock:
            self._images.pop(key, None)
            self._images[key] = image
            while self._images and sum(kept.data.nbytes for kept in self._images.values()) > self._max_bytes:
                del self._images[next(iter(self._images))]
        return image

    def forget_gone(self) -> str:
        """Forget images whose files are gone or were written to; returns how many in words, or nothing."""
        with self._lock:
            gone = [key for key in self._images if not _is_current(key)]
            for key in gone:
                del self._images[key]
        return f"{len(gone)} prepared image(s) of files that are gone" if gone else ""


def image_key(images: Sequence[Path], rules: InputRules, folder: ModelFolder, *, body_only: bool = False) -> str:
    """Return a key that is another one if a file, or what is done to it before the network, is another.

    Parameters
    ----------
    images : sequence of Path
        One file or DICOM folder per channel. A file counts as another as soon as it was written to.
    rules : InputRules
    folder : ModelFolder
    body_only : bool
    """
    files = [file for image in images for file in (sorted(image.rglob("*")) if image.is_dir() else [image])]
    stamps = [_stamp(file) for file in files]
    configuration = {
        name: value for name, value in folder.configuration_manager.configuration.items() if name != "architecture"
    }
    plans = {name: folder.plans_manager.plans.get(name) for name in PLANS_OF_PREPROCESSING}
    done = [rules.clip, rules.orientation, body_only, folder.predicts_as_v1, configuration, plans]
    return json.dumps([[str(image) for image in images], stamps, done], sort_keys=True, default=str)


def _is_current(key: str) -> bool:
    """Return whether the files of a key are there as they were."""
    _, stamps, _ = json.loads(key)
    return all(list(_stamp(Path(stamp[0]))) == stamp for stamp in stamps)


def _stamp(file: Path) -> tuple[str, int, int, int, int]:
    if not file.exists():  # whoever reads it says so
        return str(file), 0, 0, 0, 0
    facts = file.stat()
    return str(file), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino
