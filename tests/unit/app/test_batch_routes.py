"""MONAI Label's batches and scoring: processes of their own, which are told what they need and nothing else."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType
from monailabel.utils.async_tasks import utils as tasks

ODD = {
    "bundle_path": "/tmp/somewhere",
    "model": "another",
    "method": "another",
    "image": "/etc/passwd",
    "session": {"image": "/etc/passwd"},
    "network": "x.pt",
    "series": {"CT": "1.2.3"},
}


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What processes are told, which do not begin."""
    told: list[tuple[str, dict[str, Any]]] = []

    def begin(request: dict[str, Any], method: str) -> dict[str, Any]:
        told.append((method, request))
        return {"id": "1", "request": request}

    monkeypatch.setattr("monailabel.utils.async_tasks.task.run_background_task", begin)
    return told


def test_a_batch_is_told_what_a_prediction_is_and_what_makes_it_a_batch(
    server: TestClient, begun: list[tuple[str, dict[str, Any]]]
) -> None:
    wanted = {
        **{"profile": "balanced", "device": "cpu", "multi_gpu": True, "gpus": "0,1", "max_workers": 1},
        **{"save_label": True, "label_tag": "original", "max_batch_size": 1, "labels": ["liver"]},
    }
    answer = server.post("/batch/infer/tiny?images=unlabeled", json={**wanted, **ODD})
    assert answer.status_code == 200, answer.text
    assert begun == [("batch_infer", {"model": "tiny", "images": "unlabeled", **wanted})]
    begun.clear()
    assert server.post("/batch/infer/tiny", json={"images": ["b"]}).status_code == 200
    assert begun == [("batch_infer", {"model": "tiny", "images": ["b"], "gpus": "all"})]
    begun.clear()
    assert server.post("/batch/infer/tiny").status_code == 200
    assert begun == [("batch_infer", {"model": "tiny", "images": "all", "gpus": "all"})]


@pytest.mark.parametrize("gpus", [1, ["0"], "0\0", "0,", "gpu0", {"a": 1}])
def test_gpus_are_numbers(server: TestClient, begun: list[tuple[str, dict[str, Any]]], gpus: Any) -> None:
    answer = server.post("/batch/infer/tiny", json={"gpus": gpus})
    assert (answer.status_code, begun) == (400, [])
    assert "such as 0,1" in answer.json()["detail"]


def test_a_batch_that_no_process_could_be_told_of_is_refused(
    server: TestClient, begun: list[tuple[str, dict[str, Any]]]
) -> None:
    images = [f"1.2.840.{number:056d}" for number in range(1000)]
    assert server.post("/batch/infer/tiny", json={"images": images}).status_code == 200
    assert len(begun) == 1
    answer = server.post("/batch/infer/tiny", json={"images": images + images})
    assert (answer.status_code, len(begun)) == (413, 1)
    assert "fewer images" in answer.json()["detail"]


def test_scoring_is_told_its_method_only(server: TestClient, begun: list[tuple[str, dict[str, Any]]]) -> None:
    assert server.post("/scoring/dice", json=ODD).status_code == 200
    assert server.post("/scoring/", json={"dice": ODD, **ODD}).status_code == 200
    assert begun == [("scoring", {"method": "dice"})] * 2
    answer = server.post("/scoring/luck", json={})
    assert (answer.status_code, answer.json()["detail"]) == (
        404,
        "There is no scoring method 'luck' here. Known: dice.",
    )


@pytest.mark.parametrize("path", ["/batch/infer/tiny", "/scoring/", "/scoring/dice"])
def test_options_are_an_object(server: TestClient, begun: list[tuple[str, dict[str, Any]]], path: str) -> None:
    answer = server.post(path, json=["bundle_path"])
    assert (answer.status_code, begun) == (400, [])
    assert "no JSON object" in answer.json()["detail"]


def test_what_is_asked_for_at_once_is_answered_at_once(server: TestClient) -> None:
    assert server.post("/scoring/dice?run_sync=true", json={}).json() == {"cases": {}, "dice": {}}
    found = server.post("/batch/infer/tiny?run_sync=true", json={"images": ["a"], "device": "cpu"})
    assert found.status_code == 200, found.text
    assert found.json()["a"]["params"]["label_names"] == {"liver": 1, "spleen": 2}


@pytest.fixture
def hurried_task(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A task whose thread tells of its process all the time."""
    request = {"images": [BatchInferImageType.IMAGES_ALL] * 50}
    task: dict[str, Any] = {"id": "1", "request": request, "details": deque(maxlen=20)}
    stop = threading.Event()

    def follow() -> None:
        while not stop.is_set():
            task["details"].append("a line")
            task["end_ts"] = "now"
            sum(range(300))
            del task["end_ts"]
            sum(range(300))

    for method in ("batch_infer", "scoring"):
        monkeypatch.setitem(tasks.background_tasks, method, [task])
        monkeypatch.setitem(tasks.background_processes, method, {})
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=follow)
    thread.start()
    yield task
    stop.set()
    thread.join()
    sys.setswitchinterval(before)


@pytest.mark.parametrize("path", ["/batch/infer", "/batch/infer?all=true", "/scoring/"])
def test_a_task_is_told_as_it_was_at_one_moment(server: TestClient, hurried_task: dict[str, Any], path: str) -> None:
    """A batch that had just been started was answered with 500: MONAI Label changes its tasks while they are told."""
    for _ in range(60):
        answer = server.get(path)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("path", "method"), [("/batch/infer", "batch_infer"), ("/scoring/", "scoring")])
@pytest.mark.parametrize("how", [lambda: psutil.NoSuchProcess(1), StopIteration])
def test_what_ends_just_as_it_is_to_be_stopped_is_stopped(
    server: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, method: str, how: Callable[[], Exception]
) -> None:
    def stop(asked: str) -> None:
        assert asked == method
        raise how()

    monkeypatch.setattr("monailabel.utils.async_tasks.task.stop_background_task", stop)
    answer = server.delete(path)
    assert (answer.status_code, answer.json()) == (200, None)
