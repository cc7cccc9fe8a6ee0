"""OpenVINO itself, an extra: imported when it is needed, once per process, and its errors as sentences."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from mshub.errors import PredictionError


def is_installed() -> bool:
    """Return whether OpenVINO can be imported here; it is not imported to find out."""
    return importlib.util.find_spec("openvino") is not None


def library() -> Any:
    """Import OpenVINO, which reports its use to its makers unless the package that sends the reports is missing."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@cache
def core() -> Any:
    """Return the one core of this process.

    A core gives the thread it is made in a stack for signals, and takes the memory away when it is deleted: after a
    few of them the next signal, SIGTERM say, would be answered on memory that is gone, and end the process.
    """
    return library().Core()


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Say in a sentence what failed; OpenVINO, torch and numpy raise nearly anything."""
    try:
        yield
    except PredictionError:
        raise
    except ModuleNotFoundError as error:
        raise PredictionError(
            f"OpenVINO is not installed ({error}). Install the package openvino, or let torch run the network."
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise PredictionError(
            f"OpenVINO could not {what} the network ({type(error).__name__}: {reason}). Let torch run it."
        ) from error
