"""One trainer per model: what it offers clients, what they may choose, and what a training says while it runs."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from fastapi import HTTPException

from factories import make_model_folder
from lib.app import MSHubApp
from lib.conf import Config
from lib.trainers import NNUNetTrainTask
from lib.trainers.options import MONAI_LABELS_OWN, TrainOptions, options_for
from lib.trainers.tasks import as_stats, as_task
from mshub.atomic_file import replace_by_copy
from mshub.errors import CaseError, ConfigError
from mshub.install import add_model
from mshub.jobs import Job, JobRequest, Jobs
from mshub.recipe import Recipe
from mshub.store import ModelStore
from waiting import eventually

pytestmark = pytest.mark.usefixtures("fake_worker")

SHORT = {"epochs": 2, "iterations": 1}
LONG = {"epochs": 1000, "iterations": 10}


@pytest.fixture
def trainer(clinic: MSHubApp) -> NNUNetTrainTask:
    return clinic._trainers["tiny"]


@pytest.fixture
def publish(installed: ModelStore, clinic: MSHubApp, tmp_path: Path) -> Callable[..., None]:
    """Publish a version of ``tiny`` as a training does, having seen the cases there are now."""

    def make() -> None:
        cases = [{"case": case.case_id, "digest": case.digest} for case in clinic.datastore().reviewed_cases()]
        record = {**installed.current("tiny").record, "parent": "v1", "lineage": {"cases": cases, "held_out": []}}
        with installed.staging() as folder:
            number = len(installed.versions("tiny"))
            model = make_model_folder(folder / "model", seed=number)
            installed.publish("tiny", model, record)

    return make


def refused(call: Callable[..., Any], *arguments: Any) -> tuple[int, str]:
    with pytest.raises(HTTPException) as caught:
        call(*arguments)
    return caught.value.status_code, str(caught.value.detail)


wait_for = partial(eventually, seconds=30, every_s=0.05)


# -- what clients see -------------------------------------------------------------------------------------------------


def test_every_model_has_a_trainer_with_options_that_slicer_and_ohif_can_show(clinic: MSHubApp) -> None:
    trainers = clinic.info()["trainers"]
    assert list(trainers) == ["tiny"]
    assert trainers["tiny"]["description"].startswith("Fine-tunes")
    config = trainers["tiny"]["config"]
    assert list(config) == ["device", "epochs", "iterations", "learning_rate", "guard"]
    defaults = Recipe()
    assert (config["epochs"], config["iterations"]) == (defaults.epochs, defaults.iterations)
    assert config["learning_rate"] == defaults.learning_rate
    assert config["guard"][0] == defaults.guard
    assert sorted(config["guard"]) == ["both", "distil", "interpolate", "none"]
    assert config["device"] == ["cpu"]


def test_every_option_can_be_sent_back_as_it_is(trainer: NNUNetTrainTask) -> None:
    sent = {key: value[0] if isinstance(value, list) else value for key, value in trainer.config().items()}
    for options in (sent, {key: str(value) for key, value in sent.items()}, dict.fromkeys(sent, "")):
        assert TrainOptions.parse(options, Config(home=Path())).recipe == Recipe()


def test_where_counting_cases_takes_long_info_does_not_count_them_each_time(
    clinic: MSHubApp, review: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted() -> int:
        return clinic.info()["trainers"]["tiny"]["mshub"]["reviewed_cases"]

    looked = Mock(wraps=clinic.datastore().reviewed_cases)
    monkeypatch.setattr(clinic.datastore(), "reviewed_cases", looked)
    monkeypatch.setattr("lib.trainers.trainings.SLOW_S", float("inf"))
    review("a", "liver")
    assert [counted(), counted(), looked.call_count] == [1, 1, 2], "what is quick is counted each time"
    monkeypatch.setattr("lib.trainers.trainings.SLOW_S", 0.0)
    monkeypatch.setattr("lib.trainers.trainings.SHARE_OF_COUNTING", 1e-6)
    assert [counted(), counted(), looked.call_count] == [1, 1, 2]
    review("b", "liver")
    assert [counted(), counted(), looked.call_count] == [2, 2, 3], "somebody who submits a label sees it counted"
    clinic.datastore().remove_label("b", "final")
    assert [counted(), counted(), looked.call_count] == [1, 1, 4]
    monkeypatch.setattr("lib.trainers.trainings.SHARE_OF_COUNTING", 1e6)
    assert [counted(), counted(), looked.call_count] == [1, 1, 6]


def test_info_counts_the_cases_that_fit_and_those_no_version_has_seen(
    clinic: MSHubApp, review: Callable[..., None], publish: Callable[..., None]
) -> None:
    def counted() -> dict[str, Any]:
        return dict(clinic.info()["trainers"]["tiny"]["mshub"])

    assert counted() == {"reviewed_cases": 0, "new_cases": 0}
    review("a", "liver")
    review("mr", "liver")  # two channels: this model takes one
    assert counted() == {"reviewed_cases": 1, "new_cases": 1}
    publish()
    assert counted() == {"reviewed_cases": 1, "new_cases": 0}
    review("b", "spleen", "liver")
    assert counted() == {"reviewed_cases": 2, "new_cases": 1}
    review("a", "liver", voxels=9)
    assert counted() == {"reviewed_cases": 2, "new_cases": 2}


def test_no_image_is_read_to_count_before_the_first_fine_tuning(
    clinic: MSHubApp, review: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> str:
        raise AssertionError("read")

    review("a", "liver")
    monkeypatch.setattr("mshub.cases.file_sha256", fail)
    assert clinic.info()["trainers"]["tiny"]["mshub"]["new_cases"] == 1


def test_a_damaged_table_of_patients_is_told_and_does_not_break_info(clinic: MSHubApp) -> None:
    (Path(clinic.studies) / "patients.csv").write_text("nonsense")
    info = clinic.info()
    assert info["models"]
    assert info["trainers"]["tiny"]["config"]
    assert "expected case,patient in its first line" in info["trainers"]["tiny"]["mshub"]["problem"]


def test_trainers_follow_the_models_that_are_installed(
    clinic: MSHubApp, installed: ModelStore, two_channels: Path
) -> None:
    before = clinic._trainers["tiny"]
    add_model(installed, "tumour", two_channels)
    assert sorted(clinic.info()["trainers"]) == ["tiny", "tumour"]
    assert clinic._trainers["tiny"] is before


def test_there_are_no_trainers_where_training_is_switched_off(
    clinic: MSHubApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monailabel.config import settings

    monkeypatch.setattr(settings, "MONAI_LABEL_TASKS_TRAIN", False)
    assert clinic.info()["trainers"] == {}
    assert clinic.info()["train_stats"] == {}
    assert refused(clinic.start_training, "tiny")[0] == 405


def test_a_pacs_has_trainers_and_other_datastores_are_refused(
    installed: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = MSHubApp(str(tmp_path / "app"), "http://127.0.0.1:1/dicom-web", {"device": "cpu"})
    assert set(app.info()["trainers"]) == {"tiny"}
    assert not app.info()["mshub"]["pacs"]["reachable"]
    monkeypatch.setattr(app, "_datastore", SimpleNamespace())
    assert refused(app.start_training, "tiny", {})[0] == 405


# -- what clients may choose ------------------------------------------------------------------------------------------


def parse(**options: Any) -> TrainOptions:
    return TrainOptions.parse(options, Config(home=Path(), device="cpu"))


def test_options_change_the_recipe_and_name_the_device_and_who_asks() -> None:
    options = parse(epochs="7", learning_rate="0.01", guard="both", batch_size=3, device="cuda:1", client_id="ann")
    assert options.recipe == Recipe(epochs=7, learning_rate=0.01, guard="both", batch_size=3)
    assert (options.device, options.client) == ("cuda:1", "ann")
    assert (parse().device, parse().client) == ("cpu", "")


def test_what_only_monai_label_knows_is_ignored() -> None:
    theirs = {"name": "train_01", "pretrained": True, "val_split": 0.2, "train_batch_size": 1, "val_batch_size": 1}
    theirs |= {"multi_gpu": True, "gpus": "all", "dataset": "SmartCacheDataset", "dataloader": "ThreadDataLoader"}
    theirs |= {"tracking": "mlflow", "tracking_uri": "", "early_stop_patience": -1, "model": "tiny", "local_rank": 0}
    assert set(theirs) <= MONAI_LABELS_OWN
    assert parse(**theirs).recipe == Recipe()


def test_monai_labels_max_epochs_are_epochs_unless_those_are_given() -> None:
    assert parse(max_epochs=5).recipe.epochs == 5
    assert parse(max_epochs=5, epochs=9).recipe.epochs == 9
    assert parse(max_epochs="", epochs="").recipe.epochs == Recipe().epochs
    with pytest.raises(ConfigError, match="epochs is 0; expected 1"):
        parse(max_epochs=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": "many"}, "epochs is 'many'"),
        ({"epochs": -1}, "expected 1 to"),
        ({"epochs": {"a": 1}}, "epochs is"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"guard": "dog"}, "expected one of"),
        ({"epoch": 3}, "Did you mean epochs?"),
    ],
)
def test_an_impossible_option_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**options)
    assert words in str(caught.value)


def test_an_impossible_device_is_named() -> None:
    with pytest.raises(CaseError, match="tpu"):
        parse(device="tpu")


def test_options_come_flat_from_slicer_and_by_model_from_ohif() -> None:
    assert options_for("tiny", None) == {}
    assert options_for("tiny", {"epochs": 3, "client_id": "x"}) == {"epochs": 3, "client_id": "x"}
    by_model = {"tiny": {"epochs": 4}, "other": {"epochs": 5}, "client_id": "x", "epochs": 3}
    assert options_for("tiny", by_model) == {"epochs": 4, "client_id": "x"}
    assert options_for("more", by_model) == {"epochs": 3, "client_id": "x"}
    assert options_for("tiny", {"tiny": "text"}) == {"tiny": "text"}


# -- what a training says ---------------------------------------------------------------------------------------------

RUNNING: dict[str, Any] = {
    **{"state": "running", "stage": "training", "epoch": 3, "total_epochs": 20, "best_metric": 0.81, "eta_s": 42.0},
    **{"message": "", "created": "2026-01-02T03:04:00+00:00", "started": "2026-01-02T03:04:05+00:00", "pid": 1},
    **{"updated": "2026-01-02T03:05:05+00:00", "total_time": None, "attempts": 1},
}


def test_a_model_never_trained_has_no_statistics(trainer: NNUNetTrainTask) -> None:
    assert trainer.stats() == {}


@pytest.fixture
def job(clinic: MSHubApp, review: Callable[..., None]) -> Iterator[Job]:
    """A job that is about to start, and never does."""
    review("a", "liver")
    cases = tuple(clinic.datastore().reviewed_cases())
    job = clinic.jobs.create(JobRequest("tiny", "v1", cases, Recipe(epochs=3), device="cpu", client="ann"))
    yield job
    job.tell(state="stopped")


@pytest.fixture
def told(job: Job, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return the statistics of a job that says so."""

    def stats(**progress: Any) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setattr(Job, "progress", lambda _: progress)
            return as_stats(job)

    return stats


