"""Training jobs: each a folder that says what was asked for, how far it is, and what came of it.

::

    <MSHUB_HOME>/jobs/<job>/
        request.json     model, parent version, cases, recipe: written once
        labels/          the labels as they were when the training was asked for
        progress.json    state and progress, replaced as a whole; read by the server and by people
        log.txt          what the job's process said
        stop             exists once somebody asked the job to stop
        .lock            held by the process that works on the job, for as long as it lives
        work/            checkpoints and the candidate; removed when the job is done

A job is a process of its own, and whoever looks at the folder sees the same: no state is kept anywhere else. It ends
with the process that started it, at its next step, and is ``interrupted`` then; the next server lets it go on. Jobs
take turns: each waits for the lock of the queue before it computes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from mshub.atomic_file import replace_by_copy, replace_json, replace_text
from mshub.cases import ReviewedCase
from mshub.errors import LabelsChanged, MSHubError, TrainingError
from mshub.orphans import naming_itself
from mshub.recipe import Recipe
from mshub.store import utc_now, writable_folder

if os.name == "posix":
    import fcntl

logger = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "failed", "stopped", "interrupted"]
OPEN: tuple[State, ...] = ("queued", "running")
MAX_ATTEMPTS = 3
START_GRACE_S = 30.0
STOP_GRACE_S = 30.0
"""How long a job may take to end once it was asked to, or whoever started it is gone."""


@dataclass(frozen=True)
class JobRequest:
    """What somebody asked for.

    Attributes
    ----------
    model_id : str
    parent : str or None
        Version to continue; None trains from scratch.
    cases : tuple of ReviewedCase
        All reviewed cases so far; which of them are held out is decided when the job runs.
    recipe : Recipe
    device : str
    dataset : dict
        For a training from scratch: channel names and labels as in nnU-Net's ``dataset.json``.
    client : str
        Who asked.
    """

    model_id: str
    parent: str | None
    cases: tuple[ReviewedCase, ...]
    recipe: Recipe
    device: str = "auto"
    dataset: dict[str, Any] | None = None
    client: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the request ready for JSON; `from_dict` reads it back."""
        return {
            "model": self.model_id,
            "parent": self.parent,
            "cases": [case.as_dict() for case in self.cases],
            "recipe": self.recipe.as_dict(),
            "device": self.device,
            "dataset": self.dataset,
            "client": self.client,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> JobRequest:
        """Read what `as_dict` wrote."""
        return cls(
            model_id=stored["model"],
            parent=stored["parent"],
            cases=tuple(ReviewedCase.from_dict(case) for case in stored["cases"]),
            recipe=Recipe.from_options(stored["recipe"]),
            device=stored["device"],
            dataset=stored["dataset"],
            client=stored["client"],
        )


class Job:
    """One job, by its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._leaving = False

    @property
    def id(self) -> str:
        """Name of the job: model and time."""
        return self.path.name

    @property
    def request(self) -> JobRequest:
        """What was asked for."""
        return JobRequest.from_dict(_read(self.path / "request.json"))

    @property
    def model_id(self) -> str:
        """The model the job trains."""
        return self.id.rpartition("--")[0]

    @property
    def work(self) -> Path:
        """Folder for what the job needs while it runs."""
        return self.path / "work"

    @property
    def lock(self) -> FileLock:
        """The lock that the job's process holds while it lives."""
        return FileLock(self.path / ".lock")

    def progress(self) -> dict[str, Any]:
        """Return what the job's process said last; ``state`` is ``interrupted`` where it died saying so."""
        progress = _read(self.path / "progress.json")
        if progress["state"] in OPEN and not self.is_alive(progress):
            progress = _read(self.path / "progress.json")  # it may have ended between the two looks
            if progress["state"] in OPEN:
                return {**progress, "state": "interrupted"}
        return progress

    def is_alive(self, progress: Mapping[str, Any] | None = None) -> bool:
        """Return whether a process works on the job, or was started a moment ago."""
        if _is_held(self.lock):
            return True
        progress = progress or _read(self.path / "progress.json")
        return progress.get("pid") is None and time.time() - progress.get("spawned", 0) < START_GRACE_S

    def tell(self, **facts: Any) -> None:
        """Replace the progress by itself and `facts`; only the job's own process and its starter do so."""
        progress = {**_read(self.path / "progress.json"), **facts, "updated": utc_now()}
        replace_json(self.path / "progress.json", progress)

    def log_tail(self, lines: int = 20) -> list[str]:
        """Return the last lines of the job's log."""
        log = self.path / "log.txt"
        return log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:] if log.is_file() else []

    def ask_to_stop(self) -> None:
        """Ask the job to end at the next step; it keeps what it has, for a later start to go on from."""
        replace_text(self.path / "stop", utc_now() + "\n")

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether somebody asked."""
        return (self.path / "stop").exists()

    def leave(self) -> None:
        """Let the job's own process end at the next step though nobody asked: a server that starts lets it go on."""
        self._leaving = True

    @property
    def is_to_end(self) -> bool:
        """Whether the job's own process is to end at the next step."""
        return self._leaving or self.is_asked_to_stop

    def spawn(self, *, resumable: bool = True) -> None:
        """Start a process that works on the job and ends with this one.

        Parameters
        ----------
        resumable : bool
            Whether `Jobs.resume_interrupted` may start the job again after its process died.
        """
        (self.path / "stop").unlink(missing_ok=True)
        attempts = _read(self.path / "progress.json")["attempts"] + 1
        # The process itself writes its pid, once it holds the job's lock: two writers at once would lose a line.
        self.tell(attempts=attempts, resumable=resumable, message="starting", **_starting())
        with (self.path / "log.txt").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mshub.worker", str(self.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=naming_itself(),
                start_new_session=True,  # Ctrl+C is for the server; the job ends in its own way
            )
        threading.Thread(target=process.wait, daemon=True).start()  # or it would stay a zombie when it ends
        logger.info("training %s started as process %d", self.id, process.pid)

    def wait(self, poll_s: float = 0.5) -> dict[str, Any]:
        """Wait until the job has ended; returns its last progress."""
        while (progress := self.progress())["state"] in OPEN:
            time.sleep(poll_s)
        return progress


