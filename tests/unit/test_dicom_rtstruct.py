"""RT Structure Sets: filled again at pixel centres they are the label, and a validator finds nothing wrong."""

from __future__ import annotations

import shutil
import subprocess
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from skimage.measure import points_in_poly

from dicom_series_factory import AXES, SeriesMaker, oblique
from mshub.dicom_derived import Algorithm, Facts
from mshub.dicom_rtstruct import interpreted_type, write_rtstruct
from mshub.dicom_series import SeriesStack, read_stack
from mshub.errors import CaseError, ConfigError, GeometryError, LabelError
from mshub.label_export import export_labels
from mshub.structures import StructureOverride, structure

NAMES = {"liver": 1, "spleen": 2, "GTVp": 3, "CTV_L": 4, "Wumpus": 7}
FACTS = Facts(Algorithm("starter", "1.2"), "MSHub starter 1.2", "Jo Doe")


def labelled(shape: tuple[int, int, int]) -> np.ndarray:
    """Return a label with a hole, an island in it, single voxels, corners that touch and voxels on every border."""
    label = np.zeros(shape, np.uint8)
    label[0:14, 3:15, 5:9] = 1
    label[3:10, 6:12, 5:8] = 0
    label[6, 8, 6] = 1
    label[4:6, 8:10, 5:8] = 3
    label[20, 4, 2], label[21, 5, 2] = 4, 4
    label[-1, -1, -1], label[0, 0, 0] = 7, 7
    noise = np.random.default_rng(2).random(shape) < 0.6
    label[:, :, 11:13] = np.where(noise, 4, 0)[:, :, 11:13]
    return label