Told = Callable[..., dict[str, Any]]


def test_the_statistics_of_a_running_training_have_no_total_time(told: Told) -> None:
    stats = told(**RUNNING)
    assert {key: stats[key] for key in ("epoch", "total_epochs", "best_metric", "eta")} == {
        **{"epoch": 3, "total_epochs": 20, "best_metric": 0.81, "eta": 42.0}
    }
    assert (stats["state"], stats["stage"], stats["message"]) == ("running", "training", "")
    assert "total_time" not in stats
    assert "pid" not in stats


def test_a_training_that_goes_on_has_no_total_time_of_its_first_end(told: Told) -> None:
    assert "total_time" not in told(**{**RUNNING, "state": "queued", "total_time": 80.0})


@pytest.mark.parametrize("state", ["done", "failed", "stopped", "interrupted"])
def test_every_training_that_ended_has_a_total_time(told: Told, state: str) -> None:
    assert told(**{**RUNNING, "state": state, "total_time": 9.5})["total_time"] == 9.5
    assert told(**{**RUNNING, "state": state})["total_time"] == 60.0
    assert told(state=state)["total_time"] > 0
    assert told(**{**RUNNING, "state": state, "total_time": 0})["total_time"] > 0


def test_the_end_says_what_came_of_it(told: Told) -> None:
    facts = {"version": "v3", "outcome": "promoted", "report": "reports/tiny/v3.html", "message": "better"}
    stats = told(**{**RUNNING, "state": "done", **facts})
    assert {key: stats[key] for key in facts} == facts
    assert "eta" not in stats


