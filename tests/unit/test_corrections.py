"""Submitted labels are read by name, whatever the client's numbers, and refused when anything about them is unclear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from mshub.corrections import read_correction
from mshub.errors import CaseError, GeometryError, LabelError
from mshub.geometry import Grid

KNOWN = ("liver", "spleen", "kidney_left", "liver_lesion")
SHAPE = (7, 9, 5)
AFFINE = np.array([[0, -1.5, 0, 10], [1.2, 0, 0, -4], [0, 0, 3.0, 7], [0, 0, 0, 1.0]])
IMAGE = Grid(SHAPE, AFFINE)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def scene(**values: int) -> list[dict[str, Any]]:
    return [{"name": name, "idx": value} for name, value in values.items()]


@pytest.fixture
def label(tmp_path: Path) -> Path:
    """Spleen is 1 and liver is 3 in this scene, the other way round than in any model."""
    array = np.zeros(SHAPE, np.uint8)
    array[1:3, 2:4, 1:3] = 1
    array[4:6, 5:8, 0:2] = 3
    return save(tmp_path / "label.nii.gz", array)


def test_scene_order_numbers_are_read_by_name(label: Path) -> None:
    correction = read_correction(label, scene(spleen=1, kidney_left=2, liver=3), IMAGE, KNOWN)
    assert correction.values == {"spleen": 1, "kidney_left": 2, "liver": 3}
    assert correction.voxels == {"spleen": 8, "kidney_left": 0, "liver": 12}


def test_names_are_spelled_as_the_models_spell_them(label: Path) -> None:
    correction = read_correction(label, [{"name": " Spleen", "idx": 1}, {"name": "LIVER", "idx": 3}], IMAGE, KNOWN)
    assert list(correction.values) == ["spleen", "liver"]


def test_what_was_reviewed_is_what_is_there_or_was_predicted(label: Path) -> None:
    correction = read_correction(label, scene(spleen=1, kidney_left=2, liver=3, liver_lesion=4), IMAGE, KNOWN)
    assert correction.reviewed() == ("spleen", "liver")
    assert correction.reviewed(predicted=("liver", "liver_lesion")) == ("spleen", "liver", "liver_lesion")


def test_background_may_be_a_segment_of_value_0(label: Path) -> None:
    segments = [{"name": "background", "idx": 0}, *scene(spleen=1, liver=3)]
    assert list(read_correction(label, segments, IMAGE, KNOWN).values) == ["spleen", "liver"]


def test_an_empty_label_is_a_valid_statement(tmp_path: Path) -> None:
    path = save(tmp_path / "empty.nii.gz", np.zeros(SHAPE, np.uint8))
    assert read_correction(path, scene(liver=1), IMAGE, KNOWN).voxels == {"liver": 0}


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (None, "without the names of its segments"),
        ([], "without the names of its segments"),
        ("liver", "without the names of its segments"),
        ([{"name": "liver"}], "Expected a name and a whole number"),
        ([{"name": "liver", "idx": "1"}], "Expected a name and a whole number"),
        ([{"name": "liver", "idx": True}], "Expected a name and a whole number"),
        (["liver"], "Expected a name and a whole number"),
        (scene(spleen=1, livr=3), "structure called 'livr'. Did you mean liver.*Known: kidney_left, liver"),
        (scene(spleen=1, Segment_4=3), "Segment_4.*rename the segment"),
        ([*scene(spleen=1, liver=3), {"name": "Liver ", "idx": 4}], "called liver"),
        (scene(spleen=1, liver=1), "numbered 1"),
        (scene(spleen=-1, liver=3), "not positive"),
        (scene(spleen=1), r"the value 3, which no segment has. Found: segments 1 \(spleen\)"),
    ],
)
def test_unclear_names_and_numbers_are_refused(label: Path, segments: Any, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        read_correction(label, segments, IMAGE, KNOWN)


def test_fractions_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "soft.nii.gz", np.full(SHAPE, 0.5, np.float32))
    with pytest.raises(LabelError, match="whole numbers"):
        read_correction(path, scene(liver=1), IMAGE, KNOWN)


@pytest.mark.parametrize(
    ("shape", "affine"),
    [
        ((9, 7, 5), AFFINE),
        (SHAPE, AFFINE + np.array([[0, 0, 0, 1.0], *np.zeros((3, 4))])),
        (SHAPE, AFFINE @ np.diag([-1, 1, 1, 1.0])),
        (SHAPE, AFFINE @ np.diag([1, 1, 1.5, 1.0])),
    ],
    ids=["other shape", "shifted", "flipped", "other spacing"],
)
def test_a_label_on_another_grid_is_refused(tmp_path: Path, shape: tuple[int, ...], affine: np.ndarray) -> None:
    path = save(tmp_path / "label.nii.gz", np.ones(shape, np.uint8), affine)
    with pytest.raises(GeometryError, match=r"the label.*the image"):
        read_correction(path, scene(liver=1), IMAGE, KNOWN)


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "label.nii.gz"
    path.write_bytes(content)
    with pytest.raises(CaseError):
        read_correction(path, scene(liver=1), IMAGE, KNOWN)


def test_a_label_of_another_grid_is_refused_before_its_voxels_are_read(
    label: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mshub.corrections.read_volume", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(GeometryError):
        read_correction(label, scene(spleen=1, liver=3), Grid((7, 9, 6), AFFINE), KNOWN)
