"""A folder of DICOM files as one volume, or a reason why it is none.

pydicom reads the headers and judges; SimpleITK (GDCM) decodes the pixels, so compressed transfer syntaxes work and the
geometry is what every ITK program sees. A series is refused rather than bent: a missing slice or a doubled one would
come out of any reader as a volume of the right look and the wrong size.

A tilted gantry leaves slices that are pushed sideways by one constant vector per slice: a sheared stack, which no grid
describes. It is straightened by whole pixels: every slice keeps its pixels and lies where it was within half a pixel
along each axis, on an orthogonal grid that is larger in plane. A label on that grid goes back to the slices unchanged.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import SimpleITK as sitk  # noqa: N813 -- the name its own documentation uses
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

from mshub.errors import CaseError, GeometryError
from mshub.geometry import Array, Grid, Volume, check_fits, check_same_grid, from_sitk, ras_affine
from mshub.image_limits import (
    MAX_VOXELS,
    MIN_SPACING_MM,
    MIN_VOXELS_PER_AXIS,
    SHEAR_TOLERANCE,
    check_spacing,
    check_voxel_count,
    text_xyz,
)

logger = logging.getLogger(__name__)

#: How far, as a fraction of the slice spacing, a slice may lie from where a regular stack has it. Rounded positions
#: reach 2 %, a missing slice 50 % or more.
SLICE_POSITION_TOLERANCE = 0.1
#: Drift across the slices that rounding of a short stack explains, whatever its length.
TILT_TOLERANCE_MM = 0.05
#: Steepest tilt that is straightened: gantries reach 30 degrees, beyond this the headers are wrong.
MAX_TILT_DEGREES = 45.0
#: What lies beside the slices of a straightened CT, in HU.
AIR_HU = -1024
#: Decimal strings of one series that differ by less are the same orientation or pixel size.
HEADER_TOLERANCE = 1e-4
#: How far from 1 the length of a direction vector may be: three decimals are common, a zero vector is not a direction.
UNIT_TOLERANCE = 1e-2

#: Objects that have rows and columns but are no scan: RT images and doses; segmentations, fiducials, raw data.
_NOT_A_SCAN = ("1.2.840.10008.5.1.4.1.1.481.", "1.2.840.10008.5.1.4.1.1.66")
_TAGS = [
    "SOPClassUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "SeriesDescription",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PixelRepresentation",
    "BitsAllocated",
    "BitsStored",
    "RescaleSlope",
    "RescaleIntercept",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
]

_Vector = npt.NDArray[np.float64]
_Header = tuple[Path, Any]  # a file and its pydicom dataset without pixels


@dataclass(frozen=True, eq=False)
class SeriesStack:
    """Where the slices of one series lie, from headers alone.

    Attributes
    ----------
    grid : Grid
        Grid of the image, orthogonal. Of a tilted gantry it is larger in plane than a slice.
    headers : tuple of pydicom.Dataset
        One per slice, without pixels, in the order of z.
    offsets : ndarray of int, shape (n, 2)
        Column and row of the grid at which pixel (0, 0) of each slice lies; zero unless the gantry was tilted.
    slices_shape : (int, int, int)
        Columns, rows and number of the slices.
    """

    grid: Grid
    headers: tuple[Any, ...]
    offsets: npt.NDArray[np.int64]
    slices_shape: tuple[int, int, int]

    @property
    def tilted(self) -> bool:
        """Whether slices are shifted against each other."""
        return self.slices_shape != self.grid.shape_xyz

    def to_slices(self, array_xyz: Array) -> Array:
        """Return an array of the grid as pixels of the slices: ``[column, row, slice]``, cropped where tilted.

        Raises
        ------
        GeometryError
            The array has another shape than the grid.
        """
        check_fits(array_xyz, self.grid)
        if not self.tilted:
            return array_xyz
        return np.stack([array_xyz[(*window, k)] for k, window in enumerate(self._windows())], axis=2)

    def from_slices(self, array_xyz: Array, fill: float = 0) -> Array:
        """Return pixels of the slices, ``[column, row, slice]``, on the grid; the inverse of `to_slices`.

        Parameters
        ----------
        array_xyz
            Of `slices_shape`.
        fill
            Value beside the slices.

        Raises
        ------
        GeometryError
            The array has another shape than the slices.
        """
        if array_xyz.shape != self.slices_shape:
            raise GeometryError(
                f"found an array of {text_xyz(array_xyz.shape)} pixels, expected {text_xyz(self.slices_shape)} like "
                "the slices of its series (columns, rows, slices); give one value per pixel of the series"
            )
        if not self.tilted:
            return array_xyz
        padded = np.full(self.grid.shape_xyz, fill, dtype=array_xyz.dtype)
        for k, window in enumerate(self._windows()):
            padded[(*window, k)] = array_xyz[:, :, k]
        return padded

    def _windows(self) -> list[tuple[slice, slice]]:
        """Return the columns and rows of the grid that each slice covers."""
        columns, rows, _ = self.slices_shape
        return [(slice(x, x + columns), slice(y, y + rows)) for x, y in self.offsets.tolist()]


@dataclass(frozen=True, eq=False)
class _Layout:
    """A stack, the files of its slices in order, and the grid that ITK gives them, which knows no tilt."""

    stack: SeriesStack
    files: tuple[Path, ...]
    untilted: Grid


def read_series(folder: Path, *, series_uid: str | None = None, max_voxels: int = MAX_VOXELS) -> Volume:
    """Read the one series in a folder.

    Parameters
    ----------
    folder
        Holds the files of one series, or folders that do. Files that are not DICOM are ignored, and so are objects
        that are no scan (RT structures, segmentations, reports) beside one.
    series_uid
        Series Instance UID to choose where there are several.
    max_voxels
        Refuse larger series before any pixel is decoded.

    Returns
    -------
    Volume
        Slices in ascending order along the normal of the image plane, straightened where the gantry was tilted (the
        new corners hold air in CT, the series' minimum otherwise). Rescale slope and intercept are applied: whole
        numbers stay integers, anything else, or slices that are scaled differently (PET), become float32.

    Raises
    ------
    CaseError
        No DICOM, several series, multi-frame, colour, damaged or too large.
    GeometryError
        Missing or doubled slices, mixed orientations or sizes, slices shifted unevenly, a single slice.
    """
    layout = _lay_out(_select_series(folder, series_uid), max_voxels)
    volume = from_sitk(_decode(folder, layout))
    check_same_grid(volume.grid, layout.untilted, "the decoded series", "what its headers say")
    if layout.stack.grid is layout.untilted:
        return volume
    fill = _background(volume.array_xyz, layout.stack.headers[0])
    return Volume(layout.stack.from_slices(volume.array_xyz, fill), layout.stack.grid)


def read_series_grid(folder: Path, *, series_uid: str | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return the grid of the one series in a folder from headers alone; parameters and errors as `read_series`."""
    return _lay_out(_select_series(folder, series_uid), max_voxels).stack.grid


def read_stack(folder: Path, *, series_uid: str | None = None, max_voxels: int = MAX_VOXELS) -> SeriesStack:
    """Return where the slices of the one series in a folder lie, with their headers; pixels are not looked at.

    Parameters and errors are those of `read_series`. Files that have lost their pixels will do.
    """
    layout = _lay_out(_select_series(folder, series_uid), max_voxels)
    return replace(layout.stack, headers=tuple(_read_whole_header(file) for file in layout.files))


def _select_series(folder: Path, series_uid: str | None) -> list[_Header]:
    headers = _read_headers(_files(folder))
    if not headers:
        below = sorted(entry for entry in folder.iterdir() if entry.is_dir())
        headers = _read_headers(file for entry in below for file in _files(entry))
    if not headers:
        raise CaseError("found no DICOM file in the folder, expected the files of one series; check the export")
    series = _group_by_series(_scans(headers))
    if series_uid is not None:
        series = {uid: members for uid, members in series.items() if uid == series_uid}
    if len(series) != 1:
        raise CaseError(_describe_choice(series, series_uid))
    return next(iter(series.values()))


def _files(folder: Path) -> list[Path]:
    """Return the regular files of a folder, without the table of contents of a CD and what operating systems drop."""
    files = (entry for entry in folder.iterdir() if entry.is_file())
    return sorted(file for file in files if not file.name.startswith(".") and file.name.upper() != "DICOMDIR")


def _read_headers(files: Iterable[Path]) -> list[_Header]:
    return [(file, header) for file in files if (header := _read_header(file)) is not None]


def _read_header(file: Path) -> Any | None:
    """Return the dataset of one file without pixels, or None where it is not DICOM and does not claim to be."""
    try:
        return _converted(pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS))
    except InvalidDicomError:
        if file.suffix.lower() != ".dcm":
            return None
        raise CaseError(
            f"{file.name} is no DICOM file in spite of its name, expected every .dcm file to be readable; the copy is "
            "damaged or incomplete: copy the series again"
        ) from None
    except Exception as error:
        # pydicom promises no exception type for damaged files
        raise _damaged(file, error) from error


