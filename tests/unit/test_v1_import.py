"""`mshub add` with releases of nnU-Net v1: folders and zips become versions like any other."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from mshub.archive import extract_model, find_model_roots
from mshub.catalogue import load_card
from mshub.errors import LabelError, ModelFolderError, StoreError
from mshub.install import add_model, origin_of
from mshub.nnunet.engine import Engine
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.model_writing import write_trained
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import NNUNetPredictor, PredictOptions
from mshub.nnunet.trainer import train_fold
from mshub.nnunet.training_set import prepare
from mshub.recipe import Recipe
from mshub.store import ModelStore
from reviewed import make_cases
from v1_models import MODELS, write_v1_folder, write_v1_images

CPU = torch.device("cpu")
ANISOTROPIC = MODELS["anisotropic"]
NESTED = "nnUNet/3d_fullres/Task001_Tumour/nnUNetTrainerV2__nnUNetPlansv2.1"
CARD = (
    'id = "our-tumour"\ntitle = "t"\nsite = "s"\nmodality = "MR"\ntarget = "t"\nstatus = "local"\ngeneration = 1\n'
    'labels = ["tumour", "node"]\n{more}\n'
    '[[channels]]\nname = "T1w"\n[[channels]]\nname = "T2w"\n'
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as nnU-Net v1 writes it, with what lies around in it."""
    path = write_v1_folder(tmp_path_factory.mktemp("release") / "model", ANISOTROPIC)
    (path / "LICENSE.txt").write_text("CC BY 4.0")
    for name in ("debug.json", "progress.png", "model_latest.model", "model_latest.model.pkl", "model_best.model"):
        (path / "fold_0" / name).write_bytes(b"not needed")
    return path


def zipped(folder: Path, path: Path, prefix: str) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for file in folder.rglob("*"):
            if file.is_file():
                out.write(file, f"{prefix}/{file.relative_to(folder)}")
    return path


def card(folder: Path, more: str = "") -> Path:
    path = folder / "card.toml"
    path.write_text(CARD.format(more=more))
    return path


@pytest.mark.parametrize("source", ["folder", "nested folder", "zip"])
def test_a_release_is_installed_from(source: str, store: ModelStore, release: Path, tmp_path: Path) -> None:
    if source == "nested folder":
        shutil.copytree(release, tmp_path / "download" / NESTED)
    path = {
        "folder": lambda: release,
        "nested folder": lambda: tmp_path / "download",
        "zip": lambda: zipped(release, tmp_path / "model.zip", NESTED),
    }[source]()
    version = add_model(store, "our-tumour", path)
    assert version.record["converted"] == "nnU-Net v1"
    assert version.record["origin"] == origin_of(path)
    assert set(version.record["files"]) == {"dataset.json", "plans.json", "LICENSE.txt", "fold_0/checkpoint_final.pth"}
    assert store.verify("our-tumour") == version
    assert list((store.home / "staging").iterdir()) == []


def test_a_model_of_v2_is_not_called_converted(installed: ModelStore) -> None:
    assert "converted" not in installed.current("tiny").record


def test_a_release_gets_a_card_of_its_generation(store: ModelStore, release: Path) -> None:
    add_model(store, "our-tumour", release)
    drafted = store.catalogue().get("our-tumour")
    assert (drafted.generation, drafted.labels) == (1, ("class 1", "class 2"))


def test_a_card_names_labels_and_channels(store: ModelStore, release: Path, tmp_path: Path) -> None:
    version = add_model(store, "our-tumour", release, card_path=card(tmp_path))
    assert version.record["labels"] == {"tumour": 1, "node": 2}
    assert version.record["channels"] == ["T1w", "T2w"]


def test_a_card_of_another_model_is_refused(store: ModelStore, tmp_path: Path) -> None:
    release = write_v1_folder(tmp_path / "v1", MODELS["sagittal"])
    with pytest.raises((ModelFolderError, LabelError), match="The card names 2 channels"):
        add_model(store, "our-tumour", release, card_path=card(tmp_path))
    assert store.installed() == []
    assert list((store.home / "staging").iterdir()) == []


def test_a_card_vouches_for_the_trainer_of_its_makers(store: ModelStore, tmp_path: Path) -> None:
    release = write_v1_folder(tmp_path / "v1", replace(ANISOTROPIC, trainer="nnUNetTrainerV2_StElsewhere"))
    with pytest.raises(ModelFolderError, match="nnUNetTrainerV2_StElsewhere is not one of nnU-Net v1's own"):
        add_model(store, "our-tumour", release, card_path=card(tmp_path))
    path = card(tmp_path, 'trainer = "nnUNetTrainerV2_StElsewhere"')
    assert add_model(store, "our-tumour", release, card_path=path).card == load_card(path)


def test_adding_the_same_release_twice_is_one_version(store: ModelStore, release: Path, tmp_path: Path) -> None:
    first = add_model(store, "our-tumour", release)
    assert add_model(store, "our-tumour", zipped(release, tmp_path / "model.zip", "a")) == first
    assert len(store.versions("our-tumour")) == 1


