"""A folder of DICOM files as one volume, or a reason why it is none.

pydicom reads the headers and judges; SimpleITK (GDCM) decodes the pixels, so compressed transfer syntaxes work and the
geometry is what every ITK program sees. A series is refused rather than bent: a missing slice, a doubled one or a
tilted gantry would come out of any reader as a volume of the right look and the wrong size.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import SimpleITK as sitk  # noqa: N813 -- the name its own documentation uses
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

from mshub.errors import CaseError, GeometryError
from mshub.geometry import Grid, Volume, check_same_grid, from_sitk, ras_affine
from mshub.image_limits import (
    MAX_VOXELS,
    MIN_SPACING_MM,
    MIN_VOXELS_PER_AXIS,
    SHEAR_TOLERANCE,
    check_spacing,
    check_voxel_count,
)

logger = logging.getLogger(__name__)

#: How far, as a fraction of the slice spacing, a slice may lie from where a regular stack has it. Rounded positions
#: reach 2 %, a missing slice 50 % or more.
SLICE_POSITION_TOLERANCE = 0.1
#: Drift across the slices that rounding of a short stack explains, whatever its length.
TILT_TOLERANCE_MM = 0.05
#: Decimal strings of one series that differ by less are the same orientation or pixel size.
HEADER_TOLERANCE = 1e-4
#: How far from 1 the length of a direction vector may be: three decimals are common, a zero vector is not a direction.
UNIT_TOLERANCE = 1e-2

#: Objects that have rows and columns but are no scan: RT images and doses; segmentations, fiducials, raw data.
_NOT_A_SCAN = ("1.2.840.10008.5.1.4.1.1.481.", "1.2.840.10008.5.1.4.1.1.66")
_TAGS = [
    "SOPClassUID",
    "SeriesInstanceUID",
    "SeriesDescription",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PixelRepresentation",
    "BitsStored",
    "RescaleSlope",
    "RescaleIntercept",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
]

_Vector = npt.NDArray[np.float64]
_Header = tuple[Path, Any]  # a file and its pydicom dataset without pixels


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
        Slices in ascending order along the normal of the image plane. Rescale slope and intercept are applied: whole
        numbers stay integers, anything else, or slices that are scaled differently (PET), become float32.

    Raises
    ------
    CaseError
        No DICOM, several series, multi-frame, colour, damaged or too large.
    GeometryError
        Missing or doubled slices, mixed orientations or sizes, a tilted gantry, a single slice.
    """
    headers = _select_series(folder, series_uid)
    grid, ordered = _stack(headers, max_voxels)
    volume = from_sitk(_decode(folder, ordered))
    check_same_grid(volume.grid, grid, "the decoded series", "what its headers say")
    return volume


def read_series_grid(folder: Path, *, series_uid: str | None = None, max_voxels: int = MAX_VOXELS) -> Grid:
    """Return the grid of the one series in a folder from headers alone; parameters and errors as `read_series`."""
    grid, _ = _stack(_select_series(folder, series_uid), max_voxels)
    return grid


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
        raise CaseError(f"{file.name} is a damaged DICOM file ({error}); copy the series again") from error


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
    if others:
        logger.info("ignoring DICOM objects that are no scan: %s", ", ".join(others))
    return scans


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


def _stack(headers: list[_Header], max_voxels: int) -> tuple[Grid, list[_Header]]:
    """Return the grid and the headers in order along the normal, or refuse."""
    for file, dataset in headers:
        _check_plain_slice(file, dataset)
    first = headers[0][1]
    orientation = _numbers(*headers[0], "ImageOrientationPatient", 6)
    pixel_spacing = _numbers(*headers[0], "PixelSpacing", 2)
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
    ordered = [headers[i] for i in order]
    spacing = _slice_spacing(ordered, positions[order], axes)
    affine_lps = np.eye(4)
    # PixelSpacing is row distance (along y) first
    affine_lps[:3, :3] = axes * np.array([pixel_spacing[1], pixel_spacing[0], spacing])
    affine_lps[:3, 3] = positions[order[0]]
    return Grid(shape, ras_affine(affine_lps)), ordered


def _check_plain_slice(file: Path, dataset: Any) -> None:
    """Refuse files that are not one grey-scale slice each."""
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise CaseError(
            f"{file.name} is a multi-frame object of {frames} frames ({_class_name(dataset)}), expected one slice "
            "per file; convert it to NIfTI, e.g. with dcm2niix or 3D Slicer"
        )
    samples = int(dataset.get("SamplesPerPixel") or 1)
    kind = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
    # MONOCHROME1 (low is white) comes out of GDCM with its bits inverted: HU no more
    if samples != 1 or kind != "MONOCHROME2":
        raise CaseError(
            f"{file.name} has {samples} samples per pixel and is {kind} ({_class_name(dataset)}), expected one "
            "grey value per pixel (MONOCHROME2); give the original scan, not a colour or inverted copy"
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
    _check_upright(positions, axes)
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


def _check_upright(positions: _Vector, axes: _Vector) -> None:
    """Refuse slices that are pushed sideways as the stack grows."""
    offsets = (positions - positions[0]) @ axes
    drift = float(np.linalg.norm(offsets[:, :2], axis=1).max())
    length = float(offsets[-1, 2])
    if drift > max(SHEAR_TOLERANCE * length, TILT_TOLERANCE_MM):
        raise GeometryError(
            f"found slices shifted sideways by up to {drift:.3g} mm over a stack of {length:.4g} mm: a gantry tilt of "
            f"about {np.degrees(np.arctan2(drift, length)):.1f} degrees, expected slices stacked along their normal; "
            "resample the series to an orthogonal grid, e.g. with 3D Slicer (which corrects the tilt on import) or "
            "dcm2niix"
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


def _decode(folder: Path, ordered: list[_Header]) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file, _ in ordered])
    if not _stored_alike([dataset for _, dataset in ordered]):
        reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].replace(str(folder), folder.name)
        raise CaseError(
            f"the pixels of the series cannot be decoded ({reason}), expected complete files in a transfer syntax that "
            "GDCM knows; copy the series again, or decompress it, e.g. with dcmdjpeg or 3D Slicer"
        ) from error
    return image if image.GetPixelID() != sitk.sitkFloat64 else sitk.Cast(image, sitk.sitkFloat32)


def _stored_alike(datasets: Sequence[Any]) -> bool:
    """Whether all slices rescale to one integer type; ITK would force the others into the type of the first slice."""
    keywords = ("RescaleSlope", "RescaleIntercept", "PixelRepresentation", "BitsStored")
    return len({tuple(str(dataset.get(keyword)) for keyword in keywords) for dataset in datasets}) == 1