def _read_whole_header(file: Path) -> Any:
    """Return every attribute but the pixels of a file that is known to be DICOM; values stay unconverted."""
    try:
        return pydicom.dcmread(file, stop_before_pixels=True)
    except Exception as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CaseError:
    return CaseError(f"{file.name} is a damaged DICOM file ({error}); copy the series again")


def _converted(dataset: Any) -> Any:
    """Convert every value now: pydicom is lazy, and a damaged one would raise wherever it is first looked at."""
    for _ in (*dataset, *dataset.file_meta):
        pass
    for keyword in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel"):
        int(dataset.get(keyword) or 0)
    return dataset


def _scans(headers: list[_Header]) -> list[_Header]:
    scans = [header for header in headers if _is_scan(header[1])]
    others = sorted({_class_name(dataset) for _, dataset in headers if not _is_scan(dataset)})
    if not scans:
        raise CaseError(
            f"found only DICOM objects that are no scan ({', '.join(others)}), expected a CT, MR or PET image series; "
            "give the series that this object was made from"
        )
    _check_none_damaged(headers, {_sop_class(dataset) for _, dataset in scans})
    if others:
        logger.info("ignoring DICOM objects that are no scan: %s", ", ".join(others))
    return scans


def _check_none_damaged(headers: list[_Header], classes: set[str]) -> None:
    """Refuse a slice that has lost its size: it would be left out as if it were another object."""
    for file, dataset in headers:
        if not _is_scan(dataset) and _sop_class(dataset) in classes:
            raise CaseError(
                f"{file.name} has no Rows and Columns, expected both as in the other slices ({_class_name(dataset)}); "
                "the file is damaged: copy the series again"
            )


