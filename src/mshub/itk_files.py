"""NRRD and MetaImage: read with ITK, behind a check of the header; NRRD is written without it.

ITK trusts a header: it opens whatever other file one names, can be crashed by a malformed one, and hands out garbage
where compressed MetaImage data are cut. So the header is read and judged here first.
"""

from __future__ import annotations

import gzip
import logging
import re
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk  # noqa: N813 -- the name its own documentation uses

from mshub.atomic_file import replacing
from mshub.errors import CaseError
from mshub.geometry import Array, Grid, Volume, from_sitk, grid_from_sitk, lps_affine
from mshub.image_file import GZIP_LEVEL, extension_of, storable, truncated
from mshub.image_limits import check_shape, check_voxel_count

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 16
_HEADER_BYTES = 1 << 16
#: What MetaImage writers produce: the type, then the number of axes, then short lines of plain ``key = value``; ITK
#: carries along keys such as ``dim[1]`` of a NIfTI and ``0008|0060`` of DICOM.
_META_HEADER = re.compile(
    rb"(ObjectType *= *Image *\r?\n)?NDims *= *\d *\r?\n([\w.|:\[\]-]{1,64} *= *[ -~]{0,400}\r?\n)+"
)
_META_VECTORS = ("DimSize", "ElementSpacing", "ElementSize", "Offset", "Position", "Origin", "CenterOfRotation")
_META_MATRICES = ("TransformMatrix", "Rotation", "Orientation")
_META_SCALARS = ("ElementNumberOfChannels", "HeaderSize", "CompressedDataSize")
_META_COUNTS = {
    **dict.fromkeys(_META_VECTORS, 3),
    **dict.fromkeys(_META_MATRICES, 9),
    **dict.fromkeys(_META_SCALARS, 1),
}
_NRRD_TYPES = {
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned int",
    "int64": "long long",
    "uint64": "unsigned long long",
    "float32": "float",
    "float64": "double",
}


def read_itk(path: Path, max_voxels: int) -> Volume:
    """Read an NRRD or MetaImage file.

    Parameters
    ----------
    path
        Ends in ``.nrrd``, ``.mha`` or ``.mhd``.
    max_voxels
        Refuse larger images before decompressing them.

    Returns
    -------
    Volume
        Floating-point data are float32, integers as in the file.

    Raises
    ------
    CaseError
        Damaged, too large, not one real value per voxel, or with the voxels in a file elsewhere.
    GeometryError
        Not 3-D, or no usable grid.
    OSError, ValueError, RuntimeError, zlib.error
        Damaged in a way that ITK found: `mshub.image_file.reading` puts that into words.
    """
    volume = from_sitk(_opened(path, max_voxels).Execute())
    if not _is_nrrd(path):
        _check_meta_stream(path, volume.array_xyz.nbytes)
    if volume.array_xyz.dtype != np.float64:
        return volume
    with np.errstate(over="ignore"):  # infinite values are reported by check_values
        return Volume(volume.array_xyz.astype(np.float32), volume.grid)


def read_itk_grid(path: Path, max_voxels: int) -> Grid:
    """Read the grid of an NRRD or MetaImage file from its header."""
    return grid_from_sitk(_opened(path, max_voxels))


def write_nrrd(path: Path, array_xyz: Array, grid: Grid, compress: bool = True) -> None:
    """Write a 3-D NRRD with attached data, as 3D Slicer and OHIF (nrrd-js) read it.

    LPS space, x fastest, little endian; raw or gzip encoding. The same input gives the same bytes.

    References
    ----------
    http://teem.sourceforge.net/nrrd/format.html

    Raises
    ------
    CaseError
        A dtype no reader takes.
    GeometryError
        The array does not fit the grid.
    """
    array = storable(array_xyz, grid)
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(order="F")
    with replacing(path) as stream:
        stream.write(_nrrd_header(array, grid, compress).encode("ascii"))
        stream.write(gzip.compress(data, GZIP_LEVEL, mtime=0) if compress else data)


def _nrrd_header(array: Array, grid: Grid, compress: bool) -> str:
    affine = lps_affine(grid)
    lines = [
        "NRRD0004",
        f"type: {_NRRD_TYPES[array.dtype.name]}",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {' '.join(str(size) for size in array.shape)}",
        f"space directions: {' '.join(_nrrd_vector(affine[:3, axis]) for axis in range(3))}",
        "kinds: domain domain domain",
        "endian: little",
        f"encoding: {'gzip' if compress else 'raw'}",
        f"space origin: {_nrrd_vector(affine[:3, 3])}",
    ]
    return "\n".join(lines) + "\n\n"


