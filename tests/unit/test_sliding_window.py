"""The sums of the sliding window: the same half-precision logits as nnU-Net's own predictor, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from factories import make_model_folder
from mshub.errors import PredictionError
from mshub.nnunet.engine import Engine, load_network
from mshub.nnunet.folder import ModelFolder

CPU = torch.device("cpu")
LABELS = {"background": 0, **{f"s{value}": value for value in range(1, 6)}}


def by_nnunet(folder: ModelFolder, data: np.ndarray, mirroring: bool, step: float) -> torch.Tensor:
    """Return the logits of nnU-Net's own predictor."""
    predictor = nnUNetPredictor(step, True, mirroring, False, CPU, allow_tqdm=False)
    weights = [folder.checkpoint(fold)["network_weights"] for fold in folder.folds]
    facts = (folder.plans_manager, folder.configuration_manager, weights, folder.dataset, folder.trainer)
    predictor.manual_initialization(load_network(folder, weights[0]), *facts, folder.mirror_axes or None)
    logits: torch.Tensor = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
    return logits


@pytest.mark.parametrize("step", [0.5, 0.75])
@pytest.mark.parametrize("mirroring", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mirror_axes": (1,)},
        {"mirror_axes": (0, 2), "folds": ("0", "1", "2")},
        {"mirror_axes": None},
        {"patch": (24, 32), "spacing_zyx_mm": (1.5, 1.5), "mirror_axes": (0, 1), "folds": ("0", "1")},
    ],
    ids=["3d", "one axis", "two axes, folds", "none", "2d"],
)
@pytest.mark.parametrize("shape", [(17, 40, 26), (5, 30, 50)], ids=["large", "padded"])
def test_logits_are_nnunets_to_the_last_bit(
    tmp_path: Path, shape: tuple[int, ...], options: dict[str, Any], mirroring: bool, step: float
) -> None:
    folder = ModelFolder.open(make_model_folder(tmp_path / "model", labels=LABELS, channels=("CT", "PET"), **options))
    data = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    logits = Engine(folder, folder.folds, CPU).logits(data, mirroring=mirroring, step=step)
    expected = by_nnunet(folder, data, mirroring, step)
    assert logits.dtype == torch.half
    assert torch.equal(logits, expected)
    assert len(torch.unique(logits.argmax(0))) == len(LABELS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_fails_is_an_error(tmp_path: Path, value: float) -> None:
    folder = ModelFolder.open(make_model_folder(tmp_path / "model"))
    data = np.zeros((1, 16, 24, 24), np.float32)
    data[0, 8, 8, 8] = value
    with pytest.raises(PredictionError, match="not finite"):
        Engine(folder, folder.folds, CPU).logits(data, mirroring=False, step=0.5)


def test_nothing_is_left_of_one_image_in_the_next(tmp_path: Path) -> None:
    folder = ModelFolder.open(make_model_folder(tmp_path / "model"))
    engine, rng = Engine(folder, folder.folds, CPU), np.random.default_rng(1)
    one, other = (rng.normal(size=(1, 20, 30, 30)).astype(np.float32) for _ in range(2))
    first = engine.logits(one, mirroring=True, step=0.5)
    kept = first.clone()
    engine.logits(other, mirroring=True, step=0.5)
    assert torch.equal(first, kept)
    assert torch.equal(engine.logits(one, mirroring=True, step=0.5), kept)
