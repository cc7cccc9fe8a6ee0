"""Loops over arrays compiled by numba, and how several threads share one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numba import njit

Function = TypeVar("Function", bound=Callable[..., object])
Result = TypeVar("Result")
PARTS_PER_THREAD = 4  # some parts take longer than others


def kernel(function: Function) -> Function:
    """Compile a function when it is first called, and let other threads run meanwhile.

    What is compiled is kept beside the source, or in the user's cache folder; where neither can be written to, each
    process compiles anew, which takes some seconds.
    """
    compiled: Any
    try:
        compiled = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep it
        compiled = njit(nogil=True)(function)
    return cast(Function, compiled)


def in_parts(work: Callable[[int, int], Result], count: int) -> list[Result]:
    """Call ``work(begin, end)`` for parts of ``range(count)`` that cover it, on as many threads as torch has.

    numba's own parallel loops may not be entered by two threads at once; a server has several.
    """
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        return [work(0, count)] if count else []
    edges = np.unique(np.linspace(0, count, threads * PARTS_PER_THREAD + 1).astype(int)).tolist()
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda edge: work(*edge), pairwise(edges)))


def value_counts(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return how often each value is in an array.

    Parameters
    ----------
    array : ndarray, uint8 or uint16
        Its axes may lie in any order in memory.

    Returns
    -------
    ndarray, int64, shape (256,) or (65536,)
        By value.
    """
    counts: np.ndarray[Any, Any] = np.zeros(np.iinfo(array.dtype).max + 1, np.int64)
    values = array.ravel(order="K")  # a view of whatever is contiguous
    for part in in_parts(partial(_value_counts, values, len(counts)), len(values)):
        counts += part
    return counts


@kernel
def _value_counts(values: np.ndarray[Any, Any], count: int, begin: int, end: int) -> Any:
    """Count a part of a 1-D array; of two neighbours neither waits for the other's count."""
    counts = np.zeros((2, count), np.int64)
    for place in range(begin, end):
        counts[place & 1, values[place]] += 1
    counts[0] += counts[1]
    return counts[0]
