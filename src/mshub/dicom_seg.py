"""Labels as DICOM Segmentation objects (SEG), written with highdicom, and those of any viewer read back.

What is written is BINARY, which every reader knows: one segment per structure that has a voxel, numbered from 1 without
gaps, frames only where a segment is, each referring to the slice it was made from. An empty label is refused: the
standard asks for at least one segment with one frame, and viewers take a segment without a voxel for a damaged object.

What is read is found by the **names** of the segments, never by their numbers, and put on the slices of its series: a
frame belongs to the slice it refers to, or to the one at its position, and is flipped where its rows or columns run
the other way. Nothing is ever guessed: overlapping segments, frames between slices and other encodings are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.sr.coding import Code as DicomCode
from pydicom.uid import generate_uid

from mshub import __version__
from mshub.atomic_file import replacing
from mshub.dicom_derived import (
    MANUFACTURER,
    SERIAL_NUMBER,
    Algorithm,
    Facts,
    WrittenObject,
    check_identified,
    frame_of_reference,
    long_string,
    patient_and_study,
    person_name,
    present_structures,
    series_number,
    slices_of,
)
from mshub.dicom_series import SeriesStack
from mshub.errors import CaseError, GeometryError, LabelError, MSHubError
from mshub.geometry import Array
from mshub.label_rules import MAX_VALUE, fold, listed, refuse_unfit_names
from mshub.seg_frames import Frame, Slices, damaged, placed, read_frames, read_masks, refused_kind
from mshub.structures import PRIVATE_SCHEME, Code, Colour, Structure

SEG_CLASS = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP_CLASS = "1.2.840.10008.5.1.4.1.1.66.7"

_ARTIFICIAL_INTELLIGENCE = DicomCode("123110", "DCM", "Artificial Intelligence")
_SOURCE_GEOMETRY = ("Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")


def write_seg(
    path: Path, labels_xyz: Array, names: Mapping[str, int], stack: SeriesStack, facts: Facts
) -> WrittenObject:
    """Write a label as a DICOM SEG, whole or not at all.

    Parameters
    ----------
    path
        File to write.
    labels_xyz
        Integers on the slices of the series, ``[column, row, slice]`` (`SeriesStack.to_slices`).
    names
        Structure name to its value in the array, absent structures too.
    stack
        The series, with the whole headers of its slices.
    facts
        Who or what made the label, and what the series is called.

    Returns
    -------
    WrittenObject
        UIDs of the new object and of its new series, which is in the study of `stack`.

    Raises
    ------
    LabelError
        An empty label, a value without a name, a name that DICOM cannot hold.
    GeometryError
        The label is not on the slices of the series.
    CaseError
        The series lacks UIDs that the object must refer to.
    """
    slices = slices_of(labels_xyz, stack)
    present = present_structures(slices, names, facts.overrides, "a DICOM SEG")
    check_identified(stack, "a DICOM SEG")
    dataset = _segmentation(_renumbered(slices, list(present)), list(present.values()), stack, facts)
    dataset.update(patient_and_study(stack))
    dataset.ContentCreatorName = person_name(facts.creator)
    dataset.SeriesDate, dataset.SeriesTime = dataset.ContentDate, dataset.ContentTime
    with replacing(path) as stream:
        pydicom.dcmwrite(stream, dataset, write_like_original=False)
    return WrittenObject(str(dataset.SeriesInstanceUID), str(dataset.SOPInstanceUID))


def _renumbered(slices: Array, values: list[int]) -> Array:
    """Return the label as highdicom takes it: ``[slice, row, column]``, values 1..k in their order."""
    numbers = np.zeros(max(values) + 1, dtype=np.uint8 if len(values) <= np.iinfo(np.uint8).max else np.uint16)
    numbers[values] = np.arange(1, len(values) + 1)
    return np.ascontiguousarray(numbers[slices.transpose(2, 1, 0)])


def _segmentation(pixels_zyx: Array, present: list[Structure], stack: SeriesStack, facts: Facts) -> Any:
    from highdicom.seg import Segmentation  # half a second of imports, for what most programs never do

    try:
        return Segmentation(
            source_images=_sources(stack),
            pixel_array=pixels_zyx,
            segmentation_type="BINARY",
            segment_descriptions=[_segment(number, item, facts) for number, item in enumerate(present, start=1)],
            series_instance_uid=generate_uid(),
            series_number=series_number(stack),
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=MANUFACTURER,
            software_versions=__version__,
            device_serial_number=SERIAL_NUMBER,
            content_label="SEGMENTATION",
            content_description=long_string(facts.series_description),
            series_description=long_string(facts.series_description),
            coding_schemes=_coding_schemes(present),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CaseError(
            f"the series cannot be referred to by a DICOM SEG ({error}), expected complete CT, MR or PET headers; "
            "write the label as NRRD or NIfTI"
        ) from error


def _sources(stack: SeriesStack) -> list[Dataset]:
    """Return what a SEG takes from the headers of its slices, without anything that highdicom may stumble over."""
    spacing = float(stack.grid.spacing_xyz_mm[2])
    shared = {
        **dict.fromkeys(("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"), ""),
        **dict.fromkeys(("StudyID", "StudyDate", "StudyTime"), ""),
        "FrameOfReferenceUID": frame_of_reference(stack),
        "PositionReferenceIndicator": stack.headers[0].get("PositionReferenceIndicator") or "",
        "Modality": str(stack.headers[0].get("Modality") or "OT"),
        "SliceThickness": _positive(stack.headers[0].get("SliceThickness")) or spacing,
        "SpacingBetweenSlices": round(spacing, 6),
    }
    return [_source(header, shared) for header in stack.headers]


def _source(header: Dataset, shared: Mapping[str, Any]) -> Dataset:
    source = Dataset()
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID", *_SOURCE_GEOMETRY):
        setattr(source, keyword, header[keyword].value)
    for keyword, value in shared.items():
        setattr(source, keyword, value)
    lossy = ("LossyImageCompressionRatio", "LossyImageCompressionMethod")
    if header.get("LossyImageCompression") == "01" and all(header.get(keyword) for keyword in lossy):
        for keyword in ("LossyImageCompression", *lossy):
            setattr(source, keyword, header[keyword].value)
    return source


def _positive(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < np.inf else None


def _segment(number: int, structure: Structure, facts: Facts) -> Any:
    from highdicom.seg import SegmentDescription

    segment = SegmentDescription(
        segment_number=number,
        segment_label=structure.name,
        segmented_property_category=_dicom_code(structure.category),
        segmented_property_type=_dicom_code(structure.type),
        algorithm_type=facts.generation,
        algorithm_identification=_identified(facts.algorithm) if facts.algorithm else None,
        tracking_uid=generate_uid(),
        tracking_id=structure.name,
        anatomic_regions=[_dicom_code(structure.region)] if structure.region else None,
    )
    if structure.modifier:
        modifier = _code_item(structure.modifier)
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    segment.RecommendedDisplayCIELabValue = list(cielab_values(structure.colour))
    return segment


def _identified(algorithm: Algorithm) -> Any:
    from highdicom.content import AlgorithmIdentificationSequence

    name, version = long_string(algorithm.name), long_string(algorithm.version)
    return AlgorithmIdentificationSequence(name, _ARTIFICIAL_INTELLIGENCE, version, source=MANUFACTURER)


def _dicom_code(code: Code) -> DicomCode:
    return DicomCode(code.value, code.scheme, code.meaning)


def _code_item(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
    return item


def _coding_schemes(present: list[Structure]) -> list[Any] | None:
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    if all(code.scheme != PRIVATE_SCHEME for item in present for code in (item.category, item.type)):
        return None
    name = "MSHub structures, coded by name"
    return [CodingSchemeIdentificationItem(PRIVATE_SCHEME, name=name, responsible_organization=MANUFACTURER)]


def cielab_values(colour: Colour) -> tuple[int, int, int]:
    """Return an sRGB colour as the three 16-bit values of RecommendedDisplayCIELabValue.

    DICOM PS3.3 C.10.7.1.1. White is D65, as in the viewers (dcmtk, dcmqi, dcmjs) that turn it back into sRGB.
    """
    part = np.array(colour) / 255
    linear = np.where(part > 0.04045, ((part + 0.055) / 1.055) ** 2.4, part / 12.92)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    ratio = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    lightness, a, b = 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])
    scaled = np.array([lightness / 100, (a + 128) / 255, (b + 128) / 255]).clip(0, 1) * 0xFFFF
    first, second, third = np.rint(scaled).astype(int).tolist()
    return first, second, third


@dataclass(frozen=True, eq=False)
class SegLabels:
    """What a DICOM SEG holds, on the slices of its series.

    Attributes
    ----------
    array_xyz : ndarray of uint8 or uint16
        ``[column, row, slice]``, of the series' `slices_shape` (`SeriesStack.from_slices` puts it on the grid).
    names : dict of str to int
        SegmentLabel to its value in the array, segments without a voxel too.
    algorithm_types : dict of str to str
        SegmentLabel to AUTOMATIC, SEMIAUTOMATIC or MANUAL; empty text where the object does not say.
    algorithm_names : dict of str to str
        SegmentLabel to the name of the algorithm; empty text where there is none.
    created : datetime or None
        When its content was made, with a time zone: this machine's where the object names none.
    creator, description, manufacturer : str
        ContentCreatorName, SeriesDescription and Manufacturer; may be empty.
    series_uid, sop_uid : str
        Of the SEG itself.
    """

    array_xyz: Array
    names: dict[str, int]
    algorithm_types: dict[str, str]
    algorithm_names: dict[str, str]
    created: datetime | None
    creator: str
    description: str
    manufacturer: str
    series_uid: str
    sop_uid: str


def read_seg(source: Path | Dataset, stack: SeriesStack) -> SegLabels:
    """Read a DICOM SEG as a label on the slices of its series.

    Parameters
    ----------
    source
        File, or dataset with its pixels.
    stack
        The series it was made from.

    Raises
    ------
    LabelError
        Damaged, no SEG, FRACTIONAL or LABELMAP, names that are missing or the same, overlapping segments.
    GeometryError
        Made from another series, in another frame of reference, of another size, or between its slices.
    """
    dataset = _opened(source)
    with _parsing():
        _check_kind(dataset)
        segments = _segments(dataset)
        frames = read_frames(dataset)
        _check_belongs(dataset, stack, frames)
        array = _painted(dataset, frames, segments, Slices.of(stack))
        return SegLabels(
            array,
            names={segment.name: number for number, segment in segments.items()},
            algorithm_types={segment.name: segment.algorithm_type for segment in segments.values()},
            algorithm_names={segment.name: segment.algorithm_name for segment in segments.values()},
            created=created(dataset),
            creator=str(dataset.get("ContentCreatorName") or "").strip("^ "),
            description=str(dataset.get("SeriesDescription") or ""),
            manufacturer=str(dataset.get("Manufacturer") or ""),
            series_uid=str(dataset.get("SeriesInstanceUID") or ""),
            sop_uid=str(dataset.get("SOPInstanceUID") or ""),
        )


def referenced_series(dataset: Dataset) -> str | None:
    """Return the UID of the series that a SEG says it was made from; None where it does not say, or is damaged."""
    try:
        return next(iter(_referenced_series(dataset)), None)
    except Exception:  # pydicom promises no exception type for damaged values
        return None


def created(dataset: Dataset) -> datetime | None:
    """Return when the content of an object was made, with a time zone; None where it does not say, or is damaged."""
    for kind in ("Content", "Series", "InstanceCreation"):
        found = _date_and_time(dataset, kind)
        if found is not None:
            return found
    return None


def _date_and_time(dataset: Dataset, kind: str) -> datetime | None:
    try:
        date, time = str(dataset.get(f"{kind}Date") or ""), str(dataset.get(f"{kind}Time") or "")
        digits, _, fraction = time.partition(".")
        text = f"{date}{digits:0<6}.{fraction or 0}"
        moment = datetime.strptime(text, "%Y%m%d%H%M%S.%f")
        offset = str(dataset.get("TimezoneOffsetFromUTC") or "").strip()
        zone = timezone(timedelta(hours=int(offset[:3]), minutes=int(offset[0] + offset[3:5]))) if offset else None
        return moment.replace(tzinfo=zone) if zone else moment.astimezone()
    except Exception:  # a damaged date is no date
        return None


def _opened(source: Path | Dataset) -> Dataset:
    if isinstance(source, Dataset):
        return source
    try:
        return pydicom.dcmread(source)
    except InvalidDicomError:
        raise LabelError(
            f"{source.name} is no DICOM file. Expected: a DICOM SEG. How to fix: export it again."
        ) from None
    except OSError:
        raise
    except Exception as error:  # pydicom promises no exception type for damaged files
        raise damaged(str(error)) from error


@contextmanager
def _parsing() -> Iterator[None]:
    """Turn what a damaged object makes pydicom and us stumble over into a `LabelError`."""
    try:
        yield
    except MSHubError:
        raise
    except Exception as error:
        raise damaged(f"{type(error).__name__}: {error}") from error


def _check_kind(dataset: Dataset) -> None:
    sop_class = str(dataset.get("SOPClassUID") or "")
    kind = str(dataset.get("SegmentationType") or "")
    if sop_class == LABEL_MAP_CLASS or kind == "LABELMAP":
        raise refused_kind("a label map (LABELMAP)", "in OHIF, set segmentation.store.defaultMode to 'bitmap'")
    if sop_class != SEG_CLASS:
        name = pydicom.uid.UID(sop_class).name if sop_class else "no SOP class"
        raise refused_kind(f"{name}, no segmentation", "choose the SEG object")
    if kind != "BINARY":
        raise refused_kind(f"{kind or 'no SegmentationType'}", "threshold it, and export it as a binary segmentation")


@dataclass(frozen=True)
class _Segment:
    name: str
    algorithm_type: str
    algorithm_name: str


def _segments(dataset: Dataset) -> dict[int, _Segment]:
    """Return segment number -> what the object says of it."""
    items = dataset.get("SegmentSequence") or []
    segments = {int(item.SegmentNumber): _described(item) for item in items}
    if not segments:
        raise damaged("no segment")
    if len(segments) < len(items) or min(segments) < 1 or max(segments) > MAX_VALUE:
        numbers = [int(item.SegmentNumber) for item in items]
        raise damaged(f"segment numbers {listed(numbers)}, where each has its own from 1 to {MAX_VALUE}")
    _check_names([segment.name for segment in segments.values()])
    return segments


def _described(item: Dataset) -> _Segment:
    name = str(item.get("SegmentLabel") or "").strip()
    kind, algorithm = (str(item.get(key) or "") for key in ("SegmentAlgorithmType", "SegmentAlgorithmName"))
    return _Segment(name, kind, algorithm)


def _check_names(names: list[str]) -> None:
    if "" in names:
        raise LabelError(
            f"A segment of the DICOM SEG has no name. Found: {listed(map(repr, names))}. Expected: a SegmentLabel for "
            "every segment. How to fix: name it in the viewer and export it again."
        )
    counts = Counter(map(fold, names))
    if twice := [name for name in names if counts[fold(name)] > 1]:
        raise LabelError(
            f"Two segments of the DICOM SEG have one name. Found: {listed(map(repr, twice))}. Expected: each "
            "structure once. How to fix: merge or rename the segments in the viewer and export it again."
        )
    refuse_unfit_names(names)


def _check_belongs(dataset: Dataset, stack: SeriesStack, frames: list[Frame]) -> None:
    """Refuse a SEG of another series or frame of reference; slices that its frames name outweigh its head."""
    slices = {str(header.get("SOPInstanceUID") or "") for header in stack.headers} - {""}
    if all(slices & set(frame.sources) for frame in frames):
        return
    series, own = _referenced_series(dataset), str(stack.headers[0].get("SeriesInstanceUID") or "")
    if series and own and own not in series:
        raise GeometryError(
            f"the DICOM SEG was made from the series {listed(series)}, expected {own}; choose the image it was drawn on"
        )
    frame, expected = (str(item.get("FrameOfReferenceUID") or "") for item in (dataset, stack.headers[0]))
    if frame and expected and frame != expected:
        raise GeometryError(
            f"the DICOM SEG lies in the frame of reference {frame}, expected {expected} like its series; choose the "
            "image it was drawn on"
        )


def _referenced_series(dataset: Dataset) -> list[str]:
    items = dataset.get("ReferencedSeriesSequence") or []
    return [str(item.SeriesInstanceUID) for item in items if item.get("SeriesInstanceUID")]


def _painted(dataset: Dataset, frames: list[Frame], segments: Mapping[int, _Segment], slices: Slices) -> Array:
    """Return the label on the slices; refuse voxels that two segments claim."""
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if sorted((rows, columns)) != sorted(slices.shape[:2]):
        raise GeometryError(
            f"the frames of the DICOM SEG have {columns} x {rows} pixels (columns x rows), expected "
            f"{slices.shape[0]} x {slices.shape[1]} like the slices of its series; export it "
            "without cropping or resampling"
        )
    dtype = np.uint8 if max(segments) <= np.iinfo(np.uint8).max else np.uint16
    label_zyx = np.zeros(slices.shape[::-1], dtype)
    shared_voxels: Counter[tuple[int, int]] = Counter()
    for frame, mask in zip(frames, read_masks(dataset, len(frames), rows, columns), strict=True):
        if frame.segment not in segments:
            raise damaged(f"a frame of segment {frame.segment}, which is not described")
        k, mask_xy = placed(frame, mask.T, slices)
        target_xy = label_zyx[k].T
        shared_voxels.update(_claimed_twice(target_xy, mask_xy, frame.segment))
        np.copyto(target_xy, frame.segment, where=mask_xy)
    _refuse_overlaps(shared_voxels, segments)
    return label_zyx.transpose(2, 1, 0)


def _claimed_twice(label_xy: Array, mask_xy: npt.NDArray[np.bool_], segment: int) -> dict[tuple[int, int], int]:
    """Return (other segment, this one) -> how many voxels of the mask the other has already."""
    claimed = mask_xy & (label_xy != 0) & (label_xy != segment)
    if not claimed.any():
        return {}
    others, counts = np.unique(label_xy[claimed], return_counts=True)
    return {(other, segment): count for other, count in zip(others.tolist(), counts.tolist(), strict=True)}


def _refuse_overlaps(shared_voxels: Mapping[tuple[int, int], int], segments: Mapping[int, _Segment]) -> None:
    if shared_voxels:
        pairs = [f"{segments[a].name} and {segments[b].name} ({n:,} voxels)" for (a, b), n in shared_voxels.items()]
        raise LabelError(
            f"Segments of the DICOM SEG overlap. Found: {listed(pairs)}. Expected: every voxel in one structure at "
            "most. How to fix: decide in the viewer whose they are (3D Slicer: Segment Editor, Masking, 'Modify other "
            "segments: overwrite all') and export it again."
        )
