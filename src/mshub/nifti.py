"""NIfTI, read strictly and written so that everybody reads one grid.

Headers are judged raw, before nibabel mends them, and the stream is read once, to its end, so that the gzip checksum
counts. ITK (3D Slicer, nnU-Net's default reader) and nibabel take different sides where a NIfTI contradicts itself, so
such a file is refused:

* qform and sform more than half a voxel apart: ITK takes the sform only if its code is 1, nibabel always;
* sform columns of another length than ``pixdim``: ITK takes ``pixdim``, nibabel the columns;
* units other than mm: ITK scales micrometres and metres, nibabel does not.

A file with neither qform nor sform is accepted with a warning, on ITK's fallback (axes L, P, S, first voxel at the
origin): 3D Slicer shows it there. nibabel's is another one (only the first axis flipped, centred on the origin).
"""

from __future__ import annotations

import gzip
import io
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mshub.atomic_file import replacing
from mshub.errors import CaseError, GeometryError
from mshub.geometry import Array, Grid, Volume
from mshub.image_file import GZIP_LEVEL, storable, truncated
from mshub.image_limits import check_shape, check_spacing, check_voxel_count, text_xyz

logger = logging.getLogger(__name__)

#: qform and sform of one file may differ by this fraction of the smallest spacing: a float32 quaternion near 180
#: degrees loses 0.2 mm on a body, a stale form is off by whole voxels.
FORM_TOLERANCE_VOXELS = 0.5
#: Relative difference between pixdim and the sform's columns that float32 and rounding explain.
PIXDIM_TOLERANCE = 1e-3
#: Bytes after the voxels that are taken for padding.
TRAILING_BYTES = 4096
#: zlib cannot shrink by more (about 1032:1): a file that would have to is cut.
MAX_GZIP_RATIO = 1040

_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_METRE, _MICRON = 1, 3
_ITK_SIGNS = np.array([-1.0, -1.0, 1.0])


def read_nifti(path: Path, max_voxels: int) -> Volume:
    """Read a NIfTI file to its end.

    Parameters
    ----------
    path
        Ends in ``.nii`` or ``.nii.gz``.
    max_voxels
        Refuse larger images before decompressing them.

    Returns
    -------
    Volume
        Scaled and floating-point data are float32, other integers as in the file, in native byte order.

    Raises
    ------
    CaseError
        Damaged, too large, colour, complex, or not one NIfTI file.
    GeometryError
        Not 3-D, no usable grid, or one that readers disagree about.
    OSError, EOFError, ValueError, zlib.error, nibabel.spatialimages.HeaderDataError
        Damaged in a way that gzip or nibabel found: `mshub.image_file.reading` puts that into words.
    """
    with _opened(path) as stream:
        header = _sound_header(stream, max_voxels)
        grid = _grid(header)
        _check_enough_bytes(path, header)
        raw = header.raw_data_from_fileobj(stream)
        # reading on to the end is what makes gzip compare the checksum
        if len(stream.read(TRAILING_BYTES + 1)) > TRAILING_BYTES:
            raise _trailing(raw.nbytes)
    return Volume(_scaled(raw, header), grid)


def read_nifti_grid(path: Path, max_voxels: int) -> Grid:
    """Read the grid of a NIfTI file from its header."""
    with _opened(path) as stream:
        return _grid(_sound_header(stream, max_voxels))


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
    array = storable(array_xyz, grid)
    if max(array.shape) > np.iinfo(np.int16).max:
        raise GeometryError(
            f"found {max(array.shape)} voxels along an axis, expected at most 32767 in NIfTI; use .nrrd"
        )
    image = nib.Nifti1Image(array, grid.affine_ras, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(grid.affine_ras, code=1)
    # a quaternion holds no shear; what `Grid` lets pass of it stays far below half a voxel
    image.set_qform(grid.affine_ras, code=1)
    with replacing(path) as stream:
        if _zipped(path):
            with gzip.GzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=stream, mtime=0) as zipped:
                image.to_stream(zipped)
        else:
            image.to_stream(stream)


