"""nnU-Net's rotation and scaling of training patches, with labels interpolated only where there is something to decide.

nnU-Net interpolates the mask of every label at every voxel of a patch, which for a model of many organs takes seconds
per patch: a GPU waits. A voxel that comes to lie between eight voxels of one label is of that label; at all others,
the borders, nnU-Net's own method is asked. The patches are the same.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform


class LabelFirstTransform(SpatialTransform):  # type: ignore[misc]
    """A `SpatialTransform` with another way to the same segmentation, in 3-D."""

    @classmethod
    def like(cls, transform: SpatialTransform) -> LabelFirstTransform:
        """Return one with the settings of `transform`."""
        made = cls.__new__(cls)
        made.__dict__.update(transform.__dict__)
        return made

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **params: Any) -> torch.Tensor:
        """Return the segmentation, axes (channel, *patch), at the places of ``params["grid"]``."""
        grid = params["grid"]
        if grid is None or segmentation.ndim != 4 or self.align_corners or min(segmentation.shape[1:]) < 2:
            return super()._apply_to_segmentation(segmentation, **params)
        places, is_inside = _corners(grid.reshape(-1, 3), segmentation.shape[1:])
        warped = torch.empty((len(segmentation), len(places)), dtype=segmentation.dtype)
        for channel, labels in enumerate(segmentation):
            warped[channel] = labels.flatten()[places]
            is_open = ~(is_inside & _is_uniform(labels).flatten()[places])
            if is_open.any():
                few = copy(self)
                few.patch_size = (int(is_open.sum()), 1, 1)
                there = grid.reshape(-1, 3)[is_open].reshape(-1, 1, 1, 3)
                found = SpatialTransform._apply_to_segmentation(few, labels[None], grid=there)
                warped[channel, is_open] = found.flatten()
        return warped.reshape(len(segmentation), *grid.shape[:-1])


def _corners(grid: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the first of the eight voxels around each place is, and whether all of them are in the array.

    Parameters
    ----------
    grid : Tensor, axes (place, 3)
        As `torch.nn.functional.grid_sample` takes it, the last axis first.
    shape : Size
        Of the array.

    Returns
    -------
    places : Tensor, int64
        In the flattened array.
    is_inside : Tensor, bool
    """
    places = torch.zeros(len(grid), dtype=torch.int64)
    is_inside = torch.ones(len(grid), dtype=torch.bool)
    for axis, size in enumerate(shape):
        first = (((grid[:, 2 - axis] + 1) * size - 1) / 2).floor()
        is_inside &= (first >= 0) & (first < size - 1)
        places = places * size + first.clamp(0, size - 1).long()
    return places, is_inside


def _is_uniform(labels: torch.Tensor) -> torch.Tensor:
    """Return which voxels of an array, axes (z, y, x), have the label of their neighbours one further on each axis."""
    uniform = torch.zeros(labels.shape, dtype=torch.bool)
    depth, height, width = (size - 1 for size in labels.shape)
    corner = labels[:depth, :height, :width]
    inner = uniform[:depth, :height, :width]
    inner[:] = True
    for number in range(1, 8):
        z, y, x = number >> 2, number >> 1 & 1, number & 1
        inner &= labels[z : z + depth, y : y + height, x : x + width] == corner
    return uniform
