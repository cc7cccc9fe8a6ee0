"""The committed sample phantoms: intact, reproducible, and the same case in every format."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - the name everybody uses

SAMPLES = Path(__file__).resolve().parents[2] / "sample-data"
CASES = [f"phantom_{number:02d}" for number in range(1, 7)]
ORIENTATIONS = {"phantom_01": "LPS", "phantom_02": "RAS", "phantom_03": "LAS", "phantom_04": "PIR", "phantom_05": "LSA"}
TOLERANCE_MM = 1e-3


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """``sample-data/generate.py``, imported from its file."""
    spec = importlib.util.spec_from_file_location("sample_data_generate", SAMPLES / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SAMPLES / "manifest.json").read_text(encoding="utf-8"))
    return loaded


def generated_files() -> set[str]:
    folders = (SAMPLES / name for name in ("images", "labels", "dicom"))
    return {p.relative_to(SAMPLES).as_posix() for folder in folders for p in folder.rglob("*") if p.is_file()}


def load(kind: str, case: str) -> nib.Nifti1Image:
    return nib.load(SAMPLES / kind / f"{case}.nii.gz")


# --- integrity --------------------------------------------------------------------------------------------------------


def test_every_file_has_the_sha256_of_the_manifest(manifest: dict[str, Any]) -> None:
    found = {name: hashlib.sha256((SAMPLES / name).read_bytes()).hexdigest() for name in manifest["files"]}
    assert found == manifest["files"]


def test_the_manifest_lists_every_generated_file(manifest: dict[str, Any]) -> None:
    assert set(manifest["files"]) == generated_files()


def test_the_manifest_names_the_labels_and_the_generator(manifest: dict[str, Any], generator: ModuleType) -> None:
    assert manifest["labels"] == generator.LABELS
    assert manifest["generator_version"] == generator.GENERATOR_VERSION
    assert manifest["base_seed"] == generator.BASE_SEED


def test_the_samples_stay_below_five_megabytes() -> None:
    assert sum((SAMPLES / name).stat().st_size for name in generated_files()) < 5_000_000


# --- reproducibility --------------------------------------------------------------------------------------------------


def test_regenerating_a_case_gives_the_committed_content(generator: ModuleType, tmp_path: Path) -> None:
    paths = generator.write_case(generator.SAMPLES[0], tmp_path)
    assert len(paths) > 3
    for path in paths:
        assert generator.contents(path) == generator.contents(SAMPLES / path.relative_to(tmp_path)), path.name


def test_regenerating_the_oblique_case_gives_the_committed_content(generator: ModuleType, tmp_path: Path) -> None:
    for path in generator.write_case(generator.SAMPLES[5], tmp_path):
        assert generator.contents(path) == generator.contents(SAMPLES / path.relative_to(tmp_path)), path.name


def test_two_regenerations_are_equal_to_the_byte(generator: ModuleType, tmp_path: Path) -> None:
    one, two = (generator.write_case(generator.SAMPLES[1], tmp_path / name) for name in ("one", "two"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_compressed_files_carry_neither_time_nor_name(generator: ModuleType) -> None:
    packed = (SAMPLES / "images" / "phantom_01.nii.gz").read_bytes()
    flags, time = packed[3], packed[4:8]
    assert (flags, time) == (0, b"\0\0\0\0")
    assert gzip.decompress(generator.gzip_bytes(b"abc" * 99)) == b"abc" * 99


def test_check_reports_changed_and_missing_files_and_nothing_else(
    generator: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*generated_files(), "manifest.json"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((SAMPLES / name).read_bytes())
    (tmp_path / "dicom/phantom_01/slice_001.dcm").unlink()
    (tmp_path / "labels/phantom_02.nii.gz").write_bytes((SAMPLES / "labels/phantom_03.nii.gz").read_bytes())
    assert generator.main(["--check", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "missing: dicom/phantom_01/slice_001.dcm",
        "differs from its regeneration: labels/phantom_02.nii.gz",
        "sha256 differs from the manifest: labels/phantom_02.nii.gz",
    ]


# --- geometry and content ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_image_and_labels_share_one_grid(case: str) -> None:
    image, labels = load("images", case), load("labels", case)
    assert image.shape == labels.shape
    assert np.array_equal(image.affine, labels.affine)
    assert (image.get_data_dtype(), labels.get_data_dtype()) == (np.int16, np.uint8)


@pytest.mark.parametrize("case", CASES)
def test_all_five_structures_occur(case: str, generator: ModuleType) -> None:
    assert np.unique(np.asarray(load("labels", case).dataobj)).tolist() == sorted(generator.LABELS.values())


@pytest.mark.parametrize("case", CASES)
def test_qform_and_sform_agree(case: str) -> None:
    image = load("images", case)
    assert np.allclose(image.get_qform(coded=True)[0], image.get_sform(coded=True)[0], atol=TOLERANCE_MM)


@pytest.mark.parametrize("case", CASES)
def test_no_two_axes_have_the_same_length(case: str) -> None:
    image = load("images", case)
    assert len(set(image.shape)) == 3
    assert max(image.header.get_zooms()) > 1.3 * min(image.header.get_zooms())


@pytest.mark.parametrize(("case", "codes"), ORIENTATIONS.items())
def test_orientation_codes_differ_between_cases(case: str, codes: str) -> None:
    assert "".join(nib.aff2axcodes(load("images", case).affine)) == codes


def test_the_last_case_is_oblique() -> None:
    directions = nib.affines.from_matvec(load("images", "phantom_06").affine[:3, :3])[:3, :3]
    assert (np.abs(directions) > 0.1).sum() > 3


@pytest.mark.parametrize("case", CASES)
def test_each_organ_lies_on_its_own_side(case: str, generator: ModuleType) -> None:
    labels = load("labels", case)
    array = np.asarray(labels.dataobj)

    def rightness(name: str) -> float:
        centre = np.argwhere(array == generator.LABELS[name]).mean(axis=0)
        return float(nib.affines.apply_affine(labels.affine, centre)[0])

    assert rightness("liver") > rightness("spleen")
    assert rightness("kidney_right") > rightness("kidney_left")


@pytest.mark.parametrize("case", CASES)
def test_the_lesion_is_darker_than_the_liver_around_it(case: str, generator: ModuleType) -> None:
    image, labels = (np.asarray(load(kind, case).dataobj) for kind in ("images", "labels"))
    liver, lesion = (image[labels == generator.LABELS[name]].mean() for name in ("liver", "liver_lesion"))
    assert 30 < liver - lesion < 90


# --- the DICOM series -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def series() -> sitk.Image:
    """The DICOM series as SimpleITK reads it."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(SAMPLES / "dicom" / "phantom_01")))
    return reader.Execute()


