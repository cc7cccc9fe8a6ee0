"""Training as MONAI Label's own client, 3D Slicer and OHIF drive it, on servers whose trainings compute nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from factories import make_image, make_model_folder
from live import LiveServer
from mshub.bundled import app_folder
from mshub.install import add_model
from mshub.jobs import Job, Jobs
from mshub.store import ModelStore
from waiting import eventually

FAKE_WORKER = Path(__file__).parent / "fake_worker"
STOCK = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app_folder())]
SHORT = {"epochs": 20, "iterations": 30}
LONG = {"epochs": 1000, "iterations": 10}
SHAPE = (21, 25, 18)


@pytest.fixture(scope="module", autouse=True)
def _fake_worker() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKE_WORKER), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a store (models ``tiny`` and ``two-channels``) and studies, for the servers of these tests."""
    folder = tmp_path_factory.mktemp("ward")
    for number in (1, 2):
        make_image(folder / "studies" / f"case0{number}.nii.gz", SHAPE, seed=number)
    for model, options in {
        "tiny": {},
        "two-channels": {"channels": ("T1", "T2"), "labels": {"background": 0, "tumour": 1}},
    }.items():
        add_model(ModelStore(folder / "home"), model, make_model_folder(folder / "models" / model, **options))
    yield folder
    Jobs(folder / "home").stop_all()


def serve(ward: Path) -> LiveServer:
    return LiveServer(ward / "home", ["--studies", str(ward / "studies")], ward)


@pytest.fixture(scope="module")
def server(ward: Path) -> Iterator[LiveServer]:
    server = serve(ward)
    yield server
    server.stop()


@pytest.fixture
def client(server: LiveServer, tmp_path: Path) -> MONAILabelClient:
    return server.client(tmp_path)


def submit(client: MONAILabelClient, image: str, folder: Path, voxels: int) -> None:
    array = np.zeros(SHAPE, np.uint8)
    array[5, :voxels, 7] = 1
    path = folder / "label.nii.gz"
    nib.save(nib.Nifti1Image(array, np.diag([1.7, 1.3, 3.1, 1.0])), path)
    client.save_label(image, str(path), params={"label_info": [{"name": "liver", "idx": 1}]})


wait_for = partial(eventually, seconds=120, every_s=0.2)


def first_stats(client: MONAILabelClient) -> dict[str, Any]:
    """What both viewers look at."""
    return dict(next(iter(client.info()["train_stats"].values())))


def test_nothing_is_trained_without_a_label(client: MONAILabelClient) -> None:
    assert client.train_status(check_if_running=True) is False
    with pytest.raises(MONAILabelClientException, match="404"):
        client.train_status()
    with pytest.raises(MONAILabelClientException, match=r"nothing tiny can learn from yet. Found: 0 reviewed case"):
        client.train_start("tiny", {})
    assert client.train_stop() is None


def test_a_training_as_slicer_sees_it(client: MONAILabelClient, recorded: Any, tmp_path: Path) -> None:
    submit(client, "case01", tmp_path, 5)
    request = recorded("slicer_train")
    assert set(client.info()["trainers"]["tiny"]["config"]) == set(request["params"]) - {"client_id"}
    task = client.train_start("tiny", {**request["params"], **SHORT})
    assert (task["status"], task["request"]["learning_rate"]) == ("RUNNING", 0.001)
    assert client.train_status(check_if_running=True) is True, "Slicer looks a second later, and stops if it is not"
    with pytest.raises(MONAILabelClientException, match=r"429.*being trained already"):
        client.train_start("tiny", {})
    bars = []
    while client.train_status()["status"] == "RUNNING":  # monitorTraining
        stats = first_stats(client)
        if stats.get("total_time"):
            break  # it ended between the two questions, and Slicer's bar is gone
        bars.append(100 * stats.get("epoch", 1) / stats.get("total_epochs", 1))
        time.sleep(0.2)
    assert sorted(bars) == bars, "the bar never goes back"
    assert len({bar for bar in bars if 0 < bar < 100}) > 2
    wait_for(lambda: client.train_status()["status"] == "DONE")
    stats = first_stats(client)
    assert (stats["best_metric"], stats["version"], stats["outcome"]) == (0.5, "v2", "promoted")
    assert stats["total_time"] > 0


