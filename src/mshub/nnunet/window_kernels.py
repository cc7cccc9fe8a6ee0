"""The sums of a sliding window on the CPU, each in one go over the memory, rounded as torch rounds them step by step.

Half-precision arrays come as `bits_of` gives them. Spatial axes are called z, y, x for short.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mshub.nnunet.half_precision import half_to_single, is_no_number, single_to_half
from mshub.nnunet.kernels import kernel

Array = np.ndarray[Any, Any]


@kernel
def add_mirrored(
    total: Array, output: Array, mirror_z: bool, mirror_y: bool, mirror_x: bool, begin: int, end: int
) -> None:
    """Add the network's output for a mirrored tile, turned back, to a total.

    Parameters
    ----------
    total, output : ndarray, float32, axes (class, z, y, x), C-contiguous
    mirror_z, mirror_y, mirror_x : bool
        Along which axes the tile was mirrored.
    begin, end : int
        Which classes.
    """
    _, depth, height, width = total.shape
    for index in range(begin, end):
        for z in range(depth):
            from_z = depth - 1 - z if mirror_z else z
            for y in range(height):
                row = total[index, z, y]
                added = output[index, from_z, height - 1 - y if mirror_y else y]
                if mirror_x:
                    for x in range(width):
                        row[x] += added[width - 1 - x]
                else:
                    for x in range(width):
                        row[x] += added[x]


@kernel
def add_tile(
    sums: Array, tile: Array, share: float, weights: Array, corner: tuple[int, int, int], begin: int, end: int
) -> None:
    """Add a weighted tile to the sums of an image.

    Parameters
    ----------
    sums : ndarray, bits of float16, axes (class, z, y, x)
    tile : ndarray, float32, axes (class, z, y, x)
        The total over mirrored copies; classes may come first or last in memory.
    share : float32
        One over the number of copies, a power of two.
    weights : ndarray, float32, axes (z, y, x), C-contiguous
    corner : tuple of int
        Of the tile in the image: z, y, x.
    begin, end : int
        Which slices of the tile.
    """
    classes, _, height, width = tile.shape
    for z in range(begin, end):
        for y in range(height):
            weight = weights[z, y]
            for index in range(classes):
                row = sums[index, corner[0] + z, corner[1] + y, corner[2] : corner[2] + width]
                added = tile[index, z, y]
                for x in range(width):
                    row[x] = single_to_half(half_to_single(row[x]) + added[x] * share * weight[x])


@kernel
def divide(sums: Array, weights: Array, begin: int, end: int) -> bool:
    """Divide the sums of each class by the weights added up.

    Parameters
    ----------
    sums : ndarray, bits of float16, axes (class, z, y, x), C-contiguous
        Divided in place.
    weights : ndarray, bits of float16, axes (z, y, x), C-contiguous
    begin, end : int
        Which classes.

    Returns
    -------
    bool
        All values are finite.
    """
    _, depth, height, width = sums.shape
    no_number = np.zeros(width, np.bool_)
    for index in range(begin, end):
        for z in range(depth):
            for y in range(height):
                row, weight = sums[index, z, y], weights[z, y]
                for x in range(width):
                    row[x] = single_to_half(half_to_single(row[x]) / half_to_single(weight[x]))
                    no_number[x] |= is_no_number(row[x])
    return not no_number.any()
