"""The DICOM table: bad and odd series and segmentations, each through a real PACS and a real server.

``docs/dicom-table.md`` is written from the rows that are tested here: ``python tests/e2e/test_dicom_table.py``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.pixel_data_handlers.rle_handler import rle_encode_frame
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

if __name__ == "__main__":  # pytest has these folders on the path already
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("tests", "demo")]

from dicom_series_factory import (
    AXES,
    OFFSET,
    SeriesMaker,
    frames_of,
    jpeg_2000,
    oblique,
    run_length,
    segmentation,
    with_frames,
)
from factories import make_model_folder
from hospital import NAMES, Hospital, voxels
from lib.audit import Pseudonyms
from live import LiveServer
from mshub.install import add_model
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import NNUNetPredictor
from mshub.store import ModelStore
from orthanc import Orthanc

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "dicom-table.md"
SHAPE = (20, 18, 14)
VARIES = "…"  # in a sentence: what differs from run to run

SEVERAL = "Several series in one study"

Slices = Sequence[FileDataset]
Change = Callable[[list[FileDataset]], Iterable[Dataset]]


# -- series: what is odd -------------------------------------------------------------------------------------------


def renamed(dataset: FileDataset, *why: object) -> FileDataset:
    """Return a copy that is an instance of its own."""
    copy = deepcopy(dataset)
    uid = generate_uid(entropy_srcs=[str(dataset.SOPInstanceUID), *map(str, why)])
    copy.SOPInstanceUID = copy.file_meta.MediaStorageSOPInstanceUID = uid
    return copy


def each(**attributes: Any) -> Change:
    """Return a change that sets attributes of every slice; None removes one."""

    def change(slices: list[FileDataset]) -> Slices:
        for dataset in slices:
            for keyword, value in attributes.items():
                if value is None:
                    delattr(dataset, keyword)
                else:
                    setattr(dataset, keyword, value)
        return slices

    return change


def one(k: int, **attributes: Any) -> Change:
    """Return a change that sets attributes of slice `k` alone."""

    def change(slices: list[FileDataset]) -> Slices:
        each(**attributes)([slices[k]])
        return slices

    return change


def one_missing(slices: list[FileDataset]) -> Slices:
    return slices[:7] + slices[8:]


def one_twice(slices: list[FileDataset]) -> Slices:
    return [*slices, renamed(slices[6])]


def two_time_points(slices: list[FileDataset]) -> Slices:
    later = [renamed(dataset, "later") for dataset in slices]
    each(AcquisitionTime="102000", TemporalPositionIdentifier=2)(later)
    return [*slices, *later]


def three_planes(slices: list[FileDataset]) -> Slices:
    planes = [AXES["axial"], AXES["coronal"], AXES["sagittal"]]
    for dataset, axes in zip(slices, planes, strict=False):
        dataset.ImageOrientationPatient = [float(part) for axis in axes for part in axis]
    return slices[:3]


def two_sizes(slices: list[FileDataset]) -> Slices:
    for dataset in slices[9:]:
        dataset.Rows, dataset.Columns = dataset.Columns, dataset.Rows
    return slices


def colour(slices: list[FileDataset]) -> Slices:
    """Secondary captures, as a workstation stores its coloured renderings beside the scan they show."""
    for dataset in slices:
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelData = bytes(dataset.Rows * dataset.Columns * 3)
    return slices


def multi_frame(slices: list[FileDataset]) -> Slices:
    """One object for the whole scan, as scanners write enhanced CT."""
    whole = renamed(slices[0], "enhanced")
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    whole.NumberOfFrames = len(slices)
    whole.PixelData = b"".join(dataset.PixelData for dataset in slices)
    del whole.ImagePositionPatient
    return [whole]


def uneven(slices: list[FileDataset]) -> Slices:
    """Twice as far apart in the lower half, as in a scan of thick and thin slices."""
    x, y, z = (float(part) for part in slices[0].ImagePositionPatient)
    for k, dataset in enumerate(slices):
        dataset.ImagePositionPatient = [x, y, z + 2.5 * k + 2.5 * max(k - 9, 0)]
    return slices


def shifted(slices: list[FileDataset]) -> Slices:
    """One slice moved sideways, as by a patient between two acquisitions that were joined."""
    x, y, z = (float(part) for part in slices[5].ImagePositionPatient)
    slices[5].ImagePositionPatient = [x + 6, y, z]
    return slices


def cut_pixels(slices: list[FileDataset]) -> Slices:
    slices[4].PixelData = slices[4].PixelData[: len(slices[4].PixelData) // 2]
    return slices


def damaged_jpeg_2000(slices: list[FileDataset]) -> Slices:
    jpeg_2000(slices)
    stream = slices[4].PixelData
    slices[4].PixelData = encapsulate([b"\xff\x4f\xff\x51" + bytes(len(stream) // 2)])
    slices[4]["PixelData"].is_undefined_length = True
    return slices


def equal_instance_numbers(slices: list[FileDataset]) -> Slices:
    each(InstanceNumber=1)(slices)
    return [*slices[1::2], *slices[::2]]


def scaled_each(slices: list[FileDataset]) -> Slices:
    """A scale of its own for every slice, as PET scanners write it."""
    for k, dataset in enumerate(slices):
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{scale_of(k):.5f}", "-512.5"
    return slices


def scale_of(k: int) -> float:
    return 0.5 + 0.03125 * k


def encoded(syntax: str) -> Change:
    def change(slices: list[FileDataset]) -> Slices:
        for dataset in slices:
            dataset.file_meta.TransferSyntaxUID = syntax
            dataset.is_implicit_VR = syntax == ImplicitVRLittleEndian
            dataset.is_little_endian = syntax != ExplicitVRBigEndian
            if syntax == ExplicitVRBigEndian:
                dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        return slices

    return change


def another_series(slices: list[FileDataset]) -> Slices:
    """Another reconstruction beside it, with other numbers, on the same slices."""
    return [*slices, *SeriesMaker("another", SHAPE, study=SEVERAL[:40], seed=33).slices()]


def two_patients(slices: list[FileDataset]) -> Slices:
    """A copy under another patient's name whose series kept its UID, as badly anonymised archives have them."""
    others = [renamed(dataset, "other patient") for dataset in slices]
    each(StudyInstanceUID=generate_uid(entropy_srcs=["other study"]), PatientID="OTHER", PatientName="Other")(others)
    each(PixelData=slices[0].PixelData)(others)
    return [*slices, *others]


