"""Training jobs: what was asked for is kept, whoever looks sees the same state, and nothing dies unseen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock, Timeout

from mshub import jobs as jobs_module
from mshub.cases import ReviewedCase
from mshub.errors import LabelsChanged, TrainingError
from mshub.jobs import MAX_ATTEMPTS, Job, JobRequest, Jobs
from mshub.recipe import FROM_SCRATCH, Recipe
from waiting import eventually

FAKE_WORKER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from filelock import FileLock

job, behaviour = Path(sys.argv[-1]), os.environ["FAKE_WORKER"]

def tell(**facts):
    part, path = job / "part", job / "progress.json"
    part.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    part.replace(path)

with FileLock(job / ".lock").acquire(timeout=10):
    if behaviour == "dies":
        tell(pid=os.getpid())
        os._exit(9)
    facts = {"argv": sys.argv[1:], "session": os.getsid(0)}
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        facts["child"] = subprocess.Popen(["sleep", "60"]).pid
    tell(pid=os.getpid(), state="running", **facts)
    print("at work", flush=True)
    while behaviour != "ends" and (behaviour == "stubborn" or not (job / "stop").exists()):
        time.sleep(0.02)
    tell(state="done" if behaviour == "ends" else "stopped", message="the end")
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "home")


@pytest.fixture
def case(tmp_path: Path) -> ReviewedCase:
    return make_case(tmp_path / "studies", "case-1")


def make_case(folder: Path, name: str, label: str = "label.nii.gz") -> ReviewedCase:
    """Return a case whose files hold its name."""
    (folder / name).mkdir(parents=True)
    image, path = folder / name / "image.nii.gz", folder / name / label
    image.write_text(f"image of {name}")
    path.write_text(f"label of {name}")
    return ReviewedCase(name, (image,), path, {"liver": 1}, ("liver",), f"patient of {name}", facts={"client_id": "x"})


def ask(*cases: ReviewedCase, model: str = "tiny", **facts: Any) -> JobRequest:
    return JobRequest(model, "v1", cases, Recipe(), **facts)


def died(job: Job) -> Job:
    """Let a job look as if its process had died."""
    job.tell(state="running", pid=2**22, spawned=0)
    return job


def ended(job: Job, state: str) -> Job:
    job.tell(state=state, pid=2**22)
    return job


class Workers:
    """The processes that jobs start in a test: they compute nothing, and behave as they are told."""

    def __init__(self, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[subprocess.Popen[bytes]] = []
        self._monkeypatch, popen = monkeypatch, subprocess.Popen

        def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            process = popen([sys.executable, str(script), *command[1:]], **options)
            self.started.append(process)
            return process

        monkeypatch.setattr(jobs_module.subprocess, "Popen", start)

    def behave(self, behaviour: str) -> None:
        self._monkeypatch.setenv("FAKE_WORKER", behaviour)

    def start(self, job: Job, behaviour: str = "listens") -> subprocess.Popen[bytes]:
        """Spawn the job's process and wait until it is at work."""
        self.behave(behaviour)
        job.spawn()
        eventually(lambda: job.progress()["state"] not in ("queued",))
        return self.started[-1]

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.wait(10)


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE_WORKER)
    workers = Workers(script, monkeypatch)
    yield workers
    workers.end()


# -- what was asked for -------------------------------------------------------------------------------------------


def test_a_request_survives_json(case: ReviewedCase, tmp_path: Path) -> None:
    plain = ask(case, make_case(tmp_path, "second"))
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "Läsion": 1}}
    full = JobRequest("new-model", None, (case,), FROM_SCRATCH, "cuda:1", dataset, "Dr. 肝")
    for request in (plain, full):
        assert JobRequest.from_dict(json.loads(json.dumps(request.as_dict()))) == request


def test_a_job_keeps_the_labels_as_they_were(jobs: Jobs, case: ReviewedCase, tmp_path: Path) -> None:
    second = make_case(tmp_path, "second", "segmentation.NII.GZ")
    third = make_case(tmp_path, "case.v2", "old.label.nrrd")
    digests = [one.digest for one in (case, second, third)]
    job = jobs.create(ask(case, second, third))
    case.label.write_text("painted over")
    second.label.unlink()
    kept = job.request.cases
    assert [one.label.read_text() for one in kept] == ["label of case-1", "label of second", "label of case.v2"]
    assert [one.label.name for one in kept] == ["case-1.nii.gz", "second.nii.gz", "case.v2.nrrd"]
    assert all(one.label.is_relative_to(job.path) for one in kept)
    assert [one.digest for one in kept] == digests
    assert [replace(one, label=case.label) for one in kept[:1]] == [case]


