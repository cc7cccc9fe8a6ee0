"""The process of one training job: ``python -m mshub.worker JOB-FOLDER``.

It holds the job's lock as long as it lives, waits for its turn, and says in ``progress.json`` how far it is and how it
ended. Asked to stop, told so by SIGTERM or left alone by the process that started it, it ends at the next step and
keeps its checkpoint. It is ``stopped`` where somebody asked, and ``interrupted`` where nobody did.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import Timeout

from mshub import jobs
from mshub.errors import MSHubError
from mshub.jobs import Job, Jobs
from mshub.orphans import end_at_once, forks_end_with_this_process, when_orphaned
from mshub.store import ModelStore, utc_now

logger = logging.getLogger(__name__)

NICENESS = 10
"""Predictions of a running server go first."""

OOM_SCORE = "500"
"""Of -1000 (never ended) to 1000 (ended first); 0 is usual."""

LOCK_TIMEOUT_S = 10.0
"""How long the job's last process may take to go."""


def main(arguments: list[str]) -> int:
    """Work on the job; returns the exit code: 0 done or stopped, 1 failed."""
    job = Job(Path(arguments[0]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    try:
        held = job.lock.acquire(timeout=LOCK_TIMEOUT_S)
    except Timeout:
        logger.error("another process works on %s", job.id)
        return 1
    with held:
        signal.signal(signal.SIGTERM, lambda *_: job.leave())  # a machine that shuts down says so to every process
        when_orphaned(lambda: _leave(job))
        job.tell(pid=os.getpid(), state="queued", stage="waiting for its turn", message="")
        os.nice(NICENESS)
        _go_first()
        return _take_turn(job, ModelStore(job.path.parents[1]))


def _take_turn(job: Job, store: ModelStore) -> int:
    turn = Jobs(store.home).turn
    while not job.is_to_end:
        try:
            with turn.acquire(timeout=1):
                if not job.is_to_end:
                    return _run(job, store)
        except Timeout:
            continue
    _end_early(job, "{} before it began", time.monotonic())
    return 0


def _run(job: Job, store: ModelStore) -> int:
    started = time.monotonic()
    job.tell(state="running", stage="starting", started=utc_now(), ended=None, total_time=None)
    try:
        ended = _round(job, store)
    except MSHubError as error:
        logger.error("%s", error)
        _end(job, "failed", str(error), started)
        return 1
    except Exception as error:
        logger.exception("the training failed")
        _end(job, "failed", f"The training failed ({type(error).__name__}: {error}); see its log.", started)
        return 1
    if ended:
        _end(job, "done", job.progress()["message"], started)
    else:
        _end_early(job, "{}; {}it goes on where it was", started)
    return 0


def _round(job: Job, store: ModelStore) -> bool:
    """Do what the job asks for; returns False if it was stopped."""
    from mshub.nnunet.trainer import Stopped  # torch is loaded only when it is our turn
    from mshub.rounds import run_round

    try:
        run_round(store, job)
    except Stopped:
        return False
    return True


def _end_early(job: Job, message: str, started: float) -> None:
    """Say that the job was stopped, where somebody asked, or else interrupted, which counts as no attempt."""
    if job.is_asked_to_stop:
        _end(job, "stopped", message.format("stopped", "asked the same again, "), started)
    else:
        job.tell(attempts=0)
        _end(job, "interrupted", message.format("interrupted", ""), started)


def _leave(job: Job) -> None:
    """End at the next step, or at once if that takes too long: a thread calls this when the starter is gone."""
    logger.info("the process that started this training is gone")
    job.leave()
    time.sleep(jobs.STOP_GRACE_S)
    job.tell(attempts=0)
    end_at_once()


def _go_first() -> None:
    """Let Linux end this process before the server when memory runs out; what this process forks ends with it."""
    forks_end_with_this_process()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)


def _end(job: Job, state: str, message: str, started: float) -> None:
    seconds = round(time.monotonic() - started, 1)
    job.tell(state=state, stage="", message=message, ended=utc_now(), total_time=seconds, eta_s=None)
    logger.info("%s: %s", state, message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
