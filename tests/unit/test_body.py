"""The profile ``fast`` looks at the body only: the box holds all of it, and the label is that of the cropped image."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from factories import make_model_folder
from mshub.nnunet.body import MARGIN_MM, body_box
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, PredictOptions, Profile

SPACING = (4.0, 4.0, 6.0)
AIR, TISSUE = -1000, 40


def patient(shape: tuple[int, ...] = (60, 50, 40), radii: tuple[float, ...] = (12, 10, 15)) -> np.ndarray:
    """Return an ellipsoid of tissue in noisy air, off the middle, beside a thin table; axes x, y, z."""
    rng = np.random.default_rng(0)
    places = np.meshgrid(*[np.arange(size) for size in shape], indexing="ij")
    inside = sum(
        ((place - 0.45 * size) / radius) ** 2 for place, size, radius in zip(places, shape, radii, strict=True)
    )
    image = np.where(inside <= 1, TISSUE, AIR) + rng.normal(0, 15, shape)
    image[:, int(0.9 * shape[1]), :] = -100
    return image.astype(np.int16)


def test_the_box_is_that_of_the_body_and_its_margin() -> None:
    image = patient()
    box = body_box(image.astype(np.float32), SPACING)
    assert box is not None
    body = np.argwhere(image[:, :44] > -300)
    for axis, spacing in enumerate(SPACING):
        margin = round(MARGIN_MM / spacing)
        assert box[axis] == [
            max(0, body[:, axis].min() - margin),
            min(image.shape[axis], body[:, axis].max() + 1 + margin),
        ]


@pytest.mark.parametrize("size", [100, 300, 517])
def test_a_large_image_is_looked_at_coarsely_and_nothing_is_cut_off(size: int) -> None:
    image = np.full((size, 40, 40), AIR, np.float32)
    image[size // 3 : 2 * size // 3, 10:30, 10:30] = TISSUE
    box = body_box(image, (1.0, 1.0, 1.0))
    assert box is not None
    assert box[0][0] <= size // 3 - MARGIN_MM + 1
    assert box[0][1] >= 2 * size // 3 + MARGIN_MM - 1
    assert box[0][1] - box[0][0] <= size // 3 + 2 * MARGIN_MM + 12


@pytest.mark.parametrize("share", [0.0, 0.001])
def test_without_a_body_nothing_is_left_out(share: float) -> None:
    image = np.full((50, 50, 50), AIR, np.float32)
    image.ravel()[: int(share * image.size)] = TISSUE
    assert body_box(image, SPACING) is None


def test_a_body_that_fills_the_image_is_left_whole() -> None:
    assert body_box(np.full((20, 30, 40), TISSUE, np.float32), SPACING) == [[0, 20], [0, 30], [0, 40]]


def predict(folder: Path, path: Path, profile: Profile) -> np.ndarray:
    predictor = NNUNetPredictor(ModelFolder.open(folder), NetworkCache())
    return predictor.predict([path], PredictOptions(profile, device="cpu")).labels.array_xyz


def ct_model(path: Path, transpose: tuple[int, ...] = (0, 1, 2)) -> Path:
    """Write a model whose images are normalised as CT is."""
    make_model_folder(path, transpose=transpose, spacing_zyx_mm=(5.0, 4.5, 4.5))
    plans = json.loads((path / "plans.json").read_text())
    for configuration in plans["configurations"].values():
        configuration["normalization_schemes"] = ["CTNormalization"]
    (path / "plans.json").write_text(json.dumps(plans))
    return path


def save(path: Path, voxels: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.diag([*SPACING, 1.0])), path)
    return path


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
def test_fast_labels_the_body_as_if_the_image_were_cropped_to_it(tmp_path: Path, transpose: tuple[int, ...]) -> None:
    folder = ct_model(tmp_path / "model", transpose)
    voxels = patient()
    box = body_box(voxels.astype(np.float32), SPACING)
    assert box is not None
    inside = tuple(slice(*edges) for edges in box)
    label = predict(folder, save(tmp_path / "image.nii.gz", voxels), PROFILES["fast"])
    same = Profile("same", mirroring=False, step=PROFILES["fast"].step)
    expected = np.zeros_like(label)
    expected[inside] = predict(folder, save(tmp_path / "cropped.nii.gz", voxels[inside]), same)
    np.testing.assert_array_equal(label, expected)
    whole = predict(folder, tmp_path / "image.nii.gz", same)
    assert whole[:4].any(), "an untrained network finds structures in air too"
    assert not label[:4].any()


def test_an_mr_image_is_left_whole(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", channels=("T1w",), spacing_zyx_mm=(5.0, 4.5, 4.5))
    path = save(tmp_path / "image.nii.gz", patient())
    same = Profile("same", mirroring=False, step=PROFILES["fast"].step)
    np.testing.assert_array_equal(predict(folder, path, PROFILES["fast"]), predict(folder, path, same))
