"""What holds for an image file of any format: how refusals name it, what damage looks like, what can be stored."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from nibabel.spatialimages import HeaderDataError

from mshub.errors import CaseError
from mshub.geometry import Array, Grid, check_fits

#: Voxel types that every format we write can hold, as numpy names them.
STORABLE = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
#: Masks shrink a hundredfold anyway, and a client waits.
GZIP_LEVEL = 1


def extension_of(path: Path) -> str:
    """Return the extension in lower case, ``.nii.gz`` as one; empty where there is none."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put the file's name in front of what is wrong with it."""
    try:
        yield
    except CaseError as error:
        raise type(error)(f"{path.name}: {error}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what libraries raise on damaged files into a `CaseError`; their text may hold the path, which is private."""
    try:
        yield
    except CaseError:
        raise
    except EOFError as error:
        raise truncated("the compressed data ends too early") from error
    except (OSError, ValueError, OverflowError, RuntimeError, zlib.error, HeaderDataError) as error:
        lines = str(error).replace(str(path), path.name).strip().splitlines() or [type(error).__name__]
        raise CaseError(
            f"the file is damaged, or no {extension_of(path)} file ({lines[-1].strip()}), expected one that can be "
            "read to its end; copy or export it again"
        ) from error


def truncated(found: str) -> CaseError:
    """Return the error for a file that ends too early."""
    return CaseError(f"the file is truncated or damaged: {found}; copy or download it again")


def storable(array_xyz: Array, grid: Grid) -> Array:
    """Return the array as it can be written on `grid`; booleans become uint8.

    Raises
    ------
    CaseError
        A dtype no reader takes.
    GeometryError
        The array does not fit the grid.
    """
    check_fits(array_xyz, grid)
    array = array_xyz.astype(np.uint8) if array_xyz.dtype == np.bool_ else array_xyz
    if array.dtype.name not in STORABLE:
        raise CaseError(f"cannot write {array.dtype} voxels, expected one of {', '.join(STORABLE)}; convert them")
    return array
