"""The CPU's part of `mshub.nnunet.export`, row by row, in numba.

Spatial axes are called z, y, x for short, whatever axes of the body they are. Values come as `bits_of` gives them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mshub.nnunet.half_precision import as_double, is_no_number, ordinal, rounded_like
from mshub.nnunet.kernels import kernel

Array = np.ndarray[Any, Any]

Axis = tuple[Array, Array, Array, Array]
"""Of every place along an axis of the output: the places of the input it lies between, and their weights."""

MARGIN = 4
"""A voxel is sure of its class if the largest value is more than so many representable numbers above the second."""


@kernel
def find_winners(bits: Array, winners: Array, unsure: int, begin: int, end: int) -> bool:
    """Write the class of the largest value of each voxel, `unsure` where the second is too close.

    Parameters
    ----------
    bits : ndarray, axes (class, z, y, x), C-contiguous
    winners : ndarray, axes (z, y, x)
        Written.
    unsure : int
    begin, end : int
        Which slices.

    Returns
    -------
    bool
        All values are finite.
    """
    classes, _, height, width = bits.shape
    best, second, winner = np.empty(width, bits.dtype), np.empty(width, bits.dtype), np.empty(width, np.int16)
    no_number = np.zeros(width, np.bool_)
    lowest = np.iinfo(bits.dtype).min
    for z in range(begin, end):
        for y in range(height):
            best[:] = lowest
            second[:] = lowest
            winner[:] = 0
            for index in range(classes):
                row, label = bits[index, z, y], np.int16(index)
                for x in range(width):
                    value, former = ordinal(row[x]), best[x]
                    no_number[x] |= is_no_number(row[x])
                    second[x] = max(second[x], min(value, former))
                    winner[x] = label if value > former else winner[x]
                    best[x] = max(former, value)
            found = winners[z, y]
            for x in range(width):
                found[x] = winner[x] if np.int64(best[x]) - np.int64(second[x]) > MARGIN else unsure
    return not no_number.any()


@kernel
def find_regions(bits: Array, threshold: float, winners: Array, begin: int, end: int) -> bool:
    """Write for each voxel one more than the last region whose value reaches the threshold, 0 without one.

    Parameters and result are those of `find_winners`.
    """
    regions, _, height, width = bits.shape
    winner, no_number = np.empty(width, np.int16), np.zeros(width, np.bool_)
    for z in range(begin, end):
        for y in range(height):
            winner[:] = 0
            for index in range(regions):
                row, label = bits[index, z, y], np.int16(index + 1)
                for x in range(width):
                    no_number[x] |= is_no_number(row[x])
                    winner[x] = label if as_double(row[x]) >= threshold else winner[x]
            found = winners[z, y]
            for x in range(width):
                found[x] = winner[x]
    return not no_number.any()


@kernel
def write_labels(
    bits: Array,
    winners: Array,
    unsure: int,
    threshold: float,
    axes: tuple[Axis, Axis, Axis],
    codes: Array,
    out: Array,
    begin: int,
    end: int,
) -> int:
    """Write some slices of the label map.

    Parameters
    ----------
    bits : ndarray, axes (class, z, y, x), C-contiguous
    winners : ndarray, axes (z, y, x)
        As `find_winners` or `find_regions` wrote it.
    unsure : int
    threshold : float
        From which value on a voxel belongs to a region; NaN where the largest value decides.
    axes : tuple of Axis
        z, y, x.
    codes : ndarray
        Label of each winner.
    out : ndarray, axes (z, y, x)
        Written.
    begin, end : int
        Which slices.

    Returns
    -------
    int
        So many voxels needed interpolation.
    """
    below, above, _, _ = axes[0]
    lefts, rights, _, _ = axes[2]
    width = len(lefts)
    common = np.empty(winners.shape[2], winners.dtype)
    open_, best, winner = np.empty(width, np.int64), np.empty(width, np.float64), np.empty(width, np.int64)
    interpolated = 0
    for z in range(begin, end):
        for y in range(len(axes[1][0])):
            front, back = axes[1][0][y], axes[1][1][y]
            _agree(winners, below[z], above[z], front, back, unsure, common)
            row, count = out[z, y], 0
            for x in range(width):
                left = common[lefts[x]]
                if left == common[rights[x]] and left != unsure:
                    row[x] = codes[left]
                else:
                    open_[count] = x
                    count += 1
            if count == 0:
                continue
            interpolated += count
            _decide(bits, threshold, z, y, axes, open_[:count], best, winner)
            for place in range(count):
                row[open_[place]] = codes[winner[place]]
    return interpolated


@kernel
def _agree(winners: Array, below: int, above: int, front: int, back: int, unsure: int, common: Array) -> None:
    """Write what four neighbouring rows have in common, `unsure` where they differ."""
    one, two = winners[below, front], winners[below, back]
    three, four = winners[above, front], winners[above, back]
    for x in range(len(common)):
        alike = (one[x] == two[x]) & (one[x] == three[x]) & (one[x] == four[x])
        common[x] = one[x] if alike else unsure


@kernel
def _decide(
    bits: Array,
    threshold: float,
    z: int,
    y: int,
    axes: tuple[Axis, Axis, Axis],
    places: Array,
    best: Array,
    winner: Array,
) -> None:
    """Interpolate all classes at some places of a row, in scipy's order of operations, and find the winners."""
    below, above, near, far = axes[0][0][z], axes[0][1][z], axes[0][2][z], axes[0][3][z]
    front, back, fore, aft = axes[1][0][y], axes[1][1][y], axes[1][2][y], axes[1][3][y]
    lefts, rights, starboard, port = axes[2]
    of_regions = not np.isnan(threshold)
    best[: len(places)] = -np.inf
    winner[: len(places)] = 0
    for index in range(bits.shape[0]):
        one, two = bits[index, below, front], bits[index, below, back]
        three, four = bits[index, above, front], bits[index, above, back]
        for place in range(len(places)):
            x = places[place]
            left, right, here, there = lefts[x], rights[x], starboard[x], port[x]
            value = as_double(one[left]) * near * fore * here + as_double(one[right]) * near * fore * there
            value += as_double(two[left]) * near * aft * here
            value += as_double(two[right]) * near * aft * there
            if far != 0:
                value += as_double(three[left]) * far * fore * here
                value += as_double(three[right]) * far * fore * there
                value += as_double(four[left]) * far * aft * here
                value += as_double(four[right]) * far * aft * there
            value = rounded_like(value, one[left])
            if of_regions:
                if value >= threshold:
                    winner[place] = index + 1
            elif value > best[place]:
                best[place], winner[place] = value, index
