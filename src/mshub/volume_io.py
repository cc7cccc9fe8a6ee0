"""Volumes from files and back: NIfTI, NRRD, MetaImage and folders of DICOM.

Reading is strict, because what a lenient reader mends in silence (a zero spacing, a cut gzip stream, two contradicting
affines) becomes a wrong mask that looks right. Every refusal starts with the file's name, never its folder.

NIfTI headers are judged raw, before nibabel mends them, and the stream is read once, to its end, so that the gzip
checksum counts. ITK (3D Slicer, nnU-Net's default reader) and nibabel take different sides where a NIfTI contradicts
itself, so such a file is refused:

* qform and sform more than half a voxel apart: ITK takes the sform only if its code is 1, nibabel always;
* sform columns of another length than ``pixdim``: ITK takes ``pixdim``, nibabel the columns;
* units other than mm: ITK scales micrometres and metres, nibabel does not.

A file with neither qform nor sform is accepted with a warning, on ITK's fallback (axes L, P, S, first voxel at the
origin): 3D Slicer shows it there. nibabel's is another one (only the first axis flipped, centred on the origin).

Writing is atomic: a reader sees the old file or the whole new one.
"""

from __future__ import annotations

import gzip
import io
import logging
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 -- the name its own documentation uses
from nibabel.spatialimages import HeaderDataError

from mshub.dicom_series import read_series, read_series_grid
from mshub.errors import CaseError, GeometryError
from mshub.geometry import (
    MAX_VOXELS,
    Array,
    Grid,
    Volume,
    check_fits,
    check_shape,
    check_spacing,
    check_values,
    check_voxel_count,
    from_sitk,
    grid_from_sitk,
    lps_affine,
    text_xyz,
)

logger = logging.getLogger(__name__)

_NIFTI = (".nii", ".nii.gz")
READABLE = (*_NIFTI, ".nrrd", ".mha", ".mhd")
WRITABLE = (*_NIFTI, ".nrrd")

#: qform and sform of one file may differ by this fraction of the smallest spacing: a float32 quaternion near 180
#: degrees loses 0.2 mm on a body, a stale form is off by whole voxels.
FORM_TOLERANCE_VOXELS = 0.5
#: Relative difference between pixdim and the sform's columns that float32 and rounding explain.
PIXDIM_TOLERANCE = 1e-3
#: Bytes after the voxels that are taken for padding.
TRAILING_BYTES = 4096
#: zlib cannot shrink by more (about 1032:1): a file that would have to is cut.
MAX_GZIP_RATIO = 1040

_NIFTI_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_NIFTI_METRE, _NIFTI_MICRON = 1, 3
_ITK_SIGNS = np.array([-1.0, -1.0, 1.0])
_CHUNK_BYTES = 1 << 16
_FAST = 1  # gzip level: masks shrink a hundredfold anyway, and a client waits
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
    with _named(path):
        volume = _read(path, series_uid, max_voxels)
        check_values(volume.array_xyz, allow_constant=allow_constant)
        return volume