def _is_scan(dataset: Any) -> bool:
    return bool(dataset.get("Rows") and dataset.get("Columns")) and not _sop_class(dataset).startswith(_NOT_A_SCAN)


def _sop_class(dataset: Any) -> str:
    """Return the SOP class UID, from the file meta information where the data set has none."""
    return str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")


def _class_name(dataset: Any) -> str:
    uid = _sop_class(dataset)
    return str(UID(uid, pydicom.config.IGNORE).name) if uid else "unknown SOP class"


def _group_by_series(headers: list[_Header]) -> dict[str, list[_Header]]:
    """Group by Series Instance UID; files without one (badly anonymised) make one series."""
    series: dict[str, list[_Header]] = defaultdict(list)
    for header in headers:
        series[str(header[1].get("SeriesInstanceUID") or "")].append(header)
    return series


def _describe_choice(series: dict[str, list[_Header]], series_uid: str | None) -> str:
    if series_uid is not None:
        return f"found no series {series_uid} in the folder; check the Series Instance UID"
    listing = "; ".join(_describe_series(uid, members) for uid, members in series.items())
    return (
        f"found {len(series)} series in the folder, expected one: {listing}; copy the wanted series into a folder of "
        "its own, or choose it by its Series Instance UID (series_uid)"
    )


def _describe_series(uid: str, members: list[_Header]) -> str:
    first = members[0][1]
    description = first.get("SeriesDescription") or "no description"
    return f"{description!s} ({first.get('Modality') or 'no modality'}, {len(members)} files, {uid or 'no UID'})"


