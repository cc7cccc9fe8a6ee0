"""Trained networks of nnU-Net v1 on real images: imported, they say what v1 itself said (see ``tests/train_v1.py``)."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from mshub.install import add_model
from mshub.nnunet.engine import load_network
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import NNUNetPredictor, PredictOptions
from mshub.store import ModelStore
from v1_trained import HIPPOCAMPUS_CASES, case_files, sampled_voxels, seeded_patch

logger = logging.getLogger(__name__)

RECORDED = Path(__file__).resolve().parents[1] / "recorded"
CASES = [*(("hippocampus", case) for case in HIPPOCAMPUS_CASES), ("brain", "study")]
AGREEMENT = 0.9999
MOST_LOGIT_DIFFERENCE = 1e-4


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """What v1 computed."""
    with np.load(RECORDED / "v1_trained_golden.npz") as recorded:
        return dict(recorded)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    """The releases, imported as a user would."""
    store = ModelStore(tmp_path_factory.mktemp("home"))
    versions = {name: add_model(store, name, RECORDED / f"v1_{name}.zip") for name in ("hippocampus", "brain")}
    return {name: ModelFolder.open(version.model_path) for name, version in versions.items()}


@pytest.mark.parametrize("name", ["hippocampus", "brain"])
def test_a_trained_network_computes_what_v1s_computed(
    name: str, networks: dict[str, ModelFolder], golden: dict[str, np.ndarray]
) -> None:
    network = load_network(networks[name], networks[name].checkpoint("all")["network_weights"]).eval()
    with torch.inference_mode():
        logits = network(seeded_patch(name))[0].numpy()
    assert np.ptp(golden[f"{name}_logits"]) > 1, "a network that has learned says more than noise"
    assert np.abs(logits - golden[f"{name}_logits"]).max() <= MOST_LOGIT_DIFFERENCE


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_whole_case_is_labelled_as_v1_labelled_it(
    name: str,
    case: str,
    networks: dict[str, ModelFolder],
    golden: dict[str, np.ndarray],
    shared_data: Path,
    tmp_path: Path,
) -> None:
    images = case_files(name, shared_data, tmp_path)[case]
    predictor = NNUNetPredictor(networks[name], NetworkCache())
    label = predictor.predict(images, PredictOptions(device="cpu")).labels.array_xyz
    sample, counts = golden[f"{name}_{case}_sample"], golden[f"{name}_{case}_counts"]
    assert (counts > 0).all(), "every structure occurs, or the test proves little"
    found = np.ascontiguousarray(label, dtype=np.uint8)
    whole = hashlib.sha256(found.tobytes()).hexdigest()
    every_voxel = whole == str(golden[f"{name}_{case}_sha256"])  # not asserted: other processors may round otherwise
    logger.info("%s: %s", case, "every voxel is v1's" if every_voxel else "not every voxel is v1's")
    same = np.mean(found.reshape(-1)[sampled_voxels(found.size)] == sample)
    assert same >= AGREEMENT
    changed = np.abs(np.bincount(found.reshape(-1), minlength=counts.size) - counts).sum()
    assert changed <= (1 - AGREEMENT) * found.size