def read_grid(path: Path, *, series_uid: str | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return the grid of an image from its header; parameters and errors as `read_volume`, voxels are not looked at."""
    with _named(path):
        if path.is_dir():
            return read_series_grid(path, series_uid=series_uid, max_voxels=max_voxels)
        extension = _readable_extension(path)
        with _reading(path):
            if extension not in _NIFTI:
                return grid_from_sitk(_open_itk(path, extension, max_voxels))
            with _open_nifti(path) as stream:
                return _nifti_grid(_judge_nifti(stream.read(max(_NIFTI_HEADERS)), max_voxels))


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
    extension = _extension(path)
    if extension not in WRITABLE:
        raise CaseError(
            f"{path.name}: cannot write {extension or 'a file without extension'}, expected one of "
            f"{', '.join(WRITABLE)}; choose another name for the output"
        )
    if extension == ".nrrd":
        write_nrrd(path, array_xyz, grid, compress=compress)
    else:
        write_nifti(path, array_xyz, grid)


def write_nifti(path: Path, array_xyz: Array, grid: Grid) -> None:
    """Write NIfTI-1, gzipped when the name ends in ``.gz``; the same input gives the same bytes.

    Both sform and qform are set, code 1 (scanner), so that ITK and nibabel read one grid.

    Raises
    ------
    CaseError
        A dtype no reader takes.
    GeometryError
        The array does not fit the grid, or the grid does not fit NIfTI-1 (32767 voxels per axis).
    """
    array = _storable(array_xyz, grid)
    if max(array.shape) > np.iinfo(np.int16).max:
        raise GeometryError(
            f"found {max(array.shape)} voxels along an axis, expected at most 32767 in NIfTI; use .nrrd"
        )
    image = nib.Nifti1Image(array, grid.affine_ras, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(grid.affine_ras, code=1)
    # a quaternion holds no shear; what `Grid` lets pass of it stays far below half a voxel
    image.set_qform(grid.affine_ras, code=1)
    with _replacing(path) as stream:
        if path.name.lower().endswith(".gz"):
            with gzip.GzipFile(filename="", mode="wb", compresslevel=_FAST, fileobj=stream, mtime=0) as zipped:
                image.to_stream(zipped)
        else:
            image.to_stream(stream)


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
    array = _storable(array_xyz, grid)
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(order="F")
    with _replacing(path) as stream:
        stream.write(_nrrd_header(array, grid, compress).encode("ascii"))
        stream.write(gzip.compress(data, _FAST, mtime=0) if compress else data)


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


def _storable(array_xyz: Array, grid: Grid) -> Array:
    check_fits(array_xyz, grid)
    array = array_xyz.astype(np.uint8) if array_xyz.dtype == np.bool_ else array_xyz
    if array.dtype.name not in _NRRD_TYPES:
        raise CaseError(f"cannot write {array.dtype} voxels, expected one of {', '.join(_NRRD_TYPES)}; convert them")
    return array


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Write beside `path` and rename over it once everything is on disk."""
    part = path.with_name(f".{uuid4().hex}.part")
    try:
        with part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the file's name in front of what is wrong with it."""
    try:
        yield
    except CaseError as error:
        raise type(error)(f"{path.name}: {error}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what libraries raise on damaged files into a `CaseError`; their text may hold the path, which is private."""
    try:
        yield
    except CaseError:
        raise
    except EOFError as error:
        raise _truncated("the compressed data ends too early") from error
    except (OSError, ValueError, OverflowError, RuntimeError, zlib.error, HeaderDataError) as error:
        lines = str(error).replace(str(path), path.name).strip().splitlines() or [type(error).__name__]
        raise CaseError(
            f"the file is damaged, or no {_extension(path)} file ({lines[-1].strip()}), expected one that can be read "
            "to its end; copy or export it again"
        ) from error


def _truncated(found: str) -> CaseError:
    return CaseError(f"the file is truncated or damaged: {found}; copy or download it again")


def _extension(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def _readable_extension(path: Path) -> str:
    """Return the extension of a file that is there, not empty and of a kind we read."""
    if not path.is_file():
        raise CaseError("no such file or folder; check the path")
    extension = _extension(path)
    if extension not in READABLE:
        raise CaseError(
            f"found {extension or 'no extension'}, expected one of {', '.join(READABLE)}, or a folder with one DICOM "
            "series; convert it, e.g. with 3D Slicer, or give the folder instead of one of its files"
        )
    if path.stat().st_size == 0:
        raise CaseError("the file is empty (0 bytes), expected an image; copy or export it again")
    return extension


def _read(path: Path, series_uid: str | None, max_voxels: int) -> Volume:
    if path.is_dir():
        return read_series(path, series_uid=series_uid, max_voxels=max_voxels)
    extension = _readable_extension(path)
    with _reading(path):
        if extension in _NIFTI:
            return _read_nifti(path, max_voxels)
        return _read_itk(path, extension, max_voxels)


# NIfTI


def _open_nifti(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _read_nifti(path: Path, max_voxels: int) -> Volume:
    with _open_nifti(path) as stream:
        header = _judge_nifti(stream.read(max(_NIFTI_HEADERS)), max_voxels)
        grid = _nifti_grid(header)
        _check_enough_bytes(path, header)
        raw = header.raw_data_from_fileobj(stream)
        # reading on to the end is what makes gzip compare the checksum
        if len(stream.read(TRAILING_BYTES + 1)) > TRAILING_BYTES:
            raise CaseError(
                f"found more data than the {raw.nbytes} bytes that the header announces, expected none; the header "
                "does not belong to the data: export the image again"
            )
    return Volume(_scaled(raw, header), grid)


def _check_enough_bytes(path: Path, header: Any) -> None:
    """Refuse a file that cannot hold its voxels before memory is set aside for them."""
    expected = header.get_data_offset() + int(np.prod(header.get_data_shape())) * header.get_data_dtype().itemsize
    ratio = MAX_GZIP_RATIO if path.name.lower().endswith(".gz") else 1
    if path.stat().st_size * ratio < expected:
        raise _truncated(f"{path.stat().st_size} bytes cannot hold the {expected} bytes that the header announces")


def _scaled(raw: Array, header: Any) -> Array:
    """Apply slope and intercept; whole numbers without them stay as they are."""
    slope, inter = header.get_slope_inter()
    native = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    with np.errstate(over="ignore"):  # infinite values are reported by check_values
        if slope in (None, 1.0) and inter in (None, 0.0):
            return native.astype(np.float32, copy=False) if native.dtype.kind == "f" else native
        return (native * np.float64(slope) + np.float64(inter)).astype(np.float32)


def _judge_nifti(block: bytes, max_voxels: int) -> Any:
    """Return the header as nibabel would have it, once the raw one has been found sound."""
    size = int.from_bytes(block[:4], "little")
    header_class = _NIFTI_HEADERS.get(size) or _NIFTI_HEADERS.get(int.from_bytes(block[:4], "big"))
    if header_class is None:
        raise CaseError("this is no NIfTI file in spite of its name; export the image again as NIfTI")
    block = block[: header_class.template_dtype.itemsize]
    if len(block) < header_class.template_dtype.itemsize:
        raise _truncated(f"{len(block)} bytes do not hold a header")
    raw = header_class(block, check=False)
    if bytes(raw["magic"])[:3] not in (b"n+1", b"n+2"):
        raise CaseError(
            "this is an Analyze or two-file (.hdr/.img) header, expected a single NIfTI file; convert it, e.g. with "
            "3D Slicer"
        )
    _judge_nifti_shape(raw, max_voxels)
    _judge_nifti_type(raw)
    _judge_nifti_lengths(raw)
    return header_class(block, check=True)


def _judge_nifti_shape(raw: Any, max_voxels: int) -> None:
    axes = int(raw["dim"][0])
    if not 1 <= axes <= 7:
        raise CaseError(f"found {axes} dimensions in the header, expected 3; the header is damaged: export it again")
    sizes = [int(size) for size in raw["dim"][1 : axes + 1]]
    if min(sizes) < 1:
        raise CaseError(f"found the image size {sizes} in the header, expected positive numbers; export it again")
    check_shape(sizes)
    check_voxel_count(sizes, max_voxels)


def _judge_nifti_type(raw: Any) -> None:
    try:
        dtype = raw.get_data_dtype()
    except KeyError as error:
        raise CaseError(f"found the unknown data type code {error} in the header; export the image again") from error
    if dtype.fields is not None:
        raise CaseError(
            f"found colour voxels ({', '.join(dtype.names)}), expected one grey value per voxel; give the original "
            "scan, or split the colours"
        )
    if dtype.kind == "c":
        raise CaseError("found complex voxels, expected real ones; save the magnitude image")
    if dtype.kind not in "iuf":
        raise CaseError(f"found voxels of type {dtype}, expected integers or floating-point numbers; convert the image")


def _judge_nifti_lengths(raw: Any) -> None:
    """Refuse units and spacings that readers disagree about; nibabel turns a zero spacing into 1 mm."""
    units = int(raw["xyzt_units"]) & 7
    if units in (_NIFTI_METRE, _NIFTI_MICRON):
        raise GeometryError(
            f"found the unit {'metre' if units == _NIFTI_METRE else 'micrometre'} in the header, expected mm; readers "
            "disagree about it: convert the affine to mm and set xyzt_units to mm"
        )
    check_spacing([float(value) for value in raw["pixdim"][1:4]])


def _nifti_grid(header: Any) -> Grid:
    sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    if sform is None and qform is None:
        logger.warning(
            "the NIfTI file has neither qform nor sform, so nobody knows left from right in it; taking ITK's reading, "
            "as 3D Slicer does: convert the image again from its DICOM series"
        )
        return Grid(header.get_data_shape(), np.diag([*_ITK_SIGNS * header["pixdim"][1:4].astype(float), 1.0]))
    grid = Grid(header.get_data_shape(), header.get_best_affine())
    if sform is not None:
        _check_pixdim(grid, header)
    if sform is not None and qform is not None:
        _check_forms_agree(grid, Grid(grid.shape_xyz, qform))
    return grid


def _check_pixdim(grid: Grid, header: Any) -> None:
    pixdim = [float(value) for value in header["pixdim"][1:4]]
    if not np.allclose(grid.spacing_xyz_mm, pixdim, rtol=PIXDIM_TOLERANCE, atol=0):
        raise GeometryError(
            f"found the spacing {text_xyz(pixdim)} in pixdim and {text_xyz(grid.spacing_xyz_mm)} mm in the sform, "
            "expected one; readers disagree about which counts: save the image again from 3D Slicer, or convert it "
            "again from its DICOM series"
        )


def _check_forms_agree(sform: Grid, qform: Grid) -> None:
    apart = float(np.linalg.norm(sform.corners_mm() - qform.corners_mm(), axis=1).max())
    allowed = FORM_TOLERANCE_VOXELS * min(sform.spacing_xyz_mm)
    if apart > allowed:
        raise GeometryError(
            f"found a qform and an sform that are {apart:.3g} mm apart, expected at most {allowed:.3g} mm; readers "
            "disagree about which counts: keep the right one, e.g. with fslorient -copysform2qform or -copyqform2sform"
        )


# NRRD and MetaImage


def _read_itk(path: Path, extension: str, max_voxels: int) -> Volume:
    volume = from_sitk(_open_itk(path, extension, max_voxels).Execute())
    if extension != ".nrrd":
        _check_meta_stream(path, extension, volume.array_xyz.nbytes)
    if volume.array_xyz.dtype != np.float64:
        return volume
    with np.errstate(over="ignore"):  # infinite values are reported by check_values
        return Volume(volume.array_xyz.astype(np.float32), volume.grid)


def _open_itk(path: Path, extension: str, max_voxels: int) -> sitk.ImageFileReader:
    """Return a reader that knows the header, which has been found sound."""
    _check_attached(path, extension)
    if extension != ".nrrd":
        _check_meta_header(path, extension)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if extension == ".nrrd" else "MetaImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in kind:
        raise CaseError(
            f"found {reader.GetNumberOfComponents()} components per voxel ({kind}), expected one real grey value; "
            "save the wanted component as an image of its own, e.g. with 3D Slicer's Vector to Scalar Volume"
        )
    check_voxel_count(grid_from_sitk(reader).shape_xyz, max_voxels)
    if extension == ".nrrd" and not reader.HasMetaDataKey("NRRD_space"):
        logger.warning("the NRRD file names no space, so nobody knows left from right in it; taking it for LPS")
    return reader


def _check_attached(path: Path, extension: str) -> None:
    """Refuse a header that sends the reader elsewhere: it would open whatever file the sender names."""
    fields, _ = _itk_header(path, extension)
    if extension == ".nrrd":
        named, fine = fields.get("data file") or fields.get("datafile"), "in the file itself"
        attached = named is None
    else:
        named, fine = fields.get("ElementDataFile", "no file"), "in the file itself or one beside its .mhd header"
        beside = extension == ".mhd" and Path(named).name == named and (path.parent / named).is_file()
        attached = named == "LOCAL" or beside
    if not attached:
        raise CaseError(
            f"the header says that the voxels are in {Path(str(named)).name!r}, expected them {fine}; save the image "
            "as one file, e.g. .nrrd or .mha"
        )


def _itk_header(path: Path, extension: str) -> tuple[dict[str, str], int]:
    """Return the fields of a header, as strictly as its reader takes them, and the offset behind it.

    NRRD ignores case and ends at an empty line; MetaImage minds case and ends with ElementDataFile.
    """
    fields: dict[str, str] = {}
    with path.open("rb") as stream:
        while line := stream.readline(_HEADER_BYTES):
            text = line.rstrip(b"\r\n").decode("latin-1")
            key, value = (*(part.strip() for part in re.split("[=:]", text, maxsplit=1)), "")[:2]
            fields[key.lower() if extension == ".nrrd" else key] = value
            if key == "ElementDataFile" or (extension == ".nrrd" and not text):
                break
            if stream.tell() > _HEADER_BYTES:
                raise CaseError(f"this is no {extension} file in spite of its name; export the image again")
        return fields, stream.tell()


def _check_meta_header(path: Path, extension: str) -> None:
    """Refuse a malformed MetaImage header: it can corrupt ITK's memory and take the whole process with it."""
    fields, offset = _itk_header(path, extension)
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


def _check_meta_stream(path: Path, extension: str, n_bytes: int) -> None:
    """Decompress a MetaImage once more: where that fails, ITK hands out garbage and no error."""
    fields, offset = _itk_header(path, extension)
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
        raise _truncated(f"the compressed data holds {found} of {n_bytes} bytes")
