"""Fixtures of the app's tests: a server's app on a store of its own, and trainings that compute nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fastapi.testclient import TestClient
from monailabel.config import settings
from monailabel.interfaces.utils.app import apps

from factories import make_image, odd_grids
from lib.app import MSHubApp
from mshub.jobs import Jobs
from mshub.log_lines import hide_with
from mshub.orphans import STARTER
from mshub.store import ModelStore

TRAINED_SHAPE = (29, 23, 14)
FAKE_WORKER = Path(__file__).parents[2] / "contract" / "fake_worker"


@pytest.fixture
def fake_worker(home: Path, monailabel_here: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs run in processes of their own that compute nothing; those left over are stopped."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE_WORKER), os.environ["PYTHONPATH"]]))
    monkeypatch.setenv(STARTER, "")  # a server that starts sets it
    yield
    Jobs(home).stop_all()


@pytest.fixture
def clinic(installed: ModelStore, fake_worker: None, tmp_path: Path) -> Iterator[MSHubApp]:
    """The app with the model ``tiny`` (liver, spleen), images ``a`` and ``b`` and, of two channels, ``mr``."""
    affine = odd_grids()["oblique-left-handed"]
    for number, name in enumerate(("a", "b", "mr_0000", "mr_0001")):
        make_image(tmp_path / "studies" / f"{name}.nii.gz", TRAINED_SHAPE, affine, seed=number)
    app = MSHubApp(str(tmp_path / "app"), str(tmp_path / "studies"), {"device": "cpu"})
    yield app
    hide_with(str)
    if app.active_learning.spare_time is not None:  # it would be at work in other tests
        app.active_learning.spare_time.stop()
        app.active_learning.spare_time.join(30)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], TestClient]:
    """Let the server's routes, ours and MONAI Label's, answer for an app; returns a client at this machine."""

    def serve(app: object) -> TestClient:
        from lib.server import asgi

        monkeypatch.setitem(apps, f"{settings.MONAI_LABEL_APP_DIR}{settings.MONAI_LABEL_STUDIES}", app)
        here = ("127.0.0.1", 50000)
        return TestClient(asgi.app, "http://127.0.0.1:8000", raise_server_exceptions=False, client=here)

    return serve


@pytest.fixture
def server(clinic: MSHubApp, serve: Callable[[object], TestClient]) -> TestClient:
    """A client of the server of `clinic`."""
    return serve(clinic)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of temporary files of its own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def review(clinic: MSHubApp, tmp_path: Path) -> Callable[..., None]:
    """Submit a final label as a clinician does."""

    def submit(image: str, *structures: str, voxels: int = 5) -> None:
        path = tmp_path / "submitted.nii.gz"
        array = np.zeros(TRAINED_SHAPE, np.uint8)
        for value, _ in enumerate(structures, 1):
            array[value, :voxels, 3] = value
        nib.save(nib.Nifti1Image(array, nib.load(clinic.datastore().get_image_uri(image)).affine), path)
        info = [{"name": name, "idx": value} for value, name in enumerate(structures, 1)]
        clinic.datastore().save_label(image, str(path), "final", {"label_info": info})

    return submit