def test_what_clients_calculate_with_is_a_number_or_absent(told: Told) -> None:
    unknown = {"state": "done", "epoch": None, "total_epochs": 0, "best_metric": math.nan, "eta_s": math.inf}
    assert set(told(**unknown)) == {"state", "total_time"}


def test_a_training_that_prepares_its_cases_has_not_done_an_epoch(told: Told) -> None:
    # Slicer takes a missing epoch for 1 of 1: everything done.
    for progress in ({}, {"epoch": None, "total_epochs": 0}, {"epoch": math.nan}):
        assert told(state="queued", **progress) == {"state": "queued", "epoch": 0, "total_epochs": 3}


def test_a_job_is_a_task_as_monai_label_shows_it(job: Job) -> None:
    task = as_task(job)
    assert task["id"] == job.id
    assert task["status"] == "RUNNING"
    assert task["request"]["model"] == "tiny"
    assert (task["request"]["epochs"], task["request"]["cases"], task["request"]["client_id"]) == (3, 1, "ann")
    assert time.strptime(task["start_ts"], "%Y-%m-%d %H:%M:%S")
    assert "end_ts" not in task
    assert as_task(job, is_first=False)["status"] == "SUBMITTED"
    json.dumps(task, allow_nan=False)


@pytest.mark.parametrize(
    ("state", "status"), [("done", "DONE"), ("failed", "ERROR"), ("stopped", "STOPPED"), ("interrupted", "ERROR")]
)
def test_a_job_that_ended_says_how(job: Job, state: str, status: str) -> None:
    (job.path / "log.txt").write_text("one\ntwo\n")
    job.tell(state=state, message="so it went", ended="2026-01-02T03:04:05+00:00")
    task = as_task(job)
    assert (task["status"], task["result"], task["details"]) == (status, "so it went", ["one", "two"])
    assert time.strptime(task["end_ts"], "%Y-%m-%d %H:%M:%S")