def hounsfield(maker: SeriesMaker) -> np.ndarray:
    return maker.stored()


@dataclass(frozen=True)
class SeriesRow:
    """A series, and what becomes of it.

    Attributes
    ----------
    kind : str
        In the table.
    change : callable
        Makes the odd series of a sound one.
    refused : str
        What the user reads, `VARIES` where it differs from run to run; empty where the series is segmented.
    status : int
        Of the answer, where it is refused.
    values : callable
        Returns the numbers the model has to see, ``[column, row, slice]``; where the series is segmented.
    regular : bool
        It is a volume, of which a copy is kept, though the model refuses it.
    said : mapping
        Attribute -> value that the SEG of a submitted correction takes over from the series.
    options : mapping
        Of the sound series.
    """

    kind: str
    change: Change = list
    refused: str = ""
    status: int = 422
    values: Callable[[SeriesMaker], np.ndarray] = hounsfield
    regular: bool = False
    said: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def maker(self) -> SeriesMaker:
        return SeriesMaker(self.kind, **{"shape": SHAPE, "study": self.kind[:40], "seed": 21, **self.options})


SERIES = (
    SeriesRow(
        "A slice is missing in the middle",
        one_missing,
        "found a gap of 5 mm between … (at 92 mm) and … (at 97 mm), expected 2.5 mm as between the other slices: 1 "
        "missing; copy the complete series, or resample one of varying spacing",
    ),
    SeriesRow(
        "A slice is there twice, as two instances",
        one_twice,
        "found 1 slice positions twice, the first at 92 mm along the normal (… and …), expected one slice per "
        "position; the folder mixes several time points, echoes or b-values, or holds copies: keep one of each",
    ),
    SeriesRow(
        "Two time points in one series",
        two_time_points,
        "found 14 slice positions twice, the first at 77 mm along the normal (… and …), expected one slice per "
        "position; the folder mixes several time points, echoes or b-values, or holds copies: keep one of each",
    ),
    SeriesRow(
        "A localizer: three planes in one series",
        three_planes,
        "the slices of the series differ in ImageOrientationPatient: … has […], … has […], expected one value "
        "throughout; remove localisers and other reconstructions from the folder",
    ),
    SeriesRow(
        "A single slice",
        lambda slices: slices[:1],
        "found a single slice (…), which is no volume, expected at least 2 slices; give the whole series",
    ),
    SeriesRow(
        "Slices of two sizes",
        two_sizes,
        "the slices of the series differ in columns x rows: … has (…), … has (…), expected one value throughout; "
        "remove localisers and other reconstructions from the folder",
    ),
    SeriesRow(
        "Colour: an RGB secondary capture that calls itself CT",
        colour,
        "… has 3 samples per pixel and is RGB (Secondary Capture Image Storage), expected one grey value per pixel "
        "(MONOCHROME2); give the original scan, not a colour or inverted copy",
    ),
    SeriesRow(
        "Inverted grey values (MONOCHROME1)",
        each(PhotometricInterpretation="MONOCHROME1"),
        "… is MONOCHROME1 (CT Image Storage), expected one grey value per pixel "
        "(MONOCHROME2); give the original scan, not a colour or inverted copy",
    ),
    SeriesRow(
        "Enhanced CT: one multi-frame object",
        multi_frame,
        "… is a multi-frame object of 14 frames (Enhanced CT Image Storage), expected one slice per file; convert "
        "it to NIfTI, e.g. with dcm2niix or 3D Slicer",
    ),
    SeriesRow(
        "Slices twice as far apart in one half",
        uneven,
        "found a gap of 5 mm between … (at 99.5 mm) and … (at 104.5 mm), expected 2.5 mm as between the other "
        "slices: 1 missing; copy the complete series, or resample one of varying spacing",
    ),
    SeriesRow(
        "One slice is shifted sideways",
        shifted,
        "found slices shifted sideways unevenly, up to 6 mm off a straight stack with slices 2.5 mm apart, expected "
        "one shift per slice as a tilted gantry leaves it; the series mixes several acquisitions or was moved by "
        "hand: export it again, or resample it, e.g. with 3D Slicer",
    ),
    SeriesRow(
        "No ImageOrientationPatient",
        each(ImageOrientationPatient=None),
        "… has ImageOrientationPatient None, expected 6 numbers; the file says not where its slice lies: export the "
        "series again without removing geometry attributes",
    ),
    SeriesRow(
        "ImageOrientationPatient of zeros",
        each(ImageOrientationPatient=[0] * 6),
        "found the ImageOrientationPatient [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], expected two perpendicular unit vectors; "
        "export the series again from the scanner or the PACS",
    ),
    SeriesRow(
        "No ImagePositionPatient",
        each(ImagePositionPatient=None),
        "… has ImagePositionPatient None, expected 3 numbers; the file says not where its slice lies: export the "
        "series again without removing geometry attributes",
    ),
    SeriesRow(
        "PixelSpacing of zero",
        each(PixelSpacing=[0, 0]),
        "found a voxel spacing of 0 x 0 x 2.5 mm, expected 0.001 to 100 mm along every axis; correct it, e.g. in 3D "
        "Slicer's Volumes module, or convert the DICOM series again",
    ),
    SeriesRow(
        "No PixelSpacing",
        each(PixelSpacing=None),
        "… has PixelSpacing None, expected 2 numbers; the file says not where its slice lies: export the series "
        "again without removing geometry attributes",
    ),
    SeriesRow(
        "Half the pixels of a slice are cut off",
        cut_pixels,
        "the pixels of the series cannot be decoded (… has 360 of 720 bytes), expected complete files in a transfer "
        "syntax that GDCM knows; copy the series again, or decompress it, e.g. with dcmdjpeg or 3D Slicer",
    ),
    SeriesRow(
        "A slice without pixels",
        one(4, PixelData=None),
        "the pixels of the series cannot be decoded (…), expected complete files in a transfer syntax that GDCM "
        "knows; copy the series again, or decompress it, e.g. with dcmdjpeg or 3D Slicer",
    ),
    SeriesRow(
        "A damaged JPEG 2000 stream",
        damaged_jpeg_2000,
        "the pixels of the series cannot be decoded (…), expected complete files in a transfer syntax that GDCM "
        "knows; copy the series again, or decompress it, e.g. with dcmdjpeg or 3D Slicer",
    ),
    SeriesRow(
        "A header that claims 65535 x 65535 pixels",
        each(Rows=65535, Columns=65535),
        "found 65535 x 65535 x 14 = 60127707150 voxels, expected at most 2147483648; crop or resample the image, or "
        "raise the limit if the machine has the memory",
    ),
    SeriesRow(
        "The same value everywhere",
        each(PixelData=bytes(2 * SHAPE[0] * SHAPE[1])),
        "…: found the same value -1024 in all 5040 voxels, expected an image with contrast; check that the right "
        "file was exported, and that the export did not fail half-way",
        regular=True,
    ),
    SeriesRow("PET, and no model that takes it", each(Modality="PT"), "The PACS has no CT or MR series ….", 404),
    SeriesRow(
        "One SeriesInstanceUID in two studies, of two patients",
        two_patients,
        "The PACS lists the series … in several studies, perhaps of several patients: nobody can tell which is meant. "
        "Expected: a SeriesInstanceUID of its own for every series. How to fix: correct or remove the copies in the "
        "PACS.",
        409,
    ),
    SeriesRow("JPEG 2000", jpeg_2000),
    SeriesRow("RLE", run_length),
    SeriesRow("Deflated", encoded(DeflatedExplicitVRLittleEndian)),
    SeriesRow("Implicit VR", encoded(ImplicitVRLittleEndian)),
    SeriesRow("Big endian", encoded(ExplicitVRBigEndian)),
    SeriesRow("Oblique slices", options={"axes": oblique()}),
    SeriesRow("Slices in no order", equal_instance_numbers),
    SeriesRow("A negative rescale slope", each(RescaleSlope=-1, RescaleIntercept=OFFSET), values=lambda m: -m.stored()),
    SeriesRow(
        "A rescaling of its own for every slice, fractions",
        scaled_each,
        values=lambda m: (m.stored() + OFFSET) * np.array([scale_of(k) for k in range(m.shape[2])]) - 512.5,
    ),
    SeriesRow("No FrameOfReferenceUID", each(FrameOfReferenceUID=None)),
    SeriesRow("An empty PatientID", each(PatientID=""), said={"PatientID": ""}),
    SeriesRow(
        "A patient's name in Japanese (ISO 2022 IR 87)",
        each(SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName="Yamada^Tarou=山田^太郎"),
        said={"PatientName": "Yamada^Tarou=山田^太郎"},
    ),
    SeriesRow(
        "A patient's name in Greek (UTF-8)",
        each(SpecificCharacterSet="ISO_IR 192", PatientName="Παπαδόπουλος^Γιώργος"),
        said={"PatientName": "Παπαδόπουλος^Γιώργος"},
    ),
    SeriesRow(SEVERAL, another_series),
    SeriesRow("A tilted gantry", options={"tilt": (0.0, 0.9)}),
    SeriesRow("Two slices only", lambda s: s[:2], values=lambda m: m.stored()[:, :, :2]),
)


