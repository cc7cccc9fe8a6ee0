"""MONAI Label's batches and scoring: processes of their own, which are told what they need and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

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
