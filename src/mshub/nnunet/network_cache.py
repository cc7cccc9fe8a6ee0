"""Networks kept warm, and one case at a time per device.

Concurrency
-----------
A `NetworkCache` may be used by any number of threads. Two kinds of lock exist and are always taken in this order:

1. one lock per device, held for the whole time a network computes on it: a device runs one case at a time;
2. the cache's own lock, held only while its table of networks is read or changed, never while computing.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mshub.nnunet.engine import Engine
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.sliding_window import Check

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 0.5
_EngineKey = tuple[str, tuple[str, ...], str, str]


def _key(folder: ModelFolder, folds: tuple[str, ...], device: torch.device, runtime: str) -> _EngineKey:
    return str(folder.path), folds, str(device), runtime


def _never() -> None:
    """Find no reason to stop waiting."""


class NetworkCache:
    """Networks kept in memory, the least recently used dropped first when they exceed `max_bytes`.

    Parameters
    ----------
    max_bytes : int
        Budget for the weights of all cached networks; the one in use is always kept.
    kept : Path, optional
        See `Engine`.
    """

    def __init__(self, max_bytes: int = 8 * 2**30, kept: Path | None = None) -> None:
        self._max_bytes, self._kept = max_bytes, kept
        self._engines: dict[_EngineKey, Engine] = {}
        self._lock = threading.Lock()
        self._device_locks: dict[str, threading.Lock] = {}
        self._queues: Counter[str] = Counter()
        self._forgotten: dict[str, int] = {}

    @contextmanager
    def engine(
        self,
        folder: ModelFolder,
        folds: tuple[str, ...],
        *devices: torch.device,
        runtime: str = "torch",
        check: Check = _never,
    ) -> Iterator[Engine]:
        """Wait for one of `devices`, then hold it with the engine of `folder` loaded, until the ``with`` block ends.

        It is the one that the fewest wait for; among equals one that has the network already, or else the first. What
        runs the network, see `Engine`, is `runtime`. `check` is called now and then while it waits; what it raises ends
        that.
        """
        device, forgotten = self._queue_up(folder, folds, devices, runtime)
        lock, is_held = self._device_locks[str(device)], False
        try:
            while not (is_held := lock.acquire(timeout=CHECK_EVERY_S)):
                check()
            yield self._get(folder, folds, device, runtime, forgotten)
        finally:
            if is_held:
                lock.release()
            with self._lock:
                self._queues[str(device)] -= 1

    def _queue_up(
        self, folder: ModelFolder, folds: tuple[str, ...], devices: tuple[torch.device, ...], runtime: str
    ) -> tuple[torch.device, int]:
        """Return the device to wait for, and how often the folder was given up so far."""
        with self._lock:
            device = min(
                devices,
                key=lambda device: (
                    self._queues[str(device)],
                    _key(folder, folds, device, runtime) not in self._engines,
                ),
            )
            self._device_locks.setdefault(str(device), threading.Lock())
            self._queues[str(device)] += 1
            return device, self._forgotten.get(str(folder.path), 0)

    def _get(
        self, folder: ModelFolder, folds: tuple[str, ...], device: torch.device, runtime: str, forgotten: int
    ) -> Engine:
        key = _key(folder, folds, device, runtime)
        with self._lock:
            engine = self._engines.pop(key, None)
        if engine is None:
            logger.info("loading %s, fold %s, on %s", folder.path, ",".join(folds), device)
            engine = Engine(folder, folds, device, runtime, self._kept)
        with self._lock:
            if forgotten != self._forgotten.get(key[0], 0):
                return engine  # the folder was given up while this request waited: used once more, not kept
            self._engines[key] = engine  # re-inserted last: a dict keeps insertion order, oldest first
            self._evict(keep=key)
        return engine

    def free_bytes(self) -> int:
        """Return how much of the budget is left; negative where the network in use is larger."""
        with self._lock:
            used: int = sum(engine.nbytes for engine in self._engines.values())
        return self._max_bytes - used

    def _evict(self, keep: _EngineKey) -> None:
        used = sum(engine.nbytes for engine in self._engines.values())
        for key in [key for key in self._engines if key != keep]:
            if used <= self._max_bytes:
                return
            used -= self._engines.pop(key).nbytes
            logger.info("dropped %s from memory", key[0])

    def make_room(self, device: torch.device) -> None:
        """Drop every network on a device, after one of them found too little memory beside the others."""
        with self._lock:
            for key in [key for key in self._engines if key[2] == str(device)]:
                del self._engines[key]
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def forget(self, path: Path) -> None:
        """Drop every network of the folder at `path`, after it stopped being the current version."""
        with self._lock:
            self._forgotten[str(path)] = self._forgotten.get(str(path), 0) + 1
            for key in [key for key in self._engines if key[0] == str(path)]:
                del self._engines[key]

    def loaded(self) -> list[str]:
        """Return the model folders in memory, least recently used first."""
        with self._lock:
            return list(dict.fromkeys(key[0] for key in self._engines))
