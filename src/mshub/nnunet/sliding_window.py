"""The network over an image, tile by tile: as nnU-Net v2 does it, and as v1 did.

nnU-Net v2 averages *logits* over mirrored copies, overlapping tiles and folds, in half precision. v1 averaged
*probabilities*, in single precision. The two differ in up to 0.2 % of the voxels, so a model of v1 is served by v1's
rule.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

from mshub.nnunet.deepest_features import noted_features
from mshub.nnunet.half_precision import check_finite
from mshub.nnunet.measures import Measures
from mshub.nnunet.window_sums import SumsOnCPU, SumsOnDevice, add_copy, first_copy

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (tiles done, tiles in all) while the network runs."""
Check = Callable[[], None]
"""Called now and then; raises to end what is being done."""
Network = Callable[[torch.Tensor], torch.Tensor]
"""Takes a tile, axes (batch, channel, *spatial), and returns its logits, axes (batch, class, *spatial)."""
Sums = TypeVar("Sums")


class SlidingWindow(nnUNetPredictor):  # type: ignore[misc]
    """nnU-Net v2's predictor, silent, with its progress told to a callback.

    The parent's constructor prints on CPU and its loader imports trainer classes and unpickles; neither is called.

    Attributes
    ----------
    sums_in_main_memory : bool
        Whether the sums are to be, and after a prediction whether they were, in main memory though the network is not.
    """

    def __init__(self, device: torch.device) -> None:
        self.verbose = self.verbose_preprocessing = self.allow_tqdm = False
        self.use_gaussian = self.use_mirroring = True
        self.tile_step_size = 0.5
        self.device = device
        self._networks: tuple[Network, ...] = ()
        self.perform_everything_on_device = False  # where the sums are is decided here
        self.sums_in_main_memory = False
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.start(None)

    def start(self, on_progress: Progress | None, check: Check | None = None, measures: Measures | None = None) -> None:
        """Make ready for one image.

        Parameters
        ----------
        on_progress : callable, optional
            Called after every tile.
        check : callable, optional
            Called before every pass of the network; what it raises ends the prediction.
        measures : Measures, optional
            Told what comes out before it is averaged.
        """
        self._on_progress, self._done, self._total = on_progress, 0, 0
        self._check, self._measures = check, measures
        self._features: torch.Tensor | None = None
        self._constants: tuple[float, ...] | None = None
        if self.device.type == "cuda":
            self._tile_end = torch.cuda.Event()
        self._of_constant: tuple[tuple[float, ...], torch.Tensor, torch.Tensor | None] | None = None

    def _internal_get_sliding_window_slicers(self, image_size: tuple[int, ...]) -> list[Any]:
        slicers: list[Any] = super()._internal_get_sliding_window_slicers(image_size)
        self._total = len(slicers) * len(self.list_of_parameters)
        return slicers

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
        """Predict with one fold."""
        watching = nullcontext() if self._measures is None else noted_features(self._running, self._note_features)
        with watching:
            logits: torch.Tensor = super().predict_sliding_window_return_logits(input_image)
        if self._measures is not None:
            self._measures.end_of_fold(logits)
        return logits

    def _note_features(self, features: torch.Tensor) -> None:
        """Take note of what the encoder made of a tile."""
        self._features = features
        if self._measures is not None:
            self._measures.deepest_features(features)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """Return the mean over all folds, half precision, axes (class, *spatial), where it was calculated.

        nnU-Net would use 8 threads at most, and move every fold's to the CPU.
        """
        folds = len(self.list_of_parameters)
        mean = self._of_fold(0, data)
        for fold in range(1, folds):
            mean += self._of_fold(fold, data).to(mean.device)
        return mean if folds == 1 else mean.div_(folds)

    def _of_fold(self, fold: int, data: torch.Tensor) -> torch.Tensor:
        self._of_constant = None
        if self._networks:
            self._running = self._networks[fold]
        else:
            self.network.load_state_dict(self.list_of_parameters[fold])
            self._running = self.network
        logits: torch.Tensor = self.predict_sliding_window_return_logits(data)
        return logits

    def run_instead(self, networks: Sequence[Network]) -> None:
        """Let other networks, one of each fold, do what torch's would do, which is given up with its weights."""
        self._networks = tuple(networks)
        self.network = torch.nn.Identity()
        self.list_of_parameters: list[dict[str, Any]] = [{} for _ in networks]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _internal_predict_sliding_window_return_logits(
        self, data: torch.Tensor, slicers: list[Any], _do_on_device: bool = True
    ) -> torch.Tensor:
        sums = self._sums(tuple(data.shape[1:]))
        for tile, slicer in self._tiles(data, slicers):
            sums.add(*self._sum_of_passes(tile), slicer)
        return sums.mean()

    def _sums(self, shape: tuple[int, ...]) -> SumsOnCPU | SumsOnDevice:
        """Return sums for an image where the network is, or else, where that has too little memory, in main memory."""
        facts = self.label_manager.num_segmentation_heads, shape, tuple(self.configuration_manager.patch_size)
        on_device: Callable[[], SumsOnCPU | SumsOnDevice] = partial(SumsOnDevice, *facts, self.device)
        return self._where_there_is_room(on_device, partial(SumsOnCPU, *facts))

    def _where_there_is_room(self, on_device: Callable[[], Sums], in_main_memory: Callable[[], Sums]) -> Sums:
        if self.device.type != "cpu" and not self.sums_in_main_memory:
            try:
                return on_device()
            except torch.OutOfMemoryError:
                logger.warning("%s has no memory left for what the network makes; it goes to main memory", self.device)
                self.sums_in_main_memory = True
        return in_main_memory()

    def _tiles(self, data: torch.Tensor, slicers: list[Any]) -> Iterator[tuple[torch.Tensor, Any]]:
        """Yield the tiles of an image, axes (1, channel, *patch), on the device of the network, and where they lie."""
        there = data.to(self.device)
        for slicer in slicers:
            self._constants = _constants(data[slicer][None])  # of the image on the CPU: a GPU is not waited for
            yield there[slicer][None].contiguous(), slicer

    def _sum_of_passes(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the sum of the network's outputs for a tile and its mirrored copies, and how many there are."""
        flips = list(self._flips())
        output = self._pass(x, flips[0], len(flips))
        total = first_copy(output) if len(flips) > 1 else output  # which the next pass overwrites
        for axes in flips[1:]:
            add_copy(total, self._pass(x, axes, len(flips)), axes)
        self._end_of_tile()
        return total, len(flips)

    def _pass(self, x: torch.Tensor, axes: tuple[int, ...], passes: int) -> torch.Tensor:
        """Return the network's output for a copy of a tile, mirrored as the copy is."""
        if self._check is not None:
            self._check()
        output = self._outcome(torch.flip(x, axes) if axes else x)
        if self._measures is not None:
            self._measures.one_pass(output, passes, axes)
        return output

    def _end_of_tile(self) -> None:
        if self._measures is not None:
            self._measures.end_of_tile()
        self._wait_for_tile_before()
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)

    def _wait_for_tile_before(self) -> None:
        """Let a GPU work on one tile more than is waited for: it has always something to do, and progress is true."""
        if self.device.type == "cuda":
            before, self._tile_end = self._tile_end, torch.cuda.Event()
            self._tile_end.record(torch.cuda.current_stream(self.device))
            before.synchronize()

    def _outcome(self, x: torch.Tensor) -> torch.Tensor:
        return self._output(x)

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        """Return the network's output; that of a tile in which nothing changes is calculated once.

        Such tiles lie in the air around a body, and their mirrored copies are the same tile.
        """
        values = self._constants
        if values is None:
            return self._running(x)
        if self._of_constant is None or self._of_constant[0] != values:
            self._features = None
            output = self._running(x).clone()
            self._of_constant = values, output, None if self._features is None else self._features.clone()
        elif self._measures is not None and self._of_constant[2] is not None:
            self._measures.deepest_features(self._of_constant[2])
        return self._of_constant[1].clone()

    def _flips(self) -> Iterator[tuple[int, ...]]:
        """Yield the axes of (batch, channel, *spatial) tensors to flip together, beginning with none."""
        axes = [axis + 2 for axis in self.allowed_mirroring_axes or ()] if self.use_mirroring else []
        for count in range(len(axes) + 1):
            yield from combinations(axes, count)


