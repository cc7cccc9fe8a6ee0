"""Folders of DICOM files: what is refused and why, and SimpleITK's own geometry for what is accepted."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from mshub.dicom_series import read_stack
from mshub.errors import CaseError, GeometryError
from mshub.geometry import Volume, check_channels, same_grid, to_sitk
from mshub.volume_io import read_grid, read_volume, write_nifti

COLUMNS, ROWS, SLICES = 5, 7, 9
ROW_SPACING, COLUMN_SPACING, SLICE_SPACING = 1.1, 0.8, 2.5  # along y, along x, along the normal
ORIGIN = np.array([-31.25, 12.5, 77.0])
CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_CT, SEG = "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.66.4"
RTSTRUCT, RTDOSE = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.481.2"
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def turned(x_degrees: float, z_degrees: float) -> np.ndarray:
    """Unit axes along a row, along a column and along the normal, as columns."""
    x, z = np.radians([x_degrees, z_degrees])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return about_z @ about_x


AXES = turned(25, -40)


def stored(k: int) -> np.ndarray:
    """Stored pixel values of slice k, [row, column]."""
    return (np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) + 100 * k).astype(np.int16)


def write_slice(folder: Path, k: int, axes: np.ndarray = AXES, name: str | None = None, **changes) -> Path:
    """Write slice k of a CT series; a change of None removes the attribute."""
    folder.mkdir(exist_ok=True)
    path = folder / (name or f"IM{997 * (k + 3) % 1009:04d}.dcm")  # file names in no order
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = changes.get("SOPClassUID") or CT
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    dataset.is_little_endian, dataset.is_implicit_VR = True, False
    attributes = {
        "SOPClassUID": CT,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "SeriesDescription": "Abdomen 2.5",
        "Modality": "CT",
        "InstanceNumber": SLICES - k,
        "Rows": ROWS,
        "Columns": COLUMNS,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 1,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "PixelSpacing": [ROW_SPACING, COLUMN_SPACING],
        "ImageOrientationPatient": [round(float(v), 10) for v in (*axes[:, 0], *axes[:, 1])],
        "ImagePositionPatient": [round(float(v), 8) for v in ORIGIN + k * SLICE_SPACING * axes[:, 2]],
        "PixelData": stored(k).tobytes(),
    }
    for keyword, value in {**attributes, **changes}.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.save_as(path, write_like_original=False)
    return path


def write_series(folder: Path, slices=range(SLICES), **changes) -> Path:
    for k in slices:
        write_slice(folder, k, **changes)
    return folder


def simpleitk_reads(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def assert_at_the_same_place(volume: Volume, image: sitk.Image) -> None:
    ours = to_sitk(volume)
    assert ours.GetSize() == image.GetSize()
    last = tuple(size - 1 for size in image.GetSize())
    for index in [(0, 0, 0), (last[0], 0, 0), (0, last[1], 0), (0, 0, last[2]), last]:
        expected = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(ours.TransformIndexToPhysicalPoint(index), expected, rtol=0, atol=1e-6)


def real_folder(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"the real series {name} is not here (shared test data, not part of the repository)")
    return path


class TestReading:
    @pytest.mark.parametrize("axes", [np.eye(3), AXES, turned(90, 0), turned(-90, 90), np.diag([-1.0, -1.0, 1.0])])
    def test_puts_every_slice_where_simpleitk_does(self, tmp_path, axes):
        folder = write_series(tmp_path / "ct", axes=axes)
        volume, image = read_volume(folder), simpleitk_reads(folder)
        assert_at_the_same_place(volume, image)
        np.testing.assert_array_equal(volume.array_xyz, sitk.GetArrayFromImage(image).transpose(2, 1, 0))

    def test_follows_the_standards_formula_for_a_pixels_position(self, tmp_path):
        volume = read_volume(write_series(tmp_path / "ct"))
        i, j, k = 3, 2, 7
        expected = ORIGIN + AXES @ [i * COLUMN_SPACING, j * ROW_SPACING, k * SLICE_SPACING]
        found = nib.affines.apply_affine(volume.grid.affine_ras, (i, j, k)) * [-1, -1, 1]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        assert volume.array_xyz[i, j, k] == stored(k)[j, i] - 1024
        assert volume.grid.spacing_xyz_mm == pytest.approx((COLUMN_SPACING, ROW_SPACING, SLICE_SPACING))

    def test_applies_whole_rescaling_in_integers(self, tmp_path):
        assert read_volume(write_series(tmp_path / "ct")).array_xyz.dtype == np.int16

    def test_applies_fractional_rescaling_in_float32(self, tmp_path):
        volume = read_volume(write_series(tmp_path / "pet", RescaleSlope=0.25, RescaleIntercept=0))
        assert volume.array_xyz.dtype == np.float32
        assert volume.array_xyz[3, 2, 7] == stored(7)[2, 3] * 0.25

    def test_applies_a_rescaling_that_changes_from_slice_to_slice(self, tmp_path):
        folder = tmp_path / "pet"
        for k in range(SLICES):
            write_slice(folder, k, RescaleSlope=1 + k, RescaleIntercept=-70000 * (k > 0))
        volume = read_volume(folder)
        assert volume.array_xyz[3, 2, 0] == stored(0)[2, 3]
        assert volume.array_xyz[3, 2, 7] == stored(7)[2, 3] * 8 - 70000
        # forced into the type of the first slice, the value would have wrapped around
        assert sitk.GetArrayFromImage(simpleitk_reads(folder))[7, 2, 3] != stored(7)[2, 3] * 8 - 70000

    def test_reads_the_grid_from_headers_alone(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        expected = read_volume(folder).grid
        write_series(folder, PixelData=None)
        assert same_grid(read_grid(folder), expected)
        with pytest.raises(CaseError, match="cannot be decoded"):
            read_volume(folder)

    def test_ignores_other_files_and_the_droppings_of_operating_systems(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        (folder / "readme.txt").write_text("hello")
        (folder / "empty").touch()
        (folder / ".DS_Store").write_bytes(b"x")
        (folder / "._IM0001.dcm").write_bytes(b"x")
        assert read_volume(folder).grid.shape_xyz == (COLUMNS, ROWS, SLICES)

    def test_looks_one_folder_deeper(self, tmp_path):
        (tmp_path / "patient").mkdir()
        write_series(tmp_path / "patient" / "series")
        (tmp_path / "patient" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
        assert read_volume(tmp_path / "patient").grid.shape_xyz == (COLUMNS, ROWS, SLICES)

    def test_reads_files_without_extension(self, tmp_path):
        folder = tmp_path / "ct"
        for k in range(SLICES):
            write_slice(folder, k, name=f"CT.1.3.12.2.{k}")
        assert read_volume(folder).grid.shape_xyz == (COLUMNS, ROWS, SLICES)

    @pytest.mark.parametrize("uid", [None, ""])
    def test_reads_one_series_whose_uids_were_blanked(self, tmp_path, uid):
        folder = write_series(tmp_path / "ct", SeriesInstanceUID=uid, StudyInstanceUID=uid, SOPClassUID=uid)
        assert_at_the_same_place(read_volume(folder), simpleitk_reads(write_series(tmp_path / "good")))

    def test_chooses_a_series_by_its_uid(self, tmp_path):
        folder = write_series(tmp_path / "both")
        for k in range(4):
            write_slice(folder, k, name=f"other{k}", SeriesInstanceUID="1.2.3.5")
        assert read_volume(folder, series_uid="1.2.3.5").grid.shape_xyz == (COLUMNS, ROWS, 4)
        assert read_grid(folder, series_uid="1.2.3.4").shape_xyz == (COLUMNS, ROWS, SLICES)

    def test_ignores_structures_doses_and_segmentations_beside_the_scan(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        write_slice(folder, 0, name="rs", SOPClassUID=RTSTRUCT, SeriesInstanceUID="1.9", Rows=None, PixelData=None)
        write_slice(folder, 0, name="rd", SOPClassUID=RTDOSE, SeriesInstanceUID="1.8", NumberOfFrames=4)
        write_slice(folder, 0, name="seg", SOPClassUID=SEG, SeriesInstanceUID="1.7", NumberOfFrames=4)
        assert read_volume(folder).grid.shape_xyz == (COLUMNS, ROWS, SLICES)

    @pytest.mark.parametrize("decimals", [2, 3])
    def test_forgives_rounded_positions(self, tmp_path, decimals):
        folder = tmp_path / "ct"
        for k in range(SLICES):
            position = ORIGIN + k * SLICE_SPACING * AXES[:, 2]
            write_slice(folder, k, ImagePositionPatient=[round(float(v), decimals) for v in position])
        assert_at_the_same_place(read_volume(folder), simpleitk_reads(folder))

    def test_forgives_a_rounded_orientation(self, tmp_path):
        rounded = [round(float(v), 4) for v in (*AXES[:, 0], *AXES[:, 1])]
        folder = write_series(tmp_path / "ct", ImageOrientationPatient=rounded)
        assert_at_the_same_place(read_volume(folder), simpleitk_reads(folder))

    def test_survives_the_way_to_nifti_and_back(self, tmp_path):
        volume = read_volume(write_series(tmp_path / "ct"))
        write_nifti(tmp_path / "ct.nii.gz", volume.array_xyz, volume.grid)
        assert_at_the_same_place(volume, sitk.Cast(to_sitk(volume), sitk.sitkInt16))
        assert same_grid(read_grid(tmp_path / "ct.nii.gz"), volume.grid)


def write_tilted(folder: Path, sideways: tuple[float, float], **changes) -> Path:
    """Write a series whose slices are pushed along rows and along columns by so many mm per slice."""
    step = AXES @ [*sideways, SLICE_SPACING]
    for k in range(SLICES):
        write_slice(folder, k, ImagePositionPatient=list(np.round(ORIGIN + k * step, 8)), **changes)
    return folder


TILTS = {
    "whole pixels up": (0, ROW_SPACING),
    "whole pixels down": (0, -ROW_SPACING),
    "15 degrees": (0, np.tan(np.radians(15)) * SLICE_SPACING),
    "-30 degrees": (0, np.tan(np.radians(-30)) * SLICE_SPACING),
    "along rows": (0.9, 0),
    "both ways": (-0.55, 0.83),
    "below half a pixel": (0, 0.06),
}


class TestTiltedGantry:
    @pytest.mark.parametrize("sideways", TILTS.values(), ids=TILTS)
    def test_every_pixel_lies_within_half_a_pixel_of_where_its_header_says(self, tmp_path, sideways):
        folder = write_tilted(tmp_path / "ct", sideways)
        stack, volume = read_stack(folder), read_volume(folder)
        assert same_grid(stack.grid, volume.grid)
        pixels = stack.to_slices(volume.array_xyz)
        assert pixels.shape == stack.slices_shape == (COLUMNS, ROWS, SLICES)
        for k in range(SLICES):
            np.testing.assert_array_equal(pixels[:, :, k], stored(k).T - 1024)
            by_header = np.array(stack.headers[k].ImagePositionPatient, dtype=float)
            index = (*stack.offsets[k], k)
            found = nib.affines.apply_affine(volume.grid.affine_ras, index) * [-1, -1, 1]
            off = (found - by_header) @ AXES
            assert np.abs(off / [COLUMN_SPACING, ROW_SPACING, 1]).max() <= 0.5 + 1e-6
            assert off[2] == pytest.approx(0, abs=1e-6)

    def test_whole_pixels_are_straightened_without_an_error(self, tmp_path):
        stack = read_stack(write_tilted(tmp_path / "ct", TILTS["whole pixels down"]))
        assert stack.offsets.tolist() == [[0, SLICES - 1 - k] for k in range(SLICES)]
        assert stack.grid.shape_xyz == (COLUMNS, ROWS + SLICES - 1, SLICES)
        assert stack.grid.spacing_xyz_mm == pytest.approx((COLUMN_SPACING, ROW_SPACING, SLICE_SPACING))
        for k in range(SLICES):
            found = nib.affines.apply_affine(stack.grid.affine_ras, (*stack.offsets[k], k)) * [-1, -1, 1]
            np.testing.assert_allclose(found, np.array(stack.headers[k].ImagePositionPatient, float), atol=1e-6)

    @pytest.mark.parametrize("sideways", TILTS.values(), ids=TILTS)
    def test_labels_go_to_the_slices_and_back_unchanged(self, tmp_path, sideways):
        stack = read_stack(write_tilted(tmp_path / "ct", sideways))
        label = np.random.default_rng(0).integers(0, 4, stack.slices_shape).astype(np.uint8)
        on_grid = stack.from_slices(label)
        assert on_grid.shape == stack.grid.shape_xyz
        assert on_grid.dtype == np.uint8
        assert on_grid.sum() == label.sum()  # zero beside the slices
        np.testing.assert_array_equal(stack.to_slices(on_grid), label)

    def test_beside_the_slices_lies_air_in_ct(self, tmp_path):
        folder = write_tilted(tmp_path / "ct", TILTS["both ways"], RescaleIntercept=0)
        stack, volume = read_stack(folder), read_volume(folder)
        beside = stack.from_slices(np.ones(stack.slices_shape, bool), fill=0) == 0
        assert beside.any()
        assert set(volume.array_xyz[beside]) == {-1024}

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"RescaleIntercept": -3024}, -3024),  # the scanner's own padding is lower
            ({"Modality": "MR", "RescaleIntercept": 7}, 7),
            ({"Modality": "MR", "RescaleIntercept": None, "RescaleSlope": 0.5}, 0),
        ],
    )
    def test_beside_the_slices_lies_the_minimum_otherwise(self, tmp_path, changes, expected):
        folder = write_tilted(tmp_path / "s", TILTS["both ways"], **changes)
        stack, volume = read_stack(folder), read_volume(folder)
        beside = stack.from_slices(np.ones(stack.slices_shape, bool)) == 0
        assert set(volume.array_xyz[beside]) == {expected}

    def test_it_survives_the_way_through_nifti(self, tmp_path):
        volume = read_volume(write_tilted(tmp_path / "ct", TILTS["15 degrees"]))
        write_nifti(tmp_path / "ct.nii.gz", volume.array_xyz, volume.grid)
        again = read_volume(tmp_path / "ct.nii.gz")
        assert same_grid(again.grid, volume.grid)
        np.testing.assert_array_equal(again.array_xyz, volume.array_xyz)

    def test_rounded_positions_are_straightened_like_exact_ones(self, tmp_path):
        exact = read_stack(write_tilted(tmp_path / "exact", TILTS["15 degrees"]))
        folder = tmp_path / "rounded"
        for k in range(SLICES):
            position = ORIGIN + k * AXES @ [*TILTS["15 degrees"], SLICE_SPACING]
            write_slice(folder, k, ImagePositionPatient=[round(float(v), 2) for v in position])
        assert read_stack(folder).offsets.tolist() == exact.offsets.tolist()

    def test_arrays_of_another_shape_are_refused(self, tmp_path):
        stack = read_stack(write_tilted(tmp_path / "ct", TILTS["15 degrees"]))
        with pytest.raises(GeometryError, match="found an array of 5 x 7 x 9 voxels, expected 5 x 12 x 9"):
            stack.to_slices(np.zeros(stack.slices_shape))
        with pytest.raises(GeometryError, match=r"found an array of 5 x 12 x 9 pixels, expected 5 x 7 x 9 .*slices"):
            stack.from_slices(np.zeros(stack.grid.shape_xyz))


class TestStack:
    def test_headers_are_in_the_order_of_z_and_hold_everything_but_pixels(self, tmp_path):
        folder = write_series(tmp_path / "ct", PatientName="Doe^Jane", FrameOfReferenceUID="1.9")
        stack, volume = read_stack(folder), read_volume(folder)
        assert same_grid(stack.grid, volume.grid)
        assert stack.slices_shape == (COLUMNS, ROWS, SLICES)
        for k, header in enumerate(stack.headers):
            corner = nib.affines.apply_affine(stack.grid.affine_ras, (0, 0, k)) * [-1, -1, 1]
            np.testing.assert_allclose(np.array(header.ImagePositionPatient, float), corner, rtol=0, atol=1e-6)
            assert (header.InstanceNumber, str(header.PatientName)) == (SLICES - k, "Doe^Jane")
            assert header.FrameOfReferenceUID == "1.9"
            assert "PixelData" not in header
            assert header.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian

    def test_of_an_upright_series_slices_are_the_grid(self, tmp_path):
        stack = read_stack(write_series(tmp_path / "ct"))
        array = np.random.default_rng(0).normal(size=stack.slices_shape)
        assert not stack.tilted
        assert not stack.offsets.any()
        assert stack.to_slices(array) is array
        assert stack.from_slices(array) is array

    def test_files_that_have_lost_their_pixels_will_do(self, tmp_path):
        expected = read_stack(write_series(tmp_path / "ct"))
        stack = read_stack(write_series(tmp_path / "headers", PixelData=None))
        assert same_grid(stack.grid, expected.grid)

    def test_blank_uids_will_do(self, tmp_path):
        blank = {"SeriesInstanceUID": "", "StudyInstanceUID": "", "SOPClassUID": ""}
        assert len(read_stack(write_series(tmp_path / "ct", **blank)).headers) == SLICES

    def test_a_series_is_chosen_by_its_uid(self, tmp_path):
        folder = write_series(tmp_path / "both")
        for k in range(4):
            write_slice(folder, k, name=f"other{k}", SeriesInstanceUID="1.2.3.5")
        stack = read_stack(folder, series_uid="1.2.3.5")
        assert [header.SeriesInstanceUID for header in stack.headers] == ["1.2.3.5"] * 4

    def test_what_reading_refuses_is_refused(self, tmp_path):
        with pytest.raises(GeometryError, match=r"gap of 5 mm .*: 1 missing"):
            read_stack(write_series(tmp_path / "gap", [0, 1, 2, 4, 5]))
        with pytest.raises(CaseError, match="expected at most 314"):
            read_stack(write_series(tmp_path / "ct"), max_voxels=314)

    def test_a_damaged_value_that_geometry_does_not_need_is_no_obstacle(self, tmp_path):
        folder = write_series(tmp_path / "ct", PatientAge="044Y")
        for file in folder.iterdir():
            file.write_bytes(file.read_bytes().replace(b"044Y", b"\xff\xfe\x00\x01"))
        assert len(read_stack(folder).headers) == SLICES


class TestRefusing:
    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(CaseError, match="found no DICOM file in the folder"):
            read_volume(tmp_path)

    def test_a_folder_without_dicom(self, tmp_path):
        (tmp_path / "a.txt").write_text("hello")
        with pytest.raises(CaseError, match="found no DICOM file in the folder"):
            read_volume(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
    def test_a_file_that_claims_to_be_dicom_and_is_not(self, tmp_path, content):
        folder = write_series(tmp_path / "ct")
        (folder / "last.dcm").write_bytes(content)
        with pytest.raises(CaseError, match=r"^ct: last.dcm is no DICOM file in spite of its name"):
            read_volume(folder)

    def test_several_series_and_lists_them(self, tmp_path):
        folder = write_series(tmp_path / "both")
        mr = {"SOPClassUID": MR, "Modality": "MR", "SeriesDescription": "T1", "SeriesInstanceUID": "1.2.3.5"}
        for k in range(4):
            write_slice(folder, k, name=f"other{k}", **mr)
        with pytest.raises(CaseError) as raised:
            read_volume(folder)
        message = str(raised.value)
        assert "found 2 series in the folder, expected one" in message
        assert "Abdomen 2.5 (CT, 9 files, 1.2.3.4)" in message
        assert "T1 (MR, 4 files, 1.2.3.5)" in message
        assert "into a folder of its own" in message

    def test_a_series_uid_that_is_not_there(self, tmp_path):
        with pytest.raises(CaseError, match=r"found no series 9.9 in the folder"):
            read_volume(write_series(tmp_path / "ct"), series_uid="9.9")

    @pytest.mark.parametrize("lost", [1, 4, 7])
    def test_a_missing_slice_and_says_where(self, tmp_path, lost):
        folder = write_series(tmp_path / "ct", [k for k in range(SLICES) if k != lost])
        before, after = f"IM{997 * (lost + 2) % 1009:04d}.dcm", f"IM{997 * (lost + 4) % 1009:04d}.dcm"
        with pytest.raises(
            GeometryError, match=rf"gap of 5 mm between {before} .* and {after} .* 2.5 mm .*: 1 missing"
        ):
            read_volume(folder)

    def test_three_missing_slices_in_a_row(self, tmp_path):
        with pytest.raises(GeometryError, match=r"gap of 10 mm .*: 3 missing"):
            read_volume(write_series(tmp_path / "ct", [0, 1, 2, 3, 7, 8]))

    def test_slices_that_grow_apart_little_by_little(self, tmp_path):
        folder = tmp_path / "ct"
        for k in range(SLICES):
            height = sum(SLICE_SPACING * (0.91 + 0.02 * n) for n in range(k))
            write_slice(folder, k, ImagePositionPatient=list(np.round(ORIGIN + height * AXES[:, 2], 8)))
        with pytest.raises(GeometryError, match="slice spacings that change along the stack"):
            read_volume(folder)

    def test_two_slices_at_one_position(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        write_slice(folder, 3, name="again.dcm")
        with pytest.raises(GeometryError, match=r"1 slice positions twice.*again.dcm.*time points, echoes or b-values"):
            read_volume(folder)

    def test_two_whole_volumes_in_one_series(self, tmp_path):
        folder = write_series(tmp_path / "mr")
        for k in range(SLICES):
            write_slice(folder, k, name=f"echo2_{k}")
        with pytest.raises(GeometryError, match="found 9 slice positions twice"):
            read_volume(folder)

    @pytest.mark.parametrize("damaged", [0, 4, SLICES - 1])
    def test_a_slice_that_has_lost_its_size(self, tmp_path, damaged):
        for k in range(SLICES):
            write_slice(tmp_path, k, **({"Rows": None} if k == damaged else {}))
        with pytest.raises(CaseError, match=r"has no Rows and Columns, expected both .*CT Image Storage"):
            read_volume(tmp_path)

    def test_a_localiser_in_the_series(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        write_slice(folder, 0, axes=turned(90, 0), name="scout")
        with pytest.raises(GeometryError, match=r"differ in ImageOrientationPatient: .*remove localisers"):
            read_volume(folder)

    def test_slices_of_another_size(self, tmp_path):
        folder = write_series(tmp_path / "ct", range(8))
        write_slice(folder, 8, name="z", Rows=6, PixelData=stored(8)[:6].tobytes())
        with pytest.raises(GeometryError, match=r"columns x rows: z has \(5, 6\), .* has \(5, 7\)"):
            read_volume(folder)

    def test_slices_of_another_pixel_spacing(self, tmp_path):
        folder = write_series(tmp_path / "ct", range(8))
        write_slice(folder, 8, name="z", PixelSpacing=[1.1, 0.9])
        with pytest.raises(GeometryError, match=r"PixelSpacing: z has \[1.1, 0.9\]"):
            read_volume(folder)

    def test_a_tilt_that_no_gantry_has(self, tmp_path):
        folder = write_tilted(tmp_path / "ct", sideways=(0, 2.6))  # mm per slice, 2.5 mm apart
        with pytest.raises(GeometryError, match=r"sideways by 20.8 mm over a stack of 20 mm, a tilt of 46.1 degrees"):
            read_volume(folder)

    @pytest.mark.parametrize("shifted", [3, SLICES - 1])
    def test_one_slice_that_is_shifted_sideways(self, tmp_path, shifted):
        folder = write_series(tmp_path / "ct")
        position = ORIGIN + shifted * SLICE_SPACING * AXES[:, 2] + 3 * AXES[:, 0]
        write_slice(folder, shifted, ImagePositionPatient=list(np.round(position, 8)))
        with pytest.raises(GeometryError, match=r"shifted sideways unevenly, up to .* mm off a straight stack"):
            read_volume(folder)

    def test_slices_that_swing_sideways(self, tmp_path):
        folder = tmp_path / "ct"
        for k in range(SLICES):
            position = ORIGIN + k * SLICE_SPACING * AXES[:, 2] + (k % 2) * AXES[:, 1]
            write_slice(folder, k, ImagePositionPatient=list(np.round(position, 8)))
        with pytest.raises(GeometryError, match=r"unevenly, up to 1 mm off .* 2.5 mm apart"):
            read_volume(folder)

    def test_more_voxels_than_allowed_once_a_tilt_is_straightened(self, tmp_path):
        folder = write_tilted(tmp_path / "ct", sideways=(0, ROW_SPACING))
        with pytest.raises(CaseError, match="5 x 15 x 9 = 675 voxels, expected at most 674"):
            read_volume(folder, max_voxels=674)
        assert read_volume(folder, max_voxels=675).grid.shape_xyz == (5, 15, 9)

    def test_a_single_slice(self, tmp_path):
        with pytest.raises(GeometryError, match=r"found a single slice .* at least 2 slices"):
            read_volume(write_series(tmp_path / "ct", [0]))

    def test_a_multi_frame_object_and_names_its_class(self, tmp_path):
        pixels = np.stack([stored(k) for k in range(4)]).tobytes()
        write_slice(tmp_path, 0, SOPClassUID=ENHANCED_CT, NumberOfFrames=4, PixelData=pixels)
        with pytest.raises(CaseError, match=r"multi-frame object of 4 frames \(Enhanced CT Image Storage\).*dcm2niix"):
            read_volume(tmp_path)

    @pytest.mark.parametrize(
        ("sop_class", "rows", "name"),
        [(SEG, ROWS, "Segmentation Storage"), (RTSTRUCT, None, "RT Structure Set Storage")],
    )
    def test_what_is_no_scan_and_names_its_class(self, tmp_path, sop_class, rows, name):
        write_slice(tmp_path, 0, SOPClassUID=sop_class, Rows=rows, PixelData=None)
        with pytest.raises(CaseError, match=rf"only DICOM objects that are no scan \({name}\)"):
            read_volume(tmp_path)

    def test_colour(self, tmp_path):
        pixels = np.zeros((ROWS, COLUMNS, 3), dtype=np.uint16).tobytes()
        rgb = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "PixelData": pixels}
        with pytest.raises(CaseError, match="3 samples per pixel and is RGB"):
            read_volume(write_series(tmp_path / "us", **rgb))

    @pytest.mark.parametrize("kind", ["MONOCHROME1", "PALETTE COLOR"])
    def test_inverted_and_palette_pixels(self, tmp_path, kind):
        with pytest.raises(CaseError, match=f"is {kind} .*MONOCHROME2"):
            read_volume(write_series(tmp_path / "ct", PhotometricInterpretation=kind))

    @pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
    def test_slices_that_do_not_say_where_they_are(self, tmp_path, keyword):
        with pytest.raises(GeometryError, match=rf"has {keyword} None, expected \d numbers"):
            read_volume(write_series(tmp_path / "ct", **{keyword: None}))

    def test_directions_that_are_none(self, tmp_path):
        with pytest.raises(GeometryError, match="expected two perpendicular unit vectors"):
            read_volume(write_series(tmp_path / "ct", ImageOrientationPatient=[0, 0, 0, 0, 0, 0]))

    def test_a_pixel_spacing_of_zero(self, tmp_path):
        with pytest.raises(GeometryError, match=r"voxel spacing of 0.8 x 0 x 2.5 mm"):
            read_volume(write_series(tmp_path / "ct", PixelSpacing=[0, COLUMN_SPACING]))

    def test_a_file_cut_in_its_pixels_without_naming_the_folder(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        victim = sorted(folder.iterdir())[4]
        victim.write_bytes(victim.read_bytes()[:-30])
        with pytest.raises(CaseError, match="pixels of the series cannot be decoded") as raised:
            read_volume(folder)
        assert str(tmp_path) not in str(raised.value)

    def test_a_file_cut_in_its_header(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        victim = sorted(folder.iterdir())[4]
        victim.write_bytes(victim.read_bytes()[:400])
        with pytest.raises(CaseError, match=r"^ct: "):
            read_volume(folder)

    def test_a_value_that_is_damaged(self, tmp_path):
        folder = write_series(tmp_path / "ct")
        victim = sorted(folder.iterdir())[4]
        rows = b"\x28\x00\x10\x00US"  # tag (0028,0010) and its value representation
        assert rows in victim.read_bytes()
        victim.write_bytes(victim.read_bytes().replace(rows, rows[:4] + b"U\xfc"))
        with pytest.raises(CaseError, match=rf"^ct: {victim.name} is a damaged DICOM file"):
            read_volume(folder)

    def test_a_series_without_contrast(self, tmp_path):
        with pytest.raises(CaseError, match="the same value -1024 in all 315 voxels"):
            read_volume(write_series(tmp_path / "ct", PixelData=bytes(2 * ROWS * COLUMNS)))

    def test_more_voxels_than_allowed(self, tmp_path):
        with pytest.raises(CaseError, match="5 x 7 x 9 = 315 voxels, expected at most 314"):
            read_volume(write_series(tmp_path / "ct"), max_voxels=314)


class TestRealSeries:
    def test_ct_with_blank_uids_is_at_the_place_of_its_published_labels(self):
        volume = read_volume(real_folder("dicom_ct"))
        assert volume.array_xyz.shape == (512, 512, 20)
        assert volume.array_xyz.dtype == np.int16
        assert -1100 < volume.array_xyz.min() < -900
        label = nib.load(real_folder("ct_torso") / "example_seg_dicom.nii.gz")
        ours = sorted(map(tuple, np.round(volume.grid.corners_mm(), 3).tolist()))
        corners = [(i, j, k) for i in (0, 511) for j in (0, 511) for k in (0, 19)]
        theirs = sorted(map(tuple, np.round(nib.affines.apply_affine(label.affine, corners), 3).tolist()))
        assert ours == theirs

    def test_ct_body_is_denser_than_the_air_around_its_published_labels(self):
        volume = read_volume(real_folder("dicom_ct"))
        label = read_volume(real_folder("ct_torso") / "example_seg_dicom.nii.gz", allow_constant=True)
        to_label = np.linalg.inv(label.grid.affine_ras) @ volume.grid.affine_ras
        inside = np.argwhere(label.array_xyz > 0)[::500]
        voxels = np.rint(nib.affines.apply_affine(np.linalg.inv(to_label), inside)).astype(int)
        assert np.median(volume.array_xyz[tuple(voxels.T)]) > -200 > np.median(volume.array_xyz[:20, :20])

    @pytest.mark.parametrize("name", ["T1post", "FLAIR"])
    def test_oblique_mr_is_where_simpleitk_has_it(self, name):
        folder = real_folder(f"dicom_mr/{name}")
        volume, image = read_volume(folder), simpleitk_reads(folder)
        assert_at_the_same_place(volume, image)
        np.testing.assert_array_equal(volume.array_xyz, sitk.GetArrayFromImage(image).transpose(2, 1, 0))
        assert same_grid(read_grid(folder), volume.grid)

    def test_two_mr_series_of_one_study_are_channels_of_one_case(self):
        names = ["T1post", "FLAIR"]
        check_channels([read_grid(real_folder(f"dicom_mr/{name}")) for name in names], names)

    def test_the_study_folder_asks_which_series(self):
        with pytest.raises(CaseError, match=r"2 series in the folder.*FLAIR_reg \(MR, 22 files.*T1post \(MR, 22 files"):
            read_volume(real_folder("dicom_mr"))

    def test_a_lost_slice_of_the_real_ct_is_noticed(self, tmp_path):
        files = sorted(real_folder("dicom_ct").iterdir(), key=lambda f: float(pydicom.dcmread(f).SliceLocation))
        for number, file in enumerate(files):
            if number != 8:
                (tmp_path / file.name).symlink_to(file)
        with pytest.raises(GeometryError, match=r"gap of 4 mm .* expected 2 mm .*1 missing"):
            read_volume(tmp_path)