def test_a_version_trained_from_a_release_predicts_as_v1_does(store: ModelStore, release: Path, tmp_path: Path) -> None:
    parent = ModelFolder.open(add_model(store, "our-tumour", release).model_path)
    write_trained(tmp_path / "child", parent, {"0": parent.checkpoint("0")["network_weights"]})
    images = write_v1_images(tmp_path, "anisotropic", ANISOTROPIC)
    labels = [
        NNUNetPredictor(folder, NetworkCache()).predict(images, PredictOptions(device="cpu")).labels.array_xyz
        for folder in (parent, ModelFolder.open(tmp_path / "child"))
    ]
    np.testing.assert_array_equal(*labels)


@pytest.mark.usefixtures("nnunet_environment")
@pytest.mark.parametrize("name", ["anisotropic", "slices"])
def test_a_release_is_continued_on_images_prepared_as_v1_did(name: str, store: ModelStore, tmp_path: Path) -> None:
    parent = ModelFolder.open(add_model(store, name, write_v1_folder(tmp_path / "v1", MODELS[name])).model_path)
    (fold,) = parent.folds
    values = {structure: value for value, structure in enumerate(parent.labels.names, 1)}
    cases = make_cases(tmp_path / "cases", 2, channels=len(parent.channels), values=values)
    prepared = prepare(parent, cases, tmp_path / "set", None, lambda _: None)

    identifier, case = next(iter(prepared.cases.items()))
    reader = parent.plans_manager.image_reader_writer_class()
    image = reader.read_images([str(path) for path in case.images])
    served, _ = Engine(parent, parent.folds, CPU).preprocess(*image)
    trained = nnUNetDatasetBlosc2(str(prepared.folder), [identifier]).load_case(identifier)[0]
    np.testing.assert_array_equal(trained[:], served)

    recipe = Recipe(epochs=2, iterations=2, optimiser="sgd", guard="none", averaging=0.0)
    fit = train_fold(parent, fold, prepared, recipe, CPU, tmp_path / "work", lambda _: None, lambda: False)
    before = parent.checkpoint(fold)["network_weights"]
    assert np.isfinite(fit.losses).all()
    assert any(not torch.equal(fit.weights[key], before[key]) for key in before)
    write_trained(tmp_path / "child", parent, {fold: fit.weights})
    child = ModelFolder.open(tmp_path / "child")
    assert child.predicts_as_v1
    prediction = NNUNetPredictor(child, NetworkCache()).predict(case.images, PredictOptions(device="cpu"))
    assert prediction.provenance["inference"] == "nnU-Net v1"


def test_models_of_both_generations_are_found_side_by_side(release: Path, liver_spleen: Path, tmp_path: Path) -> None:
    shutil.copytree(release, tmp_path / "both" / "one")
    shutil.copytree(liver_spleen, tmp_path / "both" / "two")
    assert find_model_roots(tmp_path / "both") == ["one", "two"]


def test_only_the_files_of_the_final_checkpoint_are_copied(release: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    assert extract_model(release, tmp_path / "target") == "."
    files = {path.relative_to(tmp_path / "target").as_posix() for path in (tmp_path / "target").rglob("*")}
    checkpoint = "fold_0/model_final_checkpoint.model"
    assert files == {"plans.pkl", "LICENSE.txt", "fold_0", checkpoint, f"{checkpoint}.pkl"}


def test_a_model_trained_on_all_cases_is_found(store: ModelStore, tmp_path: Path) -> None:
    release = write_v1_folder(tmp_path / "v1", MODELS["slices"])
    assert add_model(store, "slices", release).record["folds"] == ["all"]


@pytest.mark.parametrize("inner", ["fold_0", "plans.pkl", "fold_0/model_final_checkpoint.model"])
def test_a_path_inside_a_release_is_answered_with_the_folder_to_pass(
    store: ModelStore, release: Path, inner: str
) -> None:
    with pytest.raises(StoreError, match=f"Pass the whole model folder: {release}$"):
        add_model(store, "our-tumour", release / inner)


def test_weights_without_their_pickle_are_named(store: ModelStore, release: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(release, tmp_path / "bare"))
    for path in bare.rglob("*.model.pkl"):
        path.unlink()
    with pytest.raises(ModelFolderError, match=r"weights of nnU-Net v1, but model_final_checkpoint\.model\.pkl"):
        add_model(store, "our-tumour", bare)


def test_an_unfinished_training_is_refused(store: ModelStore, release: Path, tmp_path: Path) -> None:
    unfinished = Path(shutil.copytree(release, tmp_path / "unfinished"))
    for name in ("model_final_checkpoint.model", "model_final_checkpoint.model.pkl", "model_best.model"):
        (unfinished / "fold_0" / name).unlink()
    with pytest.raises(ModelFolderError, match=r"neither model_final_checkpoint\.model nor model_best\.model"):
        add_model(store, "our-tumour", unfinished)
    assert store.installed() == []
