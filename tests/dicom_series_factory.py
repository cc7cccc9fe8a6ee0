"""CT and MR series of any orientation, what is drawn on them, and what goes wrong with both, as DICOM files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

CLASSES = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4"}
SEG_CLASS = "1.2.840.10008.5.1.4.1.1.66.4"
OFFSET = 1024
AXES = {  # unit vectors along a row, along a column, LPS; the normal follows
    "axial": ((1, 0, 0), (0, 1, 0)),
    "axial, feet first": ((-1, 0, 0), (0, 1, 0)),
    "axial, prone": ((-1, 0, 0), (0, -1, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "sagittal, upside down": ((0, -1, 0), (0, 0, 1)),
}


def oblique(first: float = 20, second: float = -15, third: float = 35) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors along a row and a column of slices turned about all three axes, degrees."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians([first, second, third])):
        one, two = [index for index in range(3) if index != axis]
        about = np.eye(3)
        about[one, one] = about[two, two] = np.cos(angle)
        about[one, two], about[two, one] = -np.sin(angle), np.sin(angle)
        turn = turn @ about
    return turn[:, 0], turn[:, 1]


@dataclass
class SeriesMaker:
    """One series to be written.

    Attributes
    ----------
    name : str
        Its UIDs follow from it, and from `study`.
    shape : (int, int, int)
        Columns, rows, slices.
    axes : pair of vectors
        Unit vectors along a row and along a column, LPS.
    spacing : (float, float, float)
        Along a row, along a column, between slices; mm.
    study, frame : str, optional
        Series of one study share them.
    attributes : mapping
        Of every slice; a value of None removes the attribute.
    tilt : (float, float)
        mm along a row and a column by which each slice is shifted against the one before.
    """

    name: str
    shape: tuple[int, int, int] = (24, 20, 18)
    axes: Any = AXES["axial"]
    spacing: tuple[float, float, float] = (1.5, 1.7, 2.5)
    study: str = ""
    frame: str = ""
    modality: str = "CT"
    attributes: Mapping[str, Any] = field(default_factory=dict)
    tilt: tuple[float, float] = (0.0, 0.0)
    seed: int = 0

    @property
    def uid(self) -> str:
        """SeriesInstanceUID."""
        return generate_uid(entropy_srcs=["series", self.name])

    @property
    def study_uid(self) -> str:
        """StudyInstanceUID."""
        return generate_uid(entropy_srcs=["study", self.study or self.name])

    def stored(self) -> np.ndarray:
        """Return the values of all pixels, [column, row, slice], smooth noise with an air rim."""
        generator = np.random.default_rng(self.seed)
        noise = generator.normal(size=self.shape)
        for axis in range(3):
            noise = (noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)) / 3
        array = np.clip(noise * 400, -1000, 1000).astype(np.int16)
        array[:2] = -1000
        return array

    def slices(self) -> list[FileDataset]:
        """Return the slices in order along the normal."""
        array = self.stored()
        row, column = (np.array(axis, dtype=float) for axis in self.axes)
        normal = np.cross(row, column)
        origin = np.array([-31.25, 12.5, 77.0])
        return [
            self._slice(
                k,
                array[:, :, k],
                origin + k * (self.spacing[2] * normal + self.tilt[0] * row + self.tilt[1] * column),
            )
            for k in range(self.shape[2])
        ]

    def write(self, folder: Path, change: Callable[[list[FileDataset]], Iterable[Dataset]] = list) -> Path:
        """Write what `change` makes of the slices to `folder`, file names in no order; returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, dataset in enumerate(change(self.slices())):
            dataset.save_as(folder / f"IM{997 * (number + 3) % 10007:05d}.dcm", write_like_original=False)
        return folder

    def _slice(self, k: int, pixels_xy: np.ndarray, position: np.ndarray) -> FileDataset:
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CLASSES[self.modality]
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["slice ", self.name, " ", str(k)])
        dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        dataset.is_little_endian, dataset.is_implicit_VR = True, False
        stored = (pixels_xy.T.astype(np.int32) + OFFSET).astype(np.uint16)
        attributes = {
            "SOPClassUID": meta.MediaStorageSOPClassUID,
            "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
            "StudyInstanceUID": self.study_uid,
            "SeriesInstanceUID": self.uid,
            "FrameOfReferenceUID": generate_uid(entropy_srcs=["frame", self.frame or self.study or self.name]),
            "PatientID": (self.study or self.name).upper(),
            "PatientName": f"Test^{self.study or self.name}",
            "PatientBirthDate": "",
            "PatientSex": "O",
            "StudyDate": "20260102",
            "StudyTime": "101500",
            "SeriesDate": "20260102",
            "SeriesTime": "101500",
            "StudyID": "1",
            "AccessionNumber": "",
            "ReferringPhysicianName": "",
            "Manufacturer": "Test",
            "PositionReferenceIndicator": "",
            "Modality": self.modality,
            "SeriesDescription": self.name,
            "SeriesNumber": 3,
            "InstanceNumber": self.shape[2] - k,
            "Rows": stored.shape[0],
            "Columns": stored.shape[1],
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "BitsAllocated": 16,
            "BitsStored": 12,
            "HighBit": 11,
            "PixelRepresentation": 0,
            "RescaleSlope": 1,
            "RescaleIntercept": -OFFSET,
            "PixelSpacing": [self.spacing[1], self.spacing[0]],
            "SliceThickness": self.spacing[2],
            "ImageOrientationPatient": [round(float(v), 10) for axis in self.axes for v in axis],
            "ImagePositionPatient": [round(float(v), 8) for v in position],
            "PixelData": np.ascontiguousarray(stored).tobytes(),
        }
        for keyword, value in {**attributes, **self.attributes}.items():
            if value is not None:
                setattr(dataset, keyword, value)
        return dataset