def test_the_series_is_one_volume_with_the_voxels_of_the_nifti_file(series: sitk.Image) -> None:
    nifti = sitk.ReadImage(str(SAMPLES / "images" / "phantom_01.nii.gz"))
    assert series.GetSize() == nifti.GetSize()
    assert np.allclose(series.GetSpacing(), nifti.GetSpacing(), atol=TOLERANCE_MM)
    assert np.allclose(series.GetDirection(), nifti.GetDirection(), atol=1e-5)
    assert np.allclose(series.GetOrigin(), nifti.GetOrigin(), atol=TOLERANCE_MM)
    assert np.array_equal(sitk.GetArrayFromImage(series), sitk.GetArrayFromImage(nifti))


def test_the_series_has_one_ct_instance_per_slice() -> None:
    slices = [pydicom.dcmread(path) for path in sorted((SAMPLES / "dicom" / "phantom_01").glob("*.dcm"))]
    assert len({ds.SOPInstanceUID for ds in slices}) == len(slices) == load("images", "phantom_01").shape[2]
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        assert len({ds[name].value for ds in slices}) == 1
    assert {ds.SOPClassUID for ds in slices} == {pydicom.uid.CTImageStorage}
    assert {ds.file_meta.TransferSyntaxUID for ds in slices} == {pydicom.uid.ExplicitVRLittleEndian}
    assert all(
        ds.SOPInstanceUID.is_valid and ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID for ds in slices
    )


def test_stored_values_rescale_to_hounsfield_units() -> None:
    ds = pydicom.dcmread(SAMPLES / "dicom" / "phantom_01" / "slice_020.dcm")
    hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    expected = np.asarray(load("images", "phantom_01").dataobj)[:, :, 19].T
    assert np.array_equal(hu, expected)


# --- training phantoms ------------------------------------------------------------------------------------------------


def test_training_seeds_are_never_sample_seeds(generator: ModuleType) -> None:
    samples = {spec.seed for spec in generator.SAMPLES}
    training = {generator.training_spec(index).seed for index in range(1000)}
    assert len(training) == 1000
    assert not samples & training


def test_training_phantoms_form_an_nnunet_dataset(generator: ModuleType, tmp_path: Path) -> None:
    names = generator.write_training_dataset(tmp_path, 2)
    dataset = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    assert dataset["numTraining"] == len(names) == 2
    assert dataset["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    for name in names:
        image, labels = (
            nib.load(tmp_path / f"imagesTr/{name}_0000.nii.gz"),
            nib.load(tmp_path / f"labelsTr/{name}.nii.gz"),
        )
        assert image.shape == labels.shape
        assert set(np.unique(np.asarray(labels.dataobj))) == set(generator.LABELS.values())