def test_slicer_finds_a_last_line_even_where_the_log_is_empty(job: Job) -> None:
    assert as_task(job)["details"][-1]


def test_a_job_of_an_older_mshub_is_still_a_task(job: Job) -> None:
    request = json.loads((job.path / "request.json").read_text())
    request["recipe"]["forgotten_option"] = 1
    (job.path / "request.json").write_text(json.dumps(request))
    assert as_task(job)["request"] == {"model": "tiny"}


# -- stock MONAI Label: a process that trains and waits ---------------------------------------------------------------


def test_called_it_trains_waits_and_returns_the_statistics(clinic: MSHubApp, review: Callable[..., None]) -> None:
    review("a", "liver")
    review("mr", "liver")
    stats = clinic.train({"model": "tiny", "gpus": "all", "local_rank": 0, "client_id": "ann", **SHORT})
    assert (stats["state"], stats["version"], stats["outcome"]) == ("done", "v2", "promoted")
    assert (stats["epoch"], stats["total_epochs"], stats["total_time"]) == (2, 2, 1.5)
    request = clinic.jobs.all()[0].request
    assert [case.case_id for case in request.cases] == ["a"]
    assert (request.parent, request.device, request.client) == ("v1", "cpu", "ann")


def test_called_without_a_case_it_says_what_is_missing(clinic: MSHubApp, review: Callable[..., None]) -> None:
    review("mr", "liver")
    status, text = refused(clinic.train, {"model": "tiny"})
    assert status == 400
    assert "Found: 1 reviewed case(s), none of 1 channel(s) in which liver or spleen was reviewed" in text


def test_called_for_an_unknown_model_it_is_a_404(clinic: MSHubApp) -> None:
    assert refused(clinic.train, {"model": "nothing"})[0] == 404
    assert refused(clinic.train, {})[0] == 404


@pytest.mark.parametrize(
    ("options", "words"),
    [({"weight_decay": 1}, "The GPU ran out of memory. Its log is"), ({"seed": 13}, "ended without saying why")],
)
def test_a_training_that_failed_raises_with_the_reason(
    clinic: MSHubApp, review: Callable[..., None], options: dict[str, Any], words: str
) -> None:
    review("a", "liver")
    status, text = refused(clinic.train, {"model": "tiny", **SHORT, **options})
    assert (status, words in text) == (400, True), text


