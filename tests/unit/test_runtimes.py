"""What runs the network: torch, or OpenVINO where it is installed and agrees; labels are the same within its bound."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factories import make_image, make_model_folder
from mshub.errors import PredictionError
from mshub.nnunet import engine as engine_module
from mshub.nnunet import network_agreement, openvino_network
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.openvino_library import is_installed
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, Prediction, PredictOptions

pytestmark = pytest.mark.skipif(not is_installed(), reason="OpenVINO is an extra: make openvino")

SHAPE = (29, 23, 14)
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "dataset_extra": {"regions_class_order": [1, 2]}}
MODELS: dict[str, dict[str, Any]] = {
    "3d": {},
    "folds": {"folds": ("0", "1")},
    "regions": REGIONS,
    "2d": {"patch": (24, 32), "spacing_zyx_mm": (1.5, 1.5), "mirror_axes": (0, 1)},
}


def predict(folder: Path, image: Path, runtime: str, cache: NetworkCache | None = None, **more: Any) -> Prediction:
    options = PredictOptions(device="cpu", runtime=runtime, measure=True, **more)
    return NNUNetPredictor(ModelFolder.open(folder), cache or NetworkCache()).predict([image], options)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "image.nii.gz", SHAPE)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", MODELS)
def test_labels_and_measures_are_torchs_within_the_bound(tmp_path: Path, image: Path, name: str, profile: str) -> None:
    folder = make_model_folder(tmp_path / "model", **MODELS[name])
    ours = predict(folder, image, "openvino", profile=PROFILES[profile])
    expected = predict(folder, image, "torch", profile=PROFILES[profile])
    assert (ours.provenance["runtime"], expected.provenance["runtime"]) == ("openvino", "torch")
    differ = np.mean(ours.labels.array_xyz != expected.labels.array_xyz)
    assert differ <= network_agreement.MOST_DECISIONS
    assert len(np.unique(expected.labels.array_xyz)) > 1
    assert ours.uncertainty.agreement == pytest.approx(expected.uncertainty.agreement, abs=1e-2)
    np.testing.assert_allclose(ours.uncertainty.embedding, expected.uncertainty.embedding, atol=1e-3)
    assert np.ptp(expected.uncertainty.embedding) > 1e-2


def test_auto_takes_openvino_where_it_is_installed(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model_folder(tmp_path / "model")
    assert predict(folder, image, "auto").provenance["runtime"] == "openvino"
    monkeypatch.setattr(engine_module, "is_installed", lambda: False)
    assert predict(folder, image, "auto").provenance["runtime"] == "torch"


def test_openvino_that_does_not_agree_is_not_used(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model_folder(tmp_path / "model")
    monkeypatch.setattr(network_agreement, "LARGEST_DIFFERENCE", 1e-12)
    with caplog.at_level(logging.WARNING):
        found = predict(folder, image, "auto")
    assert found.provenance["runtime"] == "torch"
    assert "computes something else than torch" in caplog.text
    np.testing.assert_array_equal(found.labels.array_xyz, predict(folder, image, "torch").labels.array_xyz)
    with pytest.raises(PredictionError, match="computes something else than torch"):
        predict(folder, image, "openvino")


def test_what_was_prepared_is_kept_for_the_next_start(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kept = make_model_folder(tmp_path / "model", folds=("0", "1")), tmp_path / "kept"
    first = predict(folder, image, "openvino", NetworkCache(kept=kept))
    assert len(list(kept.glob(f"*{openvino_network.SUFFIX}"))) == 2

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(openvino_network, "converted_model", fail)
    again = predict(folder, image, "openvino", NetworkCache(kept=kept))
    np.testing.assert_array_equal(again.labels.array_xyz, first.labels.array_xyz)


def test_one_engine_does_not_replace_the_other(tmp_path: Path, image: Path) -> None:
    folder, cache = make_model_folder(tmp_path / "model"), NetworkCache()
    for runtime in ("torch", "openvino", "torch"):
        assert predict(folder, image, runtime, cache).provenance["runtime"] == runtime
