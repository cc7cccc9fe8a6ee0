"""Routes of what MONAI Label does in processes of its own: predictions of many images, and scores.

A thread of MONAI Label's follows each process, and changes what it tells of it while an answer is being written. So it
is told as it was at one moment.
"""

from __future__ import annotations

import json
import re
from collections import deque
from contextlib import suppress
from typing import Annotated, Any

import psutil
from fastapi import Body, HTTPException
from monailabel.endpoints import batch_infer, scoring
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType
from monailabel.interfaces.utils.app import app_instance

from lib.faults import not_found
from lib.server.asked import Admin, AnyUser, options_in
from lib.server.work_routes import INFER_OPTIONS

BATCH_OPTIONS = INFER_OPTIONS - {"series"} | {
    *("images", "labels", "max_batch_size", "max_workers", "multi_gpu", "gpus")
}
"""What a client may ask of a batch, which would look for programs where ``bundle_path`` says."""

LONGEST_BATCH = 100_000
"""Bytes of a batch's options: MONAI Label hands them to its process as one argument, and Linux takes 128 KiB."""
_GPUS = re.compile(r"all|[0-9]{1,4}(,[0-9]{1,4})*")
_ENDED = (psutil.NoSuchProcess, StopIteration)
"""What MONAI Label raises where a process ends just as it is to be stopped."""


def infer_batch(
    user: Admin,
    model: str,
    images: BatchInferImageType = BatchInferImageType.IMAGES_ALL,
    params: Annotated[Any, Body()] = None,
    run_sync: bool = False,
) -> Any:
    """Run a model on many images, in a process of its own; see `BATCH_OPTIONS`."""
    asked = options_in(params, '{"label_tag": "original"}')
    options = {name: value for name, value in asked.items() if name in BATCH_OPTIONS}
    gpus = options.get("gpus") or "all"
    if not isinstance(gpus, str) or not _GPUS.fullmatch(gpus):
        raise HTTPException(400, f"gpus is {str(gpus)[:80]!r}; expected all, or numbers such as 0,1.")
    if len(json.dumps(options).encode()) > LONGEST_BATCH:
        raise HTTPException(413, f"The options are longer than {LONGEST_BATCH} bytes: name fewer images in a batch.")
    return at_this_moment(batch_infer.run(model, images, {**options, "gpus": gpus}, run_sync))


def batch_status(user: AnyUser, all: bool = False, check_if_running: bool = False) -> Any:
    """Return the last batch, or the running one; 404 if there is none."""
    return at_this_moment(batch_infer.status(all, check_if_running))


def stop_batch(user: Admin) -> Any:
    """Stop the running batch; null if there was none."""
    with suppress(*_ENDED):
        return at_this_moment(batch_infer.stop())


def score_all(user: Admin, params: Annotated[Any, Body()] = None, run_sync: bool = False) -> Any:
    """Run every scoring method; see `score`."""
    options_in(params, "{}")
    return at_this_moment(scoring.run(None, run_sync))


def score(user: Admin, method: str, params: Annotated[Any, Body()] = None, run_sync: bool = False) -> Any:
    """Run a scoring method, in a process of its own; `params` changes nothing: none here has options."""
    options_in(params, "{}")
    known = app_instance().info()["scoring"]
    if method not in known:
        raise not_found("scoring method", method, sorted(known))
    return at_this_moment(scoring.run_method(method, None, run_sync))


def scoring_status(user: AnyUser, all: bool = False, check_if_running: bool = False) -> Any:
    """Return the last scoring, or the running one; 404 if there is none."""
    return at_this_moment(scoring.status(all, check_if_running))


def stop_scoring(user: Admin) -> Any:
    """Stop the running scoring; null if there was none."""
    with suppress(*_ENDED):
        return at_this_moment(scoring.stop())


def at_this_moment(told: Any) -> Any:
    """Return a copy of what is told of tasks; a dict or a deque is copied in one step, which no other thread is in."""
    if isinstance(told, dict):
        return {name: at_this_moment(one) for name, one in told.copy().items()}
    if isinstance(told, list | deque):
        return [at_this_moment(one) for one in told.copy()]
    return told


ROUTES = (
    ("POST", "/batch/infer/{model}", infer_batch, "Infer"),
    ("GET", "/batch/infer", batch_status, "Infer"),
    ("DELETE", "/batch/infer", stop_batch, "Infer"),
    ("POST", "/scoring/", score_all, "Scoring"),
    ("POST", "/scoring/{method}", score, "Scoring"),
    ("GET", "/scoring/", scoring_status, "Scoring"),
    ("DELETE", "/scoring/", stop_scoring, "Scoring"),
)
