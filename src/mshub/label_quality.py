"""What looks unfinished in a submitted label: hints for the person who drew it, while the image is still open.

None of it refuses a label. A structure may be in pieces, hollow or large in this patient; far more often a stroke of
the brush went astray, a slice was skipped, or an outline was never filled.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from scipy import ndimage

from mshub.geometry import Array
from mshub.volumes import three_digits, unusual_volume

MOST_HINTS = 8
"""Of one label: a longer list is read by nobody."""
STRAY = 0.01
"""Share of a structure below which a piece apart from the rest is an island."""
SCATTERED = 0.10
"""With so large a share in islands, the structure is in pieces by nature, such as metastases or vessels."""
FEW_SLICES = 2
"""Parts no thicker than this are drawn here and there; gaps no wider are skipped slices, even between thick parts."""
CONTINUES = 0.5
"""Share of a cross-section that lies over the one beyond a gap if both are of one piece."""
HOLLOW, HOLLOW_MM3, TINY_MM3 = 0.01, 1000.0, 27.0
"""Holes are told from this share of the structure or this volume on, whatever is less, and never below the last."""

_EVERY_NEIGHBOUR = np.ones((3, 3, 3), bool)
_LARGEST_OBJECT = 2**16  # scipy's list of objects is as long as the largest integer, which clients choose
_TOLD_SLICES = 3
OTHERS = "other reviewed cases"
_VOLUME, _SLICES, _HOLES, _ISLANDS = range(4)  # kinds of hints, what matters most first

Box = tuple[slice, ...]
Hint = tuple[int, str]


def label_hints(
    label: Array,
    values: Mapping[str, int],
    reviewed: Collection[str],
    spacing_mm: Sequence[float],
    usual_volumes_ml: Mapping[str, Sequence[float]],
) -> list[str]:
    """Return sentences about what looks unfinished, none for a label that looks as expected.

    What is looked for: an unusual volume, or none, beside other cases (`mshub.volumes`); slices left out between filled
    ones; unfilled holes; small pieces apart from the rest (26-connectivity).

    Parameters
    ----------
    label : ndarray of int, 3-D
        Axes i, j, k; slices are told by these indices, from 0.
    values : mapping of str to int
        Structure -> integer, not 0. Absent structures may be left out.
    reviewed : collection of str
        Structures a person looked at: the others are not looked at here either.
    spacing_mm : sequence of float
        Of the voxels, along the axes of `label`.
    usual_volumes_ml : mapping of str to sequence of float
        Structure -> its volume in each other reviewed case, 0 where it was found absent. Without the case itself.

    Returns
    -------
    list of str
        At most `MOST_HINTS`, what matters most first; the last one says how many more there are.
    """
    voxel_mm3 = math.prod(float(step) for step in spacing_mm)
    axes = sorted(range(3), key=lambda axis: -abs(label.strides[axis]))  # as in memory: thrice as fast in scipy
    label, letters = label.transpose(axes), "".join("ijk"[axis] for axis in axes)
    boxes = _boxes(label, {values[name] for name in reviewed if name in values})
    hints: list[Hint] = []
    for name in reviewed:
        usual = [float(volume) for volume in usual_volumes_ml.get(name, ()) if math.isfinite(volume) and volume >= 0]
        box = boxes.get(values[name]) if name in values else None
        if box is None:
            hints += _absence(name, usual)
        else:
            hints += _presence(_Drawn(name, label[box], values[name], box, letters, voxel_mm3), usual)
    return _shortened([sentence for _, sentence in sorted(hints, key=lambda hint: hint[0])])


def _boxes(label: Array, numbers: Collection[int]) -> dict[int, Box]:
    """Return integer -> bounding box, for those that are drawn."""
    small = [number for number in numbers if 0 < number <= _LARGEST_OBJECT]
    found = ndimage.find_objects(label, max_label=max(small)) if small else []
    boxes = {number: found[number - 1] for number in small}
    for number in set(numbers).difference(small):
        boxes[number] = ndimage.find_objects((label == number).astype(np.uint8), max_label=1)[0]
    return {number: box for number, box in boxes.items() if box is not None}


def _shortened(sentences: list[str]) -> list[str]:
    if len(sentences) <= MOST_HINTS:
        return sentences
    told = sentences[: MOST_HINTS - 1]
    return [*told, f"{len(sentences) - len(told)} more hints about this label are not listed."]


@dataclass(frozen=True, eq=False)
class _Drawn:
    """One structure, within its bounding box; `letters` are what clients call its axes."""

    name: str
    crop: Array
    value: int
    box: Box
    letters: str
    voxel_mm3: float

    @cached_property
    def mask(self) -> Array:
        return np.equal(self.crop, self.value)

    @cached_property
    def voxels(self) -> int:
        return int(np.count_nonzero(self.mask))

    @cached_property
    def pieces(self) -> tuple[Array, Array]:
        """The numbered pieces, from 1, and the voxels of each; those of 0 count for nothing."""
        numbered, count = ndimage.label(self.mask, _EVERY_NEIGHBOUR)
        return numbered, np.bincount(numbered[self.mask], minlength=int(count) + 1)

    @cached_property
    def strays(self) -> Array:
        """Whether each piece is a small island; none is in a structure that is in pieces by nature."""
        _, sizes = self.pieces
        small = (sizes > 0) & (sizes < STRAY * self.voxels)
        return small if sizes[small].sum() <= SCATTERED * self.voxels else np.zeros_like(small)

    @property
    def body(self) -> Array:
        """The mask without small islands."""
        return self.mask & ~self.strays[self.pieces[0]] if self.strays.any() else self.mask


def _presence(drawn: _Drawn, usual: Sequence[float]) -> Iterator[Hint]:
    yield from _unusual_volume(drawn, usual)
    yield from _missing_slices(drawn)
    yield from _holes(drawn)
    yield from _islands(drawn)


# -- volumes ----------------------------------------------------------------------------------------------------------


def _absence(name: str, usual: Sequence[float]) -> Iterator[Hint]:
    told = unusual_volume(name, 0.0, usual, OTHERS)
    if told:
        yield _VOLUME, f"{told}: was it left out?"


def _unusual_volume(drawn: _Drawn, usual: Sequence[float]) -> Iterator[Hint]:
    told = unusual_volume(drawn.name, drawn.voxels * drawn.voxel_mm3 / 1000, usual, OTHERS)
    if told:
        yield _VOLUME, f"{told}."


# -- slices -----------------------------------------------------------------------------------------------------------


def _missing_slices(drawn: _Drawn) -> Iterator[Hint]:
    body = drawn.body
    for letter, axis in sorted(zip(drawn.letters, range(3), strict=True)):
        start = drawn.box[axis].start
        runs = [(start + first, start + last) for first, last in _forgotten(body, axis)]
        if runs:
            one = len(runs) == 1 and runs[0][0] == runs[0][1]
            which = f"slice {letter} = {_ranges(runs)} is" if one else f"slices {letter} = {_ranges(runs)} are"
            yield _SLICES, f"{drawn.name}: {which} empty (counted from 0), and the slices on both sides are not."


def _forgotten(body: Array, axis: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last slice of every gap along an axis that no two separate parts explain.

    Parts of one piece continue beyond the gap. Two organs of a pair, or vertebrae, may lie over each other too: wide
    gaps between thick parts are theirs.
    """
    slices = np.moveaxis(body, axis, 0)
    for before, after in pairwise(_filled_runs(slices)):
        wide = after[0] - before[1] > FEW_SLICES
        thick = min(before[1] - before[0], after[1] - after[0]) > FEW_SLICES
        if not (wide and thick) and _continues(slices[before[1] - 1], slices[after[0]]):
            yield before[1], after[0] - 1


