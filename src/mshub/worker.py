"""The process of one training job: ``python -m mshub.worker JOB-FOLDER``.

It holds the job's lock as long as it lives, waits for its turn, and says in ``progress.json`` how far it is and how it
ended. SIGTERM asks it to stop: it ends at the next step, keeping its checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

from filelock import Timeout

from mshub.errors import MSHubError
from mshub.jobs import Job, Jobs
from mshub.store import ModelStore, utc_now

logger = logging.getLogger(__name__)

NICENESS = 10
"""Predictions of a running server go first."""

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
        signal.signal(signal.SIGTERM, lambda *_: job.ask_to_stop())
        job.tell(pid=os.getpid(), state="queued", stage="waiting for its turn", message="")
        os.nice(NICENESS)
        return _take_turn(job, ModelStore(job.path.parents[1]))


def _take_turn(job: Job, store: ModelStore) -> int:
    turn = Jobs(store.home).turn
    while not job.is_asked_to_stop:
        try:
            with turn.acquire(timeout=1):
                if not job.is_asked_to_stop:
                    return _run(job, store)
        except Timeout:
            continue
    _end(job, "stopped", "stopped before it began", time.monotonic())
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
        _end(job, "stopped", "stopped; asked the same again, it goes on where it was", started)
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


def _end(job: Job, state: str, message: str, started: float) -> None:
    seconds = round(time.monotonic() - started, 1)
    job.tell(state=state, stage="", message=message, ended=utc_now(), total_time=seconds, eta_s=None)
    logger.info("%s: %s", state, message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