@pytest.mark.parametrize(
    "now",
    [
        lambda case: [replace(case, values={"liver": 2, "spleen": 1})],
        lambda case: [replace(case, reviewed=("liver", "spleen"))],
        lambda case: [],
    ],
)
def test_labels_that_came_with_other_names_meanwhile_are_not_copied_under_the_old_ones(
    jobs: Jobs, case: ReviewedCase, tmp_path: Path, now: Callable[[ReviewedCase], list[ReviewedCase]]
) -> None:
    second, copied = make_case(tmp_path, "second"), []

    def look_again() -> list[ReviewedCase]:
        copied.extend(path.name for path in jobs.folder.glob("*/labels/*"))
        return [second, *now(case)]

    with pytest.raises(LabelsChanged, match=r"Labels were submitted .* \(case-1\). Start it again"):
        jobs.create(ask(case, second), look_again)
    assert sorted(copied) == ["case-1.nii.gz", "second.nii.gz"], "who looks before they are copied sees too little"
    assert not list(jobs.folder.glob("tiny--*"))
    assert jobs.create(ask(case, second), lambda: [second, case]).progress()["state"] == "queued"


def test_a_job_whose_labels_cannot_be_copied_leaves_nothing(jobs: Jobs, case: ReviewedCase, tmp_path: Path) -> None:
    gone = make_case(tmp_path, "gone")
    gone.label.unlink()
    with pytest.raises(LabelsChanged, match="The label of gone was replaced or removed"):
        jobs.create(ask(case, gone))
    assert not list(jobs.folder.glob("tiny--*"))


@pytest.mark.skipif(os.name != "posix", reason="onlookers share a lock of POSIX")
def test_who_looks_at_a_job_is_not_taken_for_its_process(jobs: Jobs, case: ReviewedCase) -> None:
    import fcntl

    job = died(jobs.create(ask(case)))
    with (job.path / ".lock").open("a+") as onlooker:
        fcntl.flock(onlooker, fcntl.LOCK_SH)
        assert not job.is_alive()
        assert job.progress()["state"] == "interrupted"
    with job.lock:
        assert job.is_alive()
    assert not job.is_alive()


def test_the_images_of_jobs_that_run_or_wait_are_to_be_read(jobs: Jobs, case: ReviewedCase, tmp_path: Path) -> None:
    second = make_case(tmp_path, "second")
    ended(jobs.create(ask(second)), "done")
    assert jobs.images_to_read() == set()
    jobs.create(ask(case, model="other"))
    assert jobs.images_to_read() == {*case.images}


def test_a_job_says_what_was_asked_for(jobs: Jobs, case: ReviewedCase) -> None:
    request = ask(case, device="cuda:1", client="reader 3")
    job = jobs.create(request)
    stored = job.request
    assert replace(stored, cases=request.cases) == request
    progress = job.progress()
    assert (progress["state"], progress["attempts"], progress["model"]) == ("queued", 0, "tiny")
    assert progress["created"].endswith("+00:00")


def test_nothing_to_learn_from_is_refused_and_leaves_nothing(jobs: Jobs) -> None:
    with pytest.raises(TrainingError, match="no reviewed case for tiny yet: submit a label first"):
        jobs.create(ask())
    assert not jobs.folder.exists()


@pytest.mark.parametrize("model", ["tiny", "liver-lesion-ct", "a--b", "a--", "x--20260101T000000.000000", "v1.2_b"])
def test_a_model_id_with_dashes_is_read_back_from_the_jobs_name(jobs: Jobs, case: ReviewedCase, model: str) -> None:
    job = jobs.create(ask(case, model=model))
    assert job.model_id == model
    assert job.id.startswith(f"{model}--")
    assert [found.model_id for found in jobs.all()] == [model]
    assert jobs.latest(model).path == job.path


def test_models_with_similar_names_have_jobs_of_their_own(jobs: Jobs, case: ReviewedCase) -> None:
    created = {model: jobs.create(ask(case, model=model)).path for model in ("a--b", "a", "a-b", "a--b--c", "b")}
    assert {model: jobs.latest(model).path for model in created} == created
    assert jobs.latest("c") is None


# -- one job at a time for a model --------------------------------------------------------------------------------


