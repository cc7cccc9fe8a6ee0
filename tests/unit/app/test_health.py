"""What those who watch over a server ask it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from lib.conf import Config
from lib.server import health, single
from lib.server.health import Health
from mshub.errors import ConfigError

STATUS = {
    "version": "1.2",
    "models": {"tiny": "v1", "starter": "v3"},
    "loaded": ["models/tiny/v1"],
    "running": [{"stage": "waiting"}, {"stage": "predicting"}, {"stage": "predicting"}],
    "finished": 7,
    "failed": 2,
    "refused": 1,
}


def served(home: Path, status: dict[str, Any] = STATUS) -> tuple[Health, TestClient]:
    watched = Health(lambda: home, lambda: status)
    api = FastAPI()
    api.router.routes[:0] = watched.routes()
    return watched, TestClient(api)


def test_a_server_that_can_work_says_so(tmp_path: Path) -> None:
    _, client = served(tmp_path)
    assert client.get("/health/live").json() == {"status": "alive"}
    answer = client.get("/health/ready")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "reasons": []})


def test_a_full_disk_is_not_ready_but_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, client = served(tmp_path)
    monkeypatch.setattr(health, "free_bytes", lambda _: 5_000_000)
    answer = client.get("/health/ready")
    assert answer.status_code == 503
    assert "disk is full: 5 MB are left" in answer.json()["reasons"][0]
    assert str(tmp_path) not in answer.text
    assert client.get("/health/live").status_code == 200


def test_an_app_that_does_not_start_is_not_ready(tmp_path: Path) -> None:
    def broken() -> Path:
        raise RuntimeError("secret path")

    api = FastAPI()
    api.router.routes[:0] = Health(broken, lambda: STATUS).routes()
    answer = TestClient(api).get("/health/ready")
    assert answer.status_code == 503
    assert "RuntimeError" in answer.text
    assert "secret" not in answer.text


def test_prometheus_can_read_the_metrics(tmp_path: Path) -> None:
    watched, client = served(tmp_path)
    watched.requests.observe("POST", "/infer/{model}", 200, 12.0)
    watched.requests.observe("POST", "/infer/{model}", 503, 0.01)
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["mshub_predictions", ("stage", "predicting")] == 2
    assert samples["mshub_predictions", ("stage", "loading")] == 0
    assert samples["mshub_predictions_ended_total", ("outcome", "finished")] == 7
    assert samples["mshub_predictions_ended_total", ("outcome", "refused")] == 1
    assert samples[("mshub_networks_loaded",)] == 1
    assert samples[("mshub_models",)] == 2
    infer = (("method", "POST"), ("route", "/infer/{model}"))
    assert samples[("mshub_requests_total", *infer, ("status", "503"))] == 1
    assert samples[("mshub_request_seconds_count", *infer)] == 2
    assert samples[("process_resident_memory_bytes",)] > 10**6


# -- one server per folder --------------------------------------------------------------------------------------------

SECOND = """
import sys
from pathlib import Path
from lib.server.single import hold
from mshub.errors import ConfigError
try:
    hold(Path(sys.argv[1]), sys.argv[1])
except ConfigError as error:
    sys.exit(str(error))
"""


def second(folder: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", SECOND, str(folder)], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_second_server_is_kept_away_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(single.__file__).parents[2]))
    lock = single.hold(tmp_path, str(tmp_path))
    assert lock is not None
    code, said = second(tmp_path)
    assert code == 1
    assert "Another server works on" in said
    lock.release()
    assert second(tmp_path)[0] == 0
    again = single.hold(tmp_path, str(tmp_path))
    assert again is not None
    with pytest.raises(ConfigError):
        single.hold(tmp_path, str(tmp_path))
    again.release()


def test_a_pacs_has_one_for_each_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(single.__file__).parents[2]))
    addresses = ("http://pacs:8042/dicom-web", "http://pacs:8042/dicom-web/", "http://other:8042/dicom-web")
    same, slash, other = (Config(tmp_path).data_folder(address) for address in addresses)
    assert same == slash != other
    for folder in (same, other):
        folder.mkdir(parents=True)
    lock = single.hold(same, addresses[0])
    assert lock is not None
    assert second(same)[0] == 1
    assert second(other)[0] == 0
    lock.release()


def test_a_folder_that_is_not_there_keeps_nobody_away(tmp_path: Path) -> None:
    assert single.hold(tmp_path / "missing", "missing") is None