def _zipped(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _opened(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if _zipped(path) else path.open("rb")


def _check_enough_bytes(path: Path, header: Any) -> None:
    """Refuse a file that cannot hold its voxels before memory is set aside for them, or that holds far more."""
    expected = header.get_data_offset() + int(np.prod(header.get_data_shape())) * header.get_data_dtype().itemsize
    found, ratio = path.stat().st_size, MAX_GZIP_RATIO if _zipped(path) else 1
    if found * ratio < expected:
        raise truncated(f"{found} bytes cannot hold the {expected} bytes that the header announces")
    if not _zipped(path) and found > expected + TRAILING_BYTES:
        raise _trailing(expected)


def _trailing(announced: int) -> CaseError:
    return CaseError(
        f"found more data than the {announced} bytes that the header announces, expected none; the header does not "
        "belong to the data: export the image again"
    )


def _scaled(raw: Array, header: Any) -> Array:
    """Apply slope and intercept; whole numbers without them stay as they are."""
    slope, inter = header.get_slope_inter()
    native = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    with np.errstate(over="ignore"):  # infinite values are reported by check_values
        if slope in (None, 1.0) and inter in (None, 0.0):
            return native.astype(np.float32, copy=False) if native.dtype.kind == "f" else native
        return (native * np.float64(slope) + np.float64(inter)).astype(np.float32)


def _sound_header(stream: io.BufferedIOBase, max_voxels: int) -> Any:
    """Return the header as nibabel would have it, once the raw one has been found sound."""
    block = stream.read(max(_HEADERS))
    size = int.from_bytes(block[:4], "little")
    header_class = _HEADERS.get(size) or _HEADERS.get(int.from_bytes(block[:4], "big"))
    if header_class is None:
        raise CaseError("this is no NIfTI file in spite of its name; export the image again as NIfTI")
    block = block[: header_class.template_dtype.itemsize]
    if len(block) < header_class.template_dtype.itemsize:
        raise truncated(f"{len(block)} bytes do not hold a header")
    raw = header_class(block, check=False)
    if bytes(raw["magic"])[:3] not in (b"n+1", b"n+2"):
        raise CaseError(
            "this is an Analyze or two-file (.hdr/.img) header, expected a single NIfTI file; convert it, e.g. with "
            "3D Slicer"
        )
    _check_byte_order(raw, size)
    _check_header_shape(raw, max_voxels)
    _check_header_type(raw)
    _check_header_numbers(raw)
    _check_header_lengths(raw)
    return header_class(block, check=True)


def _check_header_shape(raw: Any, max_voxels: int) -> None:
    axes = int(raw["dim"][0])
    if not 1 <= axes <= 7:
        raise CaseError(f"found {axes} dimensions in the header, expected 3; the header is damaged: export it again")
    sizes = [int(size) for size in raw["dim"][1 : axes + 1]]
    if min(sizes) < 1:
        raise CaseError(f"found the image size {sizes} in the header, expected positive numbers; export it again")
    check_shape(sizes)
    check_voxel_count(sizes, max_voxels)


def _check_header_type(raw: Any) -> None:
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


def _check_byte_order(raw: Any, little_endian_size: int) -> None:
    """Refuse a header in two byte orders: nibabel and ITK look at different fields to tell."""
    if (raw.endianness == "<") != (little_endian_size in _HEADERS):
        raise CaseError("found two byte orders in the header, expected one; the header is damaged: export it again")


def _check_header_numbers(raw: Any) -> None:
    """Refuse numbers that readers mend in silence, each in its way. NaN as slope is how nibabel writes that it is 1."""
    slope, offset = float(raw["scl_slope"]), float(raw["vox_offset"])
    if np.isinf(slope):
        raise CaseError("found an infinite scl_slope in the header, expected a number; export the image again")
    if not offset.is_integer():
        raise CaseError(
            f"found the voxels to begin at byte {offset:g} (vox_offset), expected a whole number; the header is "
            "damaged: export the image again"
        )
    stated, needed = int(raw["bitpix"]), 8 * raw.get_data_dtype().itemsize
    if stated not in (0, needed):
        raise CaseError(
            f"found {stated} bits per voxel (bitpix) for the type {raw.get_data_dtype()}, expected {needed}; which is "
            "right cannot be told: export the image again"
        )


def _check_header_lengths(raw: Any) -> None:
    """Refuse units and spacings that readers disagree about; nibabel turns a zero spacing into 1 mm."""
    units = int(raw["xyzt_units"]) & 7
    if units in (_METRE, _MICRON):
        raise GeometryError(
            f"found the unit {'metre' if units == _METRE else 'micrometre'} in the header, expected mm; readers "
            "disagree about it: convert the affine to mm and set xyzt_units to mm"
        )
    check_spacing([float(value) for value in raw["pixdim"][1:4]])


def _grid(header: Any) -> Grid:
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
