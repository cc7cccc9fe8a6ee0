"""A server that ends, in whatever way, leaves no process behind, and the next one goes on with what was being done."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import psutil
import pytest

import waiting
from factories import make_image, make_model_folder
from live import LiveServer
from mshub.install import add_model
from mshub.jobs import Job, Jobs
from mshub.store import ModelStore

MODEL = "tiny"
SHAPE = (24, 22, 16)
ENDS = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]


class Ward:
    """A server of ten labelled images, which can be ended and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.studies = folder, folder / "home", folder / "studies"
        for number in range(10):
            make_image(self.studies / f"case{number}.nii.gz", SHAPE, seed=number)
        add_model(ModelStore(self.home), MODEL, make_model_folder(folder / "model"))
        self.server = self.start()

    def start(self) -> LiveServer:
        self.server = LiveServer(self.home, ["--studies", str(self.studies)], self.folder)
        return self.server

    def end(self, how: signal.Signals) -> None:
        self.server._process.send_signal(how)
        self.server._process.wait(20)

    def submit(self, case: str) -> None:
        array = np.zeros(SHAPE, np.uint8)
        array[4:14, 5:15, 3:11], array[15:22, 3:10, 4:12] = 1, 2
        path = self.folder / f"{case}.nii.gz"
        nib.save(nib.Nifti1Image(array, nib.load(self.studies / f"{case}.nii.gz").affine), path)
        info = [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]
        self.client().save_label(case, str(path), params={"label_info": info})

    def client(self) -> Any:
        return self.server.client(self.folder)

    def job(self) -> Job:
        job = Jobs(self.home).latest(MODEL)
        assert job is not None
        return job


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    ward = Ward(tmp_path)
    yield ward
    Jobs(ward.home).stop_all()
    ward.server.stop()


eventually = partial(waiting.eventually, seconds=120, every_s=0.1)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("after_s", [0.0, 0.3, 0.6, 1.0])
def test_a_server_that_is_ended_while_it_makes_its_models_ready_ends_without_a_trace(
    ward: Ward, after_s: float
) -> None:
    ward.end(signal.SIGINT)
    shutil.rmtree(ward.home / "networks", ignore_errors=True)
    process = ward.start()._process
    told = len(ward.server.log.read_text())
    time.sleep(after_s)
    ward.end(signal.SIGINT)
    assert process.returncode == 0
    assert not [word for word in ("Traceback", "WARNING", "terminate") if word in ward.server.log.read_text()[told:]]


def test_a_training_ends_with_its_server_and_goes_on_with_the_next_one(ward: Ward) -> None:
    for number in range(8):
        ward.submit(f"case{number}")
    ward.client().train_start(MODEL, {"epochs": 10_000, "iterations": 2, "device": "cpu"})
    epoch = 0
    for attempt, how in enumerate(ENDS, 1):
        eventually(lambda seen=epoch: ward.job().progress().get("epoch", 0) > seen)
        eventually(lambda: list(ward.job().path.rglob("fold_*.pt")))  # every half minute
        process = psutil.Process(ward.job().progress()["pid"])
        ward.end(how)
        eventually(lambda one=process: is_gone(one), seconds=30)
        progress = ward.job().progress()
        assert (progress["state"], progress["attempts"]) == ("interrupted", 0)
        epoch = progress["epoch"]
        ward.start()
        assert ward.client().train_status()["id"] == ward.job().id
        log = ward.job().path / "log.txt"
        eventually(lambda told=log, times=attempt: told.read_text().count("going on after epoch") == times)
        assert ward.client().train_status(check_if_running=True) is True
    assert ward.client().train_stop()["status"] == "STOPPED"
    assert len(Jobs(ward.home).all()) == 1, "a second training of the same began"


def test_a_server_that_is_there_again_before_its_training_has_ended_takes_it_up(ward: Ward) -> None:
    for number in range(8):
        ward.submit(f"case{number}")
    ward.client().train_start(MODEL, {"epochs": 10_000, "iterations": 2, "device": "cpu"})
    eventually(lambda: ward.job().progress().get("epoch"))
    worker = psutil.Process(ward.job().progress()["pid"])
    worker.suspend()  # in the midst of a long step
    ward.end(signal.SIGKILL)
    ward.start()
    assert ward.client().train_status(check_if_running=True) is True
    worker.resume()
    eventually(lambda: ward.job().progress()["state"] == "running" and ward.job().progress()["pid"] != worker.pid)
    eventually(lambda: is_gone(worker), seconds=30)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_batch_of_monai_labels_ends_with_its_server(ward: Ward, how: signal.Signals) -> None:
    large = make_image(ward.folder / "large.nii.gz", (150, 150, 90), seed=20)
    for number in range(20):  # minutes of work
        shutil.copy(large, ward.studies / f"large{number}.nii.gz")
    httpx.get(f"{ward.server.url}/datastore/").raise_for_status()
    server = psutil.Process(ward.server._process.pid)
    options = {"max_workers": 1, "save_label": True, "label_tag": "original"}
    started = httpx.post(f"{ward.server.url}/batch/infer/{MODEL}?images=all", json=options)
    assert started.status_code == 200, started.text
    (child,) = eventually(server.children)
    eventually(lambda: list(ward.studies.glob("labels/original/*.nii.gz")))
    assert not is_gone(child)
    ward.end(how)
    eventually(lambda: is_gone(child), seconds=5)
