"""Time, processor time and memory of what one process does, or of the processes it starts.

Peaks are the kernel's own (``VmHWM``, reset before) where Linux lets a process reset it, else the largest of the
samples. A thread takes a sample of the resident memory every 20 ms, from which the peaks of stages are read afterwards,
so that stages may be reported by whoever knows them. Of started processes, proportional set sizes are added, so that
pages they share count once.
"""

from __future__ import annotations

import gc
import re
import resource
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

SAMPLE_S, TREE_SAMPLE_S = 0.02, 0.1
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


class Meter:
    """Measures what runs in its ``with`` block.

    Parameters
    ----------
    children : bool
        Measure the processes this one starts, instead of itself.

    Attributes
    ----------
    wall_s, cpu_s : float
        `cpu_s` counts user and system time, that of processes waited for included.
    baseline, peak : int
        Resident bytes before, and at most.
    """

    def __init__(self, *, children: bool = False) -> None:
        self.wall_s = self.cpu_s = 0.0
        self.baseline = self.peak = 0
        self._resident = _resident_of_children if children else _resident
        self._sample_s = TREE_SAMPLE_S if children else SAMPLE_S
        self._kernel_counts = not children
        self._samples: list[tuple[float, int]] = []
        self._laps: list[tuple[str, float]] = []
        self._over = threading.Event()

    def __enter__(self) -> Meter:
        gc.collect()
        self._kernel_counts = self._kernel_counts and _reset_peak()
        self.baseline = self._resident()
        self._sampler = threading.Thread(target=self._watch, daemon=True)
        self._cpu_before, self._began = cpu_seconds(), time.perf_counter()
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wall_s, self.cpu_s = time.perf_counter() - self._began, cpu_seconds() - self._cpu_before
        self._over.set()
        self._sampler.join()
        sampled = max(size for _, size in self._samples)
        self.peak = max(_peak_of_kernel(), sampled) if self._kernel_counts else sampled

    def lap(self, stage: str) -> None:
        """Take note that a stage ended."""
        self._laps.append((stage, time.perf_counter() - self._began))

    def laps(self) -> dict[str, float]:
        """Return stage -> seconds, in their order."""
        seconds, before = {}, 0.0
        for stage, end in self._laps:
            seconds[stage], before = end - before, end
        return seconds

    def result(self, stages: Mapping[str, float]) -> dict[str, Any]:
        """Return what was measured; `stages` gives the seconds of stages that followed each other from the start."""
        told, begin = {}, 0.0
        for stage, seconds in stages.items():
            told[stage] = {"wall_s": seconds, "peak": self._peak_between(begin, begin + seconds)}
            begin += seconds
        return {
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
            "baseline": self.baseline,
            "peak": self.peak,
            "stages": told,
        }

    def _peak_between(self, begin: float, end: float) -> int | None:
        """Return the largest sample of a span, None of one that was too short."""
        return max((size for at, size in self._samples if begin <= at <= end), default=None)

    def _watch(self) -> None:
        more = True
        while more:
            self._samples.append((time.perf_counter() - self._began, self._resident()))
            more = not self._over.wait(self._sample_s)
        self._samples.append((time.perf_counter() - self._began, self._resident()))


def cpu_seconds() -> float:
    """Return user and system time of this process and of those it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _resident_of_children() -> int:
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            memory = process.memory_full_info()
        except psutil.Error:  # it ended meanwhile
            continue
        total += int(getattr(memory, "pss", 0) or memory.uss)
    return total


def _reset_peak() -> bool:
    """Let the kernel count the peak from now on; False where that is not possible."""
    try:
        RESET.write_text(RESET_PEAK)
    except OSError:
        return False
    return STATUS.is_file() and "VmHWM" in STATUS.read_text()


def _peak_of_kernel() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    return int(found[1]) * 1024 if found else 0