def test_a_second_job_of_a_model_is_refused_while_the_first_is_open(
    jobs: Jobs, case: ReviewedCase, workers: Workers
) -> None:
    first = jobs.create(ask(case))
    already = rf"tiny is being trained already \({first.id}\)"
    with pytest.raises(TrainingError, match=already):
        jobs.create(replace(ask(case), recipe=Recipe(epochs=3)))
    workers.start(first)
    with pytest.raises(TrainingError, match=already):
        jobs.create(replace(ask(case), recipe=Recipe(epochs=3)))
    assert jobs.create(ask(case, model="other")).model_id == "other"
    assert len(jobs.all()) == 2


def test_of_two_who_ask_at_once_one_is_refused(jobs: Jobs, case: ReviewedCase) -> None:
    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def create() -> None:
        barrier.wait()
        try:
            jobs.create(ask(case))
            outcomes.append("created")
        except TrainingError:
            outcomes.append("refused")

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["created", "refused", "refused", "refused"]
    assert len(jobs.all()) == 1


@pytest.mark.parametrize("state", ["interrupted", "stopped"])
def test_a_job_that_broke_off_goes_on_when_the_same_is_asked_again(
    jobs: Jobs, case: ReviewedCase, tmp_path: Path, state: str
) -> None:
    second = make_case(tmp_path, "second")
    job = jobs.create(ask(case, second, client="reader 1"))
    (job.work / "checkpoint").mkdir(parents=True)
    died(job) if state == "interrupted" else ended(job, state)
    assert job.progress()["state"] == state
    again = jobs.create(ask(second, case, client="reader 2"))
    assert again.path == job.path
    assert (job.work / "checkpoint").is_dir()
    assert job.progress()["state"] == "queued"
    with pytest.raises(TrainingError, match="being trained already"):
        jobs.create(ask(case, second))


def test_asking_again_gives_a_job_all_its_attempts_back(jobs: Jobs, case: ReviewedCase) -> None:
    job = died(jobs.create(ask(case)))
    job.tell(attempts=MAX_ATTEMPTS)
    assert jobs.create(ask(case)).progress()["attempts"] == 0


def another_label(request: JobRequest) -> JobRequest:
    request.cases[0].label.write_text("corrected")
    return replace(request, cases=tuple(replace(case) for case in request.cases))


def changed(**facts: Any) -> Callable[[JobRequest], JobRequest]:
    return lambda request: replace(request, **facts)


def changed_case(**facts: Any) -> Callable[[JobRequest], JobRequest]:
    return lambda request: replace(request, cases=(replace(request.cases[0], **facts),))


OTHER = {
    "another parent": changed(parent="v2"),
    "another recipe": changed(recipe=Recipe(epochs=19)),
    "another device": changed(device="cuda"),
    "another dataset.json": changed(dataset={"labels": {}}),
    "a corrected label": another_label,
    "more reviewed": changed_case(reviewed=("liver", "spleen")),
    "a case of another name": changed_case(case_id="case-2"),
    "a case of another patient": changed_case(patient="somebody else"),
    "a case that was picked by a strategy": changed_case(audit=False),
    "a case more": lambda request: replace(request, cases=request.cases * 2),
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER.keys())
def test_with_another_request_a_new_job_begins(
    jobs: Jobs, case: ReviewedCase, change: Callable[[JobRequest], JobRequest]
) -> None:
    job = died(jobs.create(ask(case)))
    other = jobs.create(change(ask(case)))
    assert other.path != job.path
    assert jobs.latest("tiny").path == other.path
    assert [one.progress()["state"] for one in jobs.all()] == ["interrupted", "queued"]


@pytest.mark.parametrize("state", ["done", "failed"])
def test_what_has_ended_is_not_done_again_but_anew(jobs: Jobs, case: ReviewedCase, state: str) -> None:
    job = ended(jobs.create(ask(case)), state)
    assert jobs.create(ask(case)).path != job.path


def test_a_job_that_can_never_go_on_does_not_keep_new_ones_away(jobs: Jobs, case: ReviewedCase, tmp_path: Path) -> None:
    second = make_case(tmp_path, "second")
    died(jobs.create(ask(case, second)))
    second.images[0].unlink()
    job = died(jobs.create(ask(case)))
    stored = json.loads((job.path / "request.json").read_text())
    stored["recipe"]["option_of_the_past"] = 3
    (job.path / "request.json").write_text(json.dumps(stored))
    assert jobs.create(ask(case)).path != job.path
    assert len(jobs.all()) == 3


