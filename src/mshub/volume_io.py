"""Volumes from files and back: NIfTI, NRRD, MetaImage and folders of DICOM.

Reading is strict, because what a lenient reader mends in silence (a zero spacing, a cut gzip stream, two contradicting
affines) becomes a wrong mask that looks right. Every refusal starts with the file's name, never its folder.

Writing is atomic: a reader sees the old file or the whole new one.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

from mshub.dicom_series import read_series, read_series_grid
from mshub.errors import CaseError
from mshub.geometry import Array, Grid, Volume
from mshub.image_file import extension_of, named, reading
from mshub.image_limits import MAX_VOXELS, check_values
from mshub.itk_files import read_itk, read_itk_grid, write_nrrd
from mshub.nifti import MAX_GZIP_RATIO, read_nifti, read_nifti_grid, write_nifti

__all__ = ["READABLE", "WRITABLE", "read_grid", "read_volume", "write_nifti", "write_nrrd", "write_volume"]

_NIFTI = (".nii", ".nii.gz")
READABLE = (*_NIFTI, ".nrrd", ".mha", ".mhd")
WRITABLE = (*_NIFTI, ".nrrd")
#: Scans shrink to a third or so, padded ones further; beyond this a file above `LARGE_VOXELS` is no scan.
MAX_VOXELS_PER_BYTE = 200
LARGE_VOXELS = 2**24


def read_volume(
    path: Path, *, series_uid: str | None = None, allow_constant: bool = False, max_voxels: int = MAX_VOXELS
) -> Volume:
    """Read one 3-D scalar image.

    Parameters
    ----------
    path
        A file of one of `READABLE`, or a folder with one DICOM series.
    series_uid
        Which series, where the folder holds several.
    allow_constant
        True when reading labels: an empty mask is valid.
    max_voxels
        Refuse larger images before decompressing them.

    Returns
    -------
    Volume
        ``array_xyz`` has the file's own integer dtype in native byte order; scaled (``scl_slope``) and floating-point
        data are float32.

    Raises
    ------
    CaseError
        Missing, empty, damaged, unsupported, too large, colour, complex, not finite or constant.
    GeometryError
        Not 3-D, or no usable grid.
    """
    with named(path):
        if path.is_file() and not allow_constant:
            _refuse_bomb(path, max_voxels)
        volume = _read(path, series_uid, max_voxels)
        check_values(volume.array_xyz, allow_constant=allow_constant)
        return volume


def read_grid(path: Path, *, series_uid: str | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return the grid of an image from its header; parameters and errors as `read_volume`, voxels are not looked at."""
    with named(path):
        if path.is_dir():
            return read_series_grid(path, series_uid=series_uid, max_voxels=max_voxels)
        return _grid_of(path, max_voxels)


def write_volume(path: Path, array_xyz: Array, grid: Grid, *, compress: bool = True) -> None:
    """Write an image in the format its extension names, one of `WRITABLE`.

    Parameters
    ----------
    path
        Replaced atomically if it exists.
    array_xyz
        Of the grid's shape; its dtype is kept.
    grid
        Where it lies.
    compress
        For ``.nrrd``, whose name does not tell.

    Raises
    ------
    CaseError
        Another extension, or a dtype no reader takes.
    GeometryError
        The array does not fit the grid.
    """
    extension = extension_of(path)
    if extension not in WRITABLE:
        raise CaseError(
            f"{path.name}: cannot write {extension or 'a file without extension'}, expected one of "
            f"{', '.join(WRITABLE)}; choose another name for the output"
        )
    if extension == ".nrrd":
        write_nrrd(path, array_xyz, grid, compress=compress)
    else:
        write_nifti(path, array_xyz, grid)


def _read(path: Path, series_uid: str | None, max_voxels: int) -> Volume:
    if path.is_dir():
        return read_series(path, series_uid=series_uid, max_voxels=max_voxels)
    extension = _readable_extension(path)
    with reading(path):
        read = read_nifti if extension in _NIFTI else read_itk
        return read(path, max_voxels)


def _grid_of(path: Path, max_voxels: int) -> Grid:
    extension = _readable_extension(path)
    with reading(path):
        read = read_nifti_grid if extension in _NIFTI else read_itk_grid
        return read(path, max_voxels)


def _refuse_bomb(path: Path, max_voxels: int) -> None:
    """Refuse a file that would fill memory with next to nothing; a label may be so, and is as large as its image."""
    shape = _grid_of(path, max_voxels).shape_xyz
    voxels, nbytes = prod(shape), path.stat().st_size
    if extension_of(path) in _NIFTI and voxels > nbytes * MAX_GZIP_RATIO:
        return  # cut: what reads it says so, before it sets memory aside
    if voxels > LARGE_VOXELS and voxels > nbytes * MAX_VOXELS_PER_BYTE:
        raise CaseError(
            f"found {nbytes} bytes for {voxels} voxels, expected at least one for {MAX_VOXELS_PER_BYTE}: no scan "
            "shrinks so far, the file holds the same value nearly everywhere; export the image again"
        )


def _readable_extension(path: Path) -> str:
    """Return the extension of a file that is there, not empty and of a kind we read."""
    if not path.is_file():
        raise CaseError("no such file or folder; check the path")
    extension = extension_of(path)
    if extension not in READABLE:
        raise CaseError(
            f"found {extension or 'no extension'}, expected one of {', '.join(READABLE)}, or a folder with one DICOM "
            "series; convert it, e.g. with 3D Slicer, or give the folder instead of one of its files"
        )
    if path.stat().st_size == 0:
        raise CaseError("the file is empty (0 bytes), expected an image; copy or export it again")
    return extension