def _lay_out(headers: list[_Header], max_voxels: int) -> _Layout:
    """Return the slices in order along the normal and where they lie, or refuse."""
    for file, dataset in headers:
        _check_plain_slice(file, dataset)
    first = headers[0][1]
    orientation = _numbers(*headers[0], "ImageOrientationPatient", 6)
    pixel_spacing = _numbers(*headers[0], "PixelSpacing", 2)
    _check_one_origin([dataset for _, dataset in headers])
    _check_alike(headers, orientation, pixel_spacing)
    if len(headers) < MIN_VOXELS_PER_AXIS:
        raise GeometryError(
            f"found a single slice ({headers[0][0].name}), which is no volume, expected at least "
            f"{MIN_VOXELS_PER_AXIS} slices; give the whole series"
        )
    shape = (int(first.Columns), int(first.Rows), len(headers))
    check_voxel_count(shape, max_voxels)
    axes = _axes(orientation)
    positions = np.array([_numbers(file, dataset, "ImagePositionPatient", 3) for file, dataset in headers])
    order = np.argsort(positions @ axes[:, 2], kind="stable")
    ordered, positions = [headers[i] for i in order], positions[order]
    spacing = _slice_spacing(ordered, positions, axes)
    pixel_xy = pixel_spacing[::-1]  # PixelSpacing is row distance (along y) first
    check_spacing([*pixel_xy.tolist(), spacing])
    untilted = _grid(shape, axes, np.array([*pixel_xy, spacing]), positions[0])
    stack = SeriesStack(untilted, tuple(dataset for _, dataset in ordered), np.zeros((len(ordered), 2), int), shape)
    if _is_tilted(positions, axes):
        stack = _straightened(stack, positions, axes, pixel_xy)
        check_voxel_count(stack.grid.shape_xyz, max_voxels)
    return _Layout(stack, tuple(file for file, _ in ordered), untilted)


def _grid(shape: tuple[int, int, int], axes: _Vector, spacing: _Vector, position: _Vector) -> Grid:
    """Return the grid of unit axes (columns, LPS), a spacing and the position of its first voxel (LPS), in mm."""
    affine_lps = np.eye(4)
    affine_lps[:3, :3] = axes * spacing
    affine_lps[:3, 3] = position
    return Grid(shape, ras_affine(affine_lps))


def _straightened(stack: SeriesStack, positions: _Vector, axes: _Vector, pixel_xy: _Vector) -> SeriesStack:
    """Return the stack of a tilted gantry on an orthogonal grid: every slice shifted to its nearest whole pixel."""
    sideways = ((positions - positions[0]) @ axes)[:, :2]
    length = float((positions[-1] - positions[0]) @ axes[:, 2])
    spacing = length / (len(positions) - 1)
    _check_straightens(sideways, length, spacing)
    pixels = np.rint(sideways / pixel_xy).astype(np.int64)
    offsets = pixels - pixels.min(axis=0)
    wider, higher = offsets.max(axis=0).tolist()
    columns, rows, count = stack.slices_shape
    corner = positions[0] + axes[:, :2] @ (pixels.min(axis=0) * pixel_xy)
    grid = _grid((columns + wider, rows + higher, count), axes, np.array([*pixel_xy, spacing]), corner)
    return replace(stack, grid=grid, offsets=offsets)


def _background(array_xyz: Array, header: Any) -> float:
    """Return what lies beside the slices: air in CT, unless the scanner's own padding is lower; else the minimum."""
    lowest = float(array_xyz.min())
    holds_air = array_xyz.dtype.kind == "f" or np.iinfo(array_xyz.dtype).min <= AIR_HU
    return min(lowest, AIR_HU) if header.get("Modality") == "CT" and holds_air else lowest


def _check_plain_slice(file: Path, dataset: Any) -> None:
    """Refuse files that are not one grey-scale slice each."""
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise CaseError(
            f"{file.name} is a multi-frame object of {frames} frames ({_class_name(dataset)}), expected one slice "
            "per file; convert it to NIfTI, e.g. with dcm2niix or 3D Slicer"
        )
    _check_rescaling(file, dataset)
    samples = int(dataset.get("SamplesPerPixel") or 1)
    kind = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
    # MONOCHROME1 (low is white) comes out of GDCM with its bits inverted: HU no more
    if samples != 1 or kind != "MONOCHROME2":
        found = f"is {kind}" if samples == 1 else f"has {samples} samples per pixel and is {kind}"
        raise CaseError(
            f"{file.name} {found} ({_class_name(dataset)}), expected one grey value per pixel (MONOCHROME2); give the "
            "original scan, not a colour or inverted copy"
        )


def _check_rescaling(file: Path, dataset: Any) -> None:
    """Refuse a slope or intercept that is no number, or a slope of 0: GDCM takes 1 for it in silence."""
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    values = [float(value) for value in (slope, intercept) if value is not None]
    if not np.isfinite(values).all() or (slope is not None and float(slope) == 0):
        raise CaseError(
            f"{file.name} has RescaleSlope {slope} and RescaleIntercept {intercept}, expected numbers, and no slope of "
            "0; export the series again"
        )


