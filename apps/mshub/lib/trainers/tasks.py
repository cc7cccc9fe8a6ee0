"""A training job in the words of MONAI Label's clients: its statistics, and the task of ``/train``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeGuard

from mshub.errors import MSHubError
from mshub.jobs import OPEN, Job

STATUS = {"done": "DONE", "failed": "ERROR", "interrupted": "ERROR", "stopped": "STOPPED"}
COUNTS = ("epoch", "total_epochs", "best_metric")  # what clients calculate with: numbers, or absent
WORDS = ("stage", "message", "state", "version", "outcome", "report", "updated")
SHORTEST_S = 0.1


def as_stats(job: Job) -> dict[str, Any]:
    """Return what ``train_stats`` says of a job; what is not known yet is left out.

    ``epoch``, ``total_epochs``, ``best_metric`` (0 to 1) and ``total_time`` (seconds) are what 3D Slicer and OHIF read.
    They take a ``total_time`` for the end, so a job has one exactly when it has ended; and a missing ``epoch`` for
    everything done, so a job that prepares its cases is in epoch 0. ``eta`` is in seconds.
    """
    progress = job.progress()
    known = {key: progress[key] for key in COUNTS if _is_number(progress.get(key))}
    if known.get("total_epochs") == 0:  # the clients divide by it
        del known["total_epochs"]
    words = {key: progress[key] for key in WORDS if progress.get(key) is not None}
    if progress["state"] not in OPEN:
        return {**known, **words, "total_time": _total_time(progress)}
    eta = progress.get("eta_s")
    start = {"epoch": 0, "total_epochs": _request(job).get("epochs", 1)}
    return {**start, **known, **words, **({"eta": eta} if _is_number(eta) else {})}


def as_task(job: Job, *, is_first: bool = True) -> dict[str, Any]:
    """Return a job as MONAI Label's ``/train`` shows a task.

    Parameters
    ----------
    job : Job
    is_first : bool
        Whether it is the one in front of those that run or wait. That one is ``RUNNING`` from the start, even while its
        process loads: 3D Slicer takes everything else for the end and stops looking.
    """
    progress = job.progress()
    state = progress["state"]
    waiting = "RUNNING" if is_first else "SUBMITTED"
    message = progress.get("message") or state
    task = {
        "id": job.id,
        "status": STATUS.get(state, waiting),
        "request": _request(job),
        "start_ts": _local_time(progress.get("started") or progress.get("created")),
        "details": job.log_tail() or [message],  # Slicer reads the last one, whether there is one or not
        "stats": as_stats(job),
    }
    if state not in OPEN:
        task |= {"end_ts": _local_time(progress.get("ended") or progress.get("updated")), "result": message}
    return task


def _request(job: Job) -> dict[str, Any]:
    try:
        request = job.request
    except MSHubError:  # an old job, whose recipe had options that are gone
        return {"model": job.model_id}
    facts = {"model": request.model_id, "parent": request.parent, "device": request.device}
    return {**facts, "client_id": request.client, "cases": len(request.cases), **request.recipe.as_dict()}


def _total_time(progress: Mapping[str, Any]) -> float:
    """Return the seconds a job took, more than 0; one that was killed could not write them."""
    told = progress.get("total_time")
    if _is_number(told):
        return max(told, SHORTEST_S)
    started, ended = progress.get("started"), progress.get("ended") or progress.get("updated")
    if not (started and ended):
        return SHORTEST_S
    return max((datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds(), SHORTEST_S)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _local_time(moment: str | None) -> str | None:
    """Return an ISO time as MONAI Label writes times: in the server's own zone, without naming it."""
    return f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M:%S}" if moment else None