def test_a_label_that_is_submitted_while_a_training_is_about_to_start_is_not_trained_under_its_old_names(
    clinic: MSHubApp, review: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit_first(source: Path, target: Path) -> None:
        if submitted:
            review("a", *submitted.pop())
        replace_by_copy(source, target)

    submitted = [("spleen", "liver")]
    review("a", "liver", "spleen")
    monkeypatch.setattr("mshub.jobs.replace_by_copy", submit_first)
    with pytest.raises(HTTPException, match="Labels were submitted while the training was about to start") as error:
        clinic.start_training("tiny", {})
    assert (error.value.status_code, clinic.jobs.all()) == (409, [])
    clinic.start_training("tiny", {})
    (case,) = clinic.jobs.open()[0].request.cases
    assert case.values == {"spleen": 1, "liver": 2}
    assert case.label.read_bytes() == Path(clinic.datastore().get_label_uri("a", "final")).read_bytes()


def test_whoever_looks_again_waits_for_labels_that_are_being_stored(
    clinic: MSHubApp, review: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its file and its names, a label has its place but not its names."""
    datastore, in_place, go_on = clinic.datastore(), threading.Event(), threading.Event()
    store_labels = datastore._store_labels

    def store_late(*labels: Any) -> None:
        in_place.set()
        assert go_on.wait(10)
        store_labels(*labels)

    review("a", "liver", "spleen")
    monkeypatch.setattr(datastore, "_store_labels", store_late)
    with ThreadPoolExecutor() as pool:
        storing = pool.submit(review, "a", "spleen", "liver")
        assert in_place.wait(10)
        looking = pool.submit(datastore.settle)
        time.sleep(0.2)
        assert not looking.done()
        go_on.set()
        looking.result(10)
        assert datastore.reviewed_case("a", ()).values == {"spleen": 1, "liver": 2}
        storing.result(10)


def at_work(clinic: MSHubApp) -> Job | None:
    jobs = [(job, job.progress()) for job in clinic.jobs.open()]
    return next((job for job, progress in jobs if progress["state"] == "running" and progress.get("epoch")), None)


def test_a_process_that_is_asked_to_end_stops_its_training_first(clinic: MSHubApp, review: Callable[..., None]) -> None:
    def terminate() -> None:
        wait_for(lambda: at_work(clinic))
        os.kill(os.getpid(), signal.SIGTERM)

    review("a", "liver")
    unheard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: unheard.append(number))
    try:
        threading.Thread(target=terminate).start()
        assert clinic.train({"model": "tiny", **LONG})["state"] == "stopped"
        assert unheard == []
        signal.raise_signal(signal.SIGTERM)
        assert unheard == [signal.SIGTERM], "afterwards the process listens as before"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_training_that_is_killed_with_its_process_is_not_taken_up_by_itself(
    clinic: MSHubApp, review: Callable[..., None]
) -> None:
    review("a", "liver")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(refused, clinic.train, {"model": "tiny", **LONG})
        job = wait_for(lambda: at_work(clinic))
        # Stock MONAI Label's Stop kills all below its process; the job's own session does not hide it.
        children = psutil.Process().children(recursive=True)
        (worker,) = [child for child in children if child.pid == job.progress()["pid"]]
        worker.kill()
        assert "ended without saying why" in waiting.result(30)[1]
    clinic.on_init_complete()  # the server starts again
    assert clinic.jobs.open() == []
    assert clinic.start_training("tiny", LONG)["id"] == job.id, "asked for again, it goes on where it was"


def test_a_training_of_this_server_that_broke_off_goes_on_when_it_starts_again(
    clinic: MSHubApp, review: Callable[..., None]
) -> None:
    review("a", "liver")
    clinic.start_training("tiny", LONG)
    job = Jobs(clinic.store.home).all()[0]
    wait_for(lambda: job.progress().get("epoch"))
    os.kill(job.progress()["pid"], signal.SIGKILL)
    assert wait_for(lambda: job.progress()["state"] == "interrupted")
    clinic.on_init_complete()
    assert wait_for(lambda: job.progress()["state"] == "running")
    assert job.progress()["attempts"] == 2


def test_a_damaged_job_does_not_keep_the_server_from_starting(clinic: MSHubApp) -> None:
    folder = clinic.store.home / "jobs" / "tiny--20260101T000000.0"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text("{")
    clinic.on_init_complete()
    (folder / "progress.json").unlink()
