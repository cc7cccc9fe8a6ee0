"""Patches with labels interpolated at borders only are nnU-Net's own patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

from mshub.nnunet import trainer
from mshub.nnunet.label_warping import LabelFirstTransform

SHAPE, PATCH = (22, 30, 26), (16, 24, 20)


def blobs(labels: int, channels: int, seed: int) -> torch.Tensor:
    """Return label maps with large and small structures, and single voxels of others."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(-1, labels, (channels, *[-(-edge // 4) for edge in SHAPE]))
    fine = coarse.repeat(4, 1).repeat(4, 2).repeat(4, 3)[:, : SHAPE[0], : SHAPE[1], : SHAPE[2]]
    return torch.from_numpy(np.where(generator.random(fine.shape) < 0.01, labels - 1, fine).astype(np.int16))


def warped(transform: SpatialTransform, segmentation: torch.Tensor, seed: int) -> torch.Tensor:
    np.random.seed(seed)
    torch.manual_seed(seed)
    image = torch.zeros((1, *segmentation.shape[1:]))
    found: torch.Tensor = transform(image=image, segmentation=segmentation.clone())["segmentation"]
    return found


def transform_like_nnunet(patch: tuple[int, ...] = PATCH, **options: Any) -> SpatialTransform:
    chances = {"p_rotation": 1, "p_scaling": 1, "rotation": (-0.5, 0.5), "scaling": (0.7, 1.4)}
    return SpatialTransform(patch, 0, random_crop=False, **{**chances, **options})


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("border", ["constant", "zeros", "border", "reflection"])
@pytest.mark.parametrize(("labels", "channels"), [(1, 1), (2, 1), (9, 2)])
def test_the_segmentation_is_that_of_nnunet(labels: int, channels: int, border: str, seed: int) -> None:
    plain = transform_like_nnunet(border_mode_seg=border, padding_value_seg=-1, p_elastic_deform=seed % 2)
    segmentation = blobs(labels, channels, seed)
    expected = warped(plain, segmentation, seed)
    found = warped(LabelFirstTransform.like(plain), segmentation, seed)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert found.shape == (channels, *PATCH)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_places_between_two_labels_are_decided_alike(scale: float) -> None:
    plain = transform_like_nnunet(p_rotation=0, scaling=(scale, scale), border_mode_seg="constant")
    segmentation = torch.arange(22 * 30 * 26).reshape(1, *SHAPE).remainder(3).to(torch.int16)
    found = warped(LabelFirstTransform.like(plain), segmentation, 1)
    assert torch.equal(found, warped(plain, segmentation, 1))


def test_a_patch_that_is_only_cropped_and_one_of_two_axes_are_nnunets() -> None:
    plain = transform_like_nnunet(p_rotation=0, p_scaling=0)
    assert torch.equal(warped(LabelFirstTransform.like(plain), blobs(4, 1, 0), 0), warped(plain, blobs(4, 1, 0), 0))
    flat = transform_like_nnunet((24, 20))
    segmentation = blobs(4, 1, 0)[:, 8]
    assert torch.equal(warped(LabelFirstTransform.like(flat), segmentation, 0), warped(flat, segmentation, 0))


def test_few_places_are_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    own = SpatialTransform._apply_to_segmentation

    def counted(transform: Any, segmentation: torch.Tensor, **params: Any) -> torch.Tensor:
        asked.append(len(params["grid"]))
        result: torch.Tensor = own(transform, segmentation, **params)
        return result

    monkeypatch.setattr(SpatialTransform, "_apply_to_segmentation", counted)
    segmentation = torch.zeros((1, *SHAPE), dtype=torch.int16)
    segmentation[:, 8:12, 10:16, 10:16] = 3
    warped(LabelFirstTransform.like(transform_like_nnunet(scaling=(0.6, 0.7), rotation=(0, 0.01))), segmentation, 0)
    assert 0 < sum(asked) < np.prod(PATCH) / 4


def test_trainings_have_it() -> None:
    made = trainer._Trainer.get_training_transforms(PATCH, (-0.5, 0.5), None, (0, 1, 2), False)
    kinds = [type(transform) for transform in made.transforms]
    assert LabelFirstTransform in kinds
    assert SpatialTransform not in kinds
