"""Bare state files: weights of nnU-Net v1 without their plans, which the model's card then has."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mshub.archive import extract_state
from mshub.card_tables import Plan
from mshub.catalogue import Catalogue, dump_card, load_card
from mshub.errors import CatalogueError, ModelFolderError, StoreError
from mshub.install import add_model
from mshub.nnunet.engine import load_network
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import NNUNetPredictor, PredictOptions
from mshub.nnunet.v1_conversion import convert_v1_folder, convert_v1_state
from mshub.store import ModelStore
from releases import CARD, PLAN, bare_state, bare_state_in_a_zip
from v1_models import MODELS, V1Model, v1_weights, write_v1_folder, write_v1_images

ANISOTROPIC = MODELS["anisotropic"]
MAKERS = Plan(
    labels=("tumour", "node"),
    channels=("T1w", "T2w"),
    features=4,
    patch_size=ANISOTROPIC.patch,
    spacing=ANISOTROPIC.spacing,
    pools=ANISOTROPIC.pools,
    kernels=ANISOTROPIC.kernels,
)
# As published: the network of the nasopharynx model, with its first level as narrow as tests need it.
NASOPHARYNX = V1Model(
    patch=(48, 192, 192),
    pools=((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 2)),
    kernels=((1, 3, 3), (1, 3, 3), *((3, 3, 3),) * 5),
    spacing=(3.0, 0.4688, 0.4688),
    classes=1,
    features=2,
)


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_state_file_and_its_plan_are_the_model_its_folder_is(tmp_path: Path, wrapped: bool) -> None:
    model = replace(ANISOTROPIC, masks=(False, False))
    weights = v1_weights(model)
    state = saved(tmp_path / "robust.model", {"state_dict": weights} if wrapped else dict(weights))
    convert_v1_state(state, tmp_path / "bare", MAKERS)
    convert_v1_folder(write_v1_folder(tmp_path / "v1", model), tmp_path / "whole")
    images = write_v1_images(tmp_path, "anisotropic", model)
    bare, whole = (
        NNUNetPredictor(ModelFolder.open(tmp_path / name), NetworkCache()).predict(images, PredictOptions(device="cpu"))
        for name in ("bare", "whole")
    )
    np.testing.assert_array_equal(bare.labels.array_xyz, whole.labels.array_xyz)
    assert bare.names == {"tumour": 1, "node": 2}


def test_the_plan_decides_how_images_are_resampled_and_mirrored(tmp_path: Path) -> None:
    plan = MAKERS.model_copy(update={"resampling_order": 1, "separate_z": True, "mirroring": False})
    convert_v1_state(saved(tmp_path / "s.model", v1_weights(ANISOTROPIC)), tmp_path / "model", plan)
    folder = ModelFolder.open(tmp_path / "model")
    kwargs = folder.configuration_manager.configuration["resampling_fn_data_kwargs"]
    assert kwargs == {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": True}
    assert folder.mirror_axes is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": 8}, "base_num_features gives 8, the weights show 4"),
        ({"labels": ("tumour",)}, "num_classes gives 2, the weights show 3"),
        ({"channels": ("T1w",)}, "num_modalities gives 1, the weights show 2"),
        ({"pools": ((1, 2, 2), (2, 2, 1))}, "pool_op_kernel_sizes gives"),
        ({"kernels": ((3, 3, 3),) * 3}, "conv_kernel_sizes gives"),
        ({"patch_size": (16, 16)}, "patch_size gives 2, the weights show 3"),
    ],
)
def test_weights_of_another_plan_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = saved(tmp_path / "s.model", v1_weights(ANISOTROPIC))
    with pytest.raises(ModelFolderError, match=message):
        convert_v1_state(state, tmp_path / "model", MAKERS.model_copy(update=change))


def test_the_card_of_the_nasopharynx_model_fits_the_network_its_makers_describe(tmp_path: Path) -> None:
    card = Catalogue.load().get("npc-gtv-mr")
    assert card.plan is not None
    plan = card.plan.model_copy(update={"features": 2})
    state = saved(tmp_path / "robustnpc.model", {"state_dict": v1_weights(NASOPHARYNX)})
    convert_v1_state(state, tmp_path / "model", plan)
    folder = ModelFolder.open(tmp_path / "model")
    assert (folder.labels.names, folder.channels, folder.mirror_axes) == (("GTVp",), ("T1w",), None)
    assert folder.configuration_manager.patch_size == [48, 192, 192]
    assert folder.configuration_manager.spacing == [3.0, 0.4688, 0.4688]


def test_heads_of_lower_resolutions_may_be_missing(tmp_path: Path) -> None:
    weights = v1_weights(ANISOTROPIC)
    del weights["seg_outputs.0.weight"]
    convert_v1_state(saved(tmp_path / "s.model", weights), tmp_path / "model", MAKERS)
    folder = ModelFolder.open(tmp_path / "model")
    network = load_network(folder, folder.checkpoint("0")["network_weights"], deep_supervision=True)
    assert [bool(head.weight.any()) for head in network.decoder.seg_layers] == [False, True]


# -- where it is found ----------------------------------------------------------------------------------------------


def as_file(folder: Path) -> Path:
    return bare_state(folder)


def as_file_of_any_name(folder: Path) -> Path:
    return bare_state(folder).rename(folder / "uc-export-download")


def in_a_folder(folder: Path) -> Path:
    bare_state(folder)
    (folder / "readme.md").write_text("weights")
    return folder


@pytest.mark.parametrize("build", [as_file, as_file_of_any_name, in_a_folder, bare_state_in_a_zip])
def test_a_state_file_is_added_with_the_plan_of_its_card(build: Any, store: ModelStore, tmp_path: Path) -> None:
    card = tmp_path / "card.toml"
    card.write_text(CARD.format(id="ours", generation=1, more=PLAN))
    version = add_model(store, "ours", build(tmp_path / "given"), card_path=card)
    assert (version.record["converted"], version.record["labels"]) == ("nnU-Net v1", {"GTVp": 1, "node": 2})
    assert version.card.plan == load_card(card).plan, "the plan survives writing and reading the card"
    assert list((store.home / "staging").iterdir()) == []


def test_a_card_with_a_plan_takes_a_whole_folder_too(store: ModelStore, tmp_path: Path) -> None:
    card = tmp_path / "card.toml"
    card.write_text(CARD.format(id="ours", generation=1, more=PLAN))
    release = write_v1_folder(tmp_path / "v1", ANISOTROPIC)
    version = add_model(store, "ours", release, card_path=card)
    assert version.record["labels"] == {"class 1": 1, "class 2": 2}, "names come from [plan] for a bare file only"


def test_what_is_no_single_state_file_is_not_taken(tmp_path: Path) -> None:
    two = in_a_folder(tmp_path / "two")
    shutil.copy(two / "robustnpc.model", two / "other.model")
    assert not extract_state(two, tmp_path / "state.model")
    assert not extract_state(write_v1_folder(tmp_path / "whole", ANISOTROPIC), tmp_path / "state.model")
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as out:
        out.writestr("readme.txt", "nothing")
    assert not extract_state(tmp_path / "text.zip", tmp_path / "state.model")
    assert not (tmp_path / "state.model").exists()


def test_a_state_file_inside_a_model_is_answered_with_the_folder(tmp_path: Path) -> None:
    release = write_v1_folder(tmp_path / "v1", ANISOTROPIC)
    with pytest.raises(StoreError, match=f"Pass the whole model folder: {release}$"):
        extract_state(release / "fold_0" / "model_final_checkpoint.model", tmp_path / "state.model")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {"a": 1}}])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ModelFolderError, match=r"no nnU-Net v1 checkpoint|is no tensor"):
        convert_v1_state(saved(tmp_path / "s.model", content), tmp_path / "model", MAKERS)


# -- the plan of a card ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("features = 4", "", r"plan\.features.*found nothing"),
        ("patch_size = [6, 16, 16]", "patch_size = [6, 16, 0]", r"plan\.patch_size"),
        ("spacing = [4.0, 0.9, 0.9]", "spacing = [4.0, 0.9, -1]", r"plan\.spacing"),
        ("separate_z", "seperate_z", "Did you mean 'separate_z'"),
        ("mirroring = false", 'normalization = "CT2"', r"plan\.normalization.*'CT2'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_its_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    card = tmp_path / "card.toml"
    card.write_text(CARD.format(id="ours", generation=1, more=PLAN.replace(old, new)))
    with pytest.raises(CatalogueError, match=message):
        load_card(card)


def test_every_card_of_the_catalogue_survives_writing_with_its_plan(tmp_path: Path) -> None:
    card = Catalogue.load().get("npc-gtv-mr")
    (tmp_path / "card.toml").write_text(dump_card(card))
    assert load_card(tmp_path / "card.toml") == card
