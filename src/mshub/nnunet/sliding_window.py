"""The network over an image, tile by tile: as nnU-Net v2 does it, and as v1 did.

nnU-Net v2 averages *logits* over mirrored copies, overlapping tiles and folds, in half precision. v1 averaged
*probabilities*, in single precision. The two differ in up to 0.2 % of the voxels, so a model of v1 is served by v1's
rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

from mshub.nnunet.half_precision import bits_of, check_finite, not_finite
from mshub.nnunet.kernels import in_parts
from mshub.nnunet.measures import Measures
from mshub.nnunet.window_kernels import add_mirrored, add_tile, divide

Progress = Callable[[int, int], None]
"""Called with (tiles done, tiles in all) while the network runs."""
Check = Callable[[], None]
"""Called now and then; raises to end what is being done."""
Network = Callable[[torch.Tensor], torch.Tensor]
"""Takes a tile, axes (batch, channel, *spatial), and returns its logits, axes (batch, class, *spatial)."""


class SlidingWindow(nnUNetPredictor):  # type: ignore[misc]
    """nnU-Net v2's predictor, silent, with its progress told to a callback.

    The parent's constructor prints on CPU and its loader imports trainer classes and unpickles; neither is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.verbose = self.verbose_preprocessing = self.allow_tqdm = False
        self.use_gaussian = self.use_mirroring = True
        self.tile_step_size = 0.5
        self.device = device
        self._networks: tuple[Network, ...] = ()
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
        self._features: torch.Tensor | None = None
        self._of_constant: tuple[tuple[float, ...], torch.Tensor, torch.Tensor | None] | None = None

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
        encoder = getattr(self._running, "encoder", None)
        if self._measures is None or encoder is None:
            yield
            return
        hook = encoder.register_forward_hook(self._note_features)
        try:
            yield
        finally:
            hook.remove()

    def _note_features(self, _module: Any, _inputs: Any, output: Any) -> None:
        """Take note of what the encoder made of a tile: a forward hook."""
        self._features = output[-1] if isinstance(output, (list, tuple)) else output
        if self._measures is not None:
            self._measures.deepest_features(self._features)

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
        """Let other networks, one of each fold, do what torch's would do; its weights are given up."""
        self._networks = tuple(networks)
        self.list_of_parameters: list[dict[str, Any]] = [{} for _ in networks]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _internal_predict_sliding_window_return_logits(
        self, data: torch.Tensor, slicers: list[Any], do_on_device: bool = True
    ) -> torch.Tensor:
        if self.device.type != "cpu":
            logits: torch.Tensor = super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)
            check_finite(logits)
            return logits
        patch = tuple(self.configuration_manager.patch_size)
        gaussian = compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=10, device=self.device)
        exact = gaussian.float()
        sums = torch.zeros((self.label_manager.num_segmentation_heads, *data.shape[1:]), dtype=torch.half)
        weights = torch.zeros(data.shape[1:], dtype=torch.half)
        for slicer in slicers:
            total, copies = self._sum_of_passes(data[slicer][None].contiguous())
            _add_tile(sums, total, copies, exact, slicer)
            weights[slicer[1:]] += gaussian
        if not all(in_parts(partial(divide, bits_of(sums), bits_of(weights)), len(sums))):
            raise not_finite()
        return sums

    def _sum_of_passes(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the sum of the network's outputs for a tile and its mirrored copies, and how many there are."""
        flips = list(self._flips())
        total = self._pass(x, flips[0], len(flips)).contiguous()
        for axes in flips[1:]:
            _add_mirrored(total, self._pass(x, axes, len(flips)).contiguous(), axes)
        self._end_of_tile()
        return total, len(flips)

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
            output = self._pass(x, axes, len(flips))
            yield torch.flip(output, axes) if axes else output
        self._end_of_tile()

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
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)

    def _outcome(self, x: torch.Tensor) -> torch.Tensor:
        return self._output(x)

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        """Return the network's output; that of a tile in which nothing changes is calculated once.

        Such tiles lie in the air around a body, and their mirrored copies are the same tile.
        """
        values = _constants(x)
        if values is None:
            return self._running(x)
        if self._of_constant is None or self._of_constant[0] != values:
            self._features = None
            self._of_constant = values, self._running(x).clone(), self._features
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


def _add_tile(
    sums: torch.Tensor, total: torch.Tensor, copies: int, weights: torch.Tensor, slicer: tuple[slice | int, ...]
) -> None:
    """Add a tile, axes (1, class, *spatial), to the sums of the image; of a 2d network it lies in one slice."""
    places = [slice(place, place + 1) if isinstance(place, int) else place for place in slicer[1:]]
    z, y, x = (place.start for place in places)
    shape = tuple(place.stop - place.start for place in places)
    tile, weight = total.reshape(-1, *shape).numpy(), weights.reshape(shape).numpy()
    share: Any = np.float32(1 / copies)
    in_parts(partial(add_tile, bits_of(sums), tile, share, weight, (z, y, x)), len(tile))


def _add_mirrored(total: torch.Tensor, output: torch.Tensor, axes: tuple[int, ...]) -> None:
    """Add an output, axes (1, class, *spatial), turned back along `axes` of it; a 2d network's lacks one."""
    missing = 5 - total.ndim
    shape = (total.shape[1], *[1] * missing, *total.shape[2:])
    mirrored = [axis + 2 - missing in axes for axis in range(3)]
    arrays = total.view(shape).numpy(), output.view(shape).numpy()
    in_parts(partial(add_mirrored, *arrays, *mirrored), len(arrays[0]))


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
        return torch.softmax(self._output(x).float(), dim=1)

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
        check_finite(total.div_(weights))
        return total
