"""A decoder that frees what it has used computes what nnU-Net's does."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from factories import make_model_folder
from mshub.nnunet.engine import load_network
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.lean_decoder import let_go

PLAIN: dict[str, Any] = {"n_conv_per_stage_decoder": [2, 2]}
RESIDUAL = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "n_blocks_per_stage": [1, 1, 1],
    "n_conv_per_stage": None,
}


def network_of(folder: Path, **options: Any) -> Any:
    model = ModelFolder.open(folder)
    weights = model.checkpoint(model.folds[0])["network_weights"]
    return load_network(model, weights, **options).eval()


@torch.inference_mode()
@pytest.mark.parametrize("patch", [(16, 24, 32), (48, 40)], ids=["3d", "2d"])
@pytest.mark.parametrize("architecture", [PLAIN, RESIDUAL], ids=["plain", "residual"])
def test_it_computes_the_same_and_holds_no_skip_connection_in_the_end(
    tmp_path: Path, architecture: dict[str, Any], patch: tuple[int, ...]
) -> None:
    network = network_of(make_model_folder(tmp_path / "model", patch=patch, architecture=architecture))
    x = torch.randn((1, 1, *patch), generator=torch.Generator().manual_seed(3))
    expected, skips, alive = network(x), [], []
    network.encoder.register_forward_hook(lambda *passed: skips.extend(weakref.ref(one) for one in passed[-1]))
    network.decoder.seg_layers[-1].register_forward_pre_hook(
        lambda *_: alive.append([skip() is not None for skip in skips])
    )
    network(x)
    let_go(network)
    skips.clear()
    assert torch.equal(network(x), expected)
    assert alive == [[True] * 3, [False] * 3]


def test_a_network_that_trains_and_one_of_another_kind_stay_as_they_are(tmp_path: Path) -> None:
    network = network_of(make_model_folder(tmp_path / "model"), deep_supervision=True)
    let_go(network)
    assert len(network(torch.zeros(1, 1, 16, 24, 24))) == 2
    let_go(torch.nn.Identity())
