"""Predict with nnU-Net model folders, equal to nnU-Net voxel for voxel, on the image's own grid."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from mshub.card_tables import AS_STORED, InputRules
from mshub.errors import DeviceFull, GeometryError, LabelError, MSHubError, PredictionError
from mshub.geometry import Array, Grid, Volume
from mshub.nnunet.devices import candidate_devices
from mshub.nnunet.engine import Engine
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.image_cache import ImageCache, PreparedImage, image_key
from mshub.nnunet.kernels import value_counts
from mshub.nnunet.measures import Measures
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.reading import read_as_nnunet, read_channels, to_input_axes
from mshub.nnunet.sliding_window import Check, Progress
from mshub.uncertainty import Uncertainty

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

EMPTIED = "{} was emptied for it: beside other networks its memory did not suffice"
IN_MAIN_MEMORY = "what the network made on {} was added up in main memory"
TOO_SMALL = "{} has too little memory for it"
"""What the answer says of a GPU that was too small, in ``provenance``."""


@dataclass(frozen=True)
class Profile:
    """How thoroughly to predict.

    Attributes
    ----------
    mirroring : bool
        Average over all flips the model allows (test-time augmentation).
    step : float
        Distance of neighbouring tiles as a fraction of the tile, in (0, 1].
    body_only : bool
        Of CT images, only the body is looked at: see `mshub.nnunet.body`.
    """

    name: str
    mirroring: bool
    step: float
    body_only: bool = False


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("accurate", mirroring=True, step=0.5),  # nnU-Net's own defaults
        Profile("balanced", mirroring=False, step=0.5),  # nnU-Net's with --disable_tta
        Profile("fast", mirroring=False, step=0.75, body_only=True),
    )
}


@dataclass(frozen=True)
class PredictOptions:
    """Choices of one prediction.

    Attributes
    ----------
    profile : Profile
        See `PROFILES`.
    folds : tuple of str
        Folds to ensemble; empty means every fold the folder has.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:1``...
    rules : InputRules
        What is done to the image before nnU-Net sees it, as the model's card says.
    runtime : str
        What runs the network, one of `mshub.nnunet.engine.RUNTIMES`: ``torch`` as nnU-Net does, to the last voxel;
        ``openvino`` faster on a CPU, and equal within a bound that was checked; ``auto``.
    measure : bool
        Measure on the way how sure the network is: `Prediction.uncertainty`.
    probabilities : tuple of str
        Structures whose probabilities are returned too: `Prediction.probabilities`.
    """

    profile: Profile = PROFILES["accurate"]
    folds: tuple[str, ...] = ()
    device: str = "auto"
    rules: InputRules = AS_STORED
    runtime: str = "torch"
    measure: bool = False
    probabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """What came out.

    Attributes
    ----------
    labels : Volume
        uint8 (uint16 above 255 structures), axes x, y, z, on the grid of the first input file. Values are the
        model's published ones: 1..N in the order of `names`, 0 is background.
    names : dict of str to int
        Structure name -> value in `labels`, ascending.
    provenance : dict
        Model configuration, folds, profile, device; ``inference`` where it is that of nnU-Net v1.
    seconds : dict of str to float
        Wall time per stage.
    uncertainty : Uncertainty or None
        How sure the network was; None if it was not asked for.
    probabilities : dict of str to ndarray
        Structure -> its probability, float32, axes x, y, z, on the same grid, of those that were asked for.
    """

    labels: Volume
    names: dict[str, int]
    provenance: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    uncertainty: Uncertainty | None = None
    probabilities: dict[str, Array] = field(default_factory=dict)

    def voxel_counts(self) -> dict[str, int]:
        """Return the number of voxels of each structure, absent ones included."""
        counts = value_counts(self.labels.array_xyz)
        return {name: int(counts[value]) for name, value in self.names.items()}


class Predictor(Protocol):
    """Anything that turns the files of one case into a label volume."""

    def predict(
        self,
        images: Sequence[Path],
        options: PredictOptions = ...,
        progress: Progress | None = ...,
        check: Check | None = ...,
    ) -> Prediction:
        """Segment one case; see `NNUNetPredictor.predict`."""


class NNUNetPredictor:
    """Predict with one nnU-Net v2 model folder.

    Parameters
    ----------
    folder : ModelFolder
        The model.
    cache : NetworkCache
        Where its networks are kept warm; shared between predictors.
    images : ImageCache, optional
        Where images are kept for the next request; shared between predictors. Without one, none is kept.
    """

    def __init__(self, folder: ModelFolder, cache: NetworkCache, images: ImageCache | None = None) -> None:
        self.folder = folder
        self._cache = cache
        self._images = images or ImageCache()

    def predict(
        self,
        images: Sequence[Path],
        options: PredictOptions = PredictOptions(),
        progress: Progress | None = None,
        check: Check | None = None,
    ) -> Prediction:
        """Segment one case.

        Parameters
        ----------
        images : sequence of Path
            One file or DICOM folder per channel, in the order of `ModelFolder.channels`, all on one grid.
        options : PredictOptions
            Profile, folds, device.
        progress : callable, optional
            Called with (tiles done, tiles in all).
        check : callable, optional
            Called between the stages and before every pass of the network; a `MSHubError` it raises ends the
            prediction.

        Returns
        -------
        Prediction
            Never a stand-in: whatever goes wrong is raised.

        Raises
        ------
        CaseError, GeometryError, ChannelError
            The image cannot be segmented by this model.
        PredictionError
            The network failed; the message says at which stage.
        """
        self._check_structures(options.probabilities)
        return self._stepping_down(self._run(options, progress, check), partial(self._predict, images))

    def _predict(self, images: Sequence[Path], run: _Run) -> Prediction:
        options = run.options
        with _told_errors(run):
            made, image, uncertainty = self._segment(images, run)
            reader = self.folder.plans_manager.image_reader_writer_class()
            facts = (image.properties, reader, image.grid, options.rules.orientation)
            array_xyz, *maps_xyz = (to_input_axes(array, *facts) for array in made)
        labels = self._publish(array_xyz, image.grid)
        run.clock.lap("export")
        names, provenance = dict(self.folder.labels.published), self._provenance(run)
        probabilities = dict(zip(options.probabilities, maps_xyz, strict=True))
        return Prediction(labels, names, provenance, run.clock.laps, uncertainty, probabilities)

    def measure(
        self, images: Sequence[Path], options: PredictOptions = PredictOptions(), check: Check | None = None
    ) -> Uncertainty:
        """Return how sure the network is of a case, without making the label: what `predict` would measure.

        Parameters and errors are those of `predict`.
        """
        return self._stepping_down(self._run(options, None, check), partial(self._measure, images))

    def _measure(self, images: Sequence[Path], run: _Run) -> Uncertainty:
        with _told_errors(run), self._ready(images, run) as (engine, image):
            measures = engine.measures()
            return engine.uncertainty(measures, self._logits(engine, image, run, measures), image.properties)

    def _stepping_down(self, run: _Run, work: Callable[[_Run], Result]) -> Result:
        """Do `work`; where a GPU has too little memory, in the ways that need less, see `_smaller`."""
        while True:
            try:
                return work(run)
            except DeviceFull as error:
                run = self._smaller(run, error)

    def _smaller(self, run: _Run, error: DeviceFull) -> _Run:
        """Return a run that needs less memory of its GPU, which is emptied; raise `error` where that was the CPU's.

        With no other network there; with nothing but the network there; on the CPU. Mirroring and steps stay as they
        are: they change how often the network runs, one pass at a time, and with it the result, but hardly the memory.
        """
        device = run.device
        if device is None or device.type == "cpu":
            raise error
        logger.warning("%s It is tried once more otherwise.", error)
        self._cache.make_room(device)
        if not run.is_alone:
            return run.again(device, EMPTIED.format(device))
        if not run.sums_in_main_memory:
            return run.again(device, EMPTIED.format(device), sums_in_main_memory=True)
        return run.again(torch.device("cpu"), TOO_SMALL.format(device))

    def warm(self, options: PredictOptions = PredictOptions()) -> None:
        """Load the network and run it on one tile, so that the next request finds everything ready.

        Parameters and errors are those of `predict`.
        """
        run = self._run(options, None, None)
        with _told_errors(run), self._engine(run) as engine:
            engine.warm()
        value_counts(np.zeros(1, self.folder.labels.dtype))

    def _engine(self, run: _Run) -> AbstractContextManager[Engine]:
        runtime = run.options.runtime
        return self._cache.engine(self.folder, run.folds, *run.devices, runtime=runtime, check=run.check)

    def _run(self, options: PredictOptions, progress: Progress | None, check: Check | None) -> _Run:
        folds = self._check_folds(options.folds)
        return _Run(folds, options, candidate_devices(options.device), progress, check or _never)

    def _check_structures(self, wanted: tuple[str, ...]) -> None:
        known = self.folder.labels.predicted
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise LabelError(
                f"The probabilities of {', '.join(unknown)} were asked for; this model knows {', '.join(known)}."
            )

    def _check_folds(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [fold for fold in wanted if fold not in self.folder.folds]
        if unknown:
            raise PredictionError(
                f"Fold {', '.join(unknown)} was asked for; this model has fold {', '.join(self.folder.folds)}."
            )
        return wanted or self.folder.folds

    def _segment(self, images: Sequence[Path], run: _Run) -> tuple[list[Array], PreparedImage, Uncertainty | None]:
        """Return label map and probabilities on the reader's grid, what was predicted, how sure the network is."""
        with self._ready(images, run) as (engine, image):
            measures = engine.measures() if run.options.measure else None
            logits = self._logits(engine, image, run, measures)
            uncertainty = None
            if measures is not None:
                uncertainty = engine.uncertainty(measures, logits, image.properties)
                run.clock.lap("measure")
            run.check()
            made = [engine.segmentation(logits, image.properties)]
            wanted = run.options.probabilities
            if wanted:
                made += engine.probabilities(logits, image.properties, wanted).values()
            return made, image, uncertainty

    @contextmanager
    def _ready(self, images: Sequence[Path], run: _Run) -> Iterator[tuple[Engine, PreparedImage]]:
        """Hold the device with its network, and the case as the network takes it."""
        key = image_key(images, run.options.rules, self.folder, body_only=run.options.profile.body_only)
        kept = self._images.get(key)
        make = self._read(images, run) if kept is None else lambda _: kept
        run.clock.lap("read")
        with self._engine(run) as engine:
            run.device, run.runtime = engine.device, engine.runtime
            run.clock.lap("load")
            run.check()
            image = self._images.get_or_make(key, partial(make, engine))
            del make  # what was read is large
            run.grid = image.grid
            run.clock.lap("preprocess")
            yield engine, image

    def _read(self, images: Sequence[Path], run: _Run) -> Callable[[Engine], PreparedImage]:
        """Read a case, and return what makes it ready for the network."""
        volumes = read_channels(images, self.folder.channels)
        run.grid = volumes[0].grid
        reader = self.folder.plans_manager.image_reader_writer_class()
        return partial(
            _prepare, *read_as_nnunet(images, volumes, reader, run.options.rules), run.grid, run.options.profile
        )

    def _logits(self, engine: Engine, image: PreparedImage, run: _Run, measures: Measures | None) -> torch.Tensor:
        """Return the network's output."""
        profile = run.options.profile
        logits = engine.logits(
            image.data,
            mirroring=profile.mirroring,
            step=profile.step,
            progress=run.progress,
            check=run.check,
            measures=measures,
            sums_in_main_memory=run.sums_in_main_memory,
        )
        if engine.summed_in_main_memory:
            run.stepped_down = "; ".join(filter(None, [run.stepped_down, IN_MAIN_MEMORY.format(run.device)]))
        run.clock.lap("network")
        return logits

    def _publish(self, array_xyz: Array, grid: Grid) -> Volume:
        if array_xyz.shape != grid.shape_xyz:
            raise GeometryError(
                f"The segmentation has {array_xyz.shape} voxels, the image {grid.shape_xyz}; nothing is "
                "returned rather than a shifted mask. Please report this image's header."
            )
        return Volume(self.folder.labels.publish(array_xyz), grid)

    def _provenance(self, run: _Run) -> dict[str, Any]:
        rules = run.options.rules
        return {
            "configuration": self.folder.configuration,
            "trainer": self.folder.trainer,
            "folds": list(run.folds),
            "profile": run.options.profile.name,
            "device": str(run.device),
            "runtime": run.runtime,
            "input_clip": list(rules.clip) if rules.clip else None,
            **({"orientation": rules.orientation} if rules.orientation else {}),
            **({"inference": "nnU-Net v1"} if self.folder.predicts_as_v1 else {}),
            **({"stepped_down": run.stepped_down} if run.stepped_down else {}),
        }


