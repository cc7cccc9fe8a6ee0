"""DICOM SEG out and in: read by others, valid for dciodvfy, voxel for voxel the label, and damaged ones refused."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import highdicom.seg
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixel_data_handlers.rle_handler import rle_encode_frame
from pydicom.uid import JPEG2000Lossless, RLELossless

from dicom_series_factory import AXES, SeriesMaker, oblique
from mshub.dicom_derived import Algorithm, Facts
from mshub.dicom_seg import LABEL_MAP_CLASS, cielab_values, created, read_seg, referenced_series, write_seg
from mshub.dicom_series import SeriesStack, read_stack
from mshub.errors import CaseError, GeometryError, LabelError, MSHubError
from mshub.label_export import export_labels
from mshub.structures import StructureOverride, structure

RECORDED = Path(__file__).resolve().parents[1] / "recorded"
NAMES = {"liver": 1, "spleen": 2, "kidney_right": 3, "liver_lesion": 4, "Wumpus": 7}
FACTS = Facts(Algorithm("starter", "1.2"), "MSHub starter 1.2", "Jo Doe")


def labelled(shape: tuple[int, int, int]) -> np.ndarray:
    """Return a label of four of the five structures that touches every border, in slices 5 to 11 and the last."""
    label = np.zeros(shape, np.uint8)
    label[0:9, 3:12, 5:9] = 1
    label[12:, 2:7, 7:12] = 3
    label[3:5, 5:7, 6:8] = 4
    label[0, 0, 8], label[-1, -1, -1] = 7, 7
    return label


@pytest.fixture
def stack(tmp_path: Path) -> SeriesStack:
    return read_stack(SeriesMaker("seg", axes=oblique()).write(tmp_path / "image"))


@pytest.fixture
def label(stack: SeriesStack) -> np.ndarray:
    return labelled(stack.slices_shape)


@pytest.fixture
def seg(stack: SeriesStack, label: np.ndarray, tmp_path: Path) -> Dataset:
    """Return a SEG of `label`, as read from its file."""
    write_seg(tmp_path / "seg.dcm", label, NAMES, stack, FACTS)
    return pydicom.dcmread(tmp_path / "seg.dcm")


def structures_of(found: Any) -> dict[str, np.ndarray]:
    return {name: found.array_xyz == value for name, value in found.names.items()}


def check_holds(found: Any, label: np.ndarray, names: dict[str, int] = NAMES) -> None:
    """Assert that a SEG holds the label and nothing else."""
    present = {name: value for name, value in names.items() if (label == value).any()}
    masks = structures_of(found)
    assert set(masks) == set(present)
    for name, value in present.items():
        np.testing.assert_array_equal(masks[name], label == value)
    assert ((found.array_xyz > 0) == (label > 0)).all()


def frames_of(seg: Dataset) -> list[Dataset]:
    return list(seg.PerFrameFunctionalGroupsSequence)


def masks_of(seg: Dataset) -> np.ndarray:
    """Return the frames, [frame, row, column], as pydicom decodes them."""
    return seg.pixel_array.reshape(int(seg.NumberOfFrames), seg.Rows, seg.Columns)


def with_masks(seg: Dataset, masks: np.ndarray) -> Dataset:
    """Return the SEG with other frames of one bit per voxel."""
    seg.NumberOfFrames, seg.Rows, seg.Columns = masks.shape
    packed = np.packbits(masks.astype(np.uint8).ravel(), bitorder="little").tobytes()
    seg.PixelData = packed + bytes(len(packed) % 2)
    return seg


def without_references(seg: Dataset) -> Dataset:
    for frame in frames_of(seg):
        del frame.DerivationImageSequence
    return seg


class TestOutAndIn:
    @pytest.mark.parametrize("axes", [*AXES.values(), oblique()], ids=[*AXES, "oblique"])
    def test_every_orientation(self, axes, tmp_path):
        stack = read_stack(SeriesMaker("any", axes=axes).write(tmp_path / "image"))
        label = labelled(stack.slices_shape)
        write_seg(tmp_path / "seg.dcm", label, NAMES, stack, FACTS)
        check_holds(read_seg(tmp_path / "seg.dcm", stack), label)

    def test_a_tilted_gantry(self, tmp_path):
        stack = read_stack(SeriesMaker("tilted", tilt=(0.0, 0.9)).write(tmp_path / "image"))
        assert stack.tilted
        label = labelled(stack.slices_shape)
        export_labels(tmp_path / "seg.dcm", "seg", stack.from_slices(label), NAMES, stack, FACTS)
        check_holds(read_seg(tmp_path / "seg.dcm", stack), label)
        positions = [frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames_of(read(tmp_path))]
        own = [[float(part) for part in header.ImagePositionPatient] for header in stack.headers]
        assert all([float(part) for part in position] in own for position in positions)

    def test_more_structures_than_a_byte_counts(self, stack, tmp_path):
        names = {f"part {number}": number for number in range(1, 301)}
        label = np.zeros(stack.slices_shape, np.uint16)
        label.ravel()[: len(names)] = list(names.values())
        write_seg(tmp_path / "seg.dcm", label, names, stack, FACTS)
        found = read_seg(tmp_path / "seg.dcm", stack)
        assert found.array_xyz.dtype == np.uint16
        check_holds(found, label, names)

    def test_what_is_read_says_who_made_it(self, seg, stack):
        found = read_seg(seg, stack)
        assert set(found.algorithm_types.values()) == {"AUTOMATIC"}
        assert found.algorithm_names["liver"] == "starter"
        assert (found.creator, found.description, found.manufacturer) == ("Jo Doe", "MSHub starter 1.2", "MSHub")
        assert found.created is not None
        assert abs(found.created - datetime.now(timezone.utc)) < timedelta(minutes=5)

    def test_uids_are_those_that_writing_returned(self, stack, label, tmp_path):
        written = write_seg(tmp_path / "seg.dcm", label, NAMES, stack, FACTS)
        found = read_seg(tmp_path / "seg.dcm", stack)
        assert (written.series_uid, written.sop_uid) == (found.series_uid, found.sop_uid)
        assert found.series_uid != stack.headers[0].SeriesInstanceUID


def read(folder: Path) -> Dataset:
    return pydicom.dcmread(folder / "seg.dcm")


class TestWhatIsWritten:
    def test_segments_are_numbered_without_gaps_and_absent_structures_are_absent(self, seg):
        numbered = [(item.SegmentNumber, item.SegmentLabel) for item in seg.SegmentSequence]
        assert numbered == [(1, "liver"), (2, "kidney_right"), (3, "liver_lesion"), (4, "Wumpus")]

    def test_frames_without_a_voxel_are_left_out(self, seg, label):
        filled = sum(int((label == value).any(axis=(0, 1)).sum()) for value in NAMES.values())
        assert int(seg.NumberOfFrames) == filled < len(seg.SegmentSequence) * label.shape[2]
        assert masks_of(seg).any(axis=(1, 2)).all()

    def test_it_is_a_binary_segmentation_in_the_study_and_frame_of_reference_of_its_series(self, seg, stack):
        header = stack.headers[0]
        assert (seg.SegmentationType, seg.Modality) == ("BINARY", "SEG")
        for keyword in (
            "StudyInstanceUID",
            "FrameOfReferenceUID",
            "PatientID",
            "PatientName",
            "PatientSex",
            "StudyDate",
        ):
            assert seg[keyword].value == header[keyword].value
        assert seg.SeriesNumber == 10_003

    def test_every_frame_refers_to_the_slice_it_was_made_from(self, seg, stack):
        slices = {header.SOPInstanceUID: header for header in stack.headers}
        for frame in frames_of(seg):
            source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            position = frame.PlanePositionSequence[0].ImagePositionPatient
            assert position == slices[source].ImagePositionPatient
        assert referenced_series(seg) == stack.headers[0].SeriesInstanceUID

    def test_segments_are_coded_and_coloured(self, seg):
        liver, kidney, lesion, wumpus = seg.SegmentSequence
        assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
        side = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
        assert side.CodeMeaning == "Right"
        assert lesion.AnatomicRegionSequence[0].CodeMeaning == "Liver"
        assert lesion.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
        assert wumpus.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99MSHUB"
        assert seg.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == "99MSHUB"
        assert list(liver.RecommendedDisplayCIELabValue) == list(cielab_values(structure("liver").colour))
        assert len({segment.TrackingUID for segment in seg.SegmentSequence}) == 4

    def test_a_card_decides_code_and_colour(self, stack, label, tmp_path):
        said = StructureOverride(type=("7", "99LAB", "Our liver"), colour=(1, 2, 3))
        write_seg(tmp_path / "seg.dcm", label, NAMES, stack, replace(FACTS, overrides={"liver": said}))
        liver = read(tmp_path).SegmentSequence[0]
        assert liver.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Our liver"
        assert list(liver.RecommendedDisplayCIELabValue) == list(cielab_values((1, 2, 3)))

    @pytest.mark.parametrize(
        ("algorithm", "kind"),
        [
            (Algorithm("starter", "1"), "AUTOMATIC"),
            (Algorithm("starter", "1", edited=True), "SEMIAUTOMATIC"),
            (None, "MANUAL"),
        ],
    )
    def test_it_says_how_the_label_came_about(self, algorithm, kind, stack, label, tmp_path):
        write_seg(tmp_path / "seg.dcm", label, NAMES, stack, Facts(algorithm, "as it is"))
        segment = read(tmp_path).SegmentSequence[0]
        assert segment.SegmentAlgorithmType == kind
        assert segment.get("SegmentAlgorithmName") == (algorithm and "starter")
        assert set(read_seg(tmp_path / "seg.dcm", stack).algorithm_types.values()) == {kind}

    def test_highdicom_reads_it(self, seg, stack, label):
        theirs = highdicom.seg.Segmentation.from_dataset(seg)
        uids = [header.SOPInstanceUID for header in stack.headers]
        pixels = theirs.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
        for index, segment in enumerate(seg.SegmentSequence):
            expected = (label == NAMES[segment.SegmentLabel]).transpose(2, 1, 0)
            np.testing.assert_array_equal(pixels[..., index], expected)

    @pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (Debian: dicom3tools) is not installed")
    @pytest.mark.parametrize("modality", ["CT", "MR"])
    def test_dciodvfy_finds_no_error(self, modality, tmp_path):
        stack = read_stack(SeriesMaker("valid", modality=modality, axes=oblique()).write(tmp_path / "image"))
        write_seg(tmp_path / "seg.dcm", labelled(stack.slices_shape), NAMES, stack, FACTS)
        done = subprocess.run(["dciodvfy", tmp_path / "seg.dcm"], capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        assert "Segmentation" in said
        assert [line for line in said.splitlines() if line.startswith("Error")] == []

    def test_colours_are_those_of_the_standard(self):
        assert cielab_values((255, 255, 255)) == (65535, 32896, 32896)
        assert cielab_values((0, 0, 0)) == (0, 32896, 32896)
        assert cielab_values((255, 0, 0))[0] == pytest.approx(0.5324 * 65535, rel=1e-3)

    def test_an_error_leaves_the_file_that_was_there(self, stack, label, tmp_path):
        path = tmp_path / "seg.dcm"
        path.write_bytes(b"before")
        with pytest.raises(LabelError):
            write_seg(path, label, {"liver": 1}, stack, FACTS)
        assert path.read_bytes() == b"before"
        assert sorted(file.name for file in tmp_path.iterdir()) == ["image", "seg.dcm"]


class TestOddSeries:
    MISSING = (
        *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
        *("AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator", "SliceThickness", "SeriesNumber"),
        *("Modality", "SeriesDescription", "FrameOfReferenceUID"),
    )

    def made(self, folder: Path, **attributes: Any) -> tuple[SeriesStack, Dataset]:
        """Write a SEG of a series with these attributes, check that it reads back, and return both."""
        stack = read_stack(SeriesMaker("odd", attributes=attributes).write(folder / "image"))
        label = labelled(stack.slices_shape)
        write_seg(folder / "seg.dcm", label, NAMES, stack, FACTS)
        check_holds(read_seg(folder / "seg.dcm", stack), label)
        return stack, read(folder)

    @pytest.mark.parametrize("value", [None, ""], ids=["absent", "empty"])
    @pytest.mark.parametrize("keyword", MISSING)
    def test_attributes_that_may_be_missing(self, keyword, value, tmp_path):
        self.made(tmp_path, **{keyword: value})

    def test_all_of_them_missing_at_once(self, tmp_path):
        _, seg = self.made(tmp_path, **dict.fromkeys(self.MISSING))
        assert seg.PatientID == ""

    def test_without_a_frame_of_reference_it_gets_the_same_one_each_time(self, tmp_path):
        stack, seg = self.made(tmp_path, FrameOfReferenceUID=None)
        write_seg(tmp_path / "again.dcm", labelled(stack.slices_shape), NAMES, stack, FACTS)
        assert seg.FrameOfReferenceUID == pydicom.dcmread(tmp_path / "again.dcm").FrameOfReferenceUID

    def test_names_in_another_alphabet_are_kept(self, tmp_path):
        _, seg = self.made(tmp_path, SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jörg")
        assert str(seg.PatientName) == "Müller^Jörg"

    def test_a_name_of_one_word_is_kept(self, tmp_path):
        _, seg = self.made(tmp_path, PatientName="ANONYMOUS")
        assert str(seg.PatientName) == "ANONYMOUS"

    @pytest.mark.filterwarnings("ignore:Invalid value for VR")
    def test_values_that_dicom_does_not_know_become_empty(self, tmp_path):
        _, seg = self.made(tmp_path, PatientSex="UNKNOWN", PatientBirthDate="1960", StudyTime="noon")
        assert [str(seg[key].value or "") for key in ("PatientSex", "PatientBirthDate", "StudyTime")] == ["", "", ""]

    def test_lossy_compression_is_told(self, tmp_path):
        lossy = {"LossyImageCompressionRatio": "10", "LossyImageCompressionMethod": "ISO_10918_1"}
        assert self.made(tmp_path, LossyImageCompression="01", **lossy)[1].LossyImageCompression == "01"

    def test_lossy_compression_of_which_nothing_is_told(self, tmp_path):
        self.made(tmp_path, LossyImageCompression="01")

    @pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
    def test_without_a_uid_it_is_refused(self, keyword, stack, label, tmp_path):
        headers = tuple(deepcopy(header) for header in stack.headers)
        del headers[4][keyword]
        with pytest.raises(CaseError, match=f"has no {keyword}.*NRRD or NIfTI"):
            write_seg(tmp_path / "seg.dcm", label, NAMES, replace(stack, headers=headers), FACTS)

    def test_with_one_uid_for_two_slices_it_is_refused(self, stack, label, tmp_path):
        headers = tuple(deepcopy(header) for header in stack.headers)
        headers[4].SOPInstanceUID = headers[5].SOPInstanceUID
        with pytest.raises(CaseError, match="share a SOPInstanceUID"):
            write_seg(tmp_path / "seg.dcm", label, NAMES, replace(stack, headers=headers), FACTS)

    def test_of_a_class_nobody_knows_it_is_refused(self, stack, label, tmp_path):
        headers = tuple(deepcopy(header) for header in stack.headers)
        for header in headers:
            header.SOPClassUID = "1.2.3.4"
        with pytest.raises(CaseError, match="expected complete CT, MR or PET headers"):
            write_seg(tmp_path / "seg.dcm", label, NAMES, replace(stack, headers=headers), FACTS)


class TestLabelsThatAreRefused:
    def test_an_empty_one(self, stack, label, tmp_path):
        with pytest.raises(LabelError, match="The label is empty: a DICOM SEG needs"):
            write_seg(tmp_path / "seg.dcm", label * 0, NAMES, stack, FACTS)

    def test_values_without_a_name(self, stack, label, tmp_path):
        with pytest.raises(LabelError, match="values 3, 4, 7, which have no name"):
            write_seg(tmp_path / "seg.dcm", label, {"liver": 1, "spleen": 2}, stack, FACTS)

    @pytest.mark.parametrize("name", ["x" * 65, "a\\b"])
    def test_a_name_that_dicom_cannot_hold(self, name, stack, label, tmp_path):
        with pytest.raises(LabelError, match="cannot hold these names"):
            write_seg(tmp_path / "seg.dcm", label, {**NAMES, name: 9}, stack, FACTS)

    def test_names_that_are_one(self, stack, label, tmp_path):
        with pytest.raises(LabelError, match="differ only by case"):
            write_seg(tmp_path / "seg.dcm", label, {**NAMES, "Liver": 9}, stack, FACTS)

    def test_fractions(self, stack, label, tmp_path):
        with pytest.raises(LabelError, match="float32 values"):
            write_seg(tmp_path / "seg.dcm", label.astype(np.float32), NAMES, stack, FACTS)

    def test_another_shape(self, stack, label, tmp_path):
        with pytest.raises(GeometryError, match="to_slices"):
            write_seg(tmp_path / "seg.dcm", label.transpose(2, 1, 0), NAMES, stack, FACTS)


class TestSegsOfOthers:
    def test_few_slices_come_back_on_all_of_them(self, seg, stack, label):
        kept = [index for index, frame in enumerate(frames_of(seg)) if number_of(frame) == 2]
        masks = masks_of(seg)[kept]
        seg.PerFrameFunctionalGroupsSequence = [frames_of(seg)[index] for index in kept]
        found = read_seg(with_masks(seg, masks), stack)
        assert found.array_xyz.shape == stack.slices_shape
        np.testing.assert_array_equal(structures_of(found)["kidney_right"], label == 3)
        assert not structures_of(found)["liver"].any()

    def test_frames_in_any_order(self, seg, stack, label):
        order = np.random.default_rng(3).permutation(int(seg.NumberOfFrames))
        masks = masks_of(seg)[order]
        seg.PerFrameFunctionalGroupsSequence = [frames_of(seg)[index] for index in order]
        check_holds(read_seg(with_masks(seg, masks), stack), label)

    def test_without_references_frames_are_found_by_their_position(self, seg, stack, label):
        check_holds(read_seg(without_references(seg), stack), label)

    def test_positions_may_be_rounded(self, seg, stack, label):
        for frame in frames_of(without_references(seg)):
            position = frame.PlanePositionSequence[0]
            position.ImagePositionPatient = [round(float(part), 1) for part in position.ImagePositionPatient]
        check_holds(read_seg(seg, stack), label)

    def test_without_positions_frames_are_found_by_their_references(self, seg, stack, label):
        for frame in frames_of(seg):
            del frame.PlanePositionSequence
        check_holds(read_seg(seg, stack), label)

    def test_with_another_frame_of_reference_and_references_to_every_slice(self, seg, stack, label):
        seg.FrameOfReferenceUID = "1.2.3"
        check_holds(read_seg(seg, stack), label)

    def test_groups_of_all_frames_may_stand_in_each_of_them(self, seg, stack, label):
        shared = seg.SharedFunctionalGroupsSequence[0]
        for frame in frames_of(seg):
            frame.PlaneOrientationSequence = shared.PlaneOrientationSequence
            frame.PixelMeasuresSequence = shared.PixelMeasuresSequence
        del seg.SharedFunctionalGroupsSequence
        check_holds(read_seg(seg, stack), label)

    @pytest.mark.parametrize("flip_rows", [False, True], ids=["", "rows"])
    @pytest.mark.parametrize("flip_columns", [False, True], ids=["", "columns"])
    @pytest.mark.parametrize("transpose", [False, True], ids=["", "transposed"])
    @pytest.mark.parametrize("refer", [False, True], ids=["by position", "by reference"])
    def test_frames_whose_rows_and_columns_run_another_way(
        self, flip_rows, flip_columns, transpose, refer, seg, stack, label
    ):
        turned_seg(seg, flip_rows, flip_columns, transpose)
        check_holds(read_seg(seg if refer else without_references(seg), stack), label)

    def test_run_length_encoded(self, seg, stack, label):
        frames = [np.packbits(mask.ravel(), bitorder="little")[np.newaxis] for mask in masks_of(seg)]
        seg.PixelData = encapsulate([rle_encode_frame(frame) for frame in frames])
        seg["PixelData"].is_undefined_length = True
        seg.file_meta.TransferSyntaxUID = RLELossless
        check_holds(read_seg(seg, stack), label)

    def test_deflated(self, seg, stack, label, tmp_path):
        seg.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        seg.save_as(tmp_path / "deflated.dcm", write_like_original=False)
        check_holds(read_seg(tmp_path / "deflated.dcm", stack), label)

    def test_a_dataset_without_file_meta_information(self, seg, stack, label):
        del seg.file_meta
        check_holds(read_seg(seg, stack), label)

    def test_one_that_dcmqi_wrote_as_3d_slicer_does(self, stack, tmp_path):
        maker = SeriesMaker("recorded", axes=oblique())
        image = read_stack(maker.write(tmp_path / "recorded"))
        found = read_seg(RECORDED / "dcmqi_seg.dcm", image)
        assert found.algorithm_types == {"liver": "MANUAL", "Wumpus": "SEMIAUTOMATIC"}
        check_holds(found, np.where(np.isin(labelled(maker.shape), (1, 7)), labelled(maker.shape), 0))

    def test_segments_are_told_by_name_whatever_their_numbers(self, seg, stack, label):
        numbers = {1: 40, 2: 3, 3: 300, 4: 9}
        for segment in seg.SegmentSequence:
            segment.SegmentNumber = numbers[segment.SegmentNumber]
        for frame in frames_of(seg):
            identification = frame.SegmentIdentificationSequence[0]
            identification.ReferencedSegmentNumber = numbers[identification.ReferencedSegmentNumber]
        found = read_seg(seg, stack)
        assert found.names == {"liver": 40, "kidney_right": 3, "liver_lesion": 300, "Wumpus": 9}
        check_holds(found, label)


def number_of(frame: Dataset) -> int:
    return int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)


def turned_seg(seg: Dataset, flip_rows: bool, flip_columns: bool, transpose: bool) -> None:
    """Store every frame of a SEG with its axes turned, and say so in its geometry."""
    shared, masks = seg.SharedFunctionalGroupsSequence[0], masks_of(seg)
    axes = np.array([float(part) for part in shared.PlaneOrientationSequence[0].ImageOrientationPatient]).reshape(2, 3)
    between_rows, between_columns = (float(part) for part in shared.PixelMeasuresSequence[0].PixelSpacing)
    row, column, shift = axes[0], axes[1], np.zeros(3)
    if flip_columns:
        shift, row, masks = shift + row * between_columns * (seg.Columns - 1), -row, masks[:, :, ::-1]
    if flip_rows:
        shift, column, masks = shift + column * between_rows * (seg.Rows - 1), -column, masks[:, ::-1]
    if transpose:
        row, column, masks = column, row, masks.transpose(0, 2, 1)
        shared.PixelMeasuresSequence[0].PixelSpacing = [between_columns, between_rows]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [f"{part:.9f}" for part in (*row, *column)]
    for frame in frames_of(seg):
        position = np.array([float(part) for part in frame.PlanePositionSequence[0].ImagePositionPatient]) + shift
        frame.PlanePositionSequence[0].ImagePositionPatient = [f"{part:.6f}" for part in position]
    with_masks(seg, masks)


def shifted(millimetres: float) -> Callable[[Dataset], None]:
    def change(seg: Dataset) -> None:
        for frame in frames_of(without_references(seg)):
            position = frame.PlanePositionSequence[0]
            position.ImagePositionPatient = [float(part) + millimetres for part in position.ImagePositionPatient]

    return change


def of_another_series(seg: Dataset) -> None:
    without_references(seg).ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"


def in_another_frame_of_reference(seg: Dataset) -> None:
    without_references(seg).FrameOfReferenceUID = "1.2.3"


def cropped(seg: Dataset) -> None:
    with_masks(seg, masks_of(seg)[:, 1:, 2:])


def coarser(seg: Dataset) -> None:
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [3.4, 3.0]


def turned_out_of_the_plane(seg: Dataset) -> None:
    plane = seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    plane.ImageOrientationPatient = [1, 0, 0, 0, 0, 1]


def contradicting_itself(seg: Dataset) -> None:
    first, *_, last = frames_of(seg)
    first.DerivationImageSequence = last.DerivationImageSequence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_series, "made from the series 1.2.3, expected"),
        (in_another_frame_of_reference, "frame of reference 1.2.3, expected"),
        (cropped, "have 22 x 19 pixels"),
        (coarser, "does not lie on a slice"),
        (turned_out_of_the_plane, "does not lie on a slice"),
        (contradicting_itself, "does not lie on a slice"),
        (shifted(0.75), "does not lie on a slice"),
        (shifted(-200), "does not lie on a slice"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_seg_that_lies_elsewhere_is_refused(change, message, seg, stack):
    change(seg)
    with pytest.raises(GeometryError, match=message):
        read_seg(seg, stack)


def overlapping(seg: Dataset) -> None:
    for frame in frames_of(seg):
        if number_of(frame) == 3:
            frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber = 2
    masks = masks_of(seg)
    masks[[number_of(frame) == 2 for frame in frames_of(seg)]] = 1
    with_masks(seg, masks)


def fractional(seg: Dataset) -> None:
    seg.SegmentationType = "FRACTIONAL"


def label_map(seg: Dataset) -> None:
    seg.SegmentationType = "LABELMAP"


def label_map_class(seg: Dataset) -> None:
    seg.SOPClassUID = LABEL_MAP_CLASS


def no_segmentation(seg: Dataset) -> None:
    seg.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"


def one_name_twice(seg: Dataset) -> None:
    seg.SegmentSequence[1].SegmentLabel = " LIVER"


def nameless(seg: Dataset) -> None:
    seg.SegmentSequence[1].SegmentLabel = ""


def background(seg: Dataset) -> None:
    seg.SegmentSequence[1].SegmentLabel = "background"


def one_number_twice(seg: Dataset) -> None:
    seg.SegmentSequence[1].SegmentNumber = 1


def undescribed_segment(seg: Dataset) -> None:
    frames_of(seg)[3].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 60


def too_few_voxels(seg: Dataset) -> None:
    seg.PixelData = seg.PixelData[:-40]


def too_many_frames(seg: Dataset) -> None:
    seg.NumberOfFrames = 100_000


def a_byte_per_voxel(seg: Dataset) -> None:
    seg.BitsAllocated = 8


def run_lengths_that_end_early(seg: Dataset) -> None:
    seg.PixelData = encapsulate([rle_encode_frame(np.zeros((1, 4), np.uint8))] * int(seg.NumberOfFrames))
    seg.file_meta.TransferSyntaxUID = RLELossless


def jpeg(seg: Dataset) -> None:
    seg.file_meta.TransferSyntaxUID = JPEG2000Lossless


def position_of_two_numbers(seg: Dataset) -> None:
    frames_of(seg)[0].PlanePositionSequence[0].ImagePositionPatient = [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overlapping, r"overlap. Found: liver and kidney_right \([\d,]+ voxels\)"),
        (fractional, "Found: FRACTIONAL"),
        (label_map, "LABELMAP.*defaultMode"),
        (label_map_class, "LABELMAP.*defaultMode"),
        (no_segmentation, "CT Image Storage, no segmentation"),
        (one_name_twice, "Two segments.*'liver', 'LIVER'"),
        (nameless, "has no name"),
        (background, "background"),
        (one_number_twice, "segment numbers 1, 1, 3, 4"),
        (undescribed_segment, "segment 60, which is not described"),
        (too_few_voxels, "bytes of voxels, where"),
        (too_many_frames, "NumberOfFrames 100000"),
        (a_byte_per_voxel, "8 bits per voxel"),
        (run_lengths_that_end_early, "run-length"),
        (jpeg, "JPEG 2000"),
        (position_of_two_numbers, "3 numbers tell"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_seg_that_cannot_be_read_is_refused(change, message, seg, stack):
    change(seg)
    with pytest.raises(LabelError, match=message):
        read_seg(seg, stack)


def test_whatever_is_missing_is_read_or_refused_and_never_anything_else(seg, stack, label):
    expected = structures_of(read_seg(deepcopy(seg), stack))
    for parents in paths(seg):
        damaged = deepcopy(seg)
        item = damaged
        for keyword, index in parents[:-1]:
            item = item[keyword].value[index]
        del item[parents[-1][0]]
        try:
            found = read_seg(damaged, stack)
        except MSHubError:
            continue
        for name, mask in structures_of(found).items():
            np.testing.assert_array_equal(mask, expected[name], err_msg=str(parents))


def paths(dataset: Dataset, above: tuple[tuple[str, int], ...] = ()) -> list[tuple[tuple[str, int], ...]]:
    """Return the way to every attribute, into the first item of sequences only."""
    found = []
    for element in dataset:
        here = (*above, (element.keyword, 0))
        found.append(here)
        if element.VR == "SQ" and element.value:
            found += paths(element.value[0], here)
    return found


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(kept, seg, stack, tmp_path):
    content = (tmp_path / "seg.dcm").read_bytes()
    (tmp_path / "part.dcm").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(MSHubError):
        read_seg(tmp_path / "part.dcm", stack)


def test_a_file_that_is_no_dicom_is_refused(stack, tmp_path):
    (tmp_path / "seg.dcm").write_bytes(b"nothing of the kind" * 20)
    with pytest.raises(LabelError, match=r"seg\.dcm is no DICOM file"):
        read_seg(tmp_path / "seg.dcm", stack)


class TestWhenItWasMade:
    def made(self, **attributes: str) -> datetime | None:
        dataset = Dataset()
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        return created(dataset)

    def test_the_time_zone_of_the_object_counts(self):
        found = self.made(ContentDate="20260301", ContentTime="101530.25", TimezoneOffsetFromUTC="-0330")
        assert found == datetime(2026, 3, 1, 13, 45, 30, 250_000, tzinfo=timezone.utc)

    def test_without_one_it_is_that_of_this_machine(self):
        assert self.made(ContentDate="20260301", ContentTime="1015") == datetime(2026, 3, 1, 10, 15).astimezone()

    def test_without_a_time_the_day_begins(self):
        assert self.made(SeriesDate="20260301") == datetime(2026, 3, 1).astimezone()

    def test_the_content_counts_before_the_series(self):
        found = self.made(SeriesDate="20260301", ContentDate="20260302")
        assert found == datetime(2026, 3, 2).astimezone()

    @pytest.mark.filterwarnings("ignore:Invalid value for VR")
    @pytest.mark.parametrize("date", ["", "yesterday", "20261301"])
    def test_a_damaged_date_is_none(self, date):
        assert self.made(ContentDate=date) is None


def test_a_series_that_is_not_named_is_none(seg):
    del seg.ReferencedSeriesSequence
    assert referenced_series(seg) is None
    assert referenced_series(Dataset()) is None
