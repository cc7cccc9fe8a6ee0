"""Masks of slices as closed polygons, and nothing lost: every pixel centre in the mask is inside, every other outside.

The outline is that of marching squares at one half (contourpy): its corners lie half way between a pixel inside and one
outside. It never passes nearer to a pixel centre than a third of a pixel, so that planning systems that rasterise at
pixel centres get the mask back voxel by voxel. A hole is cut out by the keyhole technique of DICOM PS3.3 C.8.8.6.3: the
outline runs to the hole, around it, and back along the same line, which lies between two rows of pixels. That holds
whichever rule a reader fills by (even-odd, non-zero, one polygon after another, or their union); holes as polygons of
their own would be filled by readers that take the union.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from contourpy import FillType, contour_generator

Polygon = npt.NDArray[np.float64]


def outlines(mask_xy: npt.NDArray[np.bool_]) -> list[Polygon]:
    """Return the polygons around the pixels of a mask.

    Parameters
    ----------
    mask_xy
        ``[column, row]``.

    Returns
    -------
    list of ndarray, shape (n, 2)
        Column and row of the corners, in pixels, multiples of one half; pixel centres are whole numbers. The last
        corner is not the first again. Polygons do not overlap; pixels that touch at a corner may be in one or in two.
    """
    columns, rows = (np.flatnonzero(mask_xy.any(axis=axis)) for axis in (1, 0))
    if not len(columns):
        return []
    low, high = np.array([columns[0], rows[0]]), np.array([columns[-1], rows[-1]]) + 1
    padded = np.pad(mask_xy[low[0] : high[0], low[1] : high[1]], 1).T.astype(np.float64)
    filled_areas: Any = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2.0)
    points, offsets = filled_areas
    return [_with_keyholes(_rings(ring, ends)) + (low - 1) for ring, ends in zip(points, offsets, strict=True)]


def _rings(points: Polygon, ends: npt.NDArray[np.uint32]) -> list[Polygon]:
    """Return the outer ring and those of its holes, open, without corners on a straight line."""
    return [_corners(points[first : last - 1]) for first, last in pairwise(ends.tolist())]


def _corners(ring: Polygon) -> Polygon:
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0] != 0
    corners: Polygon = ring[turns]
    return corners


def _with_keyholes(rings: list[Polygon]) -> Polygon:
    """Return the outer ring with its holes cut out, from the top: what a hole's channel meets is part of it by then."""
    outer, *holes = rings
    started = sorted((_from_its_top(hole) for hole in holes), key=lambda hole: (hole[0, 1], hole[0, 0]))
    for hole in started:
        outer = _cut(outer, hole)
    return outer


def _from_its_top(hole: Polygon) -> Polygon:
    """Return the ring from its leftmost corner in its first row on; that row is a half: between pixels."""
    first = np.lexsort((hole[:, 0], hole[:, 1]))[0]
    return np.roll(hole, -first, axis=0)


def _cut(outer: Polygon, hole: Polygon) -> Polygon:
    """Return the outer ring that runs along a row to the hole on its right, around it, and back."""
    column, row = hole[0]
    start, end = outer, np.roll(outer, -1, axis=0)
    crosses = (np.minimum(start[:, 1], end[:, 1]) <= row) & (np.maximum(start[:, 1], end[:, 1]) >= row)
    rise = np.where(start[:, 1] == end[:, 1], 1, end[:, 1] - start[:, 1])
    along = np.where(start[:, 1] == end[:, 1], end[:, 0] > start[:, 0], (row - start[:, 1]) / rise)
    met = start[:, 0] + along * (end[:, 0] - start[:, 0])
    at = int(np.where(crosses & (met < column), met, -np.inf).argmax())
    gate = np.array([[met[at], row]])
    ring = np.vstack([outer[: at + 1], gate, hole, hole[:1], gate, outer[at + 1 :]])
    repeated = (ring == np.roll(ring, 1, axis=0)).all(axis=1)
    cut: Polygon = ring[~repeated]
    return cut
