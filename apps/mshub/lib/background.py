"""MONAI Label's processes for single tasks (its batches, scoring): they end with the server, however that ends."""

from __future__ import annotations

import os

from monailabel.utils.async_tasks import utils as tasks

from mshub.orphans import end_at_once, naming_itself, when_orphaned


def begin() -> None:
    """Let processes that this server starts from now on end with it; MONAI Label hands its environment on to them."""
    os.environ.update(naming_itself({}))


def end_with_server() -> bool:
    """End this process once the server that started it is gone, and return whether one did: this is none itself."""
    return when_orphaned(end_at_once)


def end_all() -> None:
    """End the processes of this server, or it would wait for them; what waits in a queue does not begin."""
    for executor in tasks.background_executors.values():
        executor.shutdown(wait=False, cancel_futures=True)
    for method in list(tasks.background_processes):
        tasks.stop_background_task(method)
