"""A trained nnU-Net v2 model folder: found, validated and opened without running anybody's code."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from mshub.errors import ModelFolderError
from mshub.labels import LabelMap
from mshub.nnunet.checkpoints import first_line, load_checkpoint
from mshub.nnunet.pieces import check_architecture, check_pieces, check_sizes
from mshub.nnunet.postprocessing import KEEP_LARGEST, check_rules

logger = logging.getLogger(__name__)

CHECKPOINT_NAMES = ("checkpoint_final.pth", "checkpoint_best.pth")
V1_INFERENCE = "mshub_predicts_as_nnunet_v1"  # in plans.json; nnU-Net itself ignores it
MAX_JSON_BYTES = 16 * 2**20
# Plans of nnU-Net 2.0 to 2.3, which it reads well; it warns whoever opens them that it might not.
warnings.filterwarnings("ignore", message="Detected old nnU-Net plans format")


@contextmanager
def _explained() -> Iterator[None]:
    """Say in a sentence that keys are missing or of another type than nnU-Net writes."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ModelFolderError(
            f"dataset.json, plans.json or the checkpoint is not as nnU-Net v2 writes it ({type(error).__name__}: "
            f"{first_line(error)}). Copy the model folder again."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFolderError(
                f"{path.name} has {path.stat().st_size:,} bytes; at most {MAX_JSON_BYTES:,} are read. Check that this "
                "is the file nnU-Net wrote."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFolderError(
            f"{path.parent} is no nnU-Net v2 model folder: {path.name} is missing. Expected dataset.json, plans.json "
            "and fold_X/checkpoint_final.pth side by side."
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, numbers without end
        raise ModelFolderError(
            f"{path.name} cannot be read: {first_line(error)}. Copy the model folder again."
        ) from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path.name} holds a {type(content).__name__}; expected a JSON object.")
    return content


@dataclass(frozen=True)
class ModelFolder:
    """One trained nnU-Net v2 configuration on disk: `dataset.json`, `plans.json`, `fold_*/checkpoint_*.pth`.

    Attributes
    ----------
    path : Path
        The folder.
    dataset, plans : dict
        The parsed JSON files.
    configuration : str
        Name of the configuration the weights were trained for, such as ``3d_fullres``.
    trainer : str
        Name of the trainer class that made the weights; informative, it is never imported.
    mirror_axes : tuple of int or None
        Spatial axes (of the transposed, network-order image) that test-time mirroring may flip.
    folds : tuple of str
        Folds with a checkpoint, such as ``("0", "1")`` or ``("all",)``.
    checkpoint_name : str
        ``checkpoint_final.pth``, or ``checkpoint_best.pth`` where no fold has a final one.
    """

    path: Path
    dataset: dict[str, Any]
    plans: dict[str, Any]
    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...] | None
    folds: tuple[str, ...]
    checkpoint_name: str

    @classmethod
    def open(cls, path: Path) -> ModelFolder:
        """Read and validate the folder at `path`.

        Raises
        ------
        ModelFolderError
            Something is missing, damaged, or of a kind MSHub cannot run.
        """
        dataset, plans = _read_json(path / "dataset.json"), _read_json(path / "plans.json")
        checkpoint_name, folds = _find_folds(path)
        checkpoint = load_checkpoint(path / f"fold_{folds[0]}" / checkpoint_name)
        with _explained():
            folder = cls(
                path=path,
                dataset=dataset,
                plans=plans,
                configuration=_configuration_name(checkpoint, plans),
                trainer=str(checkpoint["trainer_name"]),
                mirror_axes=_mirror_axes(checkpoint.get("inference_allowed_mirroring_axes")),
                folds=folds,
                checkpoint_name=checkpoint_name,
            )
            folder._validate()
        return folder

    @cached_property
    def labels(self) -> LabelMap:
        """Names and values of the structures this model predicts."""
        return LabelMap.from_dataset_json(self.dataset)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the input channels, in the order of the file suffixes ``_0000``, ``_0001``..."""
        names = self.dataset.get("channel_names") or self.dataset.get("modality") or {}
        return tuple(str(names[key]) for key in sorted(names, key=int))

    @property
    def reader(self) -> str:
        """Name of the nnU-Net reader class the model was trained with."""
        return str(self.plans.get("image_reader_writer", "SimpleITKIO"))

    @property
    def predicts_as_v1(self) -> bool:
        """Whether the model is one of nnU-Net v1, to be predicted with as v1 did."""
        return bool(self.plans.get(V1_INFERENCE))

    @property
    def keeps_largest(self) -> list[dict[str, Any]]:
        """Which structures are reduced to their largest component: see `mshub.nnunet.postprocessing`."""
        return list(self.plans.get(KEEP_LARGEST) or ())

    @cached_property
    def plans_manager(self) -> PlansManager:
        """nnU-Net's own view of `plans`."""
        return PlansManager(self.plans)

    @cached_property
    def configuration_manager(self) -> ConfigurationManager:
        """nnU-Net's own view of the configuration, with inheritance resolved."""
        return self.plans_manager.get_configuration(self.configuration)

    def checkpoint(self, fold: str) -> dict[str, Any]:
        """Load the checkpoint of one fold; see `load_checkpoint`."""
        return load_checkpoint(self.path / f"fold_{fold}" / self.checkpoint_name)

    def _validate(self) -> None:
        if not self.channels:
            raise ModelFolderError("dataset.json names no input channels: expected channel_names such as {'0': 'CT'}.")
        check_architecture(self.plans["configurations"][self.configuration])
        check_pieces(self.plans, self.configuration_manager.configuration)
        check_sizes(self.configuration_manager.configuration)
        check_rules(self.keeps_largest)
        if self.configuration_manager.previous_stage_name:
            raise ModelFolderError(
                f"{self.configuration} is the second stage of a cascade and needs the segmentation of "
                f"{self.configuration_manager.previous_stage_name}; cascades are not supported. "
                "Add the model's 3d_fullres or 3d_lowres configuration instead."
            )
        _ = self.labels  # raises LabelError here rather than at the first prediction