def _filled_runs(slices: Array) -> list[tuple[int, int]]:
    """Return the first slice of every run of filled ones, and the first one after it."""
    filled = slices.any(axis=(1, 2))
    ends = np.flatnonzero(np.diff(filled.astype(np.int8), prepend=0, append=0))
    return [(int(first), int(end)) for first, end in ends.reshape(-1, 2)]


def _continues(one: Array, other: Array) -> bool:
    smaller = min(np.count_nonzero(one), np.count_nonzero(other))
    return bool(np.count_nonzero(one & other) >= CONTINUES * smaller)


# -- holes and islands ------------------------------------------------------------------------------------------------


def _holes(drawn: _Drawn) -> Iterator[Hint]:
    """Yield a hint about what the structure encloses and nobody labelled; a tumour in a liver is no hole.

    What is enclosed is what `scipy.ndimage.binary_fill_holes` fills, found by numbering the outside once: scipy grows
    it by one voxel at a time.
    """
    numbered, count = ndimage.label(~drawn.mask)
    inside = np.ones(int(count) + 1, bool)
    inside[[0, *_on_faces(numbered)]] = False
    sizes = np.bincount(numbered[drawn.crop == 0], minlength=int(count) + 1) * inside
    volume_mm3, whole_mm3 = float(sizes.sum() * drawn.voxel_mm3), drawn.voxels * drawn.voxel_mm3
    if volume_mm3 >= max(TINY_MM3, min(HOLLOW * whole_mm3, HOLLOW_MM3)):
        number = int(np.count_nonzero(sizes))
        yield (
            _HOLES,
            f"{drawn.name} has {'a hole' if number == 1 else f'{number} holes'} inside that no structure fills "
            f"({_cubic_millimetres(volume_mm3)} in all).",
        )


def _on_faces(numbered: Array) -> set[int]:
    """Return what lies on the six faces of a box: it is open to the outside."""
    faces = [np.moveaxis(numbered, axis, 0)[end] for axis in range(numbered.ndim) for end in (0, -1)]
    return {int(number) for face in faces for number in np.unique(face)}


def _islands(drawn: _Drawn) -> Iterator[Hint]:
    sizes = drawn.pieces[1][drawn.strays]
    if sizes.size:
        islands = "a small island" if sizes.size == 1 else f"{sizes.size} small islands"
        volume = _cubic_millimetres(float(sizes.sum() * drawn.voxel_mm3))
        yield _ISLANDS, f"{drawn.name} has {islands} apart from the rest ({volume} in all): stray strokes of the brush?"


# -- words ------------------------------------------------------------------------------------------------------------


def _ranges(runs: Sequence[tuple[int, int]]) -> str:
    """Return such as ``3, 7 to 9 and 2 more``."""
    told = [f"{first}" if first == last else f"{first} to {last}" for first, last in runs[:_TOLD_SLICES]]
    more = sum(last - first + 1 for first, last in runs[_TOLD_SLICES:])
    return ", ".join(told) + (f" and {more} more" if more else "")


def _cubic_millimetres(value: float) -> str:
    return f"{three_digits(value)} mm³"
