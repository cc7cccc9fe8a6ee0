"""The network over an image, tile by tile: as nnU-Net v2 does it, and as v1 did.

nnU-Net v2 averages *logits* over mirrored copies, overlapping tiles and folds, in half precision. v1 averaged
*probabilities*, in single precision. The two differ in up to 0.2 % of the voxels, so a model of v1 is served by v1's
rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

from mshub.nnunet.measures import Measures

Progress = Callable[[int, int], None]
"""Called with (tiles done, tiles in all) while the network runs."""
Check = Callable[[], None]
"""Called now and then; raises to end what is being done."""


class SlidingWindow(nnUNetPredictor):  # type: ignore[misc]
    """nnU-Net v2's predictor, silent, with its progress told to a callback.

    The parent's constructor prints on CPU and its loader imports trainer classes and unpickles; neither is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.verbose = self.verbose_preprocessing = self.allow_tqdm = False
        self.use_gaussian = self.use_mirroring = True
        self.tile_step_size = 0.5
        self.device = device
        self.perform_everything_on_device = device.type == "cuda"
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

    def _internal_get_sliding_window_slicers(self, image_size: tuple[int, ...]) -> list[Any]:
        slicers: list[Any] = super()._internal_get_sliding_window_slicers(image_size)
        self._total = len(slicers) * len(self.list_of_parameters)
        return slicers

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
        """Predict with one fold."""
        with self._watched_encoder():
            logits: torch.Tensor = super().predict_sliding_window_return_logits(input_image)
        if self._measures is not None:
            self._measures.end_of_fold(logits)
        return logits

    @contextmanager
    def _watched_encoder(self) -> Iterator[None]:
        encoder = getattr(self.network, "encoder", None)
        if self._measures is None or encoder is None:
            yield
            return
        hook = encoder.register_forward_hook(self._measures.deepest_features)
        try:
            yield
        finally:
            hook.remove()

    def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
        passes = self._passes(x)
        prediction = next(passes)
        for output in passes:
            prediction += output
        prediction /= self._count
        return prediction

    def _passes(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the network's outputs for a tile and its mirrored copies, turned back; then count the tile."""
        flips = list(self._flips())
        self._count = len(flips)
        for axes in flips:
            if self._check is not None:
                self._check()
            output = self._outcome(torch.flip(x, axes) if axes else x)
            output = torch.flip(output, axes) if axes else output
            if self._measures is not None:
                self._measures.one_pass(output, len(flips))
            yield output
        if self._measures is not None:
            self._measures.end_of_tile()
        self._count_tile()

    def _outcome(self, x: torch.Tensor) -> torch.Tensor:
        outcome: torch.Tensor = self.network(x)
        return outcome

    def _flips(self) -> Iterator[tuple[int, ...]]:
        """Yield the axes of (batch, channel, *spatial) tensors to flip together, beginning with none."""
        axes = [axis + 2 for axis in self.allowed_mirroring_axes or ()] if self.use_mirroring else []
        for count in range(len(axes) + 1):
            yield from combinations(axes, count)

    def _count_tile(self) -> None:
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)


class ProbabilityWindow(SlidingWindow):
    """nnU-Net v1's rule: a softmax per forward pass, averaged in float32, weighted by the same Gaussian.

    What v2 calls logits are probabilities here; they need no softmax afterwards.
    """

    def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
        probabilities = torch.zeros((), dtype=torch.float32, device=x.device)
        for softmax in self._passes(x):
            probabilities = probabilities + softmax / self._count
        return probabilities

    def _outcome(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.network(x).float(), dim=1)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _internal_predict_sliding_window_return_logits(
        self, data: torch.Tensor, slicers: list[Any], do_on_device: bool = True
    ) -> torch.Tensor:
        device = self.device if do_on_device else torch.device("cpu")
        patch = tuple(self.configuration_manager.patch_size)
        weight = compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=1, dtype=torch.float32, device=device)
        heads = self.label_manager.num_segmentation_heads
        total = torch.zeros((heads, *data.shape[1:]), dtype=torch.float32, device=device)
        weights = torch.zeros(data.shape[1:], dtype=torch.float32, device=device)
        for slicer in slicers:
            tile = data[slicer][None].to(self.device)
            total[slicer] += self._internal_maybe_mirror_and_predict(tile)[0].to(device) * weight
            weights[slicer[1:]] += weight
        return total.div_(weights)