def filled(rtstruct: Dataset, stack: SeriesStack) -> dict[str, np.ndarray]:
    """Return ROIName -> mask of the slices; contours of one slice are united by exclusive or, as the standard says."""
    names = {roi.ROINumber: roi.ROIName for roi in rtstruct.StructureSetROISequence}
    numbers = {header.SOPInstanceUID: k for k, header in enumerate(stack.headers)}
    columns, rows, _ = stack.slices_shape
    centres = np.argwhere(np.ones((columns, rows), bool)).astype(float)
    masks = {name: np.zeros(stack.slices_shape, bool) for name in names.values()}
    for roi in rtstruct.ROIContourSequence:
        for contour in roi.ContourSequence:
            k = numbers[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            pixels = in_pixels(contour, stack.headers[k])
            inside = points_in_poly(centres, pixels).reshape(columns, rows)
            masks[names[roi.ReferencedROINumber]][:, :, k] ^= inside
    return masks


def in_pixels(contour: Dataset, header: Dataset) -> np.ndarray:
    """Return a contour in columns and rows of its slice; assert that it lies in its plane."""
    points = np.array([float(part) for part in contour.ContourData]).reshape(-1, 3)
    assert len(points) == contour.NumberOfContourPoints
    orientation = np.array([float(part) for part in header.ImageOrientationPatient])
    row, column = orientation[:3], orientation[3:]
    offset = points - np.array([float(part) for part in header.ImagePositionPatient])
    assert np.abs(offset @ np.cross(row, column)).max() < 1e-3
    between_rows, between_columns = (float(part) for part in header.PixelSpacing)
    return np.stack([offset @ row / between_columns, offset @ column / between_rows], axis=1)


def check_holds(rtstruct: Dataset, label: np.ndarray, stack: SeriesStack) -> None:
    present = {name: value for name, value in NAMES.items() if (label == value).any()}
    masks = filled(rtstruct, stack)
    assert set(masks) == set(present)
    for name, value in present.items():
        np.testing.assert_array_equal(masks[name], label == value)


@pytest.fixture
def stack(tmp_path: Path) -> SeriesStack:
    return read_stack(SeriesMaker("rt", axes=oblique()).write(tmp_path / "image"))


@pytest.fixture
def label(stack: SeriesStack) -> np.ndarray:
    return labelled(stack.slices_shape)


@pytest.fixture
def rtstruct(stack: SeriesStack, label: np.ndarray, tmp_path: Path) -> Dataset:
    write_rtstruct(tmp_path / "rt.dcm", label, NAMES, stack, FACTS)
    return pydicom.dcmread(tmp_path / "rt.dcm")


class TestVoxelForVoxel:
    @pytest.mark.parametrize("axes", [*AXES.values(), oblique()], ids=[*AXES, "oblique"])
    def test_in_every_orientation(self, axes, tmp_path):
        stack = read_stack(SeriesMaker("any", axes=axes).write(tmp_path / "image"))
        label = labelled(stack.slices_shape)
        write_rtstruct(tmp_path / "rt.dcm", label, NAMES, stack, FACTS)
        check_holds(pydicom.dcmread(tmp_path / "rt.dcm"), label, stack)

    def test_with_pixels_of_a_tenth_of_a_millimetre_far_from_the_origin(self, tmp_path):
        maker = SeriesMaker("fine", axes=oblique(), spacing=(0.11, 0.13, 0.7))
        stack = read_stack(maker.write(tmp_path / "image"))
        label = labelled(stack.slices_shape)
        write_rtstruct(tmp_path / "rt.dcm", label, NAMES, stack, FACTS)
        check_holds(pydicom.dcmread(tmp_path / "rt.dcm"), label, stack)

    def test_with_a_tilted_gantry(self, tmp_path):
        stack = read_stack(SeriesMaker("tilted", tilt=(0.0, 0.9)).write(tmp_path / "image"))
        label = labelled(stack.slices_shape)
        export_labels(tmp_path / "rt.dcm", "rtstruct", stack.from_slices(label), NAMES, stack, FACTS)
        check_holds(pydicom.dcmread(tmp_path / "rt.dcm"), label, stack)

    def test_with_a_contour_of_more_than_64_kilobytes(self, tmp_path):
        stack = read_stack(SeriesMaker("large", shape=(120, 110, 3)).write(tmp_path / "image"))
        label = np.zeros(stack.slices_shape, np.uint8)
        label[:, :, 1] = 1
        label[1:-1:2, 1:-1:2, 1] = 0
        write_rtstruct(tmp_path / "rt.dcm", label, NAMES, stack, FACTS)
        rtstruct = pydicom.dcmread(tmp_path / "rt.dcm")
        (contour,) = rtstruct.ROIContourSequence[0].ContourSequence
        assert sum(len(str(part)) + 1 for part in contour.ContourData) > 2**16
        check_holds(rtstruct, label, stack)


class TestWhatIsWritten:
    def test_regions_are_numbered_and_absent_structures_are_absent(self, rtstruct):
        rois = [(roi.ROINumber, roi.ROIName) for roi in rtstruct.StructureSetROISequence]
        assert rois == [(1, "liver"), (2, "GTVp"), (3, "CTV_L"), (4, "Wumpus")]

    def test_regions_have_types_colours_and_codes(self, rtstruct):
        types = [item.RTROIInterpretedType for item in rtstruct.RTROIObservationsSequence]
        assert types == ["ORGAN", "GTV", "CTV", "ORGAN"]
        colours = [tuple(item.ROIDisplayColor) for item in rtstruct.ROIContourSequence]
        assert colours[:2] == [structure("liver").colour, structure("GTVp").colour]
        code = rtstruct.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence[0]
        assert (code.CodeValue, code.CodeMeaning) == ("10200004", "Liver")

    def test_it_refers_to_its_study_series_and_slices(self, rtstruct, stack):
        (frame,) = rtstruct.ReferencedFrameOfReferenceSequence
        (study,) = frame.RTReferencedStudySequence
        (series,) = study.RTReferencedSeriesSequence
        header = stack.headers[0]
        assert frame.FrameOfReferenceUID == header.FrameOfReferenceUID
        assert study.ReferencedSOPInstanceUID == header.StudyInstanceUID == rtstruct.StudyInstanceUID
        assert series.SeriesInstanceUID == header.SeriesInstanceUID != rtstruct.SeriesInstanceUID
        slices = [item.ReferencedSOPInstanceUID for item in series.ContourImageSequence]
        assert slices == [header.SOPInstanceUID for header in stack.headers]
        rois = rtstruct.StructureSetROISequence
        assert {roi.ReferencedFrameOfReferenceUID for roi in rois} == {header.FrameOfReferenceUID}

    def test_contours_are_closed_and_planar(self, rtstruct):
        contours = [contour for roi in rtstruct.ROIContourSequence for contour in roi.ContourSequence]
        assert {contour.ContourGeometricType for contour in contours} == {"CLOSED_PLANAR"}
        assert min(contour.NumberOfContourPoints for contour in contours) >= 4

    @pytest.mark.parametrize(
        ("algorithm", "kind"),
        [(Algorithm("m", "1"), "AUTOMATIC"), (Algorithm("m", "1", edited=True), "SEMIAUTOMATIC"), (None, "MANUAL")],
    )
    def test_it_says_how_the_label_came_about(self, algorithm, kind, stack, label, tmp_path):
        write_rtstruct(tmp_path / "rt.dcm", label, NAMES, stack, Facts(algorithm, "as it is"))
        rois = pydicom.dcmread(tmp_path / "rt.dcm").StructureSetROISequence
        assert {roi.ROIGenerationAlgorithm for roi in rois} == {kind}

    def test_a_card_decides_colours(self, stack, label, tmp_path):
        facts = replace(FACTS, overrides={"liver": StructureOverride(colour=(1, 2, 3))})
        write_rtstruct(tmp_path / "rt.dcm", label, NAMES, stack, facts)
        assert list(pydicom.dcmread(tmp_path / "rt.dcm").ROIContourSequence[0].ROIDisplayColor) == [1, 2, 3]

    @pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (Debian: dicom3tools) is not installed")
    @pytest.mark.parametrize("modality", ["CT", "MR"])
    def test_dciodvfy_finds_no_error(self, modality, tmp_path):
        stack = read_stack(SeriesMaker("valid", modality=modality, axes=oblique()).write(tmp_path / "image"))
        write_rtstruct(tmp_path / "rt.dcm", labelled(stack.slices_shape), NAMES, stack, FACTS)
        done = subprocess.run(["dciodvfy", tmp_path / "rt.dcm"], capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        assert "RTStructureSet" in said
        assert [line for line in said.splitlines() if line.startswith("Error")] == []

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("GTVn", "GTV"),
            ("gtv primary", "GTV"),
            ("liver_lesion", "GTV"),
            ("breast CTV", "CTV"),
            ("PTV_60", "PTV"),
            ("spinal_cord", "ORGAN"),
        ],
    )
    def test_the_type_follows_from_the_name(self, name, kind):
        assert interpreted_type(structure(name)) == kind


