"""The sums of the sliding window: the same half-precision logits as nnU-Net's own predictor, to the last bit."""

from __future__ import annotations

from functools import partial
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
from mshub.nnunet.sliding_window import _constants

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


@pytest.mark.parametrize("v1", [False, True], ids=["v2", "v1"])
@pytest.mark.parametrize("mirroring", [True, False])
def test_tiles_in_which_nothing_changes_are_calculated_once(
    tmp_path: Path, mirroring: bool, v1: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if v1:
        monkeypatch.setattr(ModelFolder, "predicts_as_v1", True)
    folder = ModelFolder.open(make_model_folder(tmp_path / "model", channels=("CT", "PET"), folds=("0", "1")))
    data = np.random.default_rng(2).normal(size=(2, 16, 24, 120)).astype(np.float32)
    data[0, :, :, 40:] = -1.5
    data[1, :, :, 40:] = 0.25
    engine = Engine(folder, folder.folds, CPU)
    calls: list[torch.Tensor] = []
    network = engine._window.network
    hook = network.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    measures = engine.measures()
    logits = engine.logits(data, mirroring=mirroring, step=0.5, measures=measures)
    found = measures.result(logits, CPU, 1.0)
    few = len(calls)
    calls.clear()
    monkeypatch.setattr("mshub.nnunet.sliding_window._constants", lambda _: None)
    measures = engine.measures()
    expected = engine.logits(data, mirroring=mirroring, step=0.5, measures=measures)
    hook.remove()
    assert torch.equal(logits, expected)
    assert found.as_dict() == measures.result(expected, CPU, 1.0).as_dict()
    assert any(bool((tile == tile[:, :, :1, :1, :1]).all()) for tile in calls)
    assert few < 0.6 * len(calls)


def test_a_tile_in_which_one_channel_changes_is_calculated() -> None:
    tile = torch.ones(1, 2, 3, 4, 5)
    assert _constants(tile) == (1.0, 1.0)
    tile[0, 1, 2, 0, 0] = 2
    assert _constants(tile) is None
    tile[0, 1] = torch.nan
    assert _constants(tile) is None


def test_nothing_is_left_of_one_image_in_the_next(tmp_path: Path) -> None:
    folder = ModelFolder.open(make_model_folder(tmp_path / "model"))
    engine, rng = Engine(folder, folder.folds, CPU), np.random.default_rng(1)
    one, other = (rng.normal(size=(1, 20, 30, 30)).astype(np.float32) for _ in range(2))
    first = engine.logits(one, mirroring=True, step=0.5)
    kept = first.clone()
    engine.logits(other, mirroring=True, step=0.5)
    assert torch.equal(first, kept)
    assert torch.equal(engine.logits(one, mirroring=True, step=0.5), kept)


@pytest.mark.parametrize("v1", [False, True], ids=["v2", "v1"])
def test_sums_go_to_main_memory_where_the_device_has_none_left_or_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, v1: bool
) -> None:
    monkeypatch.setattr(ModelFolder, "predicts_as_v1", v1)
    folder = ModelFolder.open(make_model_folder(tmp_path / "model"))
    window = Engine(folder, folder.folds, CPU)._window
    window.device = torch.device("meta")  # some device that is not the CPU
    places = partial(torch.zeros, 3, device="meta"), partial(torch.zeros, 3)
    assert window._where_there_is_room(*places).device == window.device
    assert not window.sums_in_main_memory

    def none_left() -> torch.Tensor:
        raise torch.OutOfMemoryError("none left")

    assert window._where_there_is_room(none_left, places[1]).device == CPU
    assert window.sums_in_main_memory
    assert window._where_there_is_room(*places).device == CPU


def test_where_one_image_left_too_little_memory_the_next_is_tried_on_the_device_again(tmp_path: Path) -> None:
    folder = ModelFolder.open(make_model_folder(tmp_path / "model"))
    engine, data = Engine(folder, folder.folds, CPU), np.random.default_rng(1).normal(size=(1, 20, 30, 30))
    expected = engine.logits(data.astype(np.float32), mirroring=True, step=0.5, sums_in_main_memory=True)
    assert engine.summed_in_main_memory
    assert torch.equal(engine.logits(data.astype(np.float32), mirroring=True, step=0.5), expected)
    assert not engine.summed_in_main_memory