def _nrrd_vector(values: Array) -> str:
    return f"({','.join(repr(float(value) + 0.0) for value in values)})"  # + 0.0 turns -0.0 into 0.0


def _is_nrrd(path: Path) -> bool:
    return extension_of(path) == ".nrrd"


def _opened(path: Path, max_voxels: int) -> sitk.ImageFileReader:
    """Return a reader that knows the header, which has been found sound."""
    _check_attached(path)
    if not _is_nrrd(path):
        _check_meta_header(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if _is_nrrd(path) else "MetaImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in kind:
        raise CaseError(
            f"found {reader.GetNumberOfComponents()} components per voxel ({kind}), expected one real grey value; "
            "save the wanted component as an image of its own, e.g. with 3D Slicer's Vector to Scalar Volume"
        )
    check_voxel_count(grid_from_sitk(reader).shape_xyz, max_voxels)
    if _is_nrrd(path) and not reader.HasMetaDataKey("NRRD_space"):
        logger.warning("the NRRD file names no space, so nobody knows left from right in it; taking it for LPS")
    return reader


def _check_attached(path: Path) -> None:
    """Refuse a header that sends the reader elsewhere: it would open whatever file the sender names."""
    fields, _ = _header(path)
    if _is_nrrd(path):
        named, fine = fields.get("data file") or fields.get("datafile"), "in the file itself"
        attached = named is None
    else:
        named, fine = fields.get("ElementDataFile", "no file"), "in the file itself or one beside its .mhd header"
        beside = extension_of(path) == ".mhd" and Path(named).name == named and (path.parent / named).is_file()
        attached = named == "LOCAL" or beside
    if not attached:
        raise CaseError(
            f"the header says that the voxels are in {Path(str(named)).name!r}, expected them {fine}; save the image "
            "as one file, e.g. .nrrd or .mha"
        )


def _header(path: Path) -> tuple[dict[str, str], int]:
    """Return the fields of a header, as strictly as its reader takes them, and the offset behind it.

    NRRD ignores case and ends at an empty line; MetaImage minds case and ends with ElementDataFile.
    """
    fields: dict[str, str] = {}
    nrrd = _is_nrrd(path)
    with path.open("rb") as stream:
        while line := stream.readline(_HEADER_BYTES):
            text = line.rstrip(b"\r\n").decode("latin-1")
            key, value = (*(part.strip() for part in re.split("[=:]", text, maxsplit=1)), "")[:2]
            fields[key.lower() if nrrd else key] = value
            if key == "ElementDataFile" or (nrrd and not text):
                break
            if stream.tell() > _HEADER_BYTES:
                raise CaseError(f"this is no {extension_of(path)} file in spite of its name; export the image again")
        return fields, stream.tell()


def _check_meta_header(path: Path) -> None:
    """Refuse a malformed MetaImage header: it can corrupt ITK's memory and take the whole process with it."""
    fields, offset = _header(path)
    with path.open("rb") as stream:
        head = stream.read(offset)
    sizes = _meta_numbers("DimSize", fields.get("DimSize", ""))
    if not _META_HEADER.fullmatch(head) or fields["NDims"] != str(len(sizes)):
        raise CaseError("the header is malformed; export the image again")
    check_shape([int(size) for size in sizes])
    for key, count in _META_COUNTS.items():
        if key in fields and len(_meta_numbers(key, fields[key])) != count:
            raise CaseError(f"found {key} = {fields[key]!r} in the header, expected {count} numbers; export it again")


def _meta_numbers(key: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split()]
    except ValueError as error:
        raise CaseError(f"found {key} = {text!r} in the header, expected numbers; export the image again") from error


def _check_meta_stream(path: Path, n_bytes: int) -> None:
    """Decompress a MetaImage once more: where that fails, ITK hands out garbage and no error."""
    fields, offset = _header(path)
    if fields.get("CompressedData", "").lower() != "true":
        return
    local = fields["ElementDataFile"] == "LOCAL"
    with (path if local else path.parent / fields["ElementDataFile"]).open("rb") as stream:
        stream.seek(offset if local else 0)
        _check_zlib(stream, n_bytes)


def _check_zlib(stream: BinaryIO, n_bytes: int) -> None:
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # zlib or gzip, as MetaIO takes both
    found = 0
    while found <= n_bytes and (chunk := stream.read(_CHUNK_BYTES)):
        found += len(inflater.decompress(chunk))
    if found != n_bytes or not inflater.eof:
        raise truncated(f"the compressed data holds {found} of {n_bytes} bytes")