def _constants(x: torch.Tensor) -> tuple[float, ...] | None:
    """Return the value of each channel of a tile, axes (1, channel, *spatial), that has only one; None of another."""
    channels = x[0].flatten(1)
    first = channels[:, 0]
    if not torch.equal(first, channels[:, -1]) or not bool((channels == first[:, None]).all()):
        return None
    return tuple(first.tolist())


class ProbabilityWindow(SlidingWindow):
    """nnU-Net v1's rule: a softmax per forward pass, averaged in float32, weighted by the same Gaussian.

    What v2 calls logits are probabilities here; they need no softmax afterwards.
    """

    def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
        flips = list(self._flips())
        probabilities = torch.zeros((), dtype=torch.float32, device=x.device)
        for axes in flips:
            softmax = self._pass(x, axes, len(flips))
            probabilities = probabilities + (torch.flip(softmax, axes) if axes else softmax) / len(flips)
        self._end_of_tile()
        return probabilities

    def _outcome(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self._output(x).float(), dim=1)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _internal_predict_sliding_window_return_logits(
        self, data: torch.Tensor, slicers: list[Any], _do_on_device: bool = True
    ) -> torch.Tensor:
        patch = tuple(self.configuration_manager.patch_size)
        heads = self.label_manager.num_segmentation_heads
        sums = partial(torch.zeros, (heads + 1, *data.shape[1:]), dtype=torch.float32)  # of the weights, too
        sums_and_weights = self._where_there_is_room(partial(sums, device=self.device), sums)
        total, weights, device = sums_and_weights[:-1], sums_and_weights[-1], sums_and_weights.device
        weight = compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=1, dtype=torch.float32, device=device)
        for tile, slicer in self._tiles(data, slicers):
            total[slicer] += self._internal_maybe_mirror_and_predict(tile)[0].to(device) * weight
            weights[slicer[1:]] += weight
        check_finite(total.div_(weights))
        return total
