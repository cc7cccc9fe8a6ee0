"""``/train`` as 3D Slicer and OHIF use it, and the reports: statuses, shapes, and a sentence wherever it is no."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC

from factories import make_model_folder
from lib.app import MSHubApp
from lib.server import asgi, process_routes, work_routes
from mshub.install import add_model
from mshub.store import ModelStore

SHORT = {"epochs": 2, "iterations": 1}
LONG = {"epochs": 1000, "iterations": 10}


@pytest.fixture
def other(clinic: MSHubApp, installed: ModelStore, tmp_path: Path) -> str:
    """A second model, of spleen and kidney."""
    folder = make_model_folder(tmp_path / "m", labels={"background": 0, "spleen": 1, "kidney": 2}, seed=3)
    add_model(installed, "other", folder)
    return "other"


def refusal(answer: httpx.Response) -> str:
    detail = answer.json()["detail"]
    assert isinstance(detail, str)
    assert len(detail) > 20, "a code is no explanation"
    return detail


def until(server: TestClient, status: str, seconds: float = 60) -> dict[str, Any]:
    """Ask for the status every now and then, as Slicer does, until it is `status`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        task: dict[str, Any] = server.get("/train/").json()
        if task["status"] == status:
            return task
        time.sleep(0.1)
    raise AssertionError(f"never {status}: {task}")


def running(server: TestClient, epoch: int = 1) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        task: dict[str, Any] = server.get("/train/").json()
        if task["stats"]["state"] == "running" and task["stats"].get("epoch", 0) >= epoch:
            return task
        time.sleep(0.05)
    raise AssertionError(f"it did not begin: {task}")


# -- before there is anything -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", "?all=true", "?check_if_running=true"])
def test_before_the_first_training_the_status_is_a_404_that_says_so(server: TestClient, query: str) -> None:
    answer = server.get(f"/train/{query}")
    assert answer.status_code == 404
    assert "train" in refusal(answer)


def test_stopping_what_does_not_run_is_null(server: TestClient) -> None:
    answer = server.delete("/train/")
    assert (answer.status_code, answer.json()) == (200, None)


def test_without_a_case_that_fits_a_training_is_refused_with_what_is_missing(
    server: TestClient, review: Callable[..., None]
) -> None:
    review("mr", "liver")
    answer = server.post("/train/tiny", json={"client_id": "me"})
    assert answer.status_code == 400
    assert "Found: 1 reviewed case(s), none of 1 channel(s)" in refusal(answer)
    result = server.post("/train/").json()
    assert result == {"tiny": {"result": None, "detail": refusal(answer)}}


@pytest.mark.parametrize("path", ["/train/nothing", "/train/liver-lesion-ct"])
def test_an_unknown_model_is_a_404(server: TestClient, path: str) -> None:
    assert server.post(path, json={}).status_code == 404


def test_a_model_that_is_not_installed_says_how_to_get_it(server: TestClient) -> None:
    assert "mshub fetch liver-lesion-ct" in refusal(server.post("/train/liver-lesion-ct"))


@pytest.mark.parametrize(
    ("params", "status", "words"),
    [
        ({"epochs": 0}, 400, "epochs is 0; expected 1"),
        ({"epochs": "many"}, 400, "epochs is 'many'"),
        ({"guard": "dog"}, 400, "expected one of distil, interpolate"),
        ({"epoch": 3}, 400, "Did you mean epochs"),
        ({"device": "tpu"}, 422, "tpu"),
        ({"tiny": {"learning_rate": -1}}, 400, "learning_rate is -1"),
        ([1], 400, "no JSON object"),
        ("text", 400, "no JSON object"),
    ],
)
@pytest.mark.parametrize("path", ["/train/tiny", "/train/"])
def test_an_impossible_option_starts_nothing_and_is_named(
    server: TestClient, clinic: MSHubApp, review: Callable[..., None], path: str, params: Any, status: int, words: str
) -> None:
    review("a", "liver")
    answer = server.post(path, json=params)
    assert answer.status_code == status
    assert words in refusal(answer)
    assert clinic.jobs.all() == []


