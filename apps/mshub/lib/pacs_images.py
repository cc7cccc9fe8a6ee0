"""Series of the PACS as files on this machine: a volume, and the headers of its slices.

::

    <folder>/<SeriesInstanceUID>.nii           the volume
    <folder>/headers/<SeriesInstanceUID>/      its slices without their pixels, for the objects made from it
    <folder>/channels/<reference>/<other>.nii  another series of the study on the grid of the first
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pydicom

from lib.pacs_client import PacsClient
from lib.pacs_download import download
from mshub.channel_series import resample_to
from mshub.dicom_series import SeriesStack, read_series, read_stack
from mshub.geometry import same_grid
from mshub.volume_io import read_volume, write_nifti

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
VOLUME = ".nii"
COUNT = "NumberOfSeriesRelatedInstances"


def untold(done: int, total: int) -> None:
    """Tell nobody how far a download is."""


class SeriesFiles:
    """Copies of series, made when they are first asked for, whole or not at all.

    Parameters
    ----------
    folder : Path
    client : PacsClient
    needed : callable, optional
        Returns files that are needed still, though nobody asks for them: their series are not removed.
    """

    def __init__(self, folder: Path, client: PacsClient, needed: Callable[[], Collection[Path]] = frozenset) -> None:
        self.folder, self._client, self._needed = folder, client, needed
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._asked_for: dict[str, float] = {}
        self._said: dict[str, int] = {}  # how many instances a series had, by the PACS, when it was fetched

    @property
    def pending(self) -> Path:
        """Where series are that are being downloaded; beside the copies, as MONAI Label watches their folder."""
        return self.folder.with_name(f"{self.folder.name}.pending")

    def path(self, series: str) -> Path:
        """Return where the volume of a series is, or would be."""
        return self.folder / f"{series}{VOLUME}"

    def has(self, series: str, instances: int = 0) -> bool:
        """Return whether there is a copy, of as many instances as the PACS says (0: of any number)."""
        found = self.count(series)
        return found > 0 and (not instances or instances in (found, self._said.get(series)))

    def count(self, series: str) -> int:
        """Return how many instances the copy of a series has; 0 if there is none."""
        headers = self._headers(series)
        return len(list(headers.iterdir())) if self.path(series).is_file() and headers.is_dir() else 0

    def fetch(self, facts: Mapping[str, str], progress: Progress = untold) -> Path:
        """Return the volume of a series, downloading it first where there is no copy or the PACS has more slices now.

        Parameters
        ----------
        facts : mapping
            ``SeriesInstanceUID``, ``StudyInstanceUID`` and `COUNT`, without which the PACS is asked for its instances.
        progress : callable
            Told the instances downloaded and in all.

        Raises
        ------
        PacsError
            The PACS does not answer, or sends anything else than it lists.
        CaseError, GeometryError
            The series is no regular volume; nothing of it is kept.
        """
        series, study, said = facts["SeriesInstanceUID"], facts["StudyInstanceUID"], _number(facts.get(COUNT))
        with self._locks[series]:
            self._asked_for[series] = time.monotonic()
            if not said and self.has(series):
                said = len(self._client.instance_classes(study, series))
            if not self.has(series, said):
                self._fetch(study, series, said, progress)
                self._said[series] = said
        return self.path(series)

    def copies(self) -> set[str]:
        """Return the series there are copies of."""
        return {path.name.removesuffix(VOLUME) for path in self.folder.glob(f"*{VOLUME}")}

    def drop(self, series: str, unused_s: float) -> bool:
        """Remove the copy of a series that nobody needs, or asked for in so many seconds; return whether it is gone."""
        with self._locks[series]:
            if time.monotonic() - self._asked_for.get(series, float("-inf")) < unused_s:
                return False
            volume, channels = self.path(series), self.folder / "channels" / series
            if any(path == volume or path.parent == channels for path in self._needed()):
                return False
            volume.unlink(missing_ok=True)  # first: without its volume, a copy is none
            shutil.rmtree(self._headers(series), ignore_errors=True)
            shutil.rmtree(channels, ignore_errors=True)
        return True

    def trim(self, most_bytes: int, unused_s: float) -> str:
        """Remove the copies nobody asked for longest, until the others take no more than `most_bytes`.

        Those needed, or asked for within `unused_s`, stay in any case. Returns what was removed, as a sentence.
        """
        sizes = {series: self._nbytes(series) for series in self.copies()}
        total, removed = sum(sizes.values()), 0
        for series in sorted(sizes, key=self._last_use):
            if total <= most_bytes:
                break
            if time.time() - self._last_use(series) >= unused_s and self.drop(series, unused_s):
                total, removed = total - sizes[series], removed + 1
        return f"{removed} copies of series of the PACS" if removed else ""

    def _nbytes(self, series: str) -> int:
        folders = (self._headers(series), self.folder / "channels" / series)
        files = [self.path(series), *(path for folder in folders for path in folder.glob("*"))]
        return sum(path.stat().st_size for path in files if path.is_file())

    def _last_use(self, series: str) -> float:
        """Return when a copy was asked for last, or made, in seconds since 1970."""
        asked = self._asked_for.get(series)
        if asked is not None:
            return time.time() - (time.monotonic() - asked)
        path = self.path(series)
        return path.stat().st_mtime if path.exists() else 0.0

    def stack(self, series: str) -> SeriesStack:
        """Return where the slices of a fetched series lie, with their headers."""
        return read_stack(self._headers(series))

    def on_grid_of(self, reference: str, other: str) -> Path:
        """Return the volume of a fetched series on the grid of another one; errors as `resample_to`."""
        target = self.folder / "channels" / reference / f"{other}{VOLUME}"
        sources = (self.path(reference), self.path(other))
        with self._locks[f"{reference} {other}"]:
            if target.is_file() and target.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in sources):
                return target
            grid, volume = self.stack(reference).grid, read_volume(self.path(other))
            if same_grid(volume.grid, grid):
                return self.path(other)
            resampled = resample_to(volume, grid)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_nifti(target, resampled.array_xyz, resampled.grid)
        return target

    def _headers(self, series: str) -> Path:
        return self.folder / "headers" / series

    def _fetch(self, study: str, series: str, listed: int, progress: Progress) -> None:
        self.pending.mkdir(exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=self.pending))
        try:
            download(self._client, study, series, work / "files", listed, progress)
            volume = read_series(work / "files", series_uid=series)
            _drop_pixels(work / "files")
            headers = self._headers(series)
            headers.parent.mkdir(exist_ok=True)
            shutil.rmtree(headers, ignore_errors=True)
            self.path(series).unlink(missing_ok=True)  # a copy is whole once its volume, which comes last, is there
            (work / "files").replace(headers)
            write_nifti(self.path(series), volume.array_xyz, volume.grid)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        logger.info("%s: fetched from the PACS, %d x %d x %d voxels", series, *volume.grid.shape_xyz)


def _number(text: str | None) -> int:
    """Return a count of instances; 0 for what is none."""
    return int(text) if text and text.isdecimal() else 0


def _drop_pixels(folder: Path) -> None:
    for path in folder.iterdir():
        header = pydicom.dcmread(path, stop_before_pixels=True)
        header.save_as(path)
