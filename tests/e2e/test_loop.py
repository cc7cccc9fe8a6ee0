"""The whole loop as a client lives it: predict, correct, submit, train, judge, promote, go back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest

from factories import make_image, make_model_folder, odd_grids
from live import LiveServer, Site
from mshub.install import add_model
from mshub.store import ModelStore

MODEL = "tiny"
SHAPE = (24, 22, 16)
CASES = [f"case{number}" for number in range(10)]
SCENE = {"spleen": 1, "liver": 3}
"""How 3D Slicer numbered the segments of its scene."""


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("ward")
    studies, home = folder / "studies", folder / "home"
    for number, case in enumerate(CASES):
        make_image(studies / f"{case}.nii.gz", SHAPE, odd_grids()["-x+y+z"], seed=number)
    add_model(ModelStore(home), MODEL, make_model_folder(folder / "model"))
    server = LiveServer(home, ["--studies", str(studies)], folder)
    yield Site(server, studies, home)
    server.stop()


def correct(ward: Site, case: str, folder: Path) -> None:
    """Predict a case, draw a box for the liver, and submit both segments as 3D Slicer does."""
    client = ward.server.client(folder)
    client.infer(MODEL, case, {"save_label": True, "label_tag": "original", "profile": "balanced"})
    image = nib.load(ward.studies / f"{case}.nii.gz")
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[4:14, 5:15, 3:11], drawn[15:22, 3:10, 4:12] = SCENE["liver"], SCENE["spleen"]
    path = folder / f"{case}.nrrd.nii.gz"
    nib.save(nib.Nifti1Image(drawn, image.affine), path)
    info = [{"name": name, "idx": number} for name, number in SCENE.items()]
    client.save_label(case, str(path), params={"label_info": info, "model": MODEL})


def train(ward: Site, folder: Path, options: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Start a training and follow it as Slicer does; returns the last stats and all that were seen on the way."""
    client, seen = ward.server.client(folder), []
    client.train_start(MODEL, options)
    while client.train_status(check_if_running=True):
        seen.append(client.info()["train_stats"][MODEL])
        time.sleep(0.2)
    return client.info()["train_stats"][MODEL], seen


def test_corrections_become_a_version_that_is_judged_and_served(ward: Site, tmp_path: Path) -> None:
    client, store = ward.server.client(tmp_path), ModelStore(ward.home)
    for case in CASES:
        correct(ward, case, tmp_path)
    info = client.info()
    assert info["trainers"][MODEL]["mshub"] == {"reviewed_cases": 10, "new_cases": 10}

    last, seen = train(ward, tmp_path, {"epochs": 6, "iterations": 4, "device": "cpu"})
    assert last["state"] == "done", last
    assert last["outcome"] in ("promoted", "refused", "needs a person")
    assert (last["epoch"], last["total_epochs"]) == (6, 6)
    assert last["total_time"] > 0
    assert all("total_time" not in stats for stats in seen if stats.get("state") == "running")

    version = store.version(MODEL, last["version"])
    lineage = version.record["lineage"]
    assert version.record["parent"] == "v1"
    trained, judged = ([case["case"] for case in lineage[key]] for key in ("cases", "held_out"))
    assert sorted(trained + judged) == CASES
    assert trained
    assert judged
    assert lineage["cases"][0]["started_from"] == {"model": MODEL, "version": "v1"}
    assert lineage["cases"][0]["client_id"] == "tester"
    assert {"v1", "candidate"} == set(lineage["scores"])

    page = httpx.get(f"{ward.server.url}/mshub/reports/{MODEL}/{version.version}")
    assert page.status_code == 200
    assert lineage["verdict"]["outcome"].lower() in page.text.lower()

    # nothing new: OHIF's button starts nothing
    answer = httpx.post(f"{ward.server.url}/train/", json={}).json()
    assert answer[MODEL]["result"] is None
    assert "no new reviewed cases" in answer[MODEL]["detail"]


def test_the_running_server_switches_versions_and_goes_back(ward: Site, tmp_path: Path) -> None:
    store, client = ModelStore(ward.home), ward.server.client(tmp_path)
    newest = store.versions(MODEL)[-1].version
    assert newest != "v1"

    def serving() -> str:
        return str(client.infer(MODEL, "case0", {"profile": "balanced"})[1]["model_version"])

    store.promote(MODEL, "v1", "test")
    assert serving() == "v1"
    store.promote(MODEL, newest, "test")
    assert serving() == newest
    store.rollback(MODEL)
    assert serving() == "v1"


def test_inference_answers_while_a_training_runs_and_stop_keeps_the_version(ward: Site, tmp_path: Path) -> None:
    client, store = ward.server.client(tmp_path), ModelStore(ward.home)
    before, versions = store.current(MODEL).version, len(store.versions(MODEL))
    client.train_start(MODEL, {"epochs": 5000, "iterations": 5, "device": "cpu"})
    deadline = time.monotonic() + 120
    while not client.info()["train_stats"][MODEL].get("epoch") and time.monotonic() < deadline:
        time.sleep(0.3)
    assert client.infer(MODEL, "case1", {"profile": "balanced"})[1]["model_version"] == before
    stopped = client.train_stop()
    assert stopped["status"] == "STOPPED"
    assert httpx.get(f"{ward.server.url}/train/?check_if_running=true").status_code == 404
    assert store.current(MODEL).version == before
    assert len(store.versions(MODEL)) == versions
    assert client.infer(MODEL, "case1", {"profile": "balanced"})[1]["model_version"] == before