def _check_one_origin(datasets: Sequence[Any]) -> None:
    """Refuse slices of several patients under one series, as bad anonymisation leaves them; nothing of them is said."""
    for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        found = {str(dataset.get(keyword) or "") for dataset in datasets}
        if len(found) > 1:
            raise GeometryError(
                f"found {len(found)} values of {keyword} under one Series Instance UID, expected one; the folder mixes "
                "scans: copy each into a folder of its own"
            )


def _check_alike(headers: list[_Header], orientation: _Vector, pixel_spacing: _Vector) -> None:
    """Refuse a series in which size, orientation or pixel spacing changes: localisers, mixed reconstructions."""
    name, first = headers[0][0].name, headers[0][1]
    for file, dataset in headers[1:]:
        size, expected = (dataset.Columns, dataset.Rows), (first.Columns, first.Rows)
        if size != expected:
            raise _unlike(file, "columns x rows", size, name, expected)
        for keyword, reference in (("ImageOrientationPatient", orientation), ("PixelSpacing", pixel_spacing)):
            found = _numbers(file, dataset, keyword, len(reference))
            if np.abs(found - reference).max() > HEADER_TOLERANCE:
                raise _unlike(file, keyword, found.tolist(), name, reference.tolist())


def _unlike(file: Path, what: str, found: object, other: str, expected: object) -> GeometryError:
    return GeometryError(
        f"the slices of the series differ in {what}: {file.name} has {found}, {other} has {expected}, expected one "
        "value throughout; remove localisers and other reconstructions from the folder"
    )


def _axes(orientation: _Vector) -> _Vector:
    """Return the unit axes of the stack, LPS, as columns: along a row (x), along a column (y), the normal (z)."""
    row, column = orientation[:3], orientation[3:]
    lengths = np.linalg.norm([row, column], axis=1)
    if np.abs(lengths - 1).max() > UNIT_TOLERANCE or abs(row @ column) > UNIT_TOLERANCE:
        raise GeometryError(
            f"found the ImageOrientationPatient {orientation.tolist()}, expected two perpendicular unit vectors; "
            "export the series again from the scanner or the PACS"
        )
    row, column = row / lengths[0], column / lengths[1]
    normal = np.cross(row, column)
    return np.stack([row, column, normal / np.linalg.norm(normal)], axis=1)


def _slice_spacing(ordered: list[_Header], positions: _Vector, axes: _Vector) -> float:
    """Return the slice spacing in mm of a regular stack, which is end-to-end distance over n - 1 as ITK has it."""
    heights = positions @ axes[:, 2]
    gaps = np.diff(heights)
    _check_no_doubles(ordered, heights, gaps)
    _check_regular(ordered, heights, gaps)
    spacing = float(np.linalg.norm(positions[-1] - positions[0]) / (len(ordered) - 1))
    check_spacing([spacing])
    return spacing


def _check_no_doubles(ordered: list[_Header], heights: _Vector, gaps: _Vector) -> None:
    doubled = np.flatnonzero(gaps < MIN_SPACING_MM)
    if doubled.size:
        i = int(doubled[0])
        raise GeometryError(
            f"found {doubled.size} slice positions twice, the first at {heights[i]:g} mm along the normal "
            f"({ordered[i][0].name} and {ordered[i + 1][0].name}), expected one slice per position; the folder mixes "
            "several time points, echoes or b-values, or holds copies: keep one of each"
        )


def _check_regular(ordered: list[_Header], heights: _Vector, gaps: _Vector) -> None:
    usual = float(np.median(gaps))
    i = int(np.abs(gaps - usual).argmax())
    if abs(gaps[i] - usual) > SLICE_POSITION_TOLERANCE * usual:
        raise GeometryError(
            f"found a gap of {gaps[i]:g} mm between {ordered[i][0].name} (at {heights[i]:g} mm) and "
            f"{ordered[i + 1][0].name} (at {heights[i + 1]:g} mm), expected {usual:g} mm as between the other slices"
            f"{_missing(gaps[i], usual)}; copy the complete series, or resample one of varying spacing"
        )
    drift = float(np.abs(heights - np.linspace(heights[0], heights[-1], len(heights))).max())
    if drift > SLICE_POSITION_TOLERANCE * usual:
        raise GeometryError(
            f"found slice spacings that change along the stack (from {gaps.min():g} to {gaps.max():g} mm, slices up to "
            f"{drift:g} mm off a regular stack), expected one spacing; resample the series"
        )


def _missing(gap: float, usual: float) -> str:
    count = round(gap / usual) - 1
    return f": {count} missing" if count > 0 else ""