def run_length(slices: Sequence[FileDataset]) -> Sequence[FileDataset]:
    """Return the slices with their pixels in DICOM's run-length encoding."""
    for dataset in slices:
        dataset.compress(RLELossless)
    return slices


def jpeg_2000(slices: Sequence[FileDataset]) -> Sequence[FileDataset]:
    """Return the slices with their pixels in lossless JPEG 2000."""
    for dataset in slices:
        pixels = np.frombuffer(dataset.PixelData, np.uint16).reshape(dataset.Rows, dataset.Columns)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format="JPEG2000", no_jp2=True, irreversible=False)
        dataset.PixelData = encapsulate([stream.getvalue()])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    return slices


def segmentation(
    maker: SeriesMaker,
    masks: Mapping[str, np.ndarray],
    *,
    name: str = "",
    algorithm: str = "MANUAL",
    time: str = "101500",
    every_slice: bool = False,
) -> FileDataset:
    """Return a BINARY SEG as other programs make them: written here attribute by attribute, not by MSHub.

    Parameters
    ----------
    maker
        The series it is drawn on.
    masks
        SegmentLabel to its voxels, ``[column, row, slice]``, numbered from 1 in this order.
    name
        Its UIDs follow from it and from the series.
    algorithm
        SegmentAlgorithmType of every segment.
    time
        ContentTime.
    every_slice
        A frame for every slice, as OHIF has it, not only where the segment has a voxel.
    """
    slices = maker.slices()
    items, frames = [], []
    for number, mask in enumerate(masks.values(), 1):
        for k, source in enumerate(slices):
            if every_slice or mask[:, :, k].any():
                items.append(_frame_item(number, source))
                frames.append(mask[:, :, k].T)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SEG_CLASS
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["seg ", maker.name, " ", name])
    seg = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    seg.is_little_endian, seg.is_implicit_VR = True, False
    source = slices[0]
    for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate"):
        setattr(seg, keyword, source.get(keyword, ""))
    attributes = {
        "SOPClassUID": SEG_CLASS,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "SeriesInstanceUID": generate_uid(entropy_srcs=["seg series ", maker.name, " ", name]),
        "FrameOfReferenceUID": source.get("FrameOfReferenceUID", ""),
        "Modality": "SEG",
        "Manufacturer": "Another program",
        "SeriesDescription": "Segmentation",
        "SeriesNumber": 100,
        "InstanceNumber": 1,
        "ContentLabel": "SEGMENTATION",
        "ContentCreatorName": "Else^Dr",
        "SegmentationType": "BINARY",
        "ImageType": ["DERIVED", "PRIMARY"],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 1,
        "BitsStored": 1,
        "HighBit": 0,
        "PixelRepresentation": 0,
        "LossyImageCompression": "00",
        "SegmentSequence": [_segment_item(number, label, algorithm) for number, label in enumerate(masks, 1)],
        "ReferencedSeriesSequence": [_referenced_series_item(slices)],
        "SharedFunctionalGroupsSequence": [_shared_item(maker, source)],
    }
    for prefix in ("Content", "Series"):
        attributes |= {f"{prefix}Date": "20260301", f"{prefix}Time": time}
    for keyword, value in attributes.items():
        setattr(seg, keyword, value)
    return with_frames(seg, items, np.array(frames))