class _Clock:
    """Wall time per stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


@dataclass
class _Run:
    """One prediction at work."""

    folds: tuple[str, ...]
    options: PredictOptions
    devices: tuple[torch.device, ...]
    progress: Progress | None
    check: Check
    clock: _Clock = field(default_factory=_Clock)
    device: torch.device | None = None
    runtime: str = ""
    grid: Grid | None = None
    stepped_down: str = ""
    is_alone: bool = False
    sums_in_main_memory: bool = False

    def again(self, device: torch.device, stepped_down: str, *, sums_in_main_memory: bool = False) -> _Run:
        """Return the same prediction, on a device to itself; why, the answer says."""
        return replace(
            self,
            devices=(device,),
            device=None,
            clock=_Clock(),
            stepped_down=stepped_down,
            is_alone=True,
            sums_in_main_memory=sums_in_main_memory,
        )


def _prepare(data: Array, properties: dict[str, Any], grid: Grid, profile: Profile, engine: Engine) -> PreparedImage:
    prepared, properties = engine.preprocess(data, properties, profile.body_only)
    return PreparedImage(prepared, properties, grid)


def _never() -> None:
    """Find no reason to end."""


@contextmanager
def _told_errors(run: _Run) -> Iterator[None]:
    """Turn what nnU-Net and torch raise into errors with a sentence."""
    try:
        yield
    except MSHubError:
        raise
    except torch.OutOfMemoryError as error:
        size = f"an image of {run.grid.shape_xyz} voxels" if run.grid else "this image"
        raise DeviceFull(
            f"{run.device or 'The device'} ran out of memory on {size}. Choose another device, or a smaller image."
        ) from error
    except Exception as error:
        logger.exception("prediction failed")
        raise PredictionError(
            f"nnU-Net failed on this image ({type(error).__name__}: {error}). The full trace is in the log."
        ) from error