def test_ohifs_update_model_and_stop_training(server: LiveServer, client: MONAILabelClient, recorded: Any) -> None:
    request = recorded("ohif_update_model")
    started = httpx.post(server.url + request["path"], json=request["params"])
    assert started.status_code == 200
    assert started.json()["tiny"]["result"]["request"]["epochs"] == 1000
    assert started.json()["two-channels"]["result"] is None
    assert "none of 2 channel(s)" in started.json()["two-channels"]["detail"]
    answer = httpx.get(f"{server.url}/train/?check_if_running=true")  # is_train_running
    assert (answer.status_code, answer.json()["status"]) == (200, "RUNNING")
    wait_for(lambda: first_stats(client).get("epoch"))
    status = httpx.get(f"{server.url}/mshub/status").json()
    assert [training["model"] for training in status["training"]] == ["tiny"]
    stopped = client.train_stop()
    assert stopped["status"] == "STOPPED"
    assert stopped["details"][-1]
    assert client.train_status(check_if_running=True) is False
    assert first_stats(client)["total_time"] > 0


def test_slicers_auto_update_trains_anew_with_every_label(client: MONAILabelClient, tmp_path: Path) -> None:
    tasks = []
    for voxels in (6, 7):
        submit(client, "case02", tmp_path, voxels)
        if client.train_status(check_if_running=True):
            client.train_stop()
        tasks.append(client.train_start("tiny", dict(LONG)))
    assert tasks[0]["id"] != tasks[1]["id"]
    assert tasks[1]["request"]["cases"] == 2
    client.train_stop()


def test_the_report_of_a_round_can_be_opened(server: LiveServer, ward: Path) -> None:
    path = ward / "home" / "reports" / "tiny" / "v2.html"
    path.parent.mkdir(parents=True)
    path.write_text("<p>a round</p>")
    assert httpx.get(f"{server.url}/mshub/reports/tiny/v2").text == "<p>a round</p>"
    assert httpx.get(f"{server.url}/mshub/reports/tiny/v9").status_code == 404


def test_a_training_ends_with_the_server_and_goes_on_with_the_next_one_as_after_a_crash(
    server: LiveServer, client: MONAILabelClient, ward: Path, tmp_path: Path
) -> None:
    client.train_start("tiny", {**LONG, "iterations": 11})
    job = wait_for(lambda: at_work(ward))
    server.stop()
    wait_for(lambda: job.progress()["state"] == "interrupted")
    assert not job.is_alive()
    job.tell(attempts=0)  # as the real process says
    for attempt in (1, 2):
        again = serve(ward)
        try:
            wait_for(lambda: job.progress()["state"] == "running")
            assert again.client(tmp_path).train_status()["id"] == job.id
            assert job.progress()["attempts"] == attempt
        finally:
            again.kill()
            os.kill(job.progress()["pid"], signal.SIGKILL)
    job.ask_to_stop()  # or the next server would let it go on


def test_stock_monai_label_trains_and_stops_too(ward: Path, tmp_path: Path) -> None:
    arguments = ["--studies", str(ward / "studies"), "--host", "127.0.0.1"]
    server = LiveServer(ward / "home", arguments, tmp_path, command=STOCK, probe="/info/")
    client = server.client(tmp_path)
    try:
        client.train_start("tiny", {**LONG, "iterations": 12})
        job = wait_for(lambda: at_work(ward))
        assert client.train_status()["status"] == "RUNNING"
        assert first_stats(client)["state"] == "running"
        assert client.train_stop()["status"] == "STOPPED"
        wait_for(lambda: job.progress()["state"] == "interrupted")
        assert first_stats(client)["total_time"] > 0
    finally:
        server.stop()
    assert Jobs(ward / "home").resume_interrupted() == [], "what a person stopped stays stopped"


def at_work(ward: Path) -> Job | None:
    jobs = [(job, job.progress()) for job in Jobs(ward / "home").open()]
    return next((job for job, progress in jobs if progress["state"] == "running" and progress.get("epoch")), None)


def test_the_recorded_requests_say_where_they_come_from() -> None:
    for path in (Path(__file__).parent / "recorded").glob("*.json"):
        assert json.loads(path.read_text())["source"]
