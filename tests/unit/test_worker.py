"""The process of a job: it waits for its turn, can be stopped at any time, and always says how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import Timeout

import waiting
from mshub import worker
from mshub.cases import ReviewedCase
from mshub.errors import TrainingError
from mshub.jobs import Job, JobRequest, Jobs
from mshub.nnunet.trainer import Stopped
from mshub.recipe import Recipe
from mshub.store import ModelStore

RunRound = Callable[[ModelStore, Job], None]


@pytest.fixture
def job(store: ModelStore, tmp_path: Path) -> Job:
    label = tmp_path / "label.nii.gz"
    label.write_bytes(b"a label")
    case = ReviewedCase("a", (tmp_path / "image.nii.gz",), label, {"liver": 1}, ("liver",), "p")
    return Jobs(store.home).create(JobRequest("tiny", "v1", (case,), Recipe()))


@pytest.fixture(autouse=True)
def niceness(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What this process would have been made nicer by; what it does on SIGTERM is put back."""
    asked: list[int] = []
    monkeypatch.setattr(os, "nice", asked.append)
    monkeypatch.setattr(worker, "_go_first", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    yield asked
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def work_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> Callable[[RunRound], int]:
    """Work on the job in this process, with another round than the real one; returns the exit code."""

    def work(round_: RunRound) -> int:
        monkeypatch.setattr("mshub.rounds.run_round", round_)
        return worker.main([str(job.path)])

    return work


def told(job: Job) -> dict[str, Any]:
    """Return what the job's process said itself."""
    progress: dict[str, Any] = json.loads((job.path / "progress.json").read_text())
    return progress


eventually = partial(waiting.eventually, seconds=60, every_s=0.02)


@contextmanager
def taken_turn(store: ModelStore, until: Callable[[], bool]) -> Iterator[None]:
    """Let another job have its turn until something happens."""
    taken = threading.Event()

    def hold() -> None:
        with Jobs(store.home).turn:
            taken.set()
            eventually(until)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    yield
    holder.join()


def better(store: ModelStore, job: Job) -> None:
    job.tell(version="v2", outcome="promoted", message="better on 3 of 3 cases")


def unexpected(store: ModelStore, job: Job) -> None:
    pytest.fail("it must not begin")


# -- how it ends --------------------------------------------------------------------------------------------------


def test_a_round_that_is_done_says_so_with_what_came_of_it(
    job: Job, store: ModelStore, work_on: Callable[[RunRound], int], niceness: list[int]
) -> None:
    seen: list[dict[str, Any]] = []

    def run(its_store: ModelStore, its_job: Job) -> None:
        assert (its_store.home, its_job.path) == (store.home, job.path)
        seen.append(job.progress())
        better(its_store, its_job)

    assert work_on(run) == 0
    (during,) = seen
    assert (during["state"], during["pid"], during["ended"]) == ("running", os.getpid(), None)
    assert during["started"].endswith("+00:00")
    progress = told(job)
    assert (progress["state"], progress["stage"], progress["message"]) == ("done", "", "better on 3 of 3 cases")
    assert (progress["version"], progress["outcome"]) == ("v2", "promoted")
    assert progress["ended"] >= progress["started"]
    assert progress["total_time"] >= 0
    assert niceness == [worker.NICENESS]
    assert not job.is_alive()


def test_how_long_it_took_is_measured(job: Job, work_on: Callable[[RunRound], int]) -> None:
    assert work_on(lambda *_: time.sleep(0.3)) == 0
    assert 0.3 <= told(job)["total_time"] < 60


def test_a_refusal_of_ours_is_the_message_as_it_is(job: Job, work_on: Callable[[RunRound], int]) -> None:
    def fail(*_: object) -> None:
        raise TrainingError("None of the 3 reviewed cases fits tiny.")

    assert work_on(fail) == 1
    progress = told(job)
    assert (progress["state"], progress["message"]) == ("failed", "None of the 3 reviewed cases fits tiny.")
    assert progress["ended"]


def test_what_nobody_expected_is_told_with_its_name_and_where_to_look(
    job: Job, work_on: Callable[[RunRound], int], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    assert work_on(fail) == 1
    progress = told(job)
    assert progress["state"] == "failed"
    assert progress["message"] == "The training failed (ZeroDivisionError: by nothing); see its log."
    assert "Traceback" in caplog.text


def test_a_training_that_cannot_even_be_loaded_fails_with_a_reason(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mshub.rounds", None)
    assert worker.main([str(job.path)]) == 1
    assert told(job)["state"] == "failed"
    assert "mshub.rounds" in told(job)["message"]


def test_after_any_end_the_next_job_has_its_turn(
    job: Job, store: ModelStore, work_on: Callable[[RunRound], int]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError

    work_on(fail)
    with Jobs(store.home).turn.acquire(timeout=0), job.lock.acquire(timeout=0):
        pass


# -- its turn -----------------------------------------------------------------------------------------------------


def test_it_waits_for_its_turn_and_says_so(job: Job, store: ModelStore, work_on: Callable[[RunRound], int]) -> None:
    waiting: list[dict[str, Any]] = []

    def is_seen_waiting() -> bool:
        progress = job.progress()
        if progress.get("pid") is None:
            return False
        waiting.append(progress)
        time.sleep(0.3)
        return True

    def run(its_store: ModelStore, its_job: Job) -> None:
        assert waiting, "it did not wait"
        better(its_store, its_job)

    with taken_turn(store, is_seen_waiting):
        assert work_on(run) == 0
    assert (waiting[0]["state"], waiting[0]["stage"]) == ("queued", "waiting for its turn")
    assert told(job)["state"] == "done"


def test_it_has_its_turn_to_itself(job: Job, store: ModelStore, work_on: Callable[[RunRound], int]) -> None:
    def run(*_: object) -> None:
        with pytest.raises(Timeout), Jobs(store.home).turn.acquire(timeout=0.05):
            pass

    assert work_on(run) == 0
    assert told(job)["state"] == "done"


def test_a_second_process_for_the_same_job_leaves_it_alone(
    job: Job, work_on: Callable[[RunRound], int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "LOCK_TIMEOUT_S", 0.05)
    job.tell(state="running", pid=123, stage="training")
    before = told(job)
    with job.lock:
        assert work_on(unexpected) == 1
        assert told(job) == before
    assert f"another process works on {job.id}" in caplog.text


# -- stopping -----------------------------------------------------------------------------------------------------


def test_a_job_stopped_before_it_began_never_begins(job: Job, work_on: Callable[[RunRound], int]) -> None:
    job.ask_to_stop()
    assert work_on(unexpected) == 0
    progress = told(job)
    assert (progress["state"], progress["message"]) == ("stopped", "stopped before it began")
    assert progress["ended"]


def test_a_job_stopped_while_it_waits_does_not_begin_when_its_turn_comes(
    job: Job, store: ModelStore, work_on: Callable[[RunRound], int]
) -> None:
    """The waiting one takes its turn the moment that the running one, asked to stop as well, gives it away."""

    def stop_both() -> bool:
        if told(job)["pid"] is None:
            return False
        time.sleep(0.3)  # it has looked whether it was asked to, and waits for the lock
        job.ask_to_stop()
        return True

    with taken_turn(store, stop_both):
        assert work_on(unexpected) == 0
    assert told(job)["message"] == "stopped before it began"


def test_a_round_that_was_stopped_says_how_it_goes_on(job: Job, work_on: Callable[[RunRound], int]) -> None:
    def stop(*_: object) -> None:
        job.ask_to_stop()
        raise Stopped

    assert work_on(stop) == 0
    progress = told(job)
    assert (progress["state"], progress["stage"]) == ("stopped", "")
    assert progress["message"] == "stopped; asked the same again, it goes on where it was"
    assert progress["ended"]


def test_on_sigterm_the_round_ends_by_itself_and_is_interrupted_as_nobody_stopped_it(
    job: Job, work_on: Callable[[RunRound], int]
) -> None:
    steps = []

    def run(_: ModelStore, its_job: Job) -> None:
        for step in range(1000):
            steps.append(step)
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.005)
            if its_job.is_to_end:
                raise Stopped

    job.tell(attempts=2)
    assert work_on(run) == 0
    assert 3 <= steps[-1] < 999
    assert (told(job)["state"], told(job)["message"]) == ("interrupted", "interrupted; it goes on where it was")
    assert told(job)["attempts"] == 0, "it said why: a server that starts every night does not give it up"
    assert not job.is_asked_to_stop


def test_the_real_process_waits_without_loading_torch_goes_first_and_ends_on_sigterm(
    job: Job, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with Jobs(store.home).turn:
        job.spawn()
        eventually(lambda: told(job)["pid"] is not None)
        (process,) = started
        try:
            assert told(job)["pid"] == process.pid
            assert job.progress()["state"] == "queued"
            libraries = Path(f"/proc/{process.pid}/maps")
            assert not libraries.exists() or "libtorch" not in libraries.read_text()
            score = Path(f"/proc/{process.pid}/oom_score_adj")
            eventually(lambda: not score.exists() or int(score.read_text()) == int(worker.OOM_SCORE))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert (told(job)["state"], told(job)["message"]) == ("interrupted", "interrupted before it began")
    assert "interrupted: interrupted before it began" in job.log_tail(1)[0]


STARTER_PROCESS = """
import signal, sys, time
from pathlib import Path
from mshub.jobs import Job

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where what started the tests ignores it
Job(Path(sys.argv[1])).spawn()
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_training_ends_with_the_process_that_started_it_and_goes_on_with_the_next(
    job: Job, store: ModelStore, how: signal.Signals
) -> None:
    with Jobs(store.home).turn:
        starter = subprocess.Popen([sys.executable, "-c", STARTER_PROCESS, str(job.path)], stderr=subprocess.DEVNULL)
        eventually(lambda: told(job)["pid"] is not None)
        assert job.progress()["state"] == "queued"
        starter.send_signal(how)
        starter.wait(10)
        eventually(lambda: not job.is_alive())
    assert (told(job)["state"], told(job)["message"]) == ("interrupted", "interrupted before it began")
    (resumed,) = Jobs(store.home).resume_interrupted()
    assert resumed.path == job.path
    Jobs(store.home).stop_all()


def test_a_training_that_takes_too_long_to_end_with_its_starter_is_ended(job: Job, store: ModelStore) -> None:
    """As one that judges a large case; what it forked, as nnU-Net forks for a GPU, ends with it and holds no lock."""
    busy = """
import multiprocessing, os, sys, time
from pathlib import Path
import mshub.jobs, mshub.worker

def judge(job, store):
    fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    fork.start()
    job.tell(fork=fork.pid)
    time.sleep(600)

mshub.jobs.STOP_GRACE_S, mshub.worker._round = 0.5, judge
sys.exit(mshub.worker.main(sys.argv[1:]))
"""
    starting = f"""
import os, subprocess, sys, time
from mshub.orphans import naming_itself
subprocess.Popen([sys.executable, "-c", {busy!r}, sys.argv[1]], env=naming_itself(), start_new_session=True)
time.sleep(600)
"""
    starter = subprocess.Popen([sys.executable, "-c", starting, str(job.path)])
    eventually(lambda: told(job).get("fork"))
    fork = psutil.Process(told(job)["fork"])
    starter.kill()
    starter.wait(10)
    eventually(lambda: not job.is_alive())
    eventually(lambda: not fork.is_running() or fork.status() == psutil.STATUS_ZOMBIE)
    assert (job.progress()["state"], job.progress()["attempts"]) == ("interrupted", 0)
