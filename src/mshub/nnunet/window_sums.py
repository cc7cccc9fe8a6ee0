"""Where the tiles of a sliding window are added up: sums over an image, weighted by a Gaussian, in half precision.

On the CPU every value is nnU-Net's own, to the last bit, in one pass over the memory instead of several. On a GPU,
where tiles are in half precision already, fewer results on the way are rounded than nnU-Net rounds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

from mshub.nnunet.half_precision import bits_of, check_finite, not_finite
from mshub.nnunet.kernels import in_parts
from mshub.nnunet.window_kernels import add_mirrored, add_tile, divide

Slicer = tuple[slice | int, ...]
"""Where a tile lies: of all channels, and along each axis; a tile of a 2d network lies in one slice."""

SCALE = 10
"""nnU-Net's: weights far from the middle of a tile must not vanish in half precision."""


def gaussian(patch: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the weights of a tile's voxels, as nnU-Net has them, in half precision."""
    weights: torch.Tensor = compute_gaussian(patch, sigma_scale=1 / 8, value_scaling_factor=SCALE, device=device)
    return weights


class SumsOnCPU:
    """Sums in main memory.

    Parameters
    ----------
    heads : int
        Channels of the network's output.
    shape : tuple of int
        Of the image on the network's grid.
    patch : tuple of int
        Of a tile.
    """

    def __init__(self, heads: int, shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
        self._sums = torch.zeros((heads, *shape), dtype=torch.half)
        self._weights = torch.zeros(shape, dtype=torch.half)
        self._gaussian = gaussian(patch, torch.device("cpu"))
        self._exact = self._gaussian.float()

    def add(self, total: torch.Tensor, copies: int, slicer: Slicer) -> None:
        """Add the mean of a tile's copies, of which `total`, axes (1, class, *patch), is the sum."""
        places = [slice(place, place + 1) if isinstance(place, int) else place for place in slicer[1:]]
        z, y, x = (place.start for place in places)
        shape = tuple(place.stop - place.start for place in places)
        tile = total.cpu().float().reshape(-1, *shape).numpy()
        share: Any = np.float32(1 / copies)
        weight = self._exact.reshape(shape).numpy()
        in_parts(partial(add_tile, bits_of(self._sums), tile, share, weight, (z, y, x)), shape[0])
        self._weights[slicer[1:]] += self._gaussian

    def mean(self) -> torch.Tensor:
        """Return the weighted mean of all tiles, axes (class, *spatial); the sums are gone.

        Raises
        ------
        PredictionError
            A value is not finite.
        """
        if not all(in_parts(partial(divide, bits_of(self._sums), bits_of(self._weights)), len(self._sums))):
            raise not_finite()
        return self._sums


class SumsOnDevice:
    """Sums on a GPU, with the classes of a voxel next to each other, as the network writes them; see `SumsOnCPU`."""

    def __init__(self, heads: int, shape: tuple[int, ...], patch: tuple[int, ...], device: torch.device) -> None:
        self._sums = torch.zeros((*shape, heads), dtype=torch.half, device=device).movedim(-1, 0)
        self._weights = torch.zeros(shape, device=device)
        self._gaussian = gaussian(patch, device).float()

    def add(self, total: torch.Tensor, copies: int, slicer: Slicer) -> None:
        """Add the mean of a tile's copies, of which `total`, axes (1, class, *patch), is the sum."""
        self._sums[slicer].addcmul_(total[0], self._gaussian / copies)
        self._weights[slicer[1:]] += self._gaussian

    def mean(self) -> torch.Tensor:
        """Return the weighted mean of all tiles; see `SumsOnCPU.mean`."""
        mean = self._sums.div_(self._weights)
        check_finite(mean)
        return mean


def first_copy(output: torch.Tensor) -> torch.Tensor:
    """Return a network's output as a sum that other copies are added to; networks reuse their output."""
    return output.clone() if output.device.type != "cpu" else classes_first(output)


def classes_first(output: torch.Tensor) -> torch.Tensor:
    """Return an output, axes (1, class, *spatial), in this order in memory too; itself if it is, otherwise a copy.

    Of one with the classes last, as OpenVINO writes it, through two axes only: torch copies those in blocks, three
    times as fast as five.
    """
    if output.is_contiguous() or output.stride(1) != 1:
        return output.contiguous()
    columns = output.movedim(1, -1).reshape(-1, output.shape[1])
    return columns.t().clone(memory_format=torch.contiguous_format).reshape(output.shape)


def add_copy(total: torch.Tensor, output: torch.Tensor, axes: tuple[int, ...]) -> None:
    """Add the output for a mirrored copy of a tile, axes (1, class, *patch), turned back along `axes` of it."""
    if total.device.type != "cpu":
        total += output.flip(axes)
        return
    missing = 5 - total.ndim  # a 2d network's output lacks an axis
    shape = (total.shape[1], *[1] * missing, *total.shape[2:])
    mirrored = [axis + 2 - missing in axes for axis in range(3)]
    arrays = total.view(shape).numpy(), classes_first(output).view(shape).numpy()
    in_parts(partial(add_mirrored, *arrays, *mirrored), len(arrays[0]))
