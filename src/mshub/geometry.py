"""Where voxels are: grids, volumes, and when two of them are the same place.

Conventions, kept everywhere in MSHub:

* arrays are indexed ``[x, y, z]``, the order in which NIfTI stores them (x changes fastest in the file);
* affines map voxel indices (i, j, k) to **RAS** millimetres (NIfTI); ITK, DICOM and NRRD speak **LPS**, which differs
  by the sign of the first two axes, and that sign is changed nowhere but in this module and in the NRRD writer;
* SimpleITK and nnU-Net arrays are ``[z, y, x]``: a name says so (``array_zyx``) or it is x, y, z.

A `Grid` cannot be degenerate: whoever holds one needs no further check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 -- the name its own documentation uses

from mshub.errors import ChannelError, GeometryError
from mshub.image_limits import check_affine, check_shape, check_spacing, text_xyz

__all__ = [
    "SAME_GRID_TOLERANCE_MM",
    "Affine",
    "Array",
    "Grid",
    "Volume",
    "check_channels",
    "check_fits",
    "check_same_grid",
    "from_sitk",
    "grid_from_sitk",
    "lps_affine",
    "ras_affine",
    "same_grid",
    "to_sitk",
]

Array = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]

#: Two grids are one when no corner moves farther than this. NIfTI stores float32 (2e-5 mm on a body-sized image) and
#: DICOM rounds positions to decimal strings (1e-3 mm on a real MR series): both stay below; half a voxel never does.
SAME_GRID_TOLERANCE_MM = 1e-2

_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular, orthogonal, non-degenerate lattice of voxels in patient space.

    Parameters
    ----------
    shape_xyz
        Number of voxels along x, y and z, each at least `MIN_VOXELS_PER_AXIS`.
    affine_ras
        4x4; voxel index (i, j, k, 1) to RAS position in mm. Copied, converted to float64 and made read-only.
        Any rotation, axis permutation and flip is allowed, a shear is not.

    Raises
    ------
    GeometryError
        A single slice, a spacing outside `MIN_SPACING_MM` .. `MAX_SPACING_MM`, a singular or a sheared affine.

    Notes
    -----
    Compare with `same_grid`: ``==`` is identity.
    """

    shape_xyz: tuple[int, int, int]
    affine_ras: Affine

    def __post_init__(self) -> None:
        shape = check_shape(self.shape_xyz)
        affine = np.array(self.affine_ras, dtype=np.float64)
        check_affine(affine)
        affine.flags.writeable = False
        object.__setattr__(self, "shape_xyz", shape)
        object.__setattr__(self, "affine_ras", affine)

    @property
    def spacing_xyz_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along x, y and z, in mm."""
        x, y, z = np.linalg.norm(self.affine_ras[:3, :3], axis=0).tolist()
        return x, y, z

    @property
    def orientation(self) -> str:
        """The anatomical direction each axis points to, such as ``"LPS"`` (nearest axes when oblique)."""
        return "".join(str(code) for code in nib.aff2axcodes(self.affine_ras))

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        x, y, z = self.shape_xyz
        return x * y * z

    def corners_mm(self) -> Affine:
        """Return the centres of the eight corner voxels, RAS mm, shape (8, 3)."""
        indices = np.array(list(product(*((0, size - 1) for size in self.shape_xyz))), dtype=np.float64)
        corners: Affine = indices @ self.affine_ras[:3, :3].T + self.affine_ras[:3, 3]
        return corners


@dataclass(frozen=True, eq=False)
class Volume:
    """A scalar image and the grid it lives on.

    Parameters
    ----------
    array_xyz
        3-D, indexed ``[x, y, z]``. Any memory order.
    grid
        Its grid, of the same shape.

    Raises
    ------
    GeometryError
        The array's shape is not the grid's.
    """

    array_xyz: Array
    grid: Grid

    def __post_init__(self) -> None:
        check_fits(self.array_xyz, self.grid)

    def turned(self, orientation: str | None) -> Volume:
        """Return the same image stored with its axes pointing elsewhere: flips and permutations, nothing resampled.

        Parameters
        ----------
        orientation : str or None
            Axis codes such as ``RAS``, the directions x, y and z are to point to; of an oblique grid, the nearest. The
            volume itself is returned where they do already, and for None.
        """
        if orientation in (None, self.grid.orientation):
            return self
        now, wanted = nib.io_orientation(self.grid.affine_ras), nib.orientations.axcodes2ornt(orientation)
        change = nib.orientations.ornt_transform(now, wanted)
        array = nib.orientations.apply_orientation(self.array_xyz, change)
        affine = self.grid.affine_ras @ nib.orientations.inv_ornt_aff(change, self.grid.shape_xyz)
        return Volume(array, Grid(array.shape, affine))


def check_fits(array_xyz: Array, grid: Grid) -> None:
    """Refuse an array that has another shape than its grid.

    Raises
    ------
    GeometryError
        The shapes differ.
    """
    if array_xyz.shape != grid.shape_xyz:
        raise GeometryError(
            f"found an array of {text_xyz(array_xyz.shape)} voxels, expected {text_xyz(grid.shape_xyz)} like its grid "
            "(x, y, z); a transposed array is the usual reason: SimpleITK and nnU-Net index z, y, x"
        )


def same_grid(a: Grid, b: Grid) -> bool:
    """Whether two grids have one shape and no corner is farther apart than `SAME_GRID_TOLERANCE_MM`."""
    return a.shape_xyz == b.shape_xyz and _corner_distance_mm(a, b) <= SAME_GRID_TOLERANCE_MM


def check_same_grid(a: Grid, b: Grid, what_a: str, what_b: str) -> None:
    """Refuse two grids that are not the same place.

    Parameters
    ----------
    a, b
        The grids.
    what_a, what_b
        What they are, for the message: ``"the label"``, ``"the image"``.

    Raises
    ------
    GeometryError
        Tells which of shape, spacing, orientation, origin and direction differ, and by how much.
    """
    if same_grid(a, b):
        return
    raise GeometryError(
        f"{what_a} and {what_b} are not on one grid: {'; '.join(_differences(a, b))}; expected the same grid (corners "
        f"within {SAME_GRID_TOLERANCE_MM:g} mm); resample {what_a} to the grid of {what_b}, e.g. with 3D Slicer's "
        "Resample Image (BRAINS)"
    )


def check_channels(grids: Sequence[Grid], names: Sequence[str]) -> None:
    """Refuse channels of one case that do not share one grid.

    Parameters
    ----------
    grids
        One per channel.
    names
        What each channel is, such as ``"T1"``, in the same order.

    Raises
    ------
    ChannelError
        No channel at all, or not one name per grid.
    GeometryError
        Names the first channel that is elsewhere than the first one.
    """
    if not grids or len(grids) != len(names):
        raise ChannelError(
            f"found {len(grids)} channels, expected {len(names)} ({', '.join(names)}); give one image per channel, "
            "in this order"
        )
    for grid, name in zip(grids[1:], names[1:], strict=True):
        check_same_grid(grid, grids[0], f"channel {name!r}", f"channel {names[0]!r}")


def to_sitk(volume: Volume) -> sitk.Image:
    """Return the volume as a SimpleITK image (LPS); left-handed grids stay left-handed.

    Parameters
    ----------
    volume
        With a dtype that SimpleITK knows (integers, float32, float64).
    """
    image = sitk.GetImageFromArray(volume.array_xyz.transpose(2, 1, 0))
    affine_lps = lps_affine(volume.grid)
    spacing = np.array(volume.grid.spacing_xyz_mm)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine_lps[:3, 3].tolist())
    image.SetDirection((affine_lps[:3, :3] / spacing).ravel().tolist())
    return image


def from_sitk(image: sitk.Image) -> Volume:
    """Return a scalar 3-D SimpleITK image as a volume; the array is a copy.

    Raises
    ------
    GeometryError
        The image's grid is degenerate.
    """
    return Volume(sitk.GetArrayFromImage(image).transpose(2, 1, 0), grid_from_sitk(image))


def grid_from_sitk(image: sitk.Image | sitk.ImageFileReader) -> Grid:
    """Return the grid of a SimpleITK image, or of a reader that has read the image information.

    Raises
    ------
    GeometryError
        Not 3-D, or degenerate.
    """
    shape = check_shape(image.GetSize())
    check_spacing(image.GetSpacing())  # a zero has become NaN in the direction
    affine_lps = np.eye(4)
    affine_lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine_lps[:3, 3] = image.GetOrigin()
    return Grid(shape, ras_affine(affine_lps))


def lps_affine(grid: Grid) -> Affine:
    """Return the 4x4 affine from voxel index to **LPS** mm, the convention of ITK, DICOM and our NRRD files."""
    return _LPS_FROM_RAS @ grid.affine_ras


def ras_affine(affine_lps: Affine) -> Affine:
    """Return the 4x4 affine to RAS mm of one to LPS mm."""
    return _LPS_FROM_RAS @ affine_lps


def _corner_distance_mm(a: Grid, b: Grid) -> float:
    return float(np.linalg.norm(a.corners_mm() - b.corners_mm(), axis=1).max())


def _differences(a: Grid, b: Grid) -> list[str]:
    """Say in what two grids differ, the most telling first."""
    found = []
    if a.shape_xyz != b.shape_xyz:
        found.append(f"shape {text_xyz(a.shape_xyz)} against {text_xyz(b.shape_xyz)} voxels")
    if not np.allclose(a.spacing_xyz_mm, b.spacing_xyz_mm, rtol=0, atol=_per_voxel_tolerance(a)):
        found.append(f"spacing {text_xyz(a.spacing_xyz_mm)} against {text_xyz(b.spacing_xyz_mm)} mm")
    if a.orientation != b.orientation:
        found.append(f"orientation {a.orientation} against {b.orientation}")
    degrees = _angle_degrees(a, b)
    if np.radians(degrees) > _per_voxel_tolerance(a) / max(a.spacing_xyz_mm):
        found.append(f"direction differs by {degrees:.3g} degrees")
    shift = float(np.linalg.norm(a.affine_ras[:3, 3] - b.affine_ras[:3, 3]))
    if shift > SAME_GRID_TOLERANCE_MM:
        found.append(f"origin differs by {shift:.3g} mm")
    if a.shape_xyz == b.shape_xyz:
        found.append(f"corners up to {_corner_distance_mm(a, b):.3g} mm apart")
    return found


def _per_voxel_tolerance(grid: Grid) -> float:
    """Return the error per voxel, in mm, that adds up to `SAME_GRID_TOLERANCE_MM` across the longest axis."""
    return SAME_GRID_TOLERANCE_MM / max(grid.shape_xyz)


def _angle_degrees(a: Grid, b: Grid) -> float:
    """Return the largest angle between axes of the same name."""
    unit_a = a.affine_ras[:3, :3] / np.array(a.spacing_xyz_mm)
    unit_b = b.affine_ras[:3, :3] / np.array(b.spacing_xyz_mm)
    half = np.linalg.norm(unit_a - unit_b, axis=0) / 2
    return float(np.degrees(2 * np.arcsin(np.clip(half, 0, 1))).max())
