"""The part of `mshub.nnunet.export` for devices other than the CPU, in torch: logits stay where they were made.

Only the label map leaves the device. Works on the CPU too, slower than `export_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mshub.nnunet.export_kernels import MARGIN, Axis
from mshub.nnunet.half_precision import DROPPED_BITS, JUST_BELOW_HALF, SMALLEST_NORMAL, SUBNORMAL_MAGIC

Array = np.ndarray[Any, Any]
Places = tuple[torch.Tensor, ...]
"""An `Axis` on the device."""

Head = Callable[[torch.Tensor], torch.Tensor]

VALUES_AT_ONCE = 2**26
"""So many numbers of all classes are looked at together, which bounds the memory it takes."""


def write_labels_on_device(
    logits: torch.Tensor, threshold: float, axes: tuple[Axis, Axis, Axis], codes: Array, unsure: int, out: Array
) -> None:
    """Write the label map of logits on any device.

    Parameters
    ----------
    logits : Tensor, float16 or float32, axes (class, z, y, x)
        Finite.
    threshold : float
        From which value on a voxel belongs to a region; NaN where the largest value decides.
    axes : tuple of Axis
        How the output lies in the logits: z, y, x.
    codes : ndarray
        Label of each winner.
    unsure : int
        What no winner is.
    out : ndarray, axes (z, y, x)
        Written.
    """
    winners = find_winners_on_device(logits, threshold, unsure)
    z, y, x = _on_device(axes, logits.device)
    dtype = np.int32 if codes.dtype == np.uint16 else codes.dtype  # torch has few operations for uint16
    labels = torch.as_tensor(codes.astype(dtype), device=logits.device)
    slices = max(1, VALUES_AT_ONCE // (8 * out[0].size))
    for begin in range(0, len(out), slices):
        part = tuple(array[begin : begin + slices] for array in z)
        found = _Part(logits, winners, (part, y, x)).winners(threshold, unsure)
        out[begin : begin + slices] = labels[found].cpu().numpy()


def write_probabilities(
    logits: torch.Tensor, head: Head, axes: tuple[Axis, Axis, Axis], channels: Sequence[int], out: Array
) -> None:
    """Write the probabilities of some channels; memory grows with these, not with all classes.

    Parameters
    ----------
    logits : Tensor, float16 or float32, axes (class, z, y, x)
    head : callable
        Turns interpolated values of all channels, float32, axes (class, voxel), into probabilities.
    axes : tuple of Axis
        How the output lies in the logits: z, y, x.
    channels : sequence of int
    out : ndarray, float32, axes (channel, z, y, x)
        Written.
    """
    z, y, x = _on_device(axes, logits.device)
    part, chosen_channels = _Part(logits, None, (z, y, x)), torch.as_tensor(list(channels), device=logits.device)
    plane = torch.cartesian_prod(*(torch.arange(size, device=logits.device) for size in out.shape[2:]))
    for index in range(out.shape[1]):
        for places in plane.split(max(1, VALUES_AT_ONCE // (8 * len(logits)))):
            voxels = torch.cat([torch.full((len(places), 1), index, device=logits.device), places], 1)
            values = head(part.values(voxels).float())[chosen_channels].cpu().numpy()
            out[:, index, places[:, 0].cpu().numpy(), places[:, 1].cpu().numpy()] = values


def find_winners_on_device(logits: torch.Tensor, threshold: float, unsure: int) -> torch.Tensor:
    """Return the winner of each voxel; see `export_kernels.find_winners` and `find_regions`."""
    winners = torch.empty(logits.shape[1:], dtype=torch.int32, device=logits.device)
    slices = max(1, VALUES_AT_ONCE // logits[:, 0].numel())
    for values, part in zip(logits.split(slices, 1), winners.split(slices), strict=True):
        if not np.isnan(threshold):
            part.copy_(_last_region(values >= threshold))
            continue
        places = _ordinals(values)
        first = places.max(0)
        part.copy_(first.indices)
        if len(places) > 1:
            others = places.scatter(0, first.indices[None], torch.iinfo(places.dtype).min)
            part[first.values.long() - others.amax(0).long() <= MARGIN] = unsure
    return winners


def _on_device(axes: tuple[Axis, Axis, Axis], device: torch.device) -> tuple[Places, Places, Places]:
    z, y, x = (tuple(torch.as_tensor(array, device=device) for array in axis) for axis in axes)
    return z, y, x


class _Part:
    """Some slices of the output."""

    def __init__(self, logits: torch.Tensor, winners: Any, axes: tuple[Places, Places, Places]) -> None:
        self._logits, self._winners, self._axes = logits, winners, axes

    def winners(self, threshold: float, unsure: int) -> torch.Tensor:
        """Return the winner of each voxel, axes (z, y, x)."""
        first, *others = np.ndindex(2, 2, 2)
        found = self._winners_at(first)
        is_open = found == unsure
        for corner in others:
            is_open |= self._winners_at(corner) != found
        open_ = torch.nonzero(is_open)
        for chosen in open_.split(max(1, VALUES_AT_ONCE // (8 * len(self._logits)))):
            found[tuple(chosen.T)] = self._decided(chosen, threshold)
        return found

    def _winners_at(self, corner: tuple[int, ...]) -> torch.Tensor:
        """Return the winners of the voxels below (0) or above (1), along each axis, those of the output."""
        z, y, x = (axis[end] for axis, end in zip(self._axes, corner, strict=True))
        return self._winners[z][:, y][:, :, x]

    def _decided(self, chosen: torch.Tensor, threshold: float) -> torch.Tensor:
        """Return the winners of some voxels, axes (voxel, 3), by interpolating all classes."""
        values = self.values(chosen)
        if not np.isnan(threshold):
            return _last_region(values >= threshold)
        numbers = torch.arange(len(values), device=values.device)[:, None]
        first: torch.Tensor = torch.where(values == values.amax(0), numbers, len(values)).amin(0)
        return first.int()

    def values(self, chosen: torch.Tensor) -> torch.Tensor:
        """Return the values of all classes at some voxels, axes (voxel, 3), interpolated in scipy's order.

        Rounded to the precision of the logits; float64, axes (class, voxel).
        """
        logits = self._logits
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for corner in np.ndindex(2, 2, 2):
            z, y, x = (self._axes[axis][end][chosen[:, axis]] for axis, end in enumerate(corner))
            value = logits[:, z, y, x].double()
            for axis, end in enumerate(corner):
                value *= self._axes[axis][2 + end][chosen[:, axis]]
            total = total + value
        return _half(total) if logits.dtype == torch.float16 else total.float().double()


def _last_region(inside: torch.Tensor) -> torch.Tensor:
    """Return one more than the last region each voxel is inside of; axes (region, ...)."""
    numbers = torch.arange(1, len(inside) + 1, dtype=torch.int32, device=inside.device)
    return (inside * numbers.view(-1, *[1] * (inside.ndim - 1))).amax(0)


def _ordinals(values: torch.Tensor) -> torch.Tensor:
    """Return the places of numbers among all of their precision; see `half_precision.ordinal`."""
    if values.dtype == torch.float16:
        bits = values.view(torch.int16)
        return bits ^ ((bits >> 15) & 0x7FFF)
    bits = values.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _half(values: torch.Tensor) -> torch.Tensor:
    """Round float64 to half precision, as float64; torch itself would round to single precision first."""
    bits = values.view(torch.int64)
    odd = (bits >> DROPPED_BITS) & 1
    normal = (((bits + (JUST_BELOW_HALF + odd)) >> DROPPED_BITS) << DROPPED_BITS).view(torch.float64)
    small = (values + SUBNORMAL_MAGIC) - SUBNORMAL_MAGIC
    return torch.where(values.abs() < SMALLEST_NORMAL, small, normal)
