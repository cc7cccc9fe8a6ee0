"""Open the files of makers who are trusted, which runs what is in them, and leave plain files behind.

A checkpoint may hold Python objects beside its weights: a configuration, a path, a logger. Loading them means running
code that came with the file. Where a person decides to, it is run once, when the model is added; what is kept holds
tensors and plain values only, so that nothing of it runs ever again.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mshub.errors import ModelFolderError, UnsafeModelError
from mshub.nnunet.checkpoints import checked_checkpoint, first_line, load_tensors
from mshub.nnunet.v1_files import read_pickle, state_of

logger = logging.getLogger(__name__)


def make_plain(model: Path) -> list[str]:
    """Rewrite the files of a model that cannot be opened safely. **Runs code in them.**

    Parameters
    ----------
    model : Path
        A copy of the model: nnU-Net v2's folder, v1's, or a folder with one bare state file.

    Returns
    -------
    list of str
        Names of the files that were opened in this way, relative to `model`; the others are as they were.

    Raises
    ------
    ModelFolderError
        A file is damaged, or asks for something that is not installed here.
    """
    opened = [path for path in sorted(model.rglob("*")) if path.is_file() and _is_unsafe(path)]
    for path in opened:
        logger.warning("running the code in %s, as asked", path.name)
        _REWRITE[path.suffix](path)
    return [path.relative_to(model).as_posix() for path in opened]


def _is_unsafe(path: Path) -> bool:
    if path.suffix not in _REWRITE:
        return False
    try:
        read_pickle(path) if path.suffix == ".pkl" else load_tensors(path)
    except ModelFolderError as error:
        return isinstance(error, UnsafeModelError)  # what is damaged is said when the model is opened
    return False


def _rewrite_checkpoint(path: Path) -> None:
    checkpoint = checked_checkpoint(_run_torch(path), path)
    axes = checkpoint.get("inference_allowed_mirroring_axes")
    arguments = checkpoint["init_args"] if isinstance(checkpoint["init_args"], Mapping) else {}
    plain = {
        "network_weights": checkpoint["network_weights"],
        "trainer_name": checkpoint["trainer_name"],
        "init_args": {key: str(arguments[key]) for key in ("configuration", "fold") if key in arguments},
        "inference_allowed_mirroring_axes": None if axes is None else tuple(int(axis) for axis in axes),
    }
    torch.save(plain, path)


def _rewrite_v1_weights(path: Path) -> None:
    state = state_of(_run_torch(path)) or {}
    torch.save({"state_dict": {str(name): tensor for name, tensor in state.items()}}, path)


def _rewrite_pickle(path: Path) -> None:
    try:
        content = pickle.loads(path.read_bytes())
    except Exception as error:
        raise _not_opened(path, error) from error
    path.write_bytes(pickle.dumps(_plain(content)))


_REWRITE = {".pth": _rewrite_checkpoint, ".model": _rewrite_v1_weights, ".pkl": _rewrite_pickle}


def _run_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise _not_opened(path, error) from error


def _not_opened(path: Path, error: Exception) -> ModelFolderError:
    return ModelFolderError(
        f"{path.name} cannot be opened even with --trust ({type(error).__name__}: {first_line(error)}). It needs its "
        "makers' own packages: install them beside MSHub, or ask for a checkpoint of weights only."
    )


def _plain(value: Any) -> Any:
    """Return lists, dicts, text and numbers; anything else as the text Python shows for it."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    return value if value is None or isinstance(value, (str, bytes, bool, int, float)) else str(value)
