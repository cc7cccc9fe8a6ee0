"""What the server is computing right now, for `GET /mshub/status` and the log."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from mshub.errors import Busy, Interrupted

logger = logging.getLogger(__name__)

LOG_EVERY_S = 5.0
SHORTEST_RETRY_S, LONGEST_RETRY_S = 5.0, 300.0

client_gone: ContextVar[threading.Event | None] = ContextVar("client_gone", default=None)
"""Set when whoever sent the request that is being answered hung up; None where that cannot be told."""


def check_client() -> None:
    """End what nobody waits for any more.

    Raises
    ------
    Interrupted
        The client hung up.
    """
    gone = client_gone.get()
    if gone is not None and gone.is_set():
        raise Interrupted("The client hung up before the prediction was finished; nothing was stored.")


class Run:
    """One running prediction."""

    def __init__(self, number: int, model: str, image: str, client: str = "") -> None:
        self.number, self.model, self.image, self.client = number, model, image, client
        self.stage = "waiting"
        self.done, self.total = 0, 0
        self._started = self._logged = time.monotonic()

    def progress(self, done: int, total: int) -> None:
        """Take note of tiles done and in all; told to the log every few seconds."""
        self.done, self.total = done, total
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S or done == total:
            self._logged = now
            logger.info("%s: tile %d of %d, %.0f s", self.model, done, total, now - self._started)

    def loading(self, done: int, total: int) -> None:
        """Take note of images of the PACS downloaded and in all."""
        self.stage, self.done, self.total = "loading", done, total

    def predicting(self) -> None:
        """Take note that the images are here."""
        self.stage, self.done, self.total = "predicting", 0, 0
        self._started = time.monotonic()

    def as_dict(self) -> dict[str, Any]:
        """Return the run for a client; `seconds_left` is None until the first tile is done."""
        seconds = time.monotonic() - self._started
        left = seconds / self.done * (self.total - self.done) if self.done else None
        return {
            "id": self.number,
            "model": self.model,
            "image": self.image,
            "client": self.client,
            "stage": self.stage,
            "tiles_done": self.done,
            "tiles_total": self.total,
            "seconds": round(seconds, 1),
            "seconds_left": None if left is None else round(left, 1),
        }


class Activity:
    """All running predictions, and how many ended how.

    Parameters
    ----------
    most : int
        So many predictions run and wait at once; further ones are refused.
    """

    def __init__(self, most: int = 1000) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._runs: dict[int, Run] = {}
        self._needed = time.monotonic()
        self.finished = self.failed = self.refused = 0

    @contextmanager
    def run(self, model: str, image: str, client: str = "") -> Iterator[Run]:
        """Register a prediction for as long as the block runs.

        Raises
        ------
        Busy
            Too many run and wait already.
        """
        with self._lock:
            self._needed = time.monotonic()
            if len(self._runs) >= self._most:
                self.refused += 1
                raise Busy(
                    f"{len(self._runs)} predictions run and wait here already, as many as this server takes; try again "
                    "later.",
                    self._retry_after_s(),
                )
            run = Run(next(self._numbers), model, image, client)
            self._runs[run.number] = run
        is_finished = False
        try:
            yield run
            is_finished = True
        finally:
            with self._lock:
                self._needed = time.monotonic()
                del self._runs[run.number]
                self.finished += is_finished
                self.failed += not is_finished

    def _retry_after_s(self) -> float:
        """Return when the first of the running predictions should be over."""
        left = [run["seconds_left"] for run in map(Run.as_dict, self._runs.values()) if run["seconds_left"] is not None]
        return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, min(left, default=0.0)))

    def touch(self) -> None:
        """Take note that somebody uses the server."""
        with self._lock:
            self._needed = time.monotonic()

    def idle_s(self) -> float:
        """Return for how many seconds nobody has needed the server; 0 while a prediction runs or waits."""
        with self._lock:
            return 0.0 if self._runs else time.monotonic() - self._needed

    def as_dict(self) -> dict[str, Any]:
        """Return running predictions, oldest first, and the counts."""
        with self._lock:
            running = [run.as_dict() for run in self._runs.values()]
        return {"running": running, "finished": self.finished, "failed": self.failed, "refused": self.refused}