# -- segmentations: what is odd ------------------------------------------------------------------------------------

Masks = Mapping[str, np.ndarray]


def box(shape: tuple[int, int, int], x: slice, y: slice, z: slice) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[x, y, z] = True
    return mask


def drawn(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Return two structures that share slices and no voxel; they touch 7 of the 14 slices."""
    return {
        "liver": box(shape, slice(3, 9), slice(4, 11), slice(2, 7)),
        "spleen": box(shape, slice(12, 17), slice(0, 9), slice(4, 9)),
    }


def nothing(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, bool) for name in drawn(shape)}


def few_slices(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    return {"liver": box(shape, slice(3, 9), slice(4, 11), slice(5, 10))}


def later(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    return {"spleen": box(shape, slice(1, 5), slice(12, 17), slice(9, 13))}


def several_models(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Return structures of two models, in the order of the alphabet, as OHIF numbers them; two without a voxel."""
    empty = np.zeros(shape, bool)
    return {
        "adrenal_left": box(shape, slice(0, 2), slice(0, 2), slice(0, 2)),
        "aorta": box(shape, slice(10, 12), slice(10, 12), slice(0, 14)),
        "colon": empty,
        "kidney": empty,
        **drawn(shape),
    }


def known(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Return those of them that a model here knows."""
    return {name: mask for name, mask in several_models(shape).items() if name not in ("adrenal_left", "colon")}


def one_seg(masks: Callable[..., Masks] = drawn, **options: Any) -> Callable[[SeriesMaker], list[FileDataset]]:
    return lambda maker: [segmentation(maker, masks(maker.shape), **options)]


def changed(change: Callable[[FileDataset], object], **options: Any) -> Callable[[SeriesMaker], list[FileDataset]]:
    """Return a function that draws a sound SEG and changes it in place."""

    def draw(maker: SeriesMaker) -> list[FileDataset]:
        (seg,) = one_seg(**options)(maker)
        change(seg)
        return [seg]

    return draw


def sets(**attributes: Any) -> Callable[[FileDataset], object]:
    return lambda seg: each(**attributes)([seg])


def sparse_in_another_order(seg: FileDataset) -> None:
    """Frames in no order, only those with a voxel, found by their positions alone."""
    items, masks = frames_of(seg)
    order = np.random.default_rng(5).permutation(len(items))
    for item in items:
        del item.DerivationImageSequence
    with_frames(seg, [items[i] for i in order], masks[order])


def without_positions(seg: FileDataset) -> None:
    for item in seg.PerFrameFunctionalGroupsSequence:
        del item.PlanePositionSequence


def flipped(seg: FileDataset) -> None:
    """Rows and columns run the other way, as of a volume in RAS order."""
    items, masks = frames_of(seg)
    shared = seg.SharedFunctionalGroupsSequence[0]
    height, width = (float(part) for part in shared.PixelMeasuresSequence[0].PixelSpacing)
    plane = shared.PlaneOrientationSequence[0]
    row, column = np.array([float(part) for part in plane.ImageOrientationPatient]).reshape(2, 3)
    shift = row * width * (seg.Columns - 1) + column * height * (seg.Rows - 1)
    plane.ImageOrientationPatient = [float(part) for part in (*-row, *-column)]
    for item in items:
        del item.DerivationImageSequence
        position = item.PlanePositionSequence[0]
        position.ImagePositionPatient = (np.array(position.ImagePositionPatient, float) + shift).round(6).tolist()
    with_frames(seg, items, masks[:, ::-1, ::-1])


def renumbered(seg: FileDataset) -> None:
    for item in seg.SegmentSequence:
        item.SegmentNumber += 40
    for frame in seg.PerFrameFunctionalGroupsSequence:
        frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber += 40


def run_length_encoded(seg: FileDataset) -> None:
    masks = frames_of(seg)[1]
    packed = [np.packbits(mask.ravel(), bitorder="little")[np.newaxis] for mask in masks]
    seg.PixelData = encapsulate([rle_encode_frame(frame) for frame in packed])
    seg["PixelData"].is_undefined_length = True
    seg.file_meta.TransferSyntaxUID = RLELossless


def bytes_per_voxel(seg: FileDataset, factor: int) -> None:
    seg.PixelData = (frames_of(seg)[1] * factor).astype(np.uint8).tobytes()
    seg.BitsAllocated = seg.BitsStored = 8
    seg.HighBit = 7


def fractional(seg: FileDataset) -> None:
    bytes_per_voxel(seg, 200)
    seg.SegmentationType, seg.SegmentationFractionalType, seg.MaximumFractionalValue = "FRACTIONAL", "PROBABILITY", 255


def label_map(seg: FileDataset) -> None:
    bytes_per_voxel(seg, 1)
    seg.SOPClassUID = seg.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66.7"
    seg.SegmentationType = "LABELMAP"


def overlapping(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    return {**drawn(shape), "spleen": box(shape, slice(8, 12), slice(4, 11), slice(2, 7))}


def unknown(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    return dict(zip(("Segment 1", "Segment 2"), drawn(shape).values(), strict=True))


def one_name_twice(seg: FileDataset) -> None:
    seg.SegmentSequence[1].SegmentLabel = "Liver"


def nameless(seg: FileDataset) -> None:
    del seg.SegmentSequence[1].SegmentLabel


def elsewhere(seg: FileDataset) -> None:
    for item in seg.PerFrameFunctionalGroupsSequence:
        del item.DerivationImageSequence
    seg.FrameOfReferenceUID = "1.2.840.99"


def cropped(seg: FileDataset) -> None:
    items, masks = frames_of(seg)
    with_frames(seg, items, masks[:, 1:, 2:])


def between_slices(seg: FileDataset) -> None:
    for item in seg.PerFrameFunctionalGroupsSequence:
        del item.DerivationImageSequence
        position = item.PlanePositionSequence[0]
        x, y, z = (float(part) for part in position.ImagePositionPatient)
        position.ImagePositionPatient = [x, y, z + 1.25]


def cut_voxels(seg: FileDataset) -> None:
    seg.PixelData = seg.PixelData[: len(seg.PixelData) // 4 * 2]


def undescribed(seg: FileDataset) -> None:
    del seg.PerFrameFunctionalGroupsSequence


def without_references(seg: FileDataset) -> None:
    del seg.ReferencedSeriesSequence


def of_another_series(seg: FileDataset) -> None:
    seg.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.840.99.1"


def three_versions(maker: SeriesMaker) -> list[FileDataset]:
    """Stored in no order of time."""
    times = (("111500", later), ("091500", few_slices), ("101500", drawn))
    return [segmentation(maker, masks(maker.shape), name=time, time=time) for time, masks in times]


@dataclass(frozen=True)
class SegRow:
    """A DICOM SEG of a sound series, and what becomes of it.

    Attributes
    ----------
    kind : str
        In the table.
    draw : callable
        Makes the objects.
    kept : mapping
        Tag of a label -> the structures it has to hold; empty where the SEG is left out.
    reads : str
        What the server's log says, `VARIES` where it differs from run to run; empty where it says nothing.
    noted : str
        What the server notes for itself where it is left alone without a word.
    left_out : tuple of str
        Segments that are not taken over.
    early : bool
        It is stored before its series is.
    options : mapping
        Of the sound series.
    """

    kind: str
    draw: Callable[[SeriesMaker], list[FileDataset]]
    kept: Mapping[str, Callable[[tuple[int, int, int]], Masks]] = field(default_factory=dict)
    reads: str = ""
    noted: str = ""
    left_out: tuple[str, ...] = ()
    early: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def maker(self) -> SeriesMaker:
        return SeriesMaker(self.kind, **{"shape": SHAPE, "study": self.kind[:40], "seed": 22, **self.options})


TAKEN = {"final": drawn}
SEGS = (
    SegRow(
        "As OHIF: a frame per slice, numbered by alphabet",
        one_seg(several_models, every_slice=True),
        {"final": known},
        left_out=("adrenal_left", "colon"),
    ),
    SegRow("As 3D Slicer: frames in no order, without references", changed(sparse_in_another_order), TAKEN),
    SegRow("Frames for 5 of 14 slices only", one_seg(few_slices), {"final": few_slices}),
    SegRow("Of an oblique series", one_seg(), TAKEN, options={"axes": oblique()}),
    SegRow("Of a tilted gantry", one_seg(), TAKEN, options={"tilt": (0.0, 0.9)}),
    SegRow("Rows and columns run the other way", changed(flipped), TAKEN),
    SegRow("Frames that refer to slices and have no position", changed(without_positions), TAKEN),
    SegRow("Segments numbered from 41", changed(renumbered), TAKEN),
    SegRow("BINARY, run-length encoded", changed(run_length_encoded), TAKEN),
    SegRow(
        "Three of one series, stored in no order",
        three_versions,
        {"final": later, "version_1": few_slices, "version_2": drawn},
    ),
    SegRow(
        "No FrameOfReferenceUID, like its series",
        one_seg(),
        TAKEN,
        options={"attributes": {"FrameOfReferenceUID": None}},
    ),
    SegRow("A model's, corrected (SEMIAUTOMATIC)", one_seg(algorithm="SEMIAUTOMATIC"), TAKEN),
    SegRow(
        "A model's, confirmed by nobody (AUTOMATIC)",
        one_seg(algorithm="AUTOMATIC"),
        noted="made by a program, confirmed by nobody",
    ),
    SegRow(
        "None of its segments is a structure of a model",
        one_seg(unknown),
        noted="none of its segments is a structure of a model here",
    ),
    SegRow(
        "FRACTIONAL",
        changed(fractional),
        reads="The DICOM object is no segmentation that can be read. Found: FRACTIONAL. Expected: a BINARY "
        "segmentation. How to fix: threshold it, and export it as a binary segmentation.",
    ),
    SegRow(
        "LABELMAP",
        changed(label_map),
        reads="The DICOM object is no segmentation that can be read. Found: a label map (LABELMAP). Expected: a "
        "BINARY segmentation. How to fix: in OHIF, set segmentation.store.defaultMode to 'bitmap'.",
    ),
    SegRow(
        "Two segments that overlap",
        one_seg(overlapping),
        reads="Segments of the DICOM SEG overlap. Found: liver and spleen (35 voxels). Expected: every voxel in one "
        "structure at most. How to fix: decide in the viewer whose they are (3D Slicer: Segment Editor, Masking, "
        "'Modify other segments: overwrite all') and export it again.",
    ),
    SegRow(
        "Two segments of one name",
        changed(one_name_twice),
        reads="Two segments of the DICOM SEG have one name. Found: 'liver', 'Liver'. Expected: each structure once. "
        "How to fix: merge or rename the segments in the viewer and export it again.",
    ),
    SegRow(
        "A segment without a name",
        changed(nameless),
        reads="A segment of the DICOM SEG has no name. Found: 'liver', ''. Expected: a SegmentLabel for every "
        "segment. How to fix: name it in the viewer and export it again.",
    ),
    SegRow(
        "In another frame of reference, without references",
        changed(elsewhere),
        reads="the DICOM SEG lies in the frame of reference 1.2.840.99, expected … like its series; choose the image "
        "it was drawn on",
    ),
    SegRow(
        "Another matrix size",
        changed(cropped),
        reads="the frames of the DICOM SEG have 18 x 17 pixels (columns x rows), expected 20 x 18 like the slices of "
        "its series; export it without cropping or resampling",
    ),
    SegRow(
        "Halfway between the slices",
        changed(between_slices),
        reads="a frame of the DICOM SEG does not lie on a slice of its series: three of its corners are at (0.00, "
        "0.00, +0.50); (19.00, 0.00, +0.50); (0.00, 17.00, +0.50) in columns, rows and slices from slice 2, expected "
        "corners at 0 or 19, 0 or 17, and 0 (within 0.15); draw it on the series itself, or resample it to the series "
        "and export it again",
    ),
    SegRow(
        "Half of its voxels are cut off",
        changed(cut_voxels),
        reads="The DICOM SEG is damaged. Found: 224 bytes of voxels, where 10 frames need 450. Expected: the "
        "attributes of a complete segmentation. How to fix: export it again.",
    ),
    SegRow(
        "No description of its frames",
        changed(undescribed),
        reads="The DICOM SEG is damaged. Found: descriptions of 0 frames, NumberOfFrames 10. Expected: the attributes "
        "of a complete segmentation. How to fix: export it again.",
    ),
    SegRow(
        "No ReferencedSeriesSequence",
        changed(without_references),
        reads="it does not say which series it was made from",
    ),
    SegRow("Of a series that the PACS does not have", changed(of_another_series)),
    SegRow("Stored before its series", one_seg(), TAKEN, early=True),
    SegRow("No date at all", changed(sets(ContentDate="", ContentTime="", SeriesDate="", SeriesTime="")), TAKEN),
    SegRow(
        "No voxel in any segment",
        one_seg(nothing, every_slice=True),
        reads="The DICOM SEG holds no voxel of liver, spleen. Expected: an outlined structure. How to fix: nothing, if "
        "there is nothing to outline; to say so, submit an empty label from the panel.",
    ),
)


# -- the hospital --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory, orthanc: Callable[..., Orthanc]) -> Iterator[Hospital]:
    folder = tmp_path_factory.mktemp("table")
    home = folder / "home"
    add_model(ModelStore(home), "tiny", make_model_folder(folder / "tiny"))
    other = make_model_folder(folder / "other", labels={"background": 0, "aorta": 1, "kidney": 2})
    add_model(ModelStore(home), "other", other)
    pacs = orthanc(folder / "pacs")
    server = LiveServer(home, ["--studies", pacs.dicomweb], folder)
    yield Hospital(pacs, server, home, folder)
    server.stop()


@dataclass(frozen=True)
class Sound:
    """A sound series with a sound SEG, and what the server answered when nothing odd was there yet."""

    maker: SeriesMaker
    prediction: bytes
    label: bytes

    def check(self, hospital: Hospital) -> None:
        """Assert that the server answers, and that the label is as it was."""
        assert hospital.get("/info/").status_code == 200
        assert exported(hospital, self.maker).content == self.label
        assert self.maker.uid in trained_on(hospital)


@pytest.fixture(scope="module")
def sound(hospital: Hospital) -> Sound:
    maker = SeriesMaker("sound", (12, 10, 9))
    hospital.store(maker)
    store_segs(hospital, [segmentation(maker, {"liver": box(maker.shape, slice(2, 5), slice(3, 9), slice(1, 4))})])
    prediction = hospital.infer(maker.uid)
    assert prediction.status_code == 200
    assert set(hospital.get(f"/mshub/labels/{maker.uid}").json()["tags"]) == {"final"}
    return Sound(maker, prediction.content, exported(hospital, maker).content)


class Truth:
    """What the model says of numbers that came from no DICOM file: a NIfTI file written with nibabel."""

    def __init__(self, home: Path, folder: Path) -> None:
        version = ModelStore(home).current("tiny")
        self._predictor = NNUNetPredictor(ModelFolder.open(version.model_path), NetworkCache(2**30))
        self._path, self._known = folder / "truth.nii", dict[bytes, np.ndarray]()

    def of(self, row: SeriesRow) -> np.ndarray:
        """Return the label of a row's series, ``[column, row, slice]``."""
        maker, values = row.maker, row.values(row.maker)
        image, offsets = straightened(maker, values)
        key = image.get_fdata().tobytes() + image.affine.tobytes()
        if key not in self._known:
            nib.save(image, self._path)
            self._known[key] = self._predictor.predict([self._path]).labels.array_xyz
        label, (columns, rows, count) = self._known[key], values.shape
        return np.stack([label[:columns, y : y + rows, k] for k, y in zip(range(count), offsets, strict=True)], axis=2)


@pytest.fixture(scope="module")
def truth(hospital: Hospital) -> Truth:
    return Truth(hospital.home, hospital.folder)


def straightened(maker: SeriesMaker, values: np.ndarray) -> tuple[nib.Nifti1Image, list[int]]:
    """Return the numbers as NIfTI, slices of a gantry tilted along columns moved by whole pixels, and by how many."""
    columns, rows, count = values.shape
    offsets = [round(k * maker.tilt[1] / maker.spacing[1]) for k in range(count)]
    padded = np.full((columns, rows + offsets[-1], count), -OFFSET, np.float32)
    for k, y in enumerate(offsets):
        padded[:, y : y + rows, k] = values[:, :, k]
    row, column = (np.array(axis, float) for axis in maker.axes)
    affine_lps = np.eye(4)
    affine_lps[:3, :3] = np.stack([row, column, np.cross(row, column)], axis=1) * maker.spacing
    affine_lps[:3, 3] = [float(part) for part in maker.slices()[0].ImagePositionPatient]
    return nib.Nifti1Image(padded, np.diag([-1, -1, 1, 1]) @ affine_lps), offsets


def store_segs(hospital: Hospital, segs: Iterable[FileDataset]) -> None:
    for seg in segs:
        path = hospital.folder / f"{seg.SOPInstanceUID}.dcm"
        seg.save_as(path, write_like_original=False)
        hospital.pacs.upload([path])


def exported(hospital: Hospital, maker: SeriesMaker, tag: str = "final") -> httpx.Response:
    return hospital.get(f"/mshub/export/{maker.uid}", format="nrrd", tag=tag)


def trained_on(hospital: Hospital) -> set[str]:
    """Return the series that a training would learn from."""
    answer = hospital.get("/datastore/", output="train")
    assert answer.status_code == 200, answer.text
    return {Path(case["image"]).name.removesuffix(".nii") for case in answer.json()}


def holds(sentence: str, text: str) -> bool:
    """Return whether a text is a sentence of the table, with something in place of each `VARIES`."""
    return re.fullmatch(".+".join(map(re.escape, sentence.split(VARIES))), text) is not None


def labels_kept(hospital: Hospital, maker: SeriesMaker) -> list[Path]:
    return list(hospital.home.glob(f"pacs/*/labels/*/{maker.uid}*"))


def outlined(seg: Dataset, maker: SeriesMaker) -> dict[str, np.ndarray]:
    """Return the structures of a SEG by name, ``[column, row, slice]``, by the slices that its frames refer to."""
    slices = {dataset.SOPInstanceUID: k for k, dataset in enumerate(maker.slices())}
    names = {item.SegmentNumber: item.SegmentLabel for item in seg.SegmentSequence}
    found = {name: np.zeros(maker.shape, bool) for name in names.values()}
    for item, mask in zip(*frames_of(seg), strict=True):
        name = names[item.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
        source = item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        found[name][:, :, slices[source]] = mask.T
    return found


# -- what becomes of them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in SERIES if not row.refused], ids=lambda row: row.kind)
def test_an_odd_series_is_segmented_as_the_numbers_it_holds(hospital: Hospital, truth: Truth, row: SeriesRow) -> None:
    maker = row.maker
    hospital.store(maker, row.change)
    answer = hospital.infer(maker.uid)
    assert answer.status_code == 200, answer.text
    expected = truth.of(row)
    assert len(np.unique(expected)) == 3
    np.testing.assert_array_equal(voxels(answer.content, expected.shape), expected)
    reply = hospital.submit(maker.uid, answer.content)
    assert reply.json()["pacs"]["stored"], reply.text
    (seg,) = hospital.segs(maker)
    found = outlined(seg, maker)
    for name, value in NAMES.items():
        np.testing.assert_array_equal(found[name][:, :, : expected.shape[2]], expected == value)
    assert {keyword: str(seg[keyword].value) for keyword in row.said} == row.said


@pytest.mark.parametrize("row", [row for row in SERIES if row.refused], ids=lambda row: row.kind)
def test_a_bad_series_is_refused_with_a_reason_and_leaves_nothing(
    hospital: Hospital, sound: Sound, row: SeriesRow
) -> None:
    maker = row.maker
    hospital.store(maker, row.change)
    answer = hospital.infer(maker.uid)
    assert answer.status_code == row.status, answer.text
    assert holds(row.refused, answer.json()["detail"]), answer.text
    assert bool(list(hospital.home.glob(f"pacs/*/**/{maker.uid}*"))) == row.regular
    assert not list(hospital.home.glob("pacs/*.pending/*"))
    assert not labels_kept(hospital, maker)
    assert maker.uid not in trained_on(hospital)
    assert hospital.infer(sound.maker.uid).content == sound.prediction
    sound.check(hospital)


@pytest.mark.parametrize("row", SEGS, ids=lambda row: row.kind)
def test_a_seg_is_taken_voxel_for_voxel_or_left_out(hospital: Hospital, sound: Sound, row: SegRow) -> None:
    maker, segs, before = row.maker, row.draw(row.maker), len(hospital.server.log.read_text())
    if row.early:
        store_segs(hospital, segs)
        assert hospital.get(f"/mshub/labels/{maker.uid}").status_code == 404
        assert maker.uid not in trained_on(hospital)
    hospital.store(maker)
    store_segs(hospital, segs)
    answer = hospital.get(f"/mshub/labels/{maker.uid}")
    assert answer.status_code == 200, answer.text
    assert set(answer.json()["tags"]) == set(row.kept)
    for tag, structures in row.kept.items():
        check_label(exported(hospital, maker, tag), structures(maker.shape))
        assert answer.json()["tags"][tag]["pacs"]["left_out"] == list(row.left_out)
    said = hospital.server.log.read_text()[before:]
    reasons = [reason for seg in segs for reason in refusals(said, hospital, seg)]
    assert len(reasons) == bool(row.reads), reasons
    assert all(holds(row.reads, reason) for reason in reasons), reasons
    assert [noted(hospital, seg) for seg in segs if row.noted] == [row.noted for _ in segs if row.noted]
    assert bool(labels_kept(hospital, maker)) == bool(row.kept)
    assert (maker.uid in trained_on(hospital)) == bool(row.kept)
    sound.check(hospital)


def check_label(answer: httpx.Response, structures: Masks) -> None:
    assert answer.status_code == 200, answer.text
    names = json.loads(answer.headers["X-MSHub-Segments"])
    assert set(names) == set(structures)
    label = voxels(answer.content, next(iter(structures.values())).shape)
    for name, mask in structures.items():
        np.testing.assert_array_equal(label == names[name], mask)
    np.testing.assert_array_equal(label > 0, np.any(list(structures.values()), axis=0))


def refusals(log: str, hospital: Hospital, seg: FileDataset) -> list[str]:
    """Return what a log, which holds no UID, says of a SEG that was left out, each once."""
    name = Pseudonyms(hospital.home).of(str(seg.SOPInstanceUID))
    found = re.findall(rf"the SEG {name} in the PACS is left out: (.+)", log)
    return sorted(set(found))


def noted(hospital: Hospital, seg: FileDataset) -> str:
    """Return what the server notes for itself of a SEG that it leaves alone."""
    (path,) = hospital.home.glob("pacs/*/segs.json")
    instances = json.loads(path.read_text())[seg.SeriesInstanceUID]["instances"]
    return str(instances[seg.SOPInstanceUID].get("reason", ""))


# -- the document --------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# Bad and odd DICOM

What becomes of series and segmentations that are not as they should be: stored in a real PACS (Orthanc), asked of a
real server over HTTP. Every line is a test of `tests/e2e/test_dicom_table.py`, which writes this page:
`python tests/e2e/test_dicom_table.py`. "…" stands for names and numbers that differ from case to case.
"""
ABOUT_SERIES = """\
A series that is **segmented** gets the label, voxel for voxel, that the model gives the same numbers in a NIfTI file;
submitted as a correction it is a DICOM SEG in the PACS with exactly these voxels. Of a series that is **refused** no
label stays on the server, and no copy unless the series itself is a regular volume; everything else goes on as before.
"""
ABOUT_SEGS = """\
A segmentation that is **taken** is a label with exactly its voxels, on all slices of its series, under the names of its
segments, and is learned from. Of one that is **left out** there is no label; the reason is in the server's log, and
everything else goes on as before. It stays in the PACS in any case.
"""


def document() -> str:
    """Return ``docs/dicom-table.md``."""
    series = [
        (row.kind, f"refused ({row.status})" if row.refused else "segmented", row.refused or "the label")
        for row in SERIES
    ]
    segs = [(row.kind, _fate(row), _read(row)) for row in SEGS]
    parts = [
        INTRODUCTION,
        "## Series\n" + ABOUT_SERIES,
        _table(series),
        "## Segmentations\n" + ABOUT_SEGS,
        _table(segs),
    ]
    return "\n".join(parts)


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    heading = [("kind", "what happens", "what the user reads"), ("---", "---", "---")]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [*heading, *rows]]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _fate(row: SegRow) -> str:
    return f"taken: {', '.join(f'`{tag}`' for tag in row.kept)}" if row.kept else "left out"


def _read(row: SegRow) -> str:
    if not row.kept:
        return row.reads or (f"nothing ({row.noted})" if row.noted else "nothing")
    names = dict.fromkeys(name for structures in row.kept.values() for name in structures(SHAPE))
    return ", ".join(names) + (f"; not taken over: {', '.join(row.left_out)}" if row.left_out else "")


def test_the_document_says_what_is_tested() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run: python tests/e2e/test_dicom_table.py"


def test_every_kind_is_there_once() -> None:
    kinds = [row.kind for row in (*SERIES, *SEGS)]
    assert len(set(kinds)) == len(kinds)


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
