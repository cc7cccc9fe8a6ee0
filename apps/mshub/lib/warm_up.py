"""The first request after a start waits for nothing that can be done before: libraries, networks, compiled loops."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from mshub.errors import MSHubError
from mshub.nnunet.network_cache import NetworkCache

logger = logging.getLogger(__name__)


class Warmable(Protocol):
    """A model that can be made ready."""

    model_id: str

    def warm(self) -> None:
        """Load the model's network where it serves by default, and run it once."""


class WarmUp(threading.Thread):
    """Makes models ready one by one, as long as there is memory for their networks, and ends.

    Parameters
    ----------
    tasks : callable
        Returns the models.
    cache : NetworkCache
        Where their networks are kept.
    """

    def __init__(self, tasks: Callable[[], list[Warmable]], cache: NetworkCache) -> None:
        super().__init__(name="mshub-warm-up", daemon=True)
        self._tasks, self._cache = tasks, cache
        self.doing: str | None = None

    def run(self) -> None:
        """Warm up every model that fits; one that fails says so when it is asked for."""
        largest = 0
        for task in self._tasks():
            free = self._cache.free_bytes()
            if free < largest:  # loading one more would drop one that was loaded before
                logger.info(
                    "%s and what follows are loaded when they are asked for: no more memory (cache_gb)", task.model_id
                )
                break
            self.doing, started = task.model_id, time.monotonic()
            try:
                task.warm()
                logger.info("%s is warm after %.1f s", task.model_id, time.monotonic() - started)
            except MSHubError as error:
                logger.warning("%s cannot be made ready: %s", task.model_id, error)
            except Exception:
                logger.exception("%s cannot be made ready", task.model_id)
            largest = max(largest, free - self._cache.free_bytes())
        self.doing = None