class Jobs:
    """All jobs under a `MSHUB_HOME`."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "jobs"

    @property
    def turn(self) -> FileLock:
        """The lock a job holds while it computes: one at a time on a machine."""
        return FileLock(writable_folder(self.folder) / ".turn.lock")

    @property
    def _creating(self) -> FileLock:
        """The lock of whoever decides that a job is to start."""
        return FileLock(writable_folder(self.folder) / ".create.lock")

    def all(self) -> list[Job]:
        """Return all jobs, oldest first."""
        found = [path.parent for path in self.folder.glob("*/progress.json")]
        return [Job(path) for path in sorted(found, key=lambda path: path.name.rpartition("--")[2])]

    def latest(self, model_id: str) -> Job | None:
        """Return the newest job of a model."""
        return next((job for job in reversed(self.all()) if job.model_id == model_id), None)

    def open(self) -> list[Job]:
        """Return the jobs that run or wait: the running one first, then in the order they were asked for."""
        states = [(job, job.progress()["state"]) for job in self.all()]
        return sorted((job for job, state in states if state in OPEN), key=lambda job: dict(states)[job] != "running")

    def images_to_read(self) -> set[Path]:
        """Return the images of the jobs that run or wait."""
        return {image for job in self.open() for case in job.request.cases for image in case.images}

    def create(self, request: JobRequest, look_again: Callable[[], Iterable[ReviewedCase]] | None = None) -> Job:
        """Write down what is to be done, with copies of the labels; nothing starts yet.

        A job of the same model that broke off or was stopped and was asked the very same is returned instead, to go
        on where it was.

        Parameters
        ----------
        request : JobRequest
        look_again : callable, optional
            Returns the reviewed cases as they are now, where people submit labels meanwhile: it is asked once the
            labels are copied, and a label that came with other names since the request was made is not taken for it.

        Raises
        ------
        LabelsChanged
            Labels were submitted, or removed, since the request was made.
        TrainingError
            A job of this model is open already, or there is no case.
        """
        if not request.cases:
            raise TrainingError(f"There is no reviewed case for {request.model_id} yet: submit a label first.")
        with self._creating:
            latest = self.latest(request.model_id)
            state = latest.progress()["state"] if latest else None
            if latest and state in OPEN:
                raise TrainingError(
                    f"{request.model_id} is being trained already ({latest.id}). Wait, or stop it first."
                )
            if latest and state in ("interrupted", "stopped") and _asked_for(latest, request):
                latest.tell(attempts=0, **_starting())  # a person asks: what went wrong before does not count
                return latest
            path = self.folder / f"{request.model_id}--{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%f}"
            try:
                return self._write(request, path, look_again)
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise

    def _write(self, request: JobRequest, path: Path, look_again: Callable[[], Iterable[ReviewedCase]] | None) -> Job:
        kept = tuple(_keep_label(case, path / "labels") for case in request.cases)
        if look_again is not None:
            _check_names(request.cases, {case.case_id: case for case in look_again()})
        replace_json(path / "request.json", replace(request, cases=kept).as_dict())
        created = {"attempts": 0, "created": utc_now(), "model": request.model_id, **_starting()}
        replace_json(path / "progress.json", created)
        return Job(path)

    def resume_interrupted(self) -> list[Job]:
        """Start again every job that broke off, unless it died too often, was stopped or a newer job replaced it."""
        interrupted = [job for job in self.all() if self._goes_on(job)]
        resumed = [job for job in interrupted if self._take_up(job)]
        for job in resumed:
            job.spawn()
        return resumed

    def _goes_on(self, job: Job) -> bool:
        progress, newest = job.progress(), self.latest(job.model_id)
        if progress["state"] != "interrupted" or not progress.get("resumable", True) or job.is_asked_to_stop:
            return False
        return newest is not None and newest.path == job.path

    def _take_up(self, job: Job) -> bool:
        """Return whether a job is to be started, and count it as such: nobody else starts it as well."""
        with self._creating:
            if not self._goes_on(job):
                return False
            if job.progress()["attempts"] >= MAX_ATTEMPTS:
                job.tell(state="failed", message=f"It ended {MAX_ATTEMPTS} times without saying why; see its log.")
                return False
            job.tell(**_starting())
            return True

    def stop_all(self) -> list[Job]:
        """Stop every open job and wait for it; one that does not listen is killed. The serving version stays."""
        stopping = self.open()
        for job in stopping:
            job.ask_to_stop()
        deadline = time.monotonic() + STOP_GRACE_S
        for job in stopping:
            while job.is_alive() and time.monotonic() < deadline:
                time.sleep(0.1)
            if job.is_alive():
                _kill(job.progress().get("pid"))
            if job.progress()["state"] in (*OPEN, "interrupted"):
                job.tell(state="stopped", message="stopped")
        return stopping


def _check_names(cases: Iterable[ReviewedCase], now: Mapping[str, ReviewedCase]) -> None:
    """Refuse copies of labels whose names may not be theirs: they are others now."""
    changed = [
        case.case_id
        for case in cases
        if (found := now.get(case.case_id)) is None or (found.values, found.reviewed) != (case.values, case.reviewed)
    ]
    if changed:
        some = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise LabelsChanged(f"Labels were submitted while the training was about to start ({some}). Start it again.")


def _keep_label(case: ReviewedCase, folder: Path) -> ReviewedCase:
    """Copy the label of a case, which a person may replace while the training runs."""
    name = case.label.name.lower()
    ending = ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix
    kept = folder / f"{case.case_id}{ending}"
    try:
        replace_by_copy(case.label, kept)
    except FileNotFoundError:
        raise LabelsChanged(
            f"The label of {case.case_id} was replaced or removed as the training was about to start. Start it again."
        ) from None
    return replace(case, label=kept)


def _asked_for(job: Job, request: JobRequest) -> bool:
    """Return whether a job was asked for the same training of the same cases, whoever asked."""
    try:
        return _what(job.request) == _what(request) and _of_what(job.request) == _of_what(request)
    except MSHubError as error:  # a recipe of another version of MSHub, or an image that is gone: it cannot go on
        logger.info("%s is not gone on with: %s", job.id, error)
        return False


def _what(request: JobRequest) -> tuple[object, ...]:
    return request.model_id, request.parent, request.recipe, request.device, request.dataset


def _of_what(request: JobRequest) -> list[tuple[object, ...]]:
    """Return what decides of each case how it is used: its content, and whether it may judge."""
    return sorted((case.case_id, case.patient, case.audit, case.digest) for case in request.cases)


def _starting() -> dict[str, Any]:
    """Return the progress of a job whose process is about to start; it counts as alive until it takes the lock."""
    return {"state": "queued", "pid": None, "spawned": time.time()}


def _is_held(lock: FileLock) -> bool:
    """Return whether a process works on a job; whoever looks as well is not taken for one."""
    if os.name != "posix":
        try:
            with lock.acquire(timeout=0.05, poll_interval=0.01):
                return False
        except Timeout:
            return True
    with Path(lock.lock_file).open("a+") as file:  # closed, it is let go
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _kill(pid: int | None) -> None:
    """End the process group of a job that does not listen."""
    if pid:
        try:
            os.killpg(pid, signal.SIGKILL)
        except OSError as error:
            logger.warning("process %d could not be ended: %s", pid, error)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
