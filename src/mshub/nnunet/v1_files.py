"""The files of an nnU-Net v1 release, read as plain values without running anybody's code.

A v1 trained-model folder holds ``plans.pkl`` and, per fold, ``model_final_checkpoint.model`` (what torch saved) beside
``model_final_checkpoint.model.pkl`` (trainer, its arguments, the plans). Pickle files name the functions they want
called. The few names such files need are answered by stand-ins that build lists and numbers; any other name is
refused. Neither numpy's nor anybody else's functions are called.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mshub.errors import ModelFolderError, UnsafeModelError
from mshub.nnunet.checkpoints import TRUST, check_bytes, first_line, load_tensors, plain
from mshub.nnunet.pickle_limits import check_pickle

CHECKPOINTS = ("model_final_checkpoint.model", "model_best.model")
MAX_PICKLE_BYTES = 32 * 2**20  # plans of a thousand scans have some hundred kB

MAX_STEPS = 4_000_000  # plans of a thousand scans take some hundred thousand

_FOLD = re.compile(r"(?:fold_)?(?P<name>\d+|all)")
_STAGE_ARGUMENT = {False: 5, True: 6}  # the distributed trainer takes its rank before
_DTYPE = re.compile(r"[biufUS]\d+|\?|O8?")


@dataclass(frozen=True)
class V1Checkpoint:
    """What one fold of a v1 model says about itself.

    Attributes
    ----------
    fold : str
        Such as ``0`` or ``all``.
    path : Path
        The ``.model`` file.
    trainer : str
        Name of the trainer class; informative, it is never imported.
    plans : dict
        nnU-Net v1's plans, as plain values.
    stage : int
        Key of the trained stage in ``plans["plans_per_stage"]``.
    batch_dice : bool
        The loss summed over the batch.
    """

    fold: str
    path: Path
    trainer: str
    plans: dict[str, Any]
    stage: int
    batch_dice: bool

    @property
    def stage_plans(self) -> dict[str, Any]:
        """The plans of the trained stage."""
        return dict(self.plans["plans_per_stage"][self.stage])

    def weights(self) -> dict[str, torch.Tensor]:
        """Load the network's state dict, without the ``module.`` of data-parallel trainers.

        Raises
        ------
        ModelFolderError
            The file is damaged, holds more than tensors and plain values, or is no v1 checkpoint.
        """
        state = state_of(load_tensors(self.path))
        if not state:
            raise ModelFolderError(
                f"{self.path.name} is no nnU-Net v1 checkpoint: state_dict not found in it. Expected the file that "
                "nnU-Net v1 writes into its fold folders; copy the model again."
            )
        odd = [str(name) for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
        if odd:
            raise ModelFolderError(f"{self.path.name}: {odd[0]} is no tensor. Expected weights only; copy it again.")
        check_bytes(state, self.path)
        return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def state_of(content: Any) -> Mapping[Any, Any] | None:
    """Return the state dict in what v1 gave to torch, or that is all there is."""
    content = plain(content)
    if not isinstance(content, Mapping):
        return None
    is_bare = all(isinstance(tensor, torch.Tensor) for tensor in content.values())
    state = content if is_bare else plain(content.get("state_dict"))
    return state if isinstance(state, Mapping) else None


def is_v1_folder(path: Path) -> bool:
    """Return whether `path` looks like a trained-model folder of nnU-Net v1 and not of v2."""
    return not (path / "plans.json").exists() and bool(_folds_with(path, CHECKPOINTS))


def read_v1_folder(path: Path) -> list[V1Checkpoint]:
    """Read what every fold of a v1 trained-model folder says about itself; the weights stay on disk.

    The plans inside a checkpoint's ``.model.pkl`` win over ``plans.pkl``, which releases strip at times.

    Parameters
    ----------
    path : Path
        Holds ``fold_X`` or ``all``, and perhaps ``plans.pkl``.

    Returns
    -------
    list of V1Checkpoint
        Numbered folds ascending; ``all`` only where there is no other, as nnU-Net predicts with those.

    Raises
    ------
    ModelFolderError
        There is no checkpoint; a file is damaged, dangerous or not as v1 writes it; folds are of different models.
    """
    name = next((name for name in CHECKPOINTS if _folds_with(path, (name,))), None)
    if name is None:
        raise ModelFolderError(
            f"{path} holds no nnU-Net v1 weights: no fold_X/{CHECKPOINTS[0]} or fold_X/{CHECKPOINTS[1]}. Add the "
            "folder nnU-Net v1 wrote, with its fold_X subfolders."
        )
    folds = _folds_with(path, (name,))
    numbered = sorted((fold for fold in folds if fold.isdigit()), key=int)
    plans = path / "plans.pkl"
    fallback = read_pickle(plans) if plans.is_file() else None
    checkpoints = [_read_checkpoint(fold, folds[fold] / name, fallback) for fold in numbered or ["all"]]
    _refuse_mixed(checkpoints)
    return checkpoints


def read_pickle(path: Path) -> Any:
    """Read a pickle file as plain values: numpy's arrays become nested lists, its scalars numbers.

    Raises
    ------
    ModelFolderError
        The file is missing, too large or damaged, or asks for anything but the numpy values nnU-Net v1 stores.
    """
    try:
        size = path.stat().st_size
        if size > MAX_PICKLE_BYTES:
            raise ModelFolderError(
                f"{path.name} has {size:,} bytes; plans of nnU-Net v1 have at most {MAX_PICKLE_BYTES:,}. Check that "
                "this is the file its makers released."
            )
        with path.open("rb") as stream:
            check_pickle(stream, path.name, MAX_STEPS)
            stream.seek(0)
            return _PlainUnpickler(stream, path.name).load()
    except FileNotFoundError as error:
        raise ModelFolderError(
            f"{path.parent.name}/{path.name} is missing. Expected it beside the weights, as nnU-Net v1 writes it: copy "
            "the whole model folder."
        ) from error
    except ModelFolderError:
        raise
    except Exception as error:  # a damaged stream raises whatever its bytes happen to mean
        raise ModelFolderError(
            f"{path.name} cannot be read ({first_line(error)}). It is probably damaged: fetch or copy the model again."
        ) from error


def _folds_with(path: Path, names: tuple[str, ...]) -> dict[str, Path]:
    folders = {match["name"]: entry for entry in path.iterdir() if (match := _FOLD.fullmatch(entry.name))}
    return {fold: folder for fold, folder in folders.items() if any((folder / name).is_file() for name in names)}


def _read_checkpoint(fold: str, path: Path, fallback: Any) -> V1Checkpoint:
    about = path.with_name(f"{path.name}.pkl")
    info = read_pickle(about)
    if not isinstance(info, Mapping) or not isinstance(info.get("name"), str):
        raise ModelFolderError(
            f"{about.name} does not name the trainer. Expected name, init and plans, as nnU-Net v1 writes them: copy "
            "the model again."
        )
    plans = info.get("plans") or fallback
    if not isinstance(plans, Mapping) or not isinstance(plans.get("plans_per_stage"), Mapping):
        raise ModelFolderError(
            f"Neither {about.name} nor plans.pkl holds nnU-Net v1's plans (plans_per_stage). Expected them in one of "
            "the two: copy the whole model folder."
        )
    arguments = info.get("init")
    arguments = arguments if isinstance(arguments, (list, tuple)) else ()
    position = _STAGE_ARGUMENT["DDP" in info["name"]]
    stage = arguments[position] if len(arguments) > position else None
    batch_dice = bool(arguments[position - 1]) if len(arguments) > position else False
    return V1Checkpoint(fold, path, info["name"], dict(plans), _known_stage(stage, plans, about.name), batch_dice)


def _known_stage(stage: Any, plans: Mapping[str, Any], name: str) -> int:
    stages = list(plans["plans_per_stage"])
    if stage is None and len(stages) == 1:
        return int(stages[0])
    if isinstance(stage, bool) or not isinstance(stage, int) or stage not in stages:
        raise ModelFolderError(
            f"{name} says that stage {_shown(stage)} of the plans was trained; the plans have {stages}. The plans and "
            "the checkpoint are of different models: copy the model again."
        )
    return stage


def _shown(value: Any) -> str:
    """Return a value of the file for a message: of lists and the like, which may have no end, the type."""
    return repr(value) if isinstance(value, (str, int)) else f"a {type(value).__name__}"


def _refuse_mixed(checkpoints: list[V1Checkpoint]) -> None:
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if (other.trainer, other.stage) != (first.trainer, first.stage):
            raise ModelFolderError(
                f"Fold {first.fold} is of {first.trainer}, stage {first.stage}; fold {other.fold} of {other.trainer}, "
                f"stage {other.stage}. Expected folds of one model: add the folder as nnU-Net v1 wrote it."
            )


class _PlainUnpickler(pickle.Unpickler):
    """Builds plain values; whatever else a file asks for is refused before it is looked up."""

    def __init__(self, stream: Any, name: str) -> None:
        super().__init__(stream, encoding="latin1")
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _stand_ins():
            return _stand_ins()[module, name]
        raise UnsafeModelError(
            f"{self._name} was not read: it asks for {module}.{name}, which plans of nnU-Net v1 do not need and which "
            f"could run code. Ask the model's makers for the files nnU-Net v1 itself wrote. {TRUST}"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise ModelFolderError(f"{self._name} was not read: it refers to something outside itself ({_shown(pid)}).")


class _Array(list):  # type: ignore[type-arg]
    """An array of the file, as nested lists."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, in_fortran_order, raw = state
        if dtype.code.startswith("O"):
            if len(shape) != 1:
                raise ValueError(f"an array of objects in {len(shape)} dimensions")
            self[:] = raw
            return
        data = raw.encode("latin1") if isinstance(raw, str) else raw
        values = np.frombuffer(data, np.dtype(dtype.order + dtype.code))
        if not values.size and len(shape) > 1:
            raise ValueError("an array of rows without numbers")
        self[:] = np.atleast_1d(values.reshape(shape, order="F" if in_fortran_order else "C")).tolist()


