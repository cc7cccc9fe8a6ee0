"""The pictures of a case: the slice that tells most, whole and in detail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from mshub.geometry import Affine, Array
from mshub.report.canvas import AFTER, BEFORE, Box, Canvas
from mshub.report.contents import Overlay
from mshub.report.words import dice_text, finite

#: Which values of the structures are sure to be shown with contrast.
DISPLAYED_PERCENTILES = (2, 98)

#: A stack of slices is shown in the plane it was acquired in once its slices are this much thicker than its pixels.
THICK_SLICES = 1.5

#: How much of its surroundings a detail shows, relative to the structures in it, and the least it shows of the slice.
DETAIL_MARGIN, SMALLEST_DETAIL = 1.25, 0.25

#: Axis of R, A, S that slices are stacked along -> their name, and what is on their left, right, top and bottom.
_PLANES = {
    0: ("sagittal", ("A", "P", "S", "I")),
    1: ("coronal", ("R", "L", "S", "I")),
    2: ("axial", ("R", "L", "A", "P")),
}


@dataclass(frozen=True, eq=False)
class _Slices:
    """A case cut into slices, turned the way radiologists look at them: the patient's right is on the left.

    Arrays are indexed ``[slice, row, column]``, from the top left of the picture; label maps hold the reviewed
    structures only. `pixel_mm` is the height and width of a pixel, `affine_ras` maps indices along R, A, S to mm.
    """

    axis: int
    affine_ras: Affine
    pixel_mm: tuple[float, float]
    image: Array
    reviewed: Array
    after: Array
    before: Array | None

    @classmethod
    def of(cls, overlay: Overlay) -> _Slices:
        """Cut along the nearest of R, A, S: into axial slices, or where slices are thick into those acquired."""
        grid = overlay.image.grid
        turn = nib.io_orientation(grid.affine_ras)
        affine = grid.affine_ras @ nib.orientations.inv_ornt_aff(turn, grid.shape_xyz)
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        axis = int(spacing.argmax()) if spacing.max() > THICK_SLICES * np.sort(spacing)[1] else 2
        across, along = (float(spacing[other]) for other in range(3) if other != axis)
        values = list(overlay.names.values())

        def cut(array_xyz: Array) -> Array:
            stacked = np.moveaxis(nib.orientations.apply_orientation(array_xyz, turn), axis, 0)
            slices: Array = stacked.transpose(0, 2, 1)[:, ::-1, ::-1]
            return slices

        def kept(labels_xyz: Array) -> Array:
            return cut(np.where(np.isin(labels_xyz, values), labels_xyz, 0))

        before = None if overlay.before is None else kept(overlay.before)
        image, reviewed, after = cut(overlay.image.array_xyz), kept(overlay.reviewed), kept(overlay.after)
        return cls(axis, affine, (along, across), image, reviewed, after, before)

    def most_telling(self) -> int:
        """Return the slice with most disagreement; without any, the one with most of the structures."""
        wrong = np.count_nonzero(self.after != self.reviewed, axis=(1, 2))
        counts = wrong if wrong.any() else np.count_nonzero(self.reviewed, axis=(1, 2))
        return int(counts.argmax()) if counts.any() else len(counts) // 2

    def title(self, index: int) -> str:
        """Return plane and place as 3D Slicer shows them: ``axial slice, S −123.4 mm``."""
        centre = np.array([(self.image.shape[2] - 1) / 2, (self.image.shape[1] - 1) / 2])
        position = self.affine_ras @ [*np.insert(centre, self.axis, index), 1.0]
        millimetres = f"{position[self.axis]:.1f}".replace("-", "−")
        return f"{_PLANES[self.axis][0]} slice, {'RAS'[self.axis]} {millimetres} mm"


@dataclass(frozen=True)
class Panel:
    """One picture of a slice, as a data URI."""

    caption: str
    alt: str
    source: str


@dataclass(frozen=True)
class Picture:
    """One case as the page shows it."""

    case_id: str
    title: str
    differing: str
    panels: list[Panel]


def draw_picture(overlay: Overlay) -> Picture:
    """Draw the slice that tells most: all of it, and its structures larger with every prediction."""
    slices = _Slices.of(overlay)
    index = slices.most_telling()
    reviewed, after = slices.reviewed[index], slices.after[index]
    before = None if slices.before is None else slices.before[index]
    marked = np.any([labels != 0 for labels in (reviewed, after, before) if labels is not None], axis=0)
    window = overlay.window or _window(slices.image[index], reviewed != 0)
    sides, title = _PLANES[slices.axis][1], slices.title(index)
    canvas = Canvas(slices.image[index], window, slices.pixel_mm, sides, _detail(marked))
    alt = f"{overlay.case_id}, {title}, from {sides[0]} to {sides[1]} and from {sides[2]} down to {sides[3]}"
    panels = [Panel("Whole slice", alt, canvas.overview())]
    if before is not None:
        panels.append(_predicted("Before", overlay.dice_before, canvas.detail(reviewed, before, BEFORE)))
    name = "Candidate" if before is None else "After"
    panels.append(_predicted(name, overlay.dice_after, canvas.detail(reviewed, after, AFTER)))
    return Picture(overlay.case_id, title, _differing(overlay.names, reviewed, after), panels)


def _predicted(name: str, dice: float | None, source: str) -> Panel:
    known = finite(dice) is not None
    return Panel(f"{name}: mean Dice {dice_text(dice)}" if known else name, f"Contours: {name.lower()}", source)


def _differing(names: Mapping[str, int], reviewed: Array, after: Array) -> str:
    """Return the structures that differ most in a slice."""
    wrong = {name: np.count_nonzero((reviewed == value) != (after == value)) for name, value in names.items()}
    return ", ".join(sorted((name for name in wrong if wrong[name]), key=lambda name: -wrong[name])[:3])


def _detail(structures: Array) -> Box:
    """Return the part of a slice around all structures in it, of the slice's own proportions."""
    sizes = np.array(structures.shape, dtype=float)
    marked = np.argwhere(structures)
    if not len(marked):
        return Box(0, 0, sizes[1], sizes[0])
    low, high = marked.min(axis=0), marked.max(axis=0) + 1
    share = np.clip(DETAIL_MARGIN * ((high - low) / sizes).max(), SMALLEST_DETAIL, 1)
    top, left = np.clip((low + high - share * sizes) / 2, 0, (1 - share) * sizes)
    return Box(left, top, share * sizes[1], share * sizes[0])


def _window(image: Array, structures: Array) -> tuple[float, float]:
    """Return the values shown as black and white: those of the structures, with as much room again on either side.

    Values of the whole slice would not do: air and bone of a CT leave no contrast for organs.
    """
    low, high = np.percentile(image[structures] if structures.any() else image, DISPLAYED_PERCENTILES)
    room = max(high - low, image.std() / 2, 1e-6)
    return float(low - room), float(high + room)
