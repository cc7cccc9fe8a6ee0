"""Fixtures shared by all tests. Model folders are real and tiny, made once per session; nobody may change them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports torch: two threads that share a core with others wait for each other, one does not.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Labels are compared with nnU-Net's own, voxel for voxel; OpenVINO, which rounds otherwise, has tests of its own.
os.environ["MSHUB_ENGINE"] = "torch"

from mshub.store import ModelStore


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own for every test, torch as the engine, and no ``MSHUB_*`` variable of the developer's shell."""
    for name in [name for name in os.environ if name.startswith("MSHUB_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "home"
    monkeypatch.setenv("MSHUB_HOME", str(path))
    monkeypatch.setenv("MSHUB_ENGINE", "torch")
    return path


@pytest.fixture
def store(home: Path) -> ModelStore:
    """An empty store, the one `mshub` would use."""
    return ModelStore(home)


@pytest.fixture(scope="session")
def liver_spleen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: CT, liver and spleen, one fold."""
    from factories import make_model_folder

    return make_model_folder(tmp_path_factory.mktemp("models") / "liver-spleen")


@pytest.fixture(scope="session")
def two_channels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: T1w and T2w, a region-based tumour, one fold."""
    from factories import make_model_folder

    return make_model_folder(
        tmp_path_factory.mktemp("models") / "two-channels",
        channels=("T1w", "T2w"),
        labels={"background": 0, "whole tumour": [1, 2], "core": [2]},
        dataset_extra={"regions_class_order": [1, 2]},
        seed=5,
    )


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NIfTI image of unequal dimensions, left-handed, rotated, anisotropic."""
    from factories import make_image, odd_grids

    path = tmp_path_factory.mktemp("images") / "case.nii.gz"
    return make_image(path, (29, 23, 14), odd_grids()["oblique-left-handed"])


@pytest.fixture
def installed(store: ModelStore, liver_spleen: Path) -> ModelStore:
    """A store with the model ``tiny``."""
    from mshub.install import add_model

    add_model(store, "tiny", liver_spleen)
    return store


@pytest.fixture
def monailabel_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI Label in this process: no threads that watch folders, no files outside the test's own."""
    from monailabel.config import settings

    monkeypatch.setattr(settings, "MONAI_LABEL_DATASTORE_AUTO_RELOAD", False)
    monkeypatch.setattr(settings, "MONAI_LABEL_SESSION_PATH", str(tmp_path / "sessions"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def nnunet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test leaves nnU-Net's environment variables to the next."""
    from reviewed import VARIABLES

    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
