"""Cubic resampling of images: what nnU-Net's `resample_data_or_seg` gives, in a fraction of its time and memory.

nnU-Net calls `skimage.transform.resize`, which is `scipy.ndimage.zoom` with cubic B-splines and edges that go on for
ever. A spline is separable. Along one axis after the other, the samples become coefficients, by one recursion forwards
and one backwards (Unser, *Splines: a perfect fit for signal and image processing*, IEEE Signal Processing Magazine
1999), and every output is a weighted sum of four of them; all in float64, as scipy has it.

A slice is resampled in plane while it lies in the cache, and through the slices only then. What is kept in between is a
strip of columns, not the image. How the work is cut does not depend on the number of threads: nor does the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import map_coordinates

from mshub.nnunet.kernels import in_parts, kernel

Array = np.ndarray[Any, Any]
Prepare = Callable[[Array], Array]

_POLE = np.sqrt(3.0) - 2.0  # of the cubic B-spline's recursions: what is k samples away counts _POLE**k
_REACH = 28  # samples: abs(_POLE)**28 is 1e-16, the rounding of float64
_MARGIN = 2  # coefficients beyond either end that the outermost outputs need
_LANES = 16  # rows filtered side by side: their block fits the first-level cache
_STRIP = 128  # columns of the output: so wide a slice fits the second-level cache
_LINE = 16  # float32 in a cache line


def unchanged(image: Array) -> Array:
    """Return `image`."""
    return image


def resample(
    image: Array,
    shape: Sequence[int],
    separate_axis: int | None = None,
    *,
    prepare: Prepare = unchanged,
    out: Array | None = None,
) -> Array:
    """Resample one channel as nnU-Net's `resample_data_or_seg` does with order 3 and, between slices, order 0.

    Parameters
    ----------
    image : ndarray, float32, three axes
        In any memory layout. It is not changed.
    shape : sequence of int
        Of the result; at least 1.
    separate_axis : int, optional
        The axis of thick slices. Every slice is resampled, and clipped, by itself; of the slices the nearest are taken.
    prepare : callable, optional
        Gets fresh copies of parts of `image`, which it may change, and returns what is resampled in their stead; so no
        prepared copy of the whole is needed. It must treat every voxel by itself and keep the order of values.
    out : ndarray, float32, optional
        Where to write the result.

    Returns
    -------
    ndarray, float32
        No value is outside the range of the prepared image (or slice).
    """
    out = np.empty(tuple(shape), np.float32) if out is None else out
    axis = separate_axis or 0
    source, target = _Source(np.moveaxis(image, axis, 0), prepare), np.moveaxis(out, axis, 0)
    same_slices, same_planes = source.shape[0] == target.shape[0], source.shape[1:] == target.shape[1:]
    if same_planes and (same_slices or separate_axis is not None):
        _take_slices(source, target)
    elif same_slices or separate_axis is not None:
        _resample_slices(source, target, None if separate_axis is not None else source.limits())
    else:
        _resample_strips(source, target)
    return out


class _Source(NamedTuple):
    """An image, axes (slice, row, column), prepared part by part."""

    image: Array
    prepare: Prepare

    @property
    def shape(self) -> tuple[int, ...]:
        return self.image.shape

    def part(self, slices: slice, columns: slice = slice(None)) -> Array:
        """Return some slices, or strips of them, as a C-contiguous array."""
        return self.prepare(np.array(self.image[slices, :, columns], np.float32, order="C"))

    def limits(self) -> tuple[float, float]:
        """Return the smallest and the largest value."""
        low, high = self.prepare(np.array([self.image.min(), self.image.max()], np.float32))
        return float(low), float(high)

    def batches(self) -> list[slice]:
        """Return which slices to read together: where neighbours share their cache lines, as many as do."""
        strides = np.abs(self.image.strides)
        size = _LINE if strides[0] < min(strides[1:]) else 1
        return [slice(start, min(start + size, len(self.image))) for start in range(0, len(self.image), size)]


class _Taps(NamedTuple):
    """Of every output along an axis: the first of the four coefficients it lies between, and their weights."""

    first: Array  # int64, counted from the margin on
    weights: Array  # float64, axes (output, coefficient)


class _Scratch(NamedTuple):
    """Where one thread resamples a slice."""

    block: Array  # float64, axes (input column with margins, lane)
    plane: Array  # float64, axes (input row with margins, output column)

    @classmethod
    def of(cls, height: int, width: int, new_width: int) -> _Scratch:
        return cls(np.zeros((width + 2 * _MARGIN, _LANES)), np.empty((height + 2 * _MARGIN, new_width)))


def _take_slices(source: _Source, target: Array) -> None:
    """Write the slices nearest to those of `target`, as they are."""
    nearest = _nearest(len(source.image), len(target))
    for batch in source.batches():
        wanted = np.flatnonzero((nearest >= batch.start) & (nearest < batch.stop))
        if wanted.size:
            target[wanted] = source.part(batch)[nearest[wanted] - batch.start]


def _resample_slices(source: _Source, target: Array, limits: tuple[float, float] | None) -> None:
    """Resample in plane, clip to `limits` or else to the range of the slice, and take the nearest slices."""
    nearest, batches = _nearest(len(source.image), len(target)), source.batches()
    (_, height, width), (_, new_height, new_width) = source.shape, target.shape
    rows, columns = _taps(height, new_height), _taps(width, new_width)

    def work(begin: int, end: int) -> None:
        scratch, resampled = _Scratch.of(height, width, new_width), np.empty((new_height, new_width), np.float32)
        for batch in batches[begin:end]:
            if not np.isin(nearest, np.arange(batch.start, batch.stop)).any():
                continue
            for number, plane in enumerate(source.part(batch), batch.start):
                low, high = limits or (float(plane.min()), float(plane.max()))
                _resample_plane(plane, columns, scratch)
                _resample_rows(scratch.plane, rows, low, high, resampled)
                target[nearest == number] = resampled

    in_parts(work, len(batches))


def _resample_strips(source: _Source, target: Array) -> None:
    """Resample along all axes, one strip of columns after the other."""
    (depth, _, width), (_, new_height, new_width) = source.shape, target.shape
    columns, limits = _taps(width, new_width), source.limits()
    strip = min(new_width, _STRIP)
    stack = np.empty((new_height, depth + 2 * _MARGIN, strip))
    for start in range(0, new_width, strip):
        start = min(start, new_width - strip)  # the last may overlap the one before
        inputs, taps = _cut(columns, slice(start, start + strip), width)
        _fill_stack(source, inputs, taps, stack)
        _resample_stack(stack, limits, target[:, :, start : start + strip])


def _fill_stack(source: _Source, inputs: slice, columns: _Taps, stack: Array) -> None:
    """Resample a strip of all slices in plane, into `stack`, axes (row, slice with margins, column)."""
    batches, height = source.batches(), source.shape[1]
    rows = _taps(height, stack.shape[0])

    def work(begin: int, end: int) -> None:
        scratch = _Scratch.of(height, inputs.stop - inputs.start, stack.shape[2])
        for batch in batches[begin:end]:
            for number, plane in enumerate(source.part(batch, inputs), batch.start):
                _resample_plane(plane, columns, scratch)
                _resample_rows(scratch.plane, rows, -np.inf, np.inf, stack[:, number + _MARGIN])

    in_parts(work, len(batches))


def _resample_stack(stack: Array, limits: tuple[float, float], target: Array) -> None:
    """Resample a strip through the slices, into `target`, axes (slice, row, column)."""
    slices = _taps(stack.shape[1] - 2 * _MARGIN, len(target))

    def work(begin: int, end: int) -> None:
        for row in range(begin, end):
            _resample_rows(stack[row], slices, *limits, target[:, row])

    in_parts(work, len(stack))


def _nearest(size: int, new_size: int) -> Array:
    """Return the sample nearest to each output, as nnU-Net computes and scipy rounds it."""
    positions = size / new_size * (np.arange(new_size) + 0.5) - 0.5
    numbers = np.arange(size, dtype=np.float64)
    nearest: Array = map_coordinates(numbers, positions[None], order=0, mode="nearest").astype(np.int64)
    return nearest


def _taps(size: int, new_size: int) -> _Taps:
    """Return the taps of an axis: pixels, not pixel centres, cover the same extent before and after."""
    positions = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    below = np.floor(positions)
    after, before = positions - below, 1 - (positions - below)
    weights = [before**3, 4 - 6 * after**2 + 3 * after**3, 4 - 6 * before**2 + 3 * before**3, after**3]
    return _Taps(below.astype(np.int64) - 1 + _MARGIN, np.stack(weights, axis=1))


def _cut(taps: _Taps, outputs: slice, size: int) -> tuple[slice, _Taps]:
    """Return which samples matter to `outputs`, and the taps of these outputs on those samples."""
    first = taps.first[outputs] - _MARGIN
    start, stop = max(int(first[0]) - _REACH, 0), min(int(first[-1]) + 4 + _REACH, size)
    return slice(start, stop), _Taps(taps.first[outputs] - start, taps.weights[outputs])


@kernel
def _to_coefficients(block: Array) -> None:
    """Turn samples (axis 0) into spline coefficients in place, a sixth of them, and continue them into the margins.

    The signal keeps its first and last value beyond its ends. There the recursions are geometric series. scipy makes
    do with 12 samples beyond the ends and mirrors, which is the same to 1e-14 of the range.
    """
    top, end = _MARGIN, block.shape[0] - _MARGIN - 1
    first, last = block[top].copy(), block[end].copy()
    for j in range(block.shape[1]):
        block[top, j] /= 1 - _POLE
    for i in range(top + 1, end + 1):
        for j in range(block.shape[1]):
            block[i, j] += _POLE * block[i - 1, j]
    for j in range(block.shape[1]):
        block[end, j] = last[j] / 6 - _POLE / (1 - _POLE**2) * (block[end, j] - last[j] / (1 - _POLE))
    for i in range(end - 1, top - 1, -1):
        for j in range(block.shape[1]):
            block[i, j] = _POLE * (block[i + 1, j] - block[i, j])
    for k in range(1, _MARGIN + 1):
        for j in range(block.shape[1]):
            block[top - k, j] = first[j] / 6 + _POLE**k * (block[top, j] - first[j] / 6)
            block[end + k, j] = last[j] / 6 + _POLE**k * (block[end, j] - last[j] / 6)


@kernel
def _resample_plane(image: Array, columns: _Taps, scratch: _Scratch) -> None:
    """Resample the columns (axis 1) of a slice into the plane, some rows at a time."""
    block, plane = scratch.block, scratch.plane
    for top in range(0, image.shape[0], _LANES):
        lanes = min(_LANES, image.shape[0] - top)
        for lane in range(lanes):
            for j in range(image.shape[1]):
                block[_MARGIN + j, lane] = image[top + lane, j]
        _to_coefficients(block)
        for i in range(columns.first.size):
            a = columns.first[i]
            w0, w1, w2, w3 = columns.weights[i]
            for k in range(lanes):
                value = w0 * block[a, k] + w1 * block[a + 1, k] + w2 * block[a + 2, k] + w3 * block[a + 3, k]
                plane[_MARGIN + top + k, i] = value


@kernel
def _resample_rows(block: Array, rows: _Taps, low: float, high: float, target: Array) -> None:
    """Resample the rows (axis 0) of a block, which is used up, and clip; what is no number remains none."""
    _to_coefficients(block)
    for i in range(rows.first.size):
        a = rows.first[i]
        w0, w1, w2, w3 = rows.weights[i]
        for j in range(block.shape[1]):
            value = w0 * block[a, j] + w1 * block[a + 1, j] + w2 * block[a + 2, j] + w3 * block[a + 3, j]
            value = low if value < low else value
            target[i, j] = high if value > high else value
