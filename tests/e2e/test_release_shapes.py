"""Releases in the shapes they are found in: each is imported, predicts and is fine-tuned, or is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from factories import make_image, odd_grids
from mshub.errors import MSHubError
from mshub.evaluation import as_served
from mshub.geometry import same_grid
from mshub.install import add_model
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.model_writing import write_trained
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import NNUNetPredictor, Prediction
from mshub.nnunet.trainer import train_fold
from mshub.nnunet.training_set import prepare
from mshub.recipe import Recipe
from mshub.store import ModelStore, ModelVersion
from mshub.volume_io import read_grid
from nnunet_itself import nnunet_label
from releases import RELEASES, write_release
from reviewed import make_cases

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "releases.md"
IMPORTED = [name for name, release in RELEASES.items() if release.refusal is None]
REFUSED = [name for name, release in RELEASES.items() if release.refusal is not None]
SHAPE = (27, 21, 12)
RECIPE = Recipe(epochs=1, iterations=2, guard="none", averaging=0.0)
CPU = torch.device("cpu")


def images_for(folder: ModelFolder, path: Path) -> list[Path]:
    """Write an oblique, left-handed case with unequal dimensions."""
    affine = odd_grids()["oblique-left-handed"]
    channels = range(len(folder.channels))
    return [make_image(path / f"case_{number:04d}.nii.gz", SHAPE, affine, seed=number) for number in channels]


def predict(model: ModelFolder, version: ModelVersion, images: list[Path]) -> Prediction:
    return NNUNetPredictor(model, NetworkCache()).predict(images, as_served(version.card, "cpu"))


def fine_tuned(parent: ModelFolder, version: ModelVersion, folder: Path) -> ModelFolder:
    """Train two steps on two reviewed cases, from the parent's first fold."""
    values = {structure: value for value, structure in enumerate(parent.labels.names, 1)}
    cases = make_cases(folder / "cases", 2, channels=len(parent.channels), values=values)
    prepared = prepare(parent, cases, folder / "set", None, lambda _: None, version.card.input_rules)
    assert prepared.left_out == {}
    fold = parent.folds[0]
    fit = train_fold(parent, fold, prepared, RECIPE, CPU, folder / "work", lambda _: None, lambda: False)
    assert np.isfinite(fit.losses).all()
    before = parent.checkpoint(fold)["network_weights"]
    assert any(not torch.equal(fit.weights[name], before[name]) for name in before)
    write_trained(folder / "child", parent, {fold: fit.weights})
    return ModelFolder.open(folder / "child")


@pytest.mark.usefixtures("nnunet_environment")
@pytest.mark.parametrize("name", IMPORTED)
def test_a_release_is_imported_predicts_and_is_fine_tuned(name: str, store: ModelStore, tmp_path: Path) -> None:
    source, options = write_release(name, tmp_path)
    version = add_model(store, "release", source, **options)
    assert version.card.generation == RELEASES[name].generation
    model = ModelFolder.open(version.model_path)
    images = images_for(model, tmp_path)
    prediction = predict(model, version, images)
    assert same_grid(prediction.labels.grid, read_grid(images[0]))
    assert set(np.unique(prediction.labels.array_xyz)) > {0}
    if RELEASES[name].stock:
        expected = nnunet_label(source, images, tmp_path / "stock", model.folds, model.checkpoint_name)
        assert np.count_nonzero(prediction.labels.array_xyz != expected) == 0
    child = fine_tuned(model, version, tmp_path / "tuned")
    assert child.predicts_as_v1 == (RELEASES[name].generation == 1)
    assert predict(child, version, images).names == prediction.names


@pytest.mark.parametrize("name", REFUSED)
def test_a_release_is_refused_by_name(name: str, store: ModelStore, tmp_path: Path) -> None:
    source, options = write_release(name, tmp_path)
    with pytest.raises(MSHubError) as refusal:
        add_model(store, "release", source, **options)
    assert re.search(str(RELEASES[name].refusal), str(refusal.value), re.DOTALL), str(refusal.value)
    assert store.installed() == []
    assert list((store.home / "staging").iterdir()) == []


def test_the_document_has_a_line_for_every_shape() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in RELEASES if f"| {name} |" not in text] == []
