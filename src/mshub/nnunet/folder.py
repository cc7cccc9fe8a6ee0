"""A trained nnU-Net v2 model folder: found, validated and opened without running anybody's code."""

from __future__ import annotations

import codecs
import importlib
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from mshub.errors import ModelFolderError, UnsafeModelError
from mshub.labels import LabelMap
from mshub.nnunet.pieces import check_architecture, check_pieces
from mshub.nnunet.postprocessing import KEEP_LARGEST, check_rules

logger = logging.getLogger(__name__)

CHECKPOINT_NAMES = ("checkpoint_final.pth", "checkpoint_best.pth")
TRUST = (
    "Nothing was executed. Only if you trust its makers with this computer: `mshub add --trust` runs what is in it, "
    "once, and keeps weights and plain values."
)
V1_INFERENCE = "mshub_predicts_as_nnunet_v1"  # in plans.json; nnU-Net itself ignores it
_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")  # of torch.compile and of data-parallel trainings
# Plans of nnU-Net 2.0 to 2.3, which it reads well; it warns whoever opens them that it might not.
warnings.filterwarnings("ignore", message="Detected old nnU-Net plans format")


def _numpy_safe_globals() -> list[Any]:
    """Return what an nnU-Net checkpoint's training log pickles beside tensors: numpy scalars and their dtypes."""
    scalar = importlib.import_module("numpy.core.multiarray").scalar  # has no public name
    dtypes = [type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "b1")]
    return [scalar, (scalar, "numpy._core.multiarray.scalar"), np.dtype, codecs.encode, *dtypes]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load an nnU-Net v2 checkpoint onto the CPU; see `load_tensors`.

    Raises
    ------
    ModelFolderError
        The file is damaged, is no nnU-Net checkpoint, or holds Python objects that would have to be executed.
    """
    return checked_checkpoint(load_tensors(path), path)


def load_tensors(path: Path) -> Any:
    """Load what torch saved onto the CPU with `weights_only=True`: tensors and plain values.

    Raises
    ------
    UnsafeModelError
        It holds Python objects that would have to be executed.
    ModelFolderError
        It is damaged.
    """
    try:
        with torch.serialization.safe_globals(_numpy_safe_globals()):
            # Checkpoints older than torch's zip format cannot be memory-mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UnsafeModelError(
            f"{path.name} was not loaded: it holds more than weights ({first_line(error)}). Expected tensors and "
            f"plain values only; ask its makers for a checkpoint saved by nnU-Net itself. {TRUST}"
        ) from error
    except Exception as error:  # a damaged stream raises whatever its bytes happen to mean
        raise ModelFolderError(
            f"{path.name} cannot be read as a torch checkpoint ({first_line(error)}). It is probably an incomplete "
            "download: fetch or copy it again."
        ) from error


def checked_checkpoint(checkpoint: Any, path: Path) -> dict[str, Any]:
    """Return the content of an nnU-Net v2 checkpoint, weights under the network's own names.

    Raises
    ------
    ModelFolderError
        It is none.
    """
    expected = ("network_weights", "init_args", "trainer_name")
    missing = [key for key in expected if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise ModelFolderError(
            f"{path.name} is no nnU-Net v2 checkpoint: {', '.join(missing)} not found in it. Expected the "
            "checkpoint_final.pth that nnU-Net v2 writes into fold_X."
        )
    return {**checkpoint, "network_weights": _unwrapped(checkpoint["network_weights"], path)}


def _unwrapped(weights: Any, path: Path) -> dict[str, Any]:
    """Return a state dict without the names torch puts before those of a network it wraps."""
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ModelFolderError(
            f"{path.name} is no nnU-Net v2 checkpoint: its network_weights are not tensors by name. Copy it again."
        )
    return {_WRAPPERS.sub("", str(name), count=1): tensor for name, tensor in weights.items()}


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


def first_line(error: BaseException) -> str:
    """Return what an error of a library says, short enough for a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFolderError(
            f"{path.parent} is no nnU-Net v2 model folder: {path.name} is missing. Expected dataset.json, plans.json "
            "and fold_X/checkpoint_final.pth side by side."
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelFolderError(f"{path.name} cannot be read: {error}. Copy the model folder again.") from error
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
            axes = checkpoint.get("inference_allowed_mirroring_axes")
            folder = cls(
                path=path,
                dataset=dataset,
                plans=plans,
                configuration=_configuration_name(checkpoint, plans),
                trainer=str(checkpoint["trainer_name"]),
                mirror_axes=None if axes is None else tuple(int(axis) for axis in axes),
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


def _configuration_name(checkpoint: dict[str, Any], plans: dict[str, Any]) -> str:
    name = str(checkpoint["init_args"].get("configuration"))
    known = plans.get("configurations")
    if not isinstance(known, dict) or name not in known:
        raise ModelFolderError(
            f"The weights were trained for the configuration {name}, which plans.json does not have "
            f"(it has {', '.join(known or ()) or 'none'}). plans.json and the checkpoint are of different models."
        )
    return name