class TestWhatIsRefused:
    def test_an_empty_label(self, stack, label, tmp_path):
        with pytest.raises(LabelError, match="The label is empty: an RT Structure Set needs"):
            write_rtstruct(tmp_path / "rt.dcm", label * 0, NAMES, stack, FACTS)

    def test_a_label_of_another_shape(self, stack, label, tmp_path):
        with pytest.raises(GeometryError, match="to_slices"):
            write_rtstruct(tmp_path / "rt.dcm", label[1:], NAMES, stack, FACTS)

    def test_a_series_without_uids(self, stack, label, tmp_path):
        headers = tuple(deepcopy(header) for header in stack.headers)
        for header in headers:
            del header.SOPInstanceUID
        with pytest.raises(CaseError, match="has no SOPInstanceUID"):
            write_rtstruct(tmp_path / "rt.dcm", label, NAMES, replace(stack, headers=headers), FACTS)

    def test_another_format(self, stack, label, tmp_path):
        with pytest.raises(ConfigError, match="'stl', expected one of seg, rtstruct"):
            export_labels(tmp_path / "x.stl", "stl", label, NAMES, stack, FACTS)


@pytest.mark.parametrize("keyword", ["PatientID", "StudyDate", "FrameOfReferenceUID", "SeriesNumber", "PatientName"])
def test_a_series_without_what_may_be_missing(keyword, tmp_path):
    stack = read_stack(SeriesMaker("odd", attributes={keyword: None}).write(tmp_path / "image"))
    label = labelled(stack.slices_shape)
    write_rtstruct(tmp_path / "rt.dcm", label, NAMES, stack, FACTS)
    check_holds(pydicom.dcmread(tmp_path / "rt.dcm"), label, stack)
