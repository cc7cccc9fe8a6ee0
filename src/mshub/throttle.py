"""Guessing takes time: after some failures in a row, each further attempt has to wait longer."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

FREE = 5
"""So many failures cost nothing: people mistype."""
LONGEST_S = 300.0
FORGET_S = 24 * 3600.0
"""All failures are forgotten when the last one was so long ago; in any case as many in so much time as cost nothing."""
MOST_KEYS = 10_000


class Throttle:
    """Failures by key, such as a name or an address.

    Parameters
    ----------
    free : int
        So many failures cost nothing.
    longest_s : float
        Nobody waits longer.
    now : callable, optional
        Returns seconds.

    May be used by any number of threads. Keys that failed longest ago are forgotten when there are too many.
    """

    def __init__(
        self, free: int = FREE, longest_s: float = LONGEST_S, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._free, self._longest_s, self._now = free, longest_s, now
        self._lock = threading.Lock()
        self._failures: OrderedDict[str, tuple[int, float, float]] = OrderedDict()

    def attempt(self, key: str) -> float:
        """Return how long to wait before the next attempt; 0 if this one may go on.

        It counts as a failure until `succeeded` or `take_back` is called, so that many attempts at once are not all the
        first.
        """
        with self._lock:
            now = self._now()
            count, last, since = self._failures.get(key, (0, now, now))
            forgotten = int((now - since) * self._free / FORGET_S)
            count, since = max(0, count - forgotten), since + forgotten * FORGET_S / self._free
            if count == 0 or now - last > FORGET_S:
                count, since = 0, now
            if count >= self._free and (wait := last + self._wait_after(count) - now) > 0:
                return wait
            self._failures.pop(key, None)
            self._failures[key] = count + 1, now, since
            if len(self._failures) > MOST_KEYS:
                self._failures.popitem(last=False)
            return 0.0

    def succeeded(self, key: str) -> None:
        """Forget the failures."""
        with self._lock:
            self._failures.pop(key, None)

    def take_back(self, key: str) -> None:
        """Count the last attempt as no failure, and leave those before it."""
        with self._lock:
            count, last, since = self._failures.get(key, (0, 0.0, 0.0))
            if count:
                self._failures[key] = count - 1, last, since

    def _wait_after(self, count: int) -> float:
        return min(self._longest_s, 2.0 ** min(count - self._free, 30))