def _find_folds(path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the checkpoint file name and the folds that have it, numbered folds before ``all``.

    nnU-Net predicts with the numbered folds and ignores ``fold_all`` unless asked for it; so does MSHub.
    """
    for name in CHECKPOINT_NAMES:
        found = {file.parent.name.removeprefix("fold_") for file in path.glob(f"fold_*/{name}")}
        numbered = sorted((fold for fold in found if fold.isdigit()), key=int)
        if numbered or "all" in found:
            return name, tuple(numbered) or ("all",)
    raise ModelFolderError(
        f"{path} holds no weights: no fold_X/{CHECKPOINT_NAMES[0]} or fold_X/{CHECKPOINT_NAMES[1]}. "
        "Add the folder nnU-Net wrote, with its fold_X subfolders."
    )


def _mirror_axes(axes: Any) -> tuple[int, ...] | None:
    if axes is not None and (not isinstance(axes, (list, tuple)) or len(axes) > 3):
        raise ValueError("inference_allowed_mirroring_axes are no tuple of at most three axes")
    return None if axes is None else tuple(int(axis) for axis in axes)


def _configuration_name(checkpoint: dict[str, Any], plans: dict[str, Any]) -> str:
    name = checkpoint["init_args"].get("configuration")
    if not isinstance(name, str):
        raise ValueError("the configuration in init_args is no text")
    known = plans.get("configurations")
    if not isinstance(known, dict) or name not in known:
        raise ModelFolderError(
            f"The weights were trained for the configuration {name}, which plans.json does not have "
            f"(it has {', '.join(known or ()) or 'none'}). plans.json and the checkpoint are of different models."
        )
    return name