# -- the state ----------------------------------------------------------------------------------------------------


def test_a_job_waits_for_its_process_only_so_long(
    jobs: Jobs, case: ReviewedCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.create(ask(case))
    assert job.is_alive()
    assert job.progress()["state"] == "queued"
    monkeypatch.setattr(jobs_module, "START_GRACE_S", 0.0)
    assert not job.is_alive()
    assert job.progress()["state"] == "interrupted"


def test_a_job_is_alive_as_long_as_a_process_holds_its_lock(jobs: Jobs, case: ReviewedCase, workers: Workers) -> None:
    job = jobs.create(ask(case))
    process = workers.start(job)
    for _ in range(20):
        assert job.progress()["state"] == "running"
    assert job.progress()["pid"] == process.pid
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert job.progress()["state"] == "interrupted"
    assert not job.is_alive()
    assert json.loads((job.path / "progress.json").read_text())["state"] == "running"  # it could not say so itself


def test_it_is_the_lock_that_tells_not_the_number_of_a_process(jobs: Jobs, case: ReviewedCase) -> None:
    job = died(jobs.create(ask(case)))
    job.tell(pid=os.getpid())
    assert job.progress()["state"] == "interrupted"
    with FileLock(job.path / ".lock"):
        assert job.progress()["state"] == "running"
    assert job.progress()["state"] == "interrupted"


def test_looking_at_a_job_does_not_take_its_lock(jobs: Jobs, case: ReviewedCase) -> None:
    job = died(jobs.create(ask(case)))
    job.progress()
    with job.lock.acquire(timeout=0):
        pass


def test_a_process_that_ends_while_somebody_looks_has_not_broken_off(
    jobs: Jobs, case: ReviewedCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = died(jobs.create(ask(case)))

    def end_then_look(self: Job, progress: object = None) -> bool:
        self.tell(state="done", message="better")
        return False

    monkeypatch.setattr(Job, "is_alive", end_then_look)
    assert job.progress()["state"] == "done"


@pytest.mark.parametrize("state", ["done", "failed", "stopped"])
def test_what_has_ended_stays_so_without_a_process(jobs: Jobs, case: ReviewedCase, state: str) -> None:
    assert ended(jobs.create(ask(case)), state).progress()["state"] == state


def test_what_is_told_is_added_to_what_was(jobs: Jobs, case: ReviewedCase) -> None:
    job = jobs.create(ask(case))
    job.tell(epoch=3, stage="training")
    job.tell(epoch=4)
    progress = job.progress()
    assert (progress["epoch"], progress["stage"], progress["model"]) == (4, "training", "tiny")
    assert progress["updated"] >= progress["created"]


# -- lists --------------------------------------------------------------------------------------------------------


def test_jobs_are_listed_by_age_and_the_open_ones_with_the_running_one_first(
    jobs: Jobs, case: ReviewedCase, workers: Workers
) -> None:
    created = {name: jobs.create(ask(case, model=name)) for name in ("zoo", "done", "mid", "gone", "abc")}
    ended(created["done"], "done")
    died(created["gone"])
    assert [job.model_id for job in jobs.all()] == list(created)
    assert [job.model_id for job in jobs.open()] == ["zoo", "mid", "abc"]
    workers.start(created["mid"])
    assert [job.model_id for job in jobs.open()] == ["mid", "zoo", "abc"]


def test_the_latest_job_of_a_model_is_its_newest(jobs: Jobs, case: ReviewedCase) -> None:
    first = ended(jobs.create(ask(case)), "done")
    assert jobs.latest("tiny").path == first.path
    second = jobs.create(ask(case))
    jobs.create(ask(case, model="other"))
    assert jobs.latest("tiny").path == second.path


def test_a_home_without_jobs_has_none_and_stays_as_it_is(jobs: Jobs) -> None:
    assert jobs.all() == jobs.open() == jobs.resume_interrupted() == jobs.stop_all() == []
    assert jobs.latest("tiny") is None
    assert not jobs.folder.exists()


def test_a_job_that_was_never_written_to_its_end_is_none(jobs: Jobs, case: ReviewedCase) -> None:
    job = jobs.create(ask(case))
    (job.path / "progress.json").unlink()
    assert jobs.all() == []
    assert jobs.create(ask(case)).progress()["state"] == "queued"


def test_jobs_take_turns(jobs: Jobs, tmp_path: Path) -> None:
    with jobs.turn, pytest.raises(Timeout), Jobs(tmp_path / "home").turn.acquire(timeout=0.05):
        pass
    with Jobs(tmp_path / "home").turn.acquire(timeout=0.05):
        pass


def test_the_log_is_read_from_its_end_whatever_is_in_it(jobs: Jobs, case: ReviewedCase) -> None:
    job = jobs.create(ask(case))
    assert job.log_tail() == []
    (job.path / "log.txt").write_bytes(b"".join(b"line %d\n" % number for number in range(30)) + b"L\xe4sion \xff")
    assert job.log_tail(2) == ["line 29", "L\ufffdsion \ufffd"]
    assert job.log_tail() == [*[f"line {number}" for number in range(11, 30)], "L\ufffdsion \ufffd"]
    assert len(job.log_tail(100)) == 31


# -- the process --------------------------------------------------------------------------------------------------


def test_a_process_of_its_own_works_on_the_job(jobs: Jobs, case: ReviewedCase, workers: Workers) -> None:
    job = jobs.create(ask(case))
    process = workers.start(job)
    progress = job.progress()
    assert progress["argv"] == ["-m", "mshub.worker", str(job.path)]
    assert progress["session"] == process.pid != os.getsid(0)  # the end of the server's terminal is not the job's
    assert progress["attempts"] == 1
    assert progress["resumable"] is True
    eventually(lambda: job.log_tail() == ["at work"])


def test_a_process_that_ended_is_not_left_as_a_zombie(jobs: Jobs, case: ReviewedCase, workers: Workers) -> None:
    job = jobs.create(ask(case))
    process = workers.start(job, "ends")
    eventually(lambda: not psutil.pid_exists(process.pid))
    assert job.wait() == job.progress()
    assert job.progress()["state"] == "done"


def test_waiting_ends_when_the_job_does(jobs: Jobs, case: ReviewedCase, workers: Workers) -> None:
    job = jobs.create(ask(case))
    workers.start(job)
    threading.Timer(0.3, job.ask_to_stop).start()
    progress = job.wait(poll_s=0.05)
    assert (progress["state"], progress["message"]) == ("stopped", "the end")


def test_waiting_ends_when_the_process_dies(jobs: Jobs, case: ReviewedCase, workers: Workers) -> None:
    job = jobs.create(ask(case))
    process = workers.start(job)
    threading.Timer(0.3, process.kill).start()
    assert job.wait(poll_s=0.05)["state"] == "interrupted"


def test_a_new_start_forgets_that_the_last_one_was_stopped_and_adds_to_its_log(
    jobs: Jobs, case: ReviewedCase, workers: Workers
) -> None:
    job = jobs.create(ask(case))
    workers.start(job)
    job.ask_to_stop()
    assert job.is_asked_to_stop
    job.wait(poll_s=0.05)
    again = jobs.create(ask(case))
    workers.start(again)
    assert not again.is_asked_to_stop
    assert again.progress()["state"] == "running"
    eventually(lambda: again.log_tail() == ["at work", "at work"])


# -- going on after a crash ---------------------------------------------------------------------------------------


def test_jobs_whose_process_died_are_started_again(jobs: Jobs, case: ReviewedCase, workers: Workers) -> None:
    workers.behave("listens")
    gone, other = died(jobs.create(ask(case))), died(jobs.create(ask(case, model="other")))
    assert [job.path for job in jobs.resume_interrupted()] == [gone.path, other.path]
    eventually(lambda: gone.progress()["state"] == other.progress()["state"] == "running")
    assert jobs.resume_interrupted() == []
    assert len(workers.started) == 2


def test_other_jobs_are_not_started_again(jobs: Jobs, case: ReviewedCase, workers: Workers) -> None:
    for state in ("done", "failed", "stopped"):
        ended(jobs.create(ask(case, model=state)), state)
    jobs.create(ask(case, model="waiting"))
    running = jobs.create(ask(case, model="running"))
    workers.start(running)
    assert jobs.resume_interrupted() == []
    assert len(workers.started) == 1


def test_a_job_that_a_newer_one_replaced_is_not_started_again(jobs: Jobs, case: ReviewedCase, workers: Workers) -> None:
    old = died(jobs.create(ask(case)))
    ended(jobs.create(replace(ask(case), recipe=Recipe(seed=3))), "done")
    assert jobs.resume_interrupted() == []
    assert old.progress()["state"] == "interrupted"


def test_a_job_of_a_caller_who_waits_for_it_is_not_started_again(
    jobs: Jobs, case: ReviewedCase, workers: Workers
) -> None:
    workers.behave("dies")
    job = jobs.create(ask(case))
    job.spawn(resumable=False)
    eventually(lambda: job.progress()["state"] == "interrupted")
    assert jobs.resume_interrupted() == []
    assert len(workers.started) == 1


def test_what_a_person_stopped_is_not_started_again_even_if_it_could_not_say_so(
    jobs: Jobs, case: ReviewedCase, workers: Workers
) -> None:
    job = died(jobs.create(ask(case)))
    job.ask_to_stop()
    assert job.progress()["state"] == "interrupted"
    assert jobs.resume_interrupted() == workers.started == []


def test_of_two_who_let_a_job_go_on_one_starts_it(jobs: Jobs, case: ReviewedCase, workers: Workers) -> None:
    workers.behave("listens")
    died(jobs.create(ask(case)))
    threads = [threading.Thread(target=jobs.resume_interrupted) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(workers.started) == 1


def test_a_job_that_dies_again_and_again_is_given_up(jobs: Jobs, case: ReviewedCase, workers: Workers) -> None:
    workers.behave("dies")
    job = jobs.create(ask(case))
    job.spawn()
    for attempt in range(1, MAX_ATTEMPTS):
        eventually(lambda: job.progress()["state"] == "interrupted")
        assert job.progress()["attempts"] == attempt
        assert [resumed.path for resumed in jobs.resume_interrupted()] == [job.path]
    eventually(lambda: job.progress()["state"] == "interrupted")
    assert jobs.resume_interrupted() == []
    assert len(workers.started) == MAX_ATTEMPTS
    progress = job.progress()
    assert progress["state"] == "failed"
    assert progress["message"] == f"It ended {MAX_ATTEMPTS} times without saying why; see its log."


# -- stopping -----------------------------------------------------------------------------------------------------


def test_a_job_that_listens_stops_by_itself(jobs: Jobs, case: ReviewedCase, workers: Workers) -> None:
    job = jobs.create(ask(case))
    process = workers.start(job)
    assert [stopped.path for stopped in jobs.stop_all()] == [job.path]
    assert (job.progress()["state"], job.progress()["message"]) == ("stopped", "the end")
    assert process.wait(10) == 0


def test_a_job_that_does_not_listen_is_killed_with_all_it_started(
    jobs: Jobs, case: ReviewedCase, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "STOP_GRACE_S", 0.4)
    job = jobs.create(ask(case))
    process = workers.start(job, "stubborn")
    child = psutil.Process(job.progress()["child"])
    began = time.monotonic()
    assert [stopped.path for stopped in jobs.stop_all()] == [job.path]
    assert time.monotonic() - began >= 0.4
    assert process.wait(10) == -signal.SIGKILL
    assert job.progress()["state"] == "stopped"
    assert not job.is_alive()
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_all_open_jobs_are_stopped_within_one_grace_and_the_others_left(
    jobs: Jobs, case: ReviewedCase, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "STOP_GRACE_S", 2.0)
    done = ended(jobs.create(ask(case, model="done")), "done")
    running = [jobs.create(ask(case, model=name)) for name in ("one", "two", "three")]
    for job in running:
        workers.start(job, "stubborn")
    began = time.monotonic()
    assert {job.path for job in jobs.stop_all()} == {job.path for job in running}
    assert time.monotonic() - began < 5.5  # one after the other, it would be 6
    assert {job.progress()["state"] for job in running} == {"stopped"}
    assert done.progress()["state"] == "done"
    assert not done.is_asked_to_stop
    assert jobs.open() == []


def test_a_job_that_never_got_a_process_is_stopped_too(
    jobs: Jobs, case: ReviewedCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "STOP_GRACE_S", 0.1)
    job = jobs.create(ask(case))
    jobs.stop_all()
    assert job.progress()["state"] == "stopped"
    assert jobs.open() == []


def test_a_stopped_job_goes_on_when_it_is_asked_for_again(jobs: Jobs, case: ReviewedCase, workers: Workers) -> None:
    job = jobs.create(ask(case))
    workers.start(job)
    jobs.stop_all()
    assert jobs.resume_interrupted() == []
    again = jobs.create(ask(case))
    assert again.path == job.path
    workers.start(again)
    assert again.progress()["state"] == "running"
