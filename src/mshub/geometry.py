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

from mshub.errors import CaseError, ChannelError, GeometryError

Array = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]

#: Two grids are one when no corner moves farther than this. NIfTI stores float32 (2e-5 mm on a body-sized image) and
#: DICOM rounds positions to decimal strings (1e-3 mm on a real MR series): both stay below; half a voxel never does.
SAME_GRID_TOLERANCE_MM = 1e-2
#: Largest cosine between two voxel axes still taken for a right angle (0.06 degrees).
SHEAR_TOLERANCE = 1e-3
#: Below this volume of the unit axes' parallelepiped the axes lie in one plane.
SINGULAR_TOLERANCE = 1e-3
#: Voxels outside this range are a wrong unit or a broken header, not anatomy.
MIN_SPACING_MM = 1e-3
MAX_SPACING_MM = 100.0
#: A network needs context along every axis; one slice is a picture.
MIN_VOXELS_PER_AXIS = 2
#: Checked against the header, before anything is decompressed: 2**31 is a 1290-voxel cube.
MAX_VOXELS = 2**31

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
        _check_affine(affine)
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


def check_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return `shape` as three ints.

    Raises
    ------
    GeometryError
        Not three axes, or an axis shorter than `MIN_VOXELS_PER_AXIS`.
    """
    sizes = tuple(int(size) for size in shape)
    if len(sizes) > 3:
        raise GeometryError(
            f"found a {len(sizes)}-D image of {text_xyz(sizes)} voxels ({text_xyz(sizes[3:])} time points or "
            "channels), expected one 3-D volume; save the wanted time point or channel as a file of its own, e.g. with "
            "fslsplit or 3D Slicer"
        )
    if len(sizes) < 3:
        raise GeometryError(
            f"found a {len(sizes)}-D image of {text_xyz(sizes)} voxels, expected a 3-D volume; "
            "save the whole stack of slices as one volume, e.g. with 3D Slicer"
        )
    if min(sizes) < MIN_VOXELS_PER_AXIS:
        raise GeometryError(
            f"found {text_xyz(sizes)} voxels: a single slice is no volume, expected at least {MIN_VOXELS_PER_AXIS} "
            "voxels along every axis; give the whole series"
        )
    return sizes[0], sizes[1], sizes[2]


def check_voxel_count(shape: Sequence[int], max_voxels: int = MAX_VOXELS) -> None:
    """Refuse an image of more than `max_voxels` voxels; cheap, so call it before anything is decompressed.

    Raises
    ------
    CaseError
        Too many voxels.
    """
    count = int(np.prod([int(size) for size in shape], dtype=object))
    if count > max_voxels:
        raise CaseError(
            f"found {text_xyz(shape)} = {count} voxels, expected at most {max_voxels}; crop or resample the image, or "
            "raise the limit if the machine has the memory"
        )


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


def check_values(array_xyz: Array, *, allow_constant: bool = False) -> None:
    """Refuse values no network can make sense of.

    Parameters
    ----------
    array_xyz
        3-D, real.
    allow_constant
        True for labels: an empty one is valid.

    Raises
    ------
    CaseError
        NaN or infinite values (how many, and where the first one is), or the same value everywhere.
    """
    with np.errstate(invalid="ignore"):
        low, high = array_xyz.min(), array_xyz.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise CaseError(_describe_non_finite(array_xyz))
    if low == high and not allow_constant:
        raise CaseError(
            f"found the same value {low:g} in all {array_xyz.size} voxels, expected an image with contrast; "
            "check that the right file was exported, and that the export did not fail half-way"
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
    affine_lps = _LPS_FROM_RAS @ volume.grid.affine_ras
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
    return Grid(shape, _LPS_FROM_RAS @ affine_lps)


def lps_affine(grid: Grid) -> Affine:
    """Return the 4x4 affine from voxel index to **LPS** mm, the convention of ITK, DICOM and our NRRD files."""
    return _LPS_FROM_RAS @ grid.affine_ras


def ras_affine(affine_lps: Affine) -> Affine:
    """Return the 4x4 affine to RAS mm of one to LPS mm."""
    return _LPS_FROM_RAS @ affine_lps


def text_xyz(values: Sequence[float]) -> str:
    """Return sizes or spacings as a reader expects them: ``5 x 7 x 9``."""
    return " x ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def check_spacing(spacing_xyz_mm: Sequence[float]) -> None:
    """Refuse zero, negative, non-finite and absurd voxel spacings, in mm.

    Raises
    ------
    GeometryError
        A spacing is not between `MIN_SPACING_MM` and `MAX_SPACING_MM`.
    """
    if not all(MIN_SPACING_MM <= value <= MAX_SPACING_MM for value in spacing_xyz_mm):
        raise GeometryError(
            f"found a voxel spacing of {text_xyz(spacing_xyz_mm)} mm, expected {MIN_SPACING_MM:g} to "
            f"{MAX_SPACING_MM:g} mm along every axis; correct it, e.g. in 3D Slicer's Volumes module, or convert the "
            "DICOM series again"
        )


def _check_affine(affine: Affine) -> None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise GeometryError(
            f"found the affine {affine.tolist()}, expected a finite 4x4 matrix with last row 0 0 0 1; "
            "convert the image again from its DICOM series"
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    check_spacing(spacing.tolist())
    _check_orthogonal(affine[:3, :3] / spacing)


def _check_orthogonal(directions: Affine) -> None:
    if abs(np.linalg.det(directions)) < SINGULAR_TOLERANCE:
        raise GeometryError(
            "found a singular affine (its voxel axes lie in one plane), expected three perpendicular axes; "
            "convert the image again from its DICOM series"
        )
    cosine = float(np.abs(directions.T @ directions - np.eye(3)).max())
    if cosine > SHEAR_TOLERANCE:
        raise GeometryError(
            f"found voxel axes that are {np.degrees(np.arcsin(cosine)):.2f} degrees off a right angle (a shear, such "
            "as a tilted CT gantry leaves), expected perpendicular axes; resample the image to an orthogonal grid, "
            "e.g. with 3D Slicer's Resample Scalar/Vector/DWI Volume"
        )


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


def _describe_non_finite(array_xyz: Array) -> str:
    bad = ~np.isfinite(array_xyz)
    count, nans = int(bad.sum()), int(np.isnan(array_xyz).sum())
    first = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
    return (
        f"found {count} of {array_xyz.size} voxels not finite ({nans} NaN, {count - nans} infinite), the first at "
        f"x, y, z index {first}, expected numbers everywhere; replace them, e.g. with numpy.nan_to_num, or repeat the "
        "step that made them"
    )