class _Dtype:
    """A dtype of the file: its code and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise ValueError(f"an array of {_shown(code)}")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="


class _NoArray:
    """What `numpy.ndarray` is in such a file: only ever an argument of `_NewArray`."""

    __slots__ = ()


class _NewArray:
    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _NewDtype:
    __slots__ = ()

    def __call__(self, code: Any, *_: Any) -> _Dtype:
        return _Dtype(code)


class _Scalar:
    __slots__ = ()

    def __call__(self, dtype: _Dtype, raw: Any) -> Any:
        data = raw.encode("latin1") if isinstance(raw, str) else raw
        if dtype.code.startswith("O"):
            raise ValueError("a scalar that is an object")
        return np.frombuffer(data, np.dtype(dtype.order + dtype.code), count=1)[0].item()


class _Encode:
    """`_codecs.encode`, by which protocol 2 writes bytes: latin1 and nothing else."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise ValueError(f"text in the encoding {_shown(encoding)}")
        return str.encode(text, "latin1")


@cache
def _stand_ins() -> Mapping[tuple[str, str], Any]:
    """Return what answers to the names in nnU-Net v1's files: objects without attributes a file could change."""
    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _Encode(),
        ("numpy", "dtype"): _NewDtype(),
        ("numpy", "ndarray"): _NoArray(),
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names[module, "_reconstruct"] = _NewArray()
        names[module, "scalar"] = _Scalar()
    return names
