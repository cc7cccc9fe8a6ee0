"""What an image may be at all: how large, how fine, how skewed, and with which values. Every limit has a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mshub.errors import CaseError, GeometryError

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


def check_affine(affine: npt.NDArray[np.float64]) -> None:
    """Refuse an affine, voxel index to mm, whose axes are no regular, perpendicular lattice.

    Raises
    ------
    GeometryError
        Not 4x4 and finite, singular, sheared, or of an absurd spacing.
    """
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise GeometryError(
            f"found the affine {affine.tolist()}, expected a finite 4x4 matrix with last row 0 0 0 1; "
            "convert the image again from its DICOM series"
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    check_spacing(spacing.tolist())
    _check_orthogonal(affine[:3, :3] / spacing)


def check_values(array_xyz: npt.NDArray[Any], *, allow_constant: bool = False) -> None:
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


def text_xyz(values: Sequence[float]) -> str:
    """Return sizes or spacings as a reader expects them: ``5 x 7 x 9``."""
    return " x ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _check_orthogonal(directions: npt.NDArray[np.float64]) -> None:
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


def _describe_non_finite(array_xyz: npt.NDArray[Any]) -> str:
    bad = ~np.isfinite(array_xyz)
    count, nans = int(bad.sum()), int(np.isnan(array_xyz).sum())
    first = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
    return (
        f"found {count} of {array_xyz.size} voxels not finite ({nans} NaN, {count - nans} infinite), the first at "
        f"x, y, z index {first}, expected numbers everywhere; replace them, e.g. with numpy.nan_to_num, or repeat the "
        "step that made them"
    )
