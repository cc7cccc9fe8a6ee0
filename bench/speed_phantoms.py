"""Made-up images and network outputs for bench/speed.py.

Network outputs are made up: structures on a jittered lattice, each with a value that rises by 1 per mm across its
surface and levels off at 12 on either side, as the outputs of trained networks do; at a surface two values cross within
about 2 mm. Nothing about them is noise. They are written slab by slab and class by class, so that they may be larger
than the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, determine_do_sep_z_and_axis

from mshub.geometry import Array

Triple = tuple[float, float, float]
Shape = tuple[int, int, int]

SLAB = 8
"""Slices of a network output that are made at once."""
LEVEL = 12.0
"""Where the values of a network output level off."""
BODY_MM = 300.0
"""A body is at least as high, or as wide."""
WAVE_MM, WAVE_HEIGHT_MM = 30.0, 2.0
"""Length and height of the dents in the surfaces of structures."""
REGION_SIZES = (1.0, 0.75, 0.5)
"""Nested regions, by their radius."""
HU = {"air": -1000, "body": 40, "noise": 15, "step": 25}


@dataclass(frozen=True)
class Geometry:
    """An image and the grid its network works on; axes z, y, x, spacings in mm."""

    shape: Shape
    spacing: Triple
    network_spacing: Triple

    @property
    def network_shape(self) -> Shape:
        """Shape on the network's grid, rounded as nnU-Net does."""
        z, y, x = (int(edge) for edge in compute_new_shape(self.shape, self.spacing, self.network_spacing))
        return z, y, x

    @property
    def separate_z(self) -> bool:
        """Whether nnU-Net resamples the planes first and then between them."""
        return bool(determine_do_sep_z_and_axis(None, self.network_spacing, self.spacing)[0])


@dataclass(frozen=True)
class Blob:
    """A structure: an ellipsoid with dents; lengths in mm, axes z, y, x."""

    centre: Array
    radii: Array
    phases: Array

    def depth(self, places: list[Array]) -> torch.Tensor:
        """Return about how many mm each voxel lies below the surface, negative outside, axes (z, y, x)."""
        squares, waves = [], []
        for axis, place in enumerate(places):
            squares.append(_along(((place - self.centre[axis]) / self.radii[axis]) ** 2, axis))
            waves.append(_along(np.cos(place * (2 * np.pi / WAVE_MM) + self.phases[axis]), axis))
        depth = (squares[0] + squares[1] + squares[2]).sqrt_().neg_().add_(1.0).mul_(float(self.radii.mean()))
        return depth.addcmul_(waves[0] * waves[1], waves[2].expand_as(depth), value=WAVE_HEIGHT_MM)


def _along(values: Array, axis: int) -> torch.Tensor:
    shape = [1, 1, 1]
    shape[axis] = -1
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def blobs(extent_mm: Array, count: int, seed: int = 0) -> list[Blob]:
    """Return structures on a lattice over a body, some of which touch; a thin image shows the middle of the body."""
    generator = np.random.default_rng(seed)
    body_mm = np.maximum(extent_mm, (min(BODY_MM, *extent_mm[1:]), 0, 0))
    cells = np.ones(3, int)
    while cells.prod() < count:
        cells[np.argmax(body_mm / cells)] += 1
    pitch = body_mm / cells
    middle = (cells // 2 + 0.5) * pitch
    corner = np.clip(middle - extent_mm / 2, 0, body_mm - extent_mm)
    chosen = generator.permutation(int(cells.prod()))[:count]
    return [
        Blob(
            (cell + 0.5 + generator.uniform(-0.1, 0.1, 3)) * pitch - corner,
            pitch / 2 * generator.uniform(0.55, 1.05, 3),
            generator.uniform(0, 2 * np.pi, 3),
        )
        for cell in np.stack(np.unravel_index(chosen, tuple(cells)), axis=-1)
    ]


def _slabs(shape: Shape, spacing: Triple) -> Iterator[tuple[slice, list[Array]]]:
    """Yield the slices of each slab, and the places of its voxels along the axes, in mm."""
    y, x = ((np.arange(edge) + 0.5) * step for edge, step in zip(shape[1:], spacing[1:], strict=True))
    for begin in range(0, shape[0], SLAB):
        slices = slice(begin, min(begin + SLAB, shape[0]))
        yield slices, [(np.arange(slices.start, slices.stop) + 0.5) * spacing[0], y, x]


def write_logits(path: Path, geometry: Geometry, heads: int, regions: bool) -> float:
    """Write what a trained network could have returned, float16, axes (class, *network axes).

    Returns
    -------
    float
        The share of cells of 2 x 2 x 2 voxels that are not of one class.
    """
    shape, spacing = geometry.network_shape, geometry.network_spacing
    structures = (
        _nested(blobs(np.multiply(shape, spacing), 1)[0]) if regions else blobs(np.multiply(shape, spacing), heads - 1)
    )
    logits = np.lib.format.open_memmap(path, "w+", np.float16, (heads, *shape))  # type: ignore[no-untyped-call]
    labels = np.zeros(shape, np.uint8)
    for slices, places in _slabs(shape, spacing):
        deepest = torch.full((slices.stop - slices.start, *shape[1:]), -torch.inf)
        for value, structure in enumerate(structures, 1):
            depth = structure.depth(places)
            logits[value - regions, slices] = _levelled(depth)
            wins = (depth > 0) if regions else (depth > 0) & (depth > deepest)
            labels[slices][wins.numpy()] = value
            deepest = torch.maximum(deepest, depth)
        if not regions:
            logits[0, slices] = _levelled(-deepest)
    logits.flush()
    return float(_differs(labels).mean())


def _nested(outer: Blob) -> list[Blob]:
    return [Blob(outer.centre, outer.radii * size, outer.phases) for size in REGION_SIZES]


def _levelled(depth: torch.Tensor) -> Array:
    levelled: Array = (LEVEL * depth / (LEVEL + depth.abs())).half().numpy()
    return levelled


def _differs(labels: Array) -> Array:
    """Return which cells of 2 x 2 x 2 voxels are not of one class."""
    differs = np.zeros([edge - 1 for edge in labels.shape], bool)
    first = labels[:-1, :-1, :-1]
    for corner in np.ndindex(2, 2, 2):
        z, y, x = (slice(step, step + edge) for step, edge in zip(corner, first.shape, strict=True))
        differs |= labels[z, y, x] != first
    return differs


def synthetic_ct(geometry: Geometry, seed: int = 0) -> Array:
    """Return an image in HU with a body, a dozen organs and noise; float32, axes (z, y, x)."""
    extent = np.multiply(geometry.shape, geometry.spacing)
    body = Blob(extent / 2, extent * (2.0, 0.45, 0.48), np.zeros(3))
    organs = blobs(extent * (1, 0.7, 0.7), 12, seed)
    voxels = np.full(geometry.shape, HU["air"], np.float32)
    generator = np.random.default_rng(seed)
    for slices, places in _slabs(geometry.shape, geometry.spacing):
        slab = voxels[slices]
        slab[body.depth(places).numpy() > 0] = HU["body"]
        moved = [places[0], *(place - 0.15 * edge for place, edge in zip(places[1:], extent[1:], strict=True))]
        for number, organ in enumerate(organs):
            slab[organ.depth(moved).numpy() > 0] = HU["body"] + HU["step"] * (number - 5)
        slab += HU["noise"] * generator.standard_normal(slab.shape, np.float32)
    return voxels
