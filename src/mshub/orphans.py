"""Processes that end with the process that started them, however that one ends.

Who starts a process names itself in its environment (`naming_itself`); the process looks once a second whether that one
is still its parent. A signal at the end would not do: nobody sends one after ``kill -9`` or when memory runs out. On
Windows a process keeps its parent's number for good, and nothing is noticed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping

STARTER = "ENDS_WITH_PROCESS"
"""Environment variable: the number of the process to end with."""
LOOK_EVERY_S = 1.0


def naming_itself(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a process that is to end with this one."""
    return {**(os.environ if environment is None else environment), STARTER: str(os.getpid())}


def when_orphaned(act: Callable[[], None]) -> bool:
    """Call `act`, in a thread, once the process that named itself to this one is gone; return whether one did."""
    starter = os.environ.pop(STARTER, "")  # what this process starts has another parent
    has_starter = bool(starter) and int(starter) != os.getpid()
    if has_starter:
        _watch(int(starter), act)
    return has_starter


def forks_end_with_this_process() -> None:
    """Let what this process forks from now on end with it: after a kill, forks hold its locks and wait for ever."""
    parent = os.getpid()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _watch(parent, end_at_once))


def end_at_once() -> None:
    """End this process; nothing of it has to be put in order."""
    os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int, act: Callable[[], None]) -> None:
    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY_S)
        act()

    threading.Thread(target=look, name="orphans", daemon=True).start()
