"""A worker that computes nothing but holds the locks and writes the progress of a real one.

An epoch takes a hundredth of a second per iteration. ``weight_decay`` 1 fails, ``seed`` 13 dies without a word.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from filelock import Timeout

from mshub.jobs import Job, Jobs
from mshub.orphans import when_orphaned
from mshub.recipe import Recipe


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def end(job: Job, state: str, message: str, **facts: object) -> None:
    job.tell(state=state, stage="", message=message, ended=now(), total_time=1.5, eta_s=None, **facts)


def train(job: Job, recipe: Recipe) -> None:
    job.tell(state="running", stage="training", started=now(), message="", epoch=0, total_epochs=recipe.epochs)
    if recipe.seed == 13:
        os._exit(1)
    if recipe.weight_decay == 1:
        return end(job, "failed", "The GPU ran out of memory.")
    for epoch in range(1, recipe.epochs + 1):
        time.sleep(recipe.iterations / 100)
        if job.is_to_end:
            return end(job, "stopped" if job.is_asked_to_stop else "interrupted", "it goes on where it was")
        job.tell(epoch=epoch, best_metric=epoch / recipe.epochs / 2, eta_s=1.0)
        print("epoch", epoch, flush=True)  # noqa: T201
    return end(job, "done", "better on 3 of 3 cases", version="v2", outcome="promoted", report="reports/tiny/v2.html")


def main() -> None:
    job = Job(Path(sys.argv[1]))
    with job.lock.acquire(timeout=10):
        when_orphaned(job.leave)
        job.tell(pid=os.getpid(), state="queued", stage="waiting for its turn", message="")
        while not job.is_to_end:
            try:
                with Jobs(job.path.parents[1]).turn.acquire(timeout=0.2):
                    return train(job, job.request.recipe)
            except Timeout:
                continue
        end(job, "stopped" if job.is_asked_to_stop else "interrupted", "it had not begun")


main()