def with_frames(seg: FileDataset, items: Sequence[Dataset], masks: np.ndarray) -> FileDataset:
    """Return a SEG with these frames: what is said of each, and its voxels, ``[frame, row, column]``."""
    seg.PerFrameFunctionalGroupsSequence = list(items)
    seg.NumberOfFrames, seg.Rows, seg.Columns = masks.shape
    packed = np.packbits(masks.astype(np.uint8).ravel(), bitorder="little").tobytes()
    seg.PixelData = packed + bytes(len(packed) % 2)
    return seg


def frames_of(seg: FileDataset) -> tuple[list[Dataset], np.ndarray]:
    """Return what a SEG says of each frame, and the frames' voxels, ``[frame, row, column]``."""
    items = list(seg.PerFrameFunctionalGroupsSequence)
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    shape = (len(items), seg.Rows, seg.Columns)
    return items, bits[: int(np.prod(shape))].reshape(shape)


def _item(**attributes: Any) -> Dataset:
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item


def _reference(source: Dataset) -> Dataset:
    return _item(ReferencedSOPClassUID=source.SOPClassUID, ReferencedSOPInstanceUID=source.SOPInstanceUID)


def _code(value: str, meaning: str) -> list[Dataset]:
    return [_item(CodeValue=value, CodingSchemeDesignator="SCT", CodeMeaning=meaning)]


def _segment_item(number: int, label: str, algorithm: str) -> Dataset:
    item = _item(
        SegmentNumber=number,
        SegmentLabel=label,
        SegmentAlgorithmType=algorithm,
        SegmentedPropertyCategoryCodeSequence=_code("123037004", "Anatomical Structure"),
        SegmentedPropertyTypeCodeSequence=_code("123037004", "Anatomical Structure"),
    )
    if algorithm != "MANUAL":
        item.SegmentAlgorithmName = "another program"
    return item


def _referenced_series_item(slices: Sequence[Dataset]) -> Dataset:
    return _item(
        SeriesInstanceUID=slices[0].SeriesInstanceUID, ReferencedInstanceSequence=[_reference(one) for one in slices]
    )


def _shared_item(maker: SeriesMaker, source: Dataset) -> Dataset:
    measures = _item(
        SliceThickness=maker.spacing[2], SpacingBetweenSlices=maker.spacing[2], PixelSpacing=source.PixelSpacing
    )
    return _item(
        PlaneOrientationSequence=[_item(ImageOrientationPatient=source.ImageOrientationPatient)],
        PixelMeasuresSequence=[measures],
    )


def _frame_item(number: int, source: Dataset) -> Dataset:
    return _item(
        SegmentIdentificationSequence=[_item(ReferencedSegmentNumber=number)],
        PlanePositionSequence=[_item(ImagePositionPatient=source.ImagePositionPatient)],
        DerivationImageSequence=[_item(SourceImageSequence=[_reference(source)])],
    )
