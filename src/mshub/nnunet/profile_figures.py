"""What each profile costs and gives on this machine, for one model and one image: `mshub verify ID --bench IMAGE`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch

from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, Prediction, PredictOptions
from mshub.scores import dice

SAMPLE_EVERY_S = 0.01


@dataclass(frozen=True)
class ProfileFigures:
    """One profile.

    Attributes
    ----------
    profile : str
    seconds : float
        Wall time of a whole prediction by a network that is warm, reading the image included.
    memory_mb : float
        The most that was used beyond what was before; of a GPU, its own memory.
    dice : dict of str to float
        Structure -> Dice with ``accurate``; structures that neither found are left out.
    """

    profile: str
    seconds: float
    memory_mb: float
    dice: dict[str, float]

    @property
    def mean_dice(self) -> float | None:
        """Mean over the structures; None if none was found."""
        return float(np.mean(list(self.dice.values()))) if self.dice else None

    @property
    def worst(self) -> tuple[str, float] | None:
        """The structure with the lowest Dice."""
        return min(self.dice.items(), key=lambda item: item[1]) if self.dice else None


def profile_figures(
    predictor: NNUNetPredictor, images: Sequence[Path], options: PredictOptions
) -> Iterator[ProfileFigures]:
    """Measure every profile, ``accurate`` first.

    Parameters
    ----------
    predictor : NNUNetPredictor
        Without an `ImageCache`: every profile reads the image.
    images : sequence of Path
        One file or DICOM folder per channel.
    options : PredictOptions
        Its profile does not matter.
    """
    predictor.warm(options)
    reference: Prediction | None = None
    for profile in PROFILES.values():
        started = time.perf_counter()
        with _peak_memory() as peak:
            prediction = predictor.predict(images, replace(options, profile=profile))
        seconds = time.perf_counter() - started
        reference = reference or prediction
        yield ProfileFigures(profile.name, seconds, peak() / 2**20, _dice(prediction, reference))


def _dice(one: Prediction, other: Prediction) -> dict[str, float]:
    found = set(np.unique(one.labels.array_xyz)) | set(np.unique(other.labels.array_xyz))
    return {
        name: dice(one.labels.array_xyz == value, other.labels.array_xyz == value)
        for name, value in one.names.items()
        if value in found
    }


class _Peak:
    """The most memory used so far, in bytes beyond what was used at first."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._first = self._most = self._process.memory_info().rss
        self._gpu = torch.cuda.is_available()
        if self._gpu:
            self._first_of_gpu = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def sample(self) -> None:
        self._most = max(self._most, self._process.memory_info().rss)

    def __call__(self) -> int:
        if self._gpu:
            return int(torch.cuda.max_memory_allocated() - self._first_of_gpu)
        return int(self._most - self._first)


@contextmanager
def _peak_memory() -> Iterator[_Peak]:
    peak, ended = _Peak(), threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_EVERY_S):
            peak.sample()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()
        peak.sample()
