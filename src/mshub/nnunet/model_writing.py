"""Write trained-model folders as nnU-Net does: stock nnU-Net predicts with them too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mshub.nnunet.folder import ModelFolder

CHECKPOINT = "checkpoint_final.pth"


def write_trained(path: Path, parent: ModelFolder, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write the folder of a model that has new weights (fold -> ``network_weights``) and all else of its parent."""
    write_model_folder(
        path, parent.dataset, parent.plans, parent.configuration, parent.trainer, parent.mirror_axes, weights
    )


def write_model_folder(
    path: Path,
    dataset: Mapping[str, Any],
    plans: Mapping[str, Any],
    configuration: str,
    trainer: str,
    mirror_axes: tuple[int, ...] | None,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Write ``dataset.json``, ``plans.json`` and one checkpoint per fold.

    Parameters
    ----------
    path : Path
        Made if needed.
    dataset, plans : mapping
        Content of the two JSON files.
    configuration : str
        Such as ``3d_fullres``.
    trainer : str
        Name of the nnU-Net trainer class that stock nnU-Net is to use for predicting.
    mirror_axes : tuple of int or None
        Axes that test-time mirroring may flip.
    weights : mapping of str to mapping
        Fold -> ``network_weights``.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "dataset.json").write_text(json.dumps(dataset, indent=2), encoding="utf-8")
    (path / "plans.json").write_text(json.dumps(plans, indent=2), encoding="utf-8")
    for fold, tensors in weights.items():
        folder = path / f"fold_{fold}"
        folder.mkdir(exist_ok=True)
        checkpoint = {
            "network_weights": dict(tensors),
            "trainer_name": trainer,
            "init_args": {"configuration": configuration, "fold": fold},
            "inference_allowed_mirroring_axes": mirror_axes,
        }
        torch.save(checkpoint, folder / CHECKPOINT)