def test_bad_json_is_refused(server: TestClient) -> None:
    answer = server.post("/train/tiny", content="{oops", headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500


# -- one model: 3D Slicer ---------------------------------------------------------------------------------------------


def test_a_training_from_its_start_to_its_end(
    server: TestClient, clinic: MSHubApp, review: Callable[..., None]
) -> None:
    review("a", "liver")
    review("b", "spleen")
    config = clinic.info()["trainers"]["tiny"]["config"]
    params = {key: value[0] if isinstance(value, list) else value for key, value in config.items()}
    task = server.post("/train/tiny", json={**params, "epochs": 5, "iterations": 60, "client_id": "user-xyz"}).json()
    assert task["status"] == "RUNNING"
    assert task["request"]["client_id"] == "user-xyz"
    assert {"id", "start_ts", "details"} <= set(task)
    seen = [server.get("/train/?check_if_running=true")]
    assert [(answer.status_code, answer.json()["status"]) for answer in seen] == [(200, "RUNNING")]
    running(server)
    (stats,) = clinic.info()["train_stats"].values()
    assert (stats["total_epochs"], stats["state"], "total_time" in stats) == (5, "running", False)
    assert [training["model"] for training in server.get("/mshub/status").json()["training"]] == ["tiny"]
    done = until(server, "DONE")
    assert done["id"] == task["id"]
    assert done["details"][-1] == "epoch 5"
    assert done["end_ts"] >= done["start_ts"]
    (stats,) = clinic.info()["train_stats"].values()
    assert (stats["epoch"], stats["best_metric"], stats["total_time"]) == (5, 0.5, 1.5)
    assert (stats["version"], stats["outcome"], stats["report"]) == ("v2", "promoted", "reports/tiny/v2.html")
    assert server.get("/train/?check_if_running=true").status_code == 404
    assert [one["id"] for one in server.get("/train/?all=true").json()] == [task["id"]]
    assert server.get("/mshub/status").json()["training"] == []


def test_a_second_training_of_the_model_is_refused_while_the_first_runs(
    server: TestClient, review: Callable[..., None]
) -> None:
    review("a", "liver")
    first = server.post("/train/tiny", json=LONG)
    second = server.post("/train/tiny?enqueue=true&run_sync=true", json=LONG)
    assert (first.status_code, second.status_code) == (200, 429)
    assert first.json()["id"] in refusal(second)
    assert refusal(second) == server.post("/train/").json()["tiny"]["detail"]


def test_requests_at_the_same_time_start_one_training(
    server: TestClient, clinic: MSHubApp, review: Callable[..., None]
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    review("a", "liver")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.post("/train/tiny", json=LONG).status_code, range(4)))
    assert sorted(answers)[0] == 200
    assert all(400 <= status < 500 for status in sorted(answers)[1:])
    assert len(clinic.jobs.all()) == 1


def test_a_model_without_new_cases_is_trained_when_it_is_asked_for_by_name(
    server: TestClient, review: Callable[..., None]
) -> None:
    review("a", "liver")
    for _ in range(2):
        assert server.post("/train/tiny", json=SHORT).status_code == 200
        until(server, "DONE")
    assert len(server.get("/train/?all=true").json()) == 2


@pytest.mark.parametrize(("body", "client"), [({"client_id": "ada"}, "ada"), ({}, "")])
def test_where_nobody_logs_in_the_client_says_who_asks(
    server: TestClient, clinic: MSHubApp, review: Callable[..., None], body: dict[str, str], client: str
) -> None:
    review("a", "liver")
    server.post("/train/tiny", json=body)
    assert clinic.jobs.all()[0].request.client == client


def test_a_failed_training_is_an_error_with_its_reason(server: TestClient, review: Callable[..., None]) -> None:
    review("a", "liver")
    server.post("/train/tiny", json={**SHORT, "weight_decay": 1})
    task = until(server, "ERROR")
    assert task["result"] == "The GPU ran out of memory."
    assert task["stats"]["message"] == "The GPU ran out of memory."


def test_stop_ends_the_training_and_the_same_goes_on_later(server: TestClient, review: Callable[..., None]) -> None:
    review("a", "liver")
    first = server.post("/train/tiny", json=LONG).json()
    running(server)
    stopped = server.delete("/train/").json()
    assert (stopped["id"], stopped["status"]) == (first["id"], "STOPPED")
    assert stopped["details"][-1].startswith("epoch")
    assert server.get("/train/?check_if_running=true").status_code == 404
    assert server.get("/train/").json()["status"] == "STOPPED"
    assert server.delete("/train/").json() is None
    assert server.post("/train/tiny", json=LONG).json()["id"] == first["id"]
    review("b", "liver")
    running(server)
    server.delete("/train/")
    assert server.post("/train/tiny", json=LONG).json()["id"] != first["id"], "another case makes another training"


# -- all models: OHIF -------------------------------------------------------------------------------------------------


def test_ohifs_button_trains_every_model_in_turn_and_stop_ends_them_all(
    server: TestClient, clinic: MSHubApp, review: Callable[..., None], other: str
) -> None:
    review("a", "spleen")
    answer = server.post("/train/", json={"tiny": {"epochs": 900}, "other": LONG, "gone": {"epochs": 1}})
    assert answer.status_code == 200
    tasks = {model: entry["result"] for model, entry in answer.json().items()}
    assert sorted(tasks) == ["other", "tiny"]
    assert [entry["detail"] for entry in answer.json().values()] == [None, None]
    assert tasks["tiny"]["request"]["epochs"] == 900
    assert tasks["other"]["request"]["epochs"] == 1000
    task = running(server)
    statuses = {one["id"]: one["status"] for one in server.get("/train/?all=true").json()}
    assert sorted(statuses.values()) == ["RUNNING", "SUBMITTED"]
    assert statuses[task["id"]] == "RUNNING"
    first = next(iter(clinic.info()["train_stats"].items()))
    assert (first[0], first[1]["state"]) == (task["request"]["model"], "running")
    assert server.delete("/train/").json()["id"] == task["id"]
    assert {one["status"] for one in server.get("/train/?all=true").json()} == {"STOPPED"}
    assert server.get("/mshub/status").json()["training"] == []