def _is_tilted(positions: _Vector, axes: _Vector) -> bool:
    """Whether slices are pushed sideways as the stack grows, by more than rounded headers explain."""
    offsets = (positions - positions[0]) @ axes
    drift = float(np.linalg.norm(offsets[:, :2], axis=1).max())
    return drift > max(SHEAR_TOLERANCE * float(offsets[-1, 2]), TILT_TOLERANCE_MM)


def _check_straightens(sideways: _Vector, length: float, spacing: float) -> None:
    """Refuse shifts in plane (mm, one row per slice) that do not grow evenly, or are steeper than any gantry."""
    steady = np.linspace(0, 1, len(sideways))[:, np.newaxis] * sideways[-1]
    uneven = float(np.linalg.norm(sideways - steady, axis=1).max())
    if uneven > SLICE_POSITION_TOLERANCE * spacing:
        raise GeometryError(
            f"found slices shifted sideways unevenly, up to {uneven:.3g} mm off a straight stack with slices "
            f"{spacing:g} mm apart, expected one shift per slice as a tilted gantry leaves it; the series mixes "
            "several acquisitions or was moved by hand: export it again, or resample it, e.g. with 3D Slicer"
        )
    drift = float(np.linalg.norm(sideways[-1]))
    degrees = float(np.degrees(np.arctan2(drift, length)))
    if degrees > MAX_TILT_DEGREES:
        raise GeometryError(
            f"found slices shifted sideways by {drift:.4g} mm over a stack of {length:.4g} mm, a tilt of "
            f"{degrees:.1f} degrees, expected at most {MAX_TILT_DEGREES:g} (no gantry tilts farther); check its "
            "ImagePositionPatient and ImageOrientationPatient, or resample the series, e.g. with 3D Slicer"
        )


def _numbers(file: Path, dataset: Any, keyword: str, count: int) -> _Vector:
    """Return a numeric attribute as float64, or refuse where it is missing or malformed."""
    value = dataset.get(keyword)
    try:
        numbers = np.array([float(item) for item in value], dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.size != count or not np.isfinite(numbers).all():
        raise GeometryError(
            f"{file.name} has {keyword} {value!s}, expected {count} numbers; the file says not where its slice lies: "
            "export the series again without removing geometry attributes"
        )
    return numbers


def _check_complete(file: Path, dataset: Any) -> None:
    """Refuse a slice of which bytes are missing: GDCM fills it up with zeros, without a word."""
    syntax = UID(str(dataset.file_meta.get("TransferSyntaxUID") or ""), pydicom.config.IGNORE)
    if syntax.is_private or (syntax.is_transfer_syntax and syntax.is_compressed):
        return  # GDCM says what it cannot decode
    expected = -(-int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("BitsAllocated") or 16) // 8)
    found = len(_read_pixels(file))
    if 0 < found < expected:
        raise _undecodable(f"{file.name} has {found} of {expected} bytes")


def _undecodable(reason: str) -> CaseError:
    return CaseError(
        f"the pixels of the series cannot be decoded ({reason}), expected complete files in a transfer syntax that "
        "GDCM knows; copy the series again, or decompress it, e.g. with dcmdjpeg or 3D Slicer"
    )


def _read_pixels(file: Path) -> bytes:
    """Return the pixels of a file as they are stored."""
    try:
        return pydicom.dcmread(file, specific_tags=["PixelData"]).get("PixelData") or b""
    except Exception as error:
        raise _damaged(file, error) from error


def _decode(folder: Path, layout: _Layout) -> sitk.Image:
    for file, dataset in zip(layout.files, layout.stack.headers, strict=True):
        _check_complete(file, dataset)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in layout.files])
    if not _stored_alike(layout.stack.headers):
        reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].replace(str(folder), folder.name)
        reason = re.sub(r"^.*\(0x[0-9a-f]+\): ", "", reason)  # which object of ITK said so
        raise _undecodable(reason) from error
    return image if image.GetPixelID() != sitk.sitkFloat64 else sitk.Cast(image, sitk.sitkFloat32)


def _stored_alike(datasets: Sequence[Any]) -> bool:
    """Whether all slices rescale to one integer type; ITK would force the others into the type of the first slice."""
    keywords = ("RescaleSlope", "RescaleIntercept", "PixelRepresentation", "BitsStored")
    return len({tuple(str(dataset.get(keyword)) for keyword in keywords) for dataset in datasets}) == 1
