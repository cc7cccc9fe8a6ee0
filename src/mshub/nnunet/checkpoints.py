"""Checkpoints of nnU-Net, loaded as tensors and plain values without running anybody's code."""

from __future__ import annotations

import codecs
import importlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mshub.errors import ModelFolderError, UnsafeModelError
from mshub.nnunet.pickle_limits import check_torch_file

TRUST = (
    "Nothing was executed. Only if you trust its makers with this computer: `mshub add --trust` runs what is in it, "
    "once, and keeps weights and plain values."
)
MAX_SHARING = 8  # nnU-Net's state dicts have every tensor under two to four names
_ASKS_FOR = re.compile(r"GLOBAL (\S+) (?:was not|whose module)")
_TORCH_ADVICE = " In PyTorch 2.6"
_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")  # of torch.compile and of data-parallel trainings


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
        check_torch_file(path)
        with torch.serialization.safe_globals(_numpy_safe_globals()):
            # Checkpoints older than torch's zip format cannot be memory-mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UnsafeModelError(
            f"{path.name} was not loaded: it holds more than weights ({_reason(error)}). Expected tensors and "
            f"plain values only; ask its makers for a checkpoint saved by nnU-Net itself. {TRUST}"
        ) from error
    except ModelFolderError:
        raise
    except Exception as error:  # a damaged stream raises whatever its bytes happen to mean
        raise ModelFolderError(
            f"{path.name} cannot be read as a torch checkpoint ({_reason(error)}). It is probably an incomplete "
            "download: fetch or copy it again."
        ) from error


def _reason(error: Exception) -> str:
    """Return why torch refuses a file, without its advice to load it all the same."""
    said = str(error)
    if asked := _ASKS_FOR.search(said):
        return f"it asks for {asked[1]}"
    said = said.rpartition("WeightsUnpickler error:")[2].partition(_TORCH_ADVICE)[0]
    return first_line(ValueError(said)) if said.strip() else type(error).__name__


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
    if not isinstance(checkpoint["trainer_name"], str):
        raise ModelFolderError(f"{path.name} is no nnU-Net v2 checkpoint: its trainer_name is no text. Copy it again.")
    return {**checkpoint, "network_weights": _unwrapped(checkpoint["network_weights"], path)}


def plain(table: Any) -> Any:
    """Return a dictionary of a checkpoint as one of its own: a file can replace the methods of an OrderedDict."""
    return dict(dict.items(table)) if isinstance(table, dict) else table


def _unwrapped(weights: Any, path: Path) -> dict[str, Any]:
    """Return a state dict without the names torch puts before those of a network it wraps."""
    weights = plain(weights)
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ModelFolderError(
            f"{path.name} is no nnU-Net v2 checkpoint: its network_weights are not tensors by name. Copy it again."
        )
    check_bytes(weights, path)
    return {_WRAPPERS.sub("", str(name), count=1): tensor for name, tensor in weights.items()}


def check_bytes(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse tensors that stand for more numbers than their file holds: views, meta tensors, sparse ones.

    Raises
    ------
    ModelFolderError
        Gives both sizes.
    """
    size, claimed = path.stat().st_size, sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if claimed > MAX_SHARING * size:
        raise ModelFolderError(
            f"{path.name} has {size:,} bytes and weights of {claimed:,}: they are not in it. Ask the model's makers "
            "for the file nnU-Net itself wrote."
        )


def first_line(error: BaseException) -> str:
    """Return what an error of a library says, short enough for a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