def test_ohifs_button_leaves_models_alone_that_have_nothing_new(
    server: TestClient, installed: ModelStore, clinic: MSHubApp, review: Callable[..., None], other: str, tmp_path: Path
) -> None:
    review("a", "liver")  # nothing for `other`
    (case,) = clinic.datastore().reviewed_cases()
    lineage = {"cases": [], "held_out": [{"case": "a", "digest": case.digest}]}
    record = {**installed.current("tiny").record, "parent": "v1", "lineage": lineage}
    with installed.staging() as folder:
        installed.publish("tiny", make_model_folder(folder / "model", seed=9), record)
    result = server.post("/train/", json=SHORT).json()
    assert result["tiny"] == {"result": None, "detail": "no new reviewed cases since v2"}
    assert "spleen or kidney was reviewed" in result["other"]["detail"]
    assert clinic.jobs.all() == []
    review("b", "liver")
    result = server.post("/train/", json=SHORT).json()
    assert result["tiny"]["result"]["status"] == "RUNNING"
    assert result["other"]["result"] is None


def test_statistics_begin_with_the_model_that_was_trained_last(
    server: TestClient, clinic: MSHubApp, review: Callable[..., None], other: str
) -> None:
    assert list(clinic.info()["train_stats"].values()) == [{}, {}]
    review("a", "spleen")
    for model in ("tiny", "other", "tiny"):
        server.post(f"/train/{model}", json=SHORT)
        until(server, "DONE")
        time.sleep(1.1)  # progress has times in seconds
        assert next(iter(clinic.info()["train_stats"])) == model


# -- who may ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("POST", "/train/", settings.MONAI_LABEL_AUTH_ROLE_ADMIN),
        ("POST", "/train/{model}", settings.MONAI_LABEL_AUTH_ROLE_ADMIN),
        ("DELETE", "/train/", settings.MONAI_LABEL_AUTH_ROLE_ADMIN),
        ("GET", "/train/", settings.MONAI_LABEL_AUTH_ROLE_USER),
        ("POST", "/batch/infer/{model}", settings.MONAI_LABEL_AUTH_ROLE_ADMIN),
        ("GET", "/batch/infer", settings.MONAI_LABEL_AUTH_ROLE_USER),
        ("DELETE", "/batch/infer", settings.MONAI_LABEL_AUTH_ROLE_ADMIN),
        ("POST", "/scoring/{method}", settings.MONAI_LABEL_AUTH_ROLE_ADMIN),
        ("GET", "/scoring/", settings.MONAI_LABEL_AUTH_ROLE_USER),
        ("DELETE", "/scoring/", settings.MONAI_LABEL_AUTH_ROLE_ADMIN),
        ("GET", "/info/", settings.MONAI_LABEL_AUTH_ROLE_USER),
        ("GET", "/mshub/reports/{model}/{name}", settings.MONAI_LABEL_AUTH_ROLE_USER),
    ],
)
def test_our_routes_come_first_and_ask_for_monai_labels_roles(method: str, path: str, role: str) -> None:
    routes = [route for route in asgi.app.routes if isinstance(route, APIRoute)]
    first = next(route for route in routes if route.path == path and method in route.methods)
    assert first.endpoint.__module__ in (asgi.__name__, process_routes.__name__, work_routes.__name__)
    (guard,) = [dependency.call for dependency in first.dependant.dependencies if isinstance(dependency.call, RBAC)]
    assert guard.roles == role


# -- reports ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(home: Path) -> str:
    path = home / "reports" / "tiny" / "v2.html"
    path.parent.mkdir(parents=True)
    path.write_text("<p>Dice é</p>", encoding="utf-8")
    (home / "reports" / "secret.html").write_text("<p>of another</p>")
    return "<p>Dice é</p>"


def test_a_report_is_a_page(server: TestClient, page: str) -> None:
    for path in ("/mshub/reports/tiny/v2", "/mshub/reports/tiny/v2.html"):
        answer = server.get(path)
        assert (answer.status_code, answer.text) == (200, page)
        assert answer.headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize("path", ["tiny/v3", "tiny/v3.html", "nothing/v2"])
def test_a_report_that_is_not_there_is_a_404_that_names_those_that_are(
    server: TestClient, page: str, path: str
) -> None:
    answer = server.get(f"/mshub/reports/{path}")
    assert answer.status_code == 404
    assert refusal(answer).endswith("Known: v2." if path.startswith("tiny") else "Known: none.")


@pytest.mark.parametrize(
    "path",
    [
        *("tiny/..%2Fsecret", "tiny/%2e%2e%2fsecret", "..%2Freports/secret", "%2e%2e/secret", "tiny/..", "tiny/..."),
        *("tiny/%2Fetc%2Fpasswd", "tiny/a b", "tiny/%00", "-/secret"),
    ],
)
def test_no_other_file_can_be_reached(server: TestClient, page: str, path: str) -> None:
    answer = server.get(f"/mshub/reports/{path}")
    assert answer.status_code in (400, 404)
    assert "<p>" not in answer.text
