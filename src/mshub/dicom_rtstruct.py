"""Labels as DICOM RT Structure Sets, for treatment planning systems.

Contours are traced between the pixels (`mshub.contours`), closed and planar, one set per slice, in patient millimetres,
each referring to its slice. The file is stored as Implicit VR Little Endian, in which a contour may exceed 64 kB.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian, generate_uid

from mshub import __version__
from mshub.atomic_file import replacing
from mshub.contours import Polygon, outlines
from mshub.dicom_derived import (
    MANUFACTURER,
    SERIAL_NUMBER,
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
from mshub.geometry import Array
from mshub.label_rules import fold
from mshub.structures import Code, Structure

RTSTRUCT_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
#: Decimals of a coordinate in mm: rounding moves a corner by less than a thousandth of any pixel.
DECIMALS = 4

_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"  # Detached Study Management: retired, and what every planning system writes
_TARGETS = ("GTV", "CTV", "PTV")


def write_rtstruct(
    path: Path, labels_xyz: Array, names: Mapping[str, int], stack: SeriesStack, facts: Facts
) -> WrittenObject:
    """Write a label as a DICOM RT Structure Set, whole or not at all.

    Parameters, result and errors are those of `mshub.dicom_seg.write_seg`.
    """
    slices = slices_of(labels_xyz, stack)
    present = present_structures(slices, names, facts.overrides, "an RT Structure Set")
    check_identified(stack, "an RT Structure Set")
    dataset = _structure_set(stack, facts)
    planes = np.ascontiguousarray(slices.transpose(2, 1, 0))
    numbered = list(enumerate(present.items(), start=1))
    dataset.StructureSetROISequence = [_roi(number, item, stack, facts) for number, (_, item) in numbered]
    dataset.ROIContourSequence = [_contours(number, planes == value, item, stack) for number, (value, item) in numbered]
    dataset.RTROIObservationsSequence = [
        _observation(n, item, facts) for n, item in enumerate(present.values(), start=1)
    ]
    dataset.file_meta = _file_meta(dataset)
    dataset.is_little_endian, dataset.is_implicit_VR = True, True
    with replacing(path) as stream:
        pydicom.dcmwrite(stream, dataset, write_like_original=False)
    return WrittenObject(str(dataset.SeriesInstanceUID), str(dataset.SOPInstanceUID))


def _structure_set(stack: SeriesStack, facts: Facts) -> Dataset:
    now = datetime.now()
    date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S.%f")
    dataset = patient_and_study(stack)
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTSTRUCT_CLASS, generate_uid()
    dataset.Modality, dataset.SeriesInstanceUID = "RTSTRUCT", generate_uid()
    dataset.SeriesNumber, dataset.InstanceNumber = series_number(stack), 1
    dataset.SeriesDescription, dataset.OperatorsName = long_string(facts.series_description), person_name(facts.creator)
    dataset.Manufacturer = dataset.ManufacturerModelName = MANUFACTURER
    dataset.SoftwareVersions, dataset.DeviceSerialNumber = __version__, SERIAL_NUMBER
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = date, time
    dataset.SeriesDate, dataset.SeriesTime = date, time
    dataset.StructureSetDate, dataset.StructureSetTime = date, time
    dataset.StructureSetLabel, dataset.StructureSetName = MANUFACTURER, long_string(facts.series_description)
    dataset.ApprovalStatus = "UNAPPROVED"
    dataset.FrameOfReferenceUID = frame_of_reference(stack)
    dataset.PositionReferenceIndicator = stack.headers[0].get("PositionReferenceIndicator") or ""
    dataset.ReferencedFrameOfReferenceSequence = [_referenced_frame(stack)]
    return dataset


def _referenced_frame(stack: SeriesStack) -> Dataset:
    """Return what the contours lie in: frame of reference, study, series and all of its slices."""
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = stack.headers[0].SeriesInstanceUID
    series.ContourImageSequence = [_image(header) for header in stack.headers]
    study.ReferencedSOPClassUID = _STUDY_CLASS
    study.ReferencedSOPInstanceUID = stack.headers[0].StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = frame_of_reference(stack)
    frame.RTReferencedStudySequence = [study]
    return frame


def _image(header: Dataset) -> Dataset:
    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    return image


def _roi(number: int, structure: Structure, stack: SeriesStack, facts: Facts) -> Dataset:
    roi = Dataset()
    roi.ROINumber, roi.ROIName = number, structure.name
    roi.ReferencedFrameOfReferenceUID = frame_of_reference(stack)
    roi.ROIGenerationAlgorithm = facts.generation
    if facts.algorithm:
        roi.ROIGenerationDescription = long_string(f"{facts.algorithm.name} {facts.algorithm.version}")
    return roi


def _observation(number: int, structure: Structure, facts: Facts) -> Dataset:
    observation = Dataset()
    observation.ObservationNumber = observation.ReferencedROINumber = number
    observation.RTROIInterpretedType = interpreted_type(structure)
    observation.ROIInterpreter = person_name(facts.creator)
    code = _code(structure.type)
    if structure.modifier:
        code.SegmentedPropertyTypeModifierCodeSequence = [_code(structure.modifier)]
    observation.RTROIIdentificationCodeSequence = [code]
    return observation


def interpreted_type(structure: Structure) -> str:
    """Return the RT ROI Interpreted Type: GTV, CTV or PTV by the name, GTV for tumours, ORGAN for anything else."""
    named = next((kind for kind in _TARGETS if kind.casefold() in fold(structure.name)), None)
    return named or ("GTV" if structure.is_tumour else "ORGAN")


def _code(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
    return item


def _contours(number: int, mask_zyx: npt.NDArray[np.bool_], structure: Structure, stack: SeriesStack) -> Dataset:
    contours = Dataset()
    contours.ReferencedROINumber = number
    contours.ROIDisplayColor = list(structure.colour)
    contours.ContourSequence = [
        _contour(polygon, header)
        for mask, header in zip(mask_zyx, stack.headers, strict=True)
        for polygon in outlines(mask.T)
    ]
    return contours


def _contour(polygon: Polygon, header: Dataset) -> Dataset:
    contour = Dataset()
    contour.ContourImageSequence = [_image(header)]
    contour.ContourGeometricType = "CLOSED_PLANAR"
    contour.NumberOfContourPoints = len(polygon)
    contour.add(_contour_data(_in_patient(polygon, header)))
    return contour


def _in_patient(polygon: Polygon, header: Dataset) -> npt.NDArray[np.float64]:
    """Return columns and rows of a slice, shape (n, 2), as LPS mm, shape (n, 3)."""
    orientation, position, spacing = (
        np.array([float(part) for part in header[keyword].value])
        for keyword in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing")
    )
    axes = orientation.reshape(2, 3) * spacing[::-1, np.newaxis]  # PixelSpacing is row distance first
    points: npt.NDArray[np.float64] = position + polygon @ axes
    return points


def _contour_data(points: npt.NDArray[np.float64]) -> DataElement:
    """Return ContourData as the text it is stored as: a million numbers as objects of pydicom take a minute."""
    text = "\\".join(f"{part:.{DECIMALS}f}" for part in points.ravel().tolist())
    return DataElement(Tag("ContourData"), "DS", text, already_converted=True)


def _file_meta(dataset: Dataset) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return meta
