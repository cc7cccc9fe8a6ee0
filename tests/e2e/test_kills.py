"""Kill -9 at ten random moments of a training and its server: nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from http.client import HTTPException
from pathlib import Path

import nibabel as nib
import numpy as np
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from factories import make_image, make_model_folder
from live import LiveServer
from mshub.install import add_model
from mshub.jobs import OPEN, Jobs
from mshub.store import ModelStore

MODEL = "tiny"
KILLS = 10
SHAPE = (24, 22, 16)
TRAINING = {"epochs": 200, "iterations": 2}


class Ward:
    """A server that is started again after every death, and somebody who goes on submitting labels."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.studies = folder, folder / "home", folder / "studies"
        for number in range(10):
            make_image(self.studies / f"case{number}.nii.gz", SHAPE, seed=number)
        model = make_model_folder(folder / "model")
        self.first = add_model(ModelStore(self.home), MODEL, model)
        self.server = self._start()
        self.acknowledged: dict[str, int] = {}
        self._ended = threading.Event()

    def _start(self) -> LiveServer:
        return LiveServer(self.home, ["--studies", str(self.studies)], self.folder)

    def client(self) -> MONAILabelClient:
        scratch = self.folder / "client"
        scratch.mkdir(exist_ok=True)
        return self.server.client(scratch)

    def submit(self, case: str, marked: int) -> None:
        """Submit a label with `marked` voxels of liver, and take note once the server has said yes."""
        array = np.zeros(SHAPE, np.uint8)
        array.reshape(-1)[:marked] = 2
        array[-6:, -6:, -6:] = 1
        path = self.folder / f"{case}-{marked}.nii.gz"
        nib.save(nib.Nifti1Image(array, nib.load(self.studies / f"{case}.nii.gz").affine), path)
        info = [{"name": "spleen", "idx": 1}, {"name": "liver", "idx": 2}]
        self.client().save_label(case, str(path), params={"label_info": info})
        self.acknowledged[case] = marked

    def keep_submitting(self) -> None:
        """Submit label after label until told to end; a dead server is no reason to stop."""
        for marked in range(100, 10_000):
            if self._ended.wait(0.3):
                return
            try:
                self.submit(f"case{8 + marked % 2}", marked % 900 + 100)
            except (OSError, HTTPException, MONAILabelClientException):
                continue

    def end(self) -> None:
        self._ended.set()
        self.server.stop()

    def kill_server(self) -> None:
        self.server.kill()
        self.server = self._start()

    def kill_job(self) -> bool:
        """Kill the process of the training, if it has one just now."""
        jobs = Jobs(self.home).open()
        pid = jobs[0].progress().get("pid") if jobs else None
        if pid is None:
            return False
        os.killpg(pid, signal.SIGKILL)
        return True

    def train(self) -> None:
        """Ask for a training unless one is at work; the server lets one that broke off go on by itself."""
        try:
            self.client().train_start(MODEL, TRAINING)
        except MONAILabelClientException as error:
            if "is being trained already" not in str(error):
                raise

    def check(self) -> None:
        """The server answers with a whole version, and every acknowledged label is there."""
        serving = ModelStore(self.home).verify(MODEL)
        _, params = self.client().infer(MODEL, "case0", {"profile": "balanced"})
        assert params["model_version"] == serving.version
        index = self.client().datastore()
        for case, marked in dict(self.acknowledged).items():
            label = self.studies / "labels" / "final" / f"{case}.nii.gz"
            kept = [label, *(self.studies / "labels").glob(f"version_*/{case}.nii.gz")]
            counts = {int((np.asarray(nib.load(path).dataobj) == 2).sum()) for path in kept}
            assert marked in counts, f"the label of {case} with {marked} voxels is gone"
            assert "final" in index["objects"][case]["labels"]


def test_nothing_is_lost_when_job_and_server_are_killed(tmp_path: Path) -> None:
    ward, chance = Ward(tmp_path), random.Random(20)
    try:
        for number in range(8):
            ward.submit(f"case{number}", 200 + number)
        submitting = threading.Thread(target=ward.keep_submitting)
        submitting.start()
        for kill in range(KILLS):
            ward.train()
            time.sleep(chance.uniform(1, 14))
            if kill % 2 or not ward.kill_job():
                ward.kill_server()
            ward.check()
        ward._ended.set()
        submitting.join()
        ward.train()
        finished = Jobs(ward.home).latest(MODEL)
        assert finished is not None
        progress = finished.wait()
        assert progress["state"] == "done", (progress, finished.log_tail())
        ward.check()
        versions = ModelStore(ward.home).versions(MODEL)
        jobs = [version.record["lineage"]["job"] for version in versions[1:]]
        assert len(jobs) == len(set(jobs)), "a job published twice"
        assert all(job.progress()["state"] not in OPEN for job in Jobs(ward.home).all())
        for version in versions:
            ModelStore(ward.home).verify(MODEL, version.version)
    finally:
        ward.end()
