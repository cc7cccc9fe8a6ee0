"""Trained-model folders of nnU-Net v1, tiny and written by hand: the files v1 itself reads and predicts with.

``make_v1_golden.py`` runs nnU-Net v1 on these folders and images, so this module knows numpy, torch and nibabel only.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch


@dataclass(frozen=True)
class V1Model:
    """What a v1 model is made of; axes in network order."""

    patch: tuple[int, ...]
    pools: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    spacing: tuple[float, float, float]
    schemes: tuple[str, ...] = ("nonCT",)
    masks: tuple[bool, ...] = (False,)
    classes: int = 2
    transpose: tuple[int, int, int] = (0, 1, 2)
    convolutions: int = 2
    batch_norm: bool = False
    trainer: str = "nnUNetTrainerV2"
    folds: tuple[str, ...] = ("0",)
    stage: int = 0
    stages: int = 1
    features: int = 4
    plans: Mapping[str, Any] = field(default_factory=dict)


MODELS = {
    "anisotropic": V1Model(
        patch=(6, 16, 16),
        pools=((1, 2, 2), (2, 2, 2)),
        kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        spacing=(4.0, 0.9, 0.9),
        schemes=("nonCT", "nonCT"),
        masks=(True, False),
    ),
    "sagittal": V1Model(
        patch=(12, 16, 8),
        pools=((2, 2, 1), (2, 2, 2)),
        kernels=((3, 3, 3), (3, 3, 3), (3, 3, 3)),
        spacing=(1.4, 1.6, 2.1),
        schemes=("CT",),
        masks=(True,),
        transpose=(2, 0, 1),
        folds=("0", "1"),
    ),
    "slices": V1Model(
        patch=(16, 24),
        pools=((2, 2), (2, 2)),
        kernels=((3, 3), (3, 3), (3, 3)),
        spacing=(3.0, 1.1, 1.0),
        folds=("all",),
        classes=3,
        trainer="nnUNetTrainerV2_noMirroring",
    ),
    "batch-norm": V1Model(
        patch=(8, 8, 16),
        pools=((1, 1, 2), (2, 2, 2)),
        kernels=((3, 1, 3), (3, 3, 3), (1, 3, 3)),
        spacing=(2.0, 1.5, 1.5),
        convolutions=3,
        batch_norm=True,
        trainer="nnUNetTrainerV2_BN",
        plans={"conv_per_stage": 3},
    ),
}

INTENSITIES = {"mean": 60.0, "sd": 150.0, "percentile_00_5": -300.0, "percentile_99_5": 420.0, "median": 55.0}
HOSPITAL = "/data/StElsewhere/patient_Smith_John.npz"


def write_v1_folder(path: Path, model: V1Model) -> Path:
    """Write the folder nnU-Net v1 would have trained; returns `path`."""
    plans = v1_plans(model)
    path.mkdir(parents=True, exist_ok=True)
    (path / "plans.pkl").write_bytes(pickle.dumps(plans))
    for number, fold in enumerate(model.folds):
        folder = path / (fold if fold == "all" else f"fold_{fold}")
        folder.mkdir(exist_ok=True)
        file = folder / "model_final_checkpoint.model"
        number_of_fold = fold if fold == "all" else int(fold)
        paths = (str(path), str(path / "preprocessed"))
        init = (str(path / "plans.pkl"), number_of_fold, *paths, False, model.stage, True, False, True)
        init = (*init[:2], 0, *init[2:]) if "DDP" in model.trainer else init
        info = OrderedDict(init=init, name=model.trainer, plans=plans)
        info["class"] = f"<class 'nnunet.training.{model.trainer}'>"
        file.with_name(f"{file.name}.pkl").write_bytes(pickle.dumps(info))
        torch.save(v1_checkpoint(model, seed=number), file)
    return path


def v1_checkpoint(model: V1Model, seed: int = 0) -> dict[str, Any]:
    """Return what v1 gives to torch for one fold."""
    history = [np.float64(0.5), np.float64(0.4)]
    return {
        "epoch": 1000,
        "state_dict": v1_weights(model, seed),
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "lr_scheduler_state_dict": None,
        "plot_stuff": (history, history, [], history),
        "best_stuff": (np.float64(0.3), np.float64(0.9), np.float64(0.9)),
    }


def v1_plans(model: V1Model) -> dict[str, Any]:
    """Return the plans as v1 pickles them: numpy arrays and scalars, integer keys, case ids and paths."""
    stage = {
        "batch_size": 2,
        "num_pool_per_axis": list(np.sum(np.log2(np.array(model.pools)), axis=0).astype(int)),
        "patch_size": np.array(model.patch),
        "median_patient_size_in_voxels": np.array([20.0, 31.0, 27.0]),
        "current_spacing": np.array(model.spacing),
        "original_spacing": np.array(model.spacing),
        "do_dummy_2D_data_aug": np.bool_(False),
        "pool_op_kernel_sizes": [list(pool) for pool in model.pools],
        "conv_kernel_sizes": [list(kernel) for kernel in model.kernels],
    }
    channels = range(len(model.schemes))
    statistics = {**{key: np.float32(value) for key, value in INTENSITIES.items()}, "mn": -1000.0, "mx": 2000.0}
    local = OrderedDict({HOSPITAL: {"mean": np.float32(1.5)}})
    return {
        "num_stages": model.stages,
        "num_modalities": len(model.schemes),
        "modalities": {number: "CT" if model.schemes[number] == "CT" else "MRI" for number in channels},
        "normalization_schemes": OrderedDict((number, model.schemes[number]) for number in channels),
        "use_mask_for_norm": OrderedDict((number, np.bool_(model.masks[number])) for number in channels),
        "dataset_properties": {
            "intensityproperties": OrderedDict((number, {**statistics, "local_props": local}) for number in channels),
        },
        "list_of_npz_files": [HOSPITAL] * 7,
        "num_classes": model.classes,
        "all_classes": np.arange(1, model.classes + 1),
        "base_num_features": model.features,
        "keep_only_largest_region": None,
        "min_region_size_per_class": None,
        "min_size_per_class": None,
        "transpose_forward": list(model.transpose),
        "transpose_backward": [model.transpose.index(axis) for axis in range(3)],
        "data_identifier": "nnUNetData_plans_v2.1",
        "preprocessor_name": "PreprocessorFor2D" if len(model.patch) == 2 else "GenericPreprocessor",
        "conv_per_stage": 2,
        "plans_per_stage": {number: dict(stage) for number in range(model.stages)},
        **model.plans,
    }


def v1_weights(model: V1Model, seed: int = 0) -> OrderedDict[str, torch.Tensor]:
    """Return a state dict of v1's network with random weights."""
    generator = np.random.default_rng(seed)
    weights: OrderedDict[str, torch.Tensor] = OrderedDict()

    def tensor(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return torch.from_numpy((generator.standard_normal(shape) * scale + shift).astype(np.float32))

    def block(name: str, inputs: int, outputs: int, kernel: Sequence[int]) -> None:
        spread = (2 / (inputs * int(np.prod(kernel)))) ** 0.5
        weights[f"{name}.conv.weight"] = tensor(outputs, inputs, *kernel, scale=spread)
        weights[f"{name}.conv.bias"] = tensor(outputs, scale=0.1)
        weights[f"{name}.instnorm.weight"] = tensor(outputs, scale=0.1, shift=1.0)
        weights[f"{name}.instnorm.bias"] = tensor(outputs, scale=0.1)
        if model.batch_norm:
            weights[f"{name}.instnorm.running_mean"] = tensor(outputs, scale=0.1)
            weights[f"{name}.instnorm.running_var"] = tensor(outputs, scale=0.1).abs() + 0.5
            weights[f"{name}.instnorm.num_batches_tracked"] = torch.tensor(7)

    depth, last = len(model.pools), model.convolutions - 1
    features = [model.features * 2**level for level in range(depth + 1)]
    for level, kernel in enumerate(model.kernels):
        for number in range(model.convolutions):
            inputs = features[level] if number else features[level - 1] if level else len(model.schemes)
            place = f"{level}.{1 if number == last else 0}" if level == depth else f"{level}"
            block_number = 0 if level == depth and number == last else number
            block(f"conv_blocks_context.{place}.blocks.{block_number}", inputs, features[level], kernel)
    for up in range(depth):
        level = depth - 1 - up
        weights[f"tu.{up}.weight"] = tensor(features[level + 1], features[level], *model.pools[level], scale=0.3)
        for number in range(model.convolutions):
            place = "1.blocks.0" if number == last else f"0.blocks.{number}"
            name = f"conv_blocks_localization.{up}.{place}"
            block(name, features[level] * (1 if number else 2), features[level], model.kernels[level + 1])
        ones = [1] * len(model.patch)
        head = tensor(model.classes + 1, features[level], *ones, scale=2.0)
        weights[f"seg_outputs.{up}.weight"] = head - head.mean(1, keepdim=True)  # no class is favoured
    return weights


def v1_patch(model: V1Model) -> torch.Tensor:
    """Return an input of the network, axes (1, channel, *patch)."""
    values = np.random.default_rng(5).standard_normal((1, len(model.schemes), *model.patch))
    return torch.from_numpy(values.astype(np.float32))


def write_v1_images(folder: Path, name: str, model: V1Model) -> list[Path]:
    """Write one NIfTI file per channel: rotated grid, unequal dimensions, an air rim; returns the files."""
    shape, spacing = ((27, 22, 9), (0.8, 1.0, 5.0)) if name == "anisotropic" else ((25, 21, 17), (1.5, 1.2, 2.0))
    angle = np.radians(12)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([-spacing[0], spacing[1], spacing[2]]), (11.0, -23.5, 5.25)
    files = []
    for channel in range(len(model.schemes)):
        values = np.random.default_rng(100 + channel).standard_normal(shape)
        for axis in range(3):
            values = (values + np.roll(values, 1, axis) + np.roll(values, 2, axis)) / 3
        array = (values * 900).astype(np.int16)
        array[array == 0] = 1
        array[:2], array[:, -3:], array[:6, :5] = 0, 0, 0
        image = nib.Nifti1Image(array, affine)
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
        files.append(folder / f"{name}_{channel:04d}.nii.gz")
        nib.save(image, files[-1])
    return files
