"""``--trust``: code in a model's files runs when a person says so, once, and nothing of it is installed."""

from __future__ import annotations

import pickle
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from mshub.errors import ModelFolderError, UnsafeModelError
from mshub.install import add_model
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.trusted import make_plain
from mshub.nnunet.v1_files import read_v1_folder
from mshub.store import ModelStore
from v1_models import MODELS, write_v1_folder


class Touches:
    """An object whose loading creates a file, as code in a checkpoint can."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "was-run"


@pytest.fixture
def with_code(liver_spleen: Path, tmp_path: Path, mark: Path) -> Path:
    """A v2 folder whose checkpoint holds code."""
    folder = Path(shutil.copytree(liver_spleen, tmp_path / "model"))
    path = folder / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "more": Touches(mark)}, path)
    return folder


@pytest.fixture
def v1_with_code(tmp_path: Path, mark: Path) -> Path:
    """A v1 folder of which every file holds code."""
    folder = write_v1_folder(tmp_path / "v1", MODELS["sagittal"])
    for path in [folder / "plans.pkl", *folder.rglob("*.model.pkl")]:
        path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), "more": Touches(mark)}))
    for path in folder.rglob("*.model"):
        torch.save({**torch.load(path, weights_only=False), "more": Touches(mark)}, path)
    return folder


def test_without_it_nothing_runs_and_the_message_says_what_it_would_do(
    store: ModelStore, with_code: Path, mark: Path
) -> None:
    with pytest.raises(UnsafeModelError, match=r"Nothing was executed\. .*`mshub add --trust` runs what is in it"):
        add_model(store, "ours", with_code)
    assert not mark.exists()
    assert store.installed() == []


def test_with_it_the_code_runs_once_and_the_installed_files_are_plain(
    store: ModelStore, with_code: Path, liver_spleen: Path, mark: Path
) -> None:
    version = add_model(store, "ours", with_code, trust=True)
    assert mark.exists()
    assert version.record["trusted"] == ["fold_0/checkpoint_final.pth"]
    mark.unlink()
    installed, original = ModelFolder.open(version.model_path), ModelFolder.open(liver_spleen)
    weights, expected = (folder.checkpoint("0")["network_weights"] for folder in (installed, original))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (installed.configuration, installed.trainer, installed.mirror_axes) == (
        original.configuration,
        original.trainer,
        original.mirror_axes,
    )
    assert not mark.exists(), "what is installed runs nothing"


def test_a_release_of_v1_is_opened_as_well(store: ModelStore, v1_with_code: Path, mark: Path) -> None:
    with pytest.raises(UnsafeModelError):
        add_model(store, "ours", v1_with_code)
    assert not mark.exists()
    version = add_model(store, "ours", v1_with_code, trust=True)
    assert mark.exists()
    assert len(version.record["trusted"]) == 5  # plans.pkl, and two files for each of two folds
    assert ModelFolder.open(version.model_path).folds == ("0", "1")


def test_a_release_made_plain_says_what_it_said(v1_with_code: Path, tmp_path: Path) -> None:
    expected = read_v1_folder(write_v1_folder(tmp_path / "safe", MODELS["sagittal"]))
    make_plain(v1_with_code)
    found = read_v1_folder(v1_with_code)
    assert [(one.trainer, one.stage, one.batch_dice) for one in found] == [
        (one.trainer, one.stage, one.batch_dice) for one in expected
    ]
    assert {key: found[0].plans[key] for key in expected[0].plans} == expected[0].plans


def test_files_that_need_no_trust_stay_as_they_are(liver_spleen: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(liver_spleen, tmp_path / "model"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert make_plain(folder) == []
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_safe_model_added_with_it_records_nothing_of_the_kind(store: ModelStore, liver_spleen: Path) -> None:
    assert "trusted" not in add_model(store, "ours", liver_spleen, trust=True).record


def test_the_source_is_left_as_it_was(store: ModelStore, with_code: Path) -> None:
    path = with_code / "fold_0" / "checkpoint_final.pth"
    before = path.read_bytes()
    add_model(store, "ours", with_code, trust=True)
    assert path.read_bytes() == before


def test_what_needs_a_package_that_is_not_here_is_said_in_a_sentence(
    store: ModelStore, liver_spleen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(liver_spleen, tmp_path / "model"))
    path = folder / "fold_0" / "checkpoint_final.pth"
    theirs = types.ModuleType("their_package")
    theirs.Settings = type("Settings", (), {"__module__": "their_package"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "their_package", theirs)
        torch.save(torch.load(path, weights_only=False) | {"more": theirs.Settings()}, path)
    with pytest.raises(ModelFolderError, match=r"even with --trust .*makers' own packages"):
        add_model(store, "ours", folder, trust=True)
    assert store.installed() == []


def test_damage_is_no_question_of_trust(store: ModelStore, liver_spleen: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(liver_spleen, tmp_path / "model"))
    path = folder / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ModelFolderError, match="incomplete download"):
        add_model(store, "ours", folder, trust=True)
