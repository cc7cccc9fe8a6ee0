"""Small real things to test on: nnU-Net model folders with random weights, and volumes on odd grids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

IMPORTED_BY_NAME = ["conv_op", "norm_op", "dropout_op", "nonlin"]


def make_model_folder(
    path: Path,
    *,
    labels: Mapping[str, Any] | None = None,
    channels: Sequence[str] = ("CT",),
    reader: str = "SimpleITKIO",
    folds: Sequence[str] = ("0",),
    spacing_zyx_mm: Sequence[float] = (2.5, 1.5, 1.5),
    patch: Sequence[int] = (16, 24, 24),
    transpose: Sequence[int] = (0, 1, 2),
    mirror_axes: Sequence[int] | None = (0, 1, 2),
    checkpoint_name: str = "checkpoint_final.pth",
    trainer: str = "nnUNetTrainer",
    dataset_extra: Mapping[str, Any] | None = None,
    architecture: Mapping[str, Any] | None = None,
    configuration: str | None = None,
    seed: int = 0,
) -> Path:
    """Write an nnU-Net v2 model folder whose network is real, tiny and untrained; returns `path`.

    An untrained network is the hardest case for equality: its label borders run through every part of the image. No
    class is favoured, so that every one of them occurs. `architecture` replaces ``network_class_name`` and arguments.
    """
    labels = dict(labels or {"background": 0, "liver": 1, "spleen": 2})
    dataset = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": labels,
        "numTraining": 4,
        "file_ending": ".nii.gz",
        **(dataset_extra or {}),
    }
    configuration = configuration or ("2d" if len(patch) == 2 else "3d_fullres")
    plans = _plans(configuration, reader, list(spacing_zyx_mm), list(patch), list(transpose), len(channels))
    _replace_architecture(plans["configurations"][configuration]["architecture"], architecture or {})
    path.mkdir(parents=True, exist_ok=True)
    (path / "dataset.json").write_text(json.dumps(dataset))
    (path / "plans.json").write_text(json.dumps(plans))
    heads = _number_of_heads(labels)
    for number, fold in enumerate(folds):
        torch.manual_seed(seed + number)
        architecture = plans["configurations"][configuration]["architecture"]
        network = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            len(channels),
            heads,
            deep_supervision=False,
        )
        _balance(network, len(channels), patch)
        checkpoint = {
            "network_weights": network.state_dict(),
            "trainer_name": trainer,
            "init_args": {"configuration": configuration, "fold": fold},
            "inference_allowed_mirroring_axes": None if mirror_axes is None else tuple(mirror_axes),
        }
        (path / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(checkpoint, path / f"fold_{fold}" / checkpoint_name)
    return path


def _balance(network: torch.nn.Module, channels: int, patch: Sequence[int]) -> None:
    """Shift the output layer's biases so that on noise every class has the same mean."""
    with torch.inference_mode():
        logits = network.eval()(torch.randn(1, channels, *patch))
    bias = network.decoder.seg_layers[-1].bias
    with torch.no_grad():
        bias -= logits.mean(dim=[0, *range(2, logits.ndim)]).clone()


def _number_of_heads(labels: Mapping[str, Any]) -> int:
    values = [value for name, value in labels.items() if name != "ignore"]
    has_regions = any(isinstance(value, list) and len(value) > 1 for value in values)
    return len(values) - 1 if has_regions else len(values)


def _replace_architecture(plan: dict[str, Any], replacement: Mapping[str, Any]) -> None:
    for name, value in replacement.items():
        if name == "network_class_name":
            plan[name] = value
        elif value is None:
            del plan["arch_kwargs"][name]
        else:
            plan["arch_kwargs"][name] = value


def _plans(
    name: str, reader: str, spacing: list[float], patch: list[int], transpose: list[int], channels: int
) -> dict[str, Any]:
    dimension = len(patch)
    convolution = f"torch.nn.modules.conv.Conv{dimension}d"
    normalisation = f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d"
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": patch,
        "spacing": spacing[-dimension:],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 8, 8],
                "conv_op": convolution,
                "kernel_sizes": [[3] * dimension] * 3,
                "strides": [[1] * dimension, [2] * dimension, [2] * dimension],
                "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
                "conv_bias": True,
                "norm_op": normalisation,
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": IMPORTED_BY_NAME,
        },
        "batch_dice": False,
    }
    statistics = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 0.0)
    return {
        "dataset_name": "Dataset999_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": reader,
        "transpose_forward": transpose,
        "transpose_backward": [transpose.index(axis) for axis in range(3)],
        "configurations": {name: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(index): statistics for index in range(channels)},
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": [32, 32, 32],
    }


def make_image(
    path: Path, shape_xyz: Sequence[int] = (33, 27, 18), affine_ras: np.ndarray | None = None, seed: int = 0
) -> Path:
    """Write an int16 NIfTI image of smooth noise with an air rim, so that cropping and borders matter."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=shape_xyz)
    for axis in range(3):
        noise = (noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)) / 3
    array = (noise * 400).astype(np.int16)
    array[array == 0] = 1
    array[:2], array[:, -3:] = 0, 0
    affine = np.diag([1.7, 1.3, 3.1, 1.0]) if affine_ras is None else affine_ras
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def odd_grids() -> dict[str, np.ndarray]:
    """Return affines (voxel -> RAS mm): flips, permutations, oblique, negative determinant, anisotropic."""
    spacing = np.array([1.7, 1.3, 3.1])
    axes = {"x": 0, "y": 1, "z": 2}
    codes = ("+x+y+z", "-x-y+z", "-x+y+z", "+x-y+z", "+x+y-z", "+y+z+x", "-z+x-y", "+z-y+x", "-y-x-z", "+x-z+y")
    grids = {}
    for code in codes:
        affine = np.eye(4)
        affine[:3, :3] = 0
        for column in range(3):
            sign, axis = code[2 * column], axes[code[2 * column + 1]]
            affine[axis, column] = spacing[column] * (1 if sign == "+" else -1)
        affine[:3, 3] = (-12.5, 40.25, 7.75)
        grids[code] = affine
    for name, angles in {"oblique": (20, -15, 35), "slightly-oblique": (3, 2, -4)}.items():
        grids[name] = _rotated(np.diag([*spacing, 1.0]), angles)
        grids[f"{name}-left-handed"] = _rotated(np.diag([-spacing[0], *spacing[1:], 1.0]), angles)
    grids["very-anisotropic"] = np.diag([0.9, 0.9, 6.0, 1.0])
    grids["thick-first-axis"] = np.diag([-5.5, 1.1, -1.4, 1.0])
    return grids


def _rotated(affine: np.ndarray, degrees: Sequence[float]) -> np.ndarray:
    rotation = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        cosine, sine = np.cos(angle), np.sin(angle)
        one, two = [index for index in range(3) if index != axis]
        turn = np.eye(3)
        turn[one, one] = turn[two, two] = cosine
        turn[one, two], turn[two, one] = -sine, sine
        rotation = rotation @ turn
    turned = affine.copy()
    turned[:3, :3] = rotation @ affine[:3, :3]
    turned[:3, 3] = (11.0, -23.5, 5.25)
    return turned
