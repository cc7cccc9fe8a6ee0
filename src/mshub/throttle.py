"""Guessing takes time: after some failures in a row, each further attempt has to wait longer."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

FREE = 5
"""So many failures cost nothing: people mistype."""
LONGEST_S = 300.0
MOST_KEYS = 10_000


class Throttle:
    """Failures by key, such as a name or an address.

    Parameters
    ----------
    now : callable, optional
        Returns seconds.

    May be used by any number of threads. Keys that failed longest ago are forgotten when there are too many.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._lock = now, threading.Lock()
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def wait_s(self, *keys: str) -> float:
        """Return how long to wait before the next attempt with any of these keys; 0 if none."""
        with self._lock:
            return max((self._wait_of(key) for key in keys), default=0.0)

    def failed(self, *keys: str) -> None:
        """Count a failure."""
        with self._lock:
            for key in keys:
                count, _ = self._failures.pop(key, (0, 0.0))
                self._failures[key] = count + 1, self._now()
            while len(self._failures) > MOST_KEYS:
                self._failures.popitem(last=False)

    def succeeded(self, *keys: str) -> None:
        """Forget the failures."""
        with self._lock:
            for key in keys:
                self._failures.pop(key, None)

    def _wait_of(self, key: str) -> float:
        count, last = self._failures.get(key, (0, 0.0))
        if count < FREE:
            return 0.0
        wait = min(LONGEST_S, 2.0 ** (count - FREE))
        return float(max(0.0, last + wait - self._now()))
