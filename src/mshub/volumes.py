"""Whether a structure's volume is unusual beside its volumes in other cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mshub.geometry import Array

ENOUGH_CASES = 8
"""So many other cases say what is usual."""
UNUSUAL = 4.0
"""Robust z-score of the logarithm of a volume."""
LEAST_SPREAD = 0.1
"""Healthy organs differ by a tenth between people: other cases that happen to be alike are no tighter limit."""

_MAD_TO_SD = 1.4826


def unusual_volume(name: str, volume_ml: float, usual: Sequence[float], cases: str = "other cases") -> str | None:
    """Return a clause about an unusual volume, or about a structure that others have; None for what is as expected.

    Robust z-score of the logarithm: Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993.

    Parameters
    ----------
    name : str
        The structure.
    volume_ml : float
        0 where it is absent.
    usual : sequence of float
        Its volume in each other case, in ml, 0 where it is absent.
    cases : str
        What the others are called.
    """
    others = [volume for volume in usual if volume > 0]
    if len(others) < ENOUGH_CASES:
        return None
    median = millilitres(float(np.median(others)))
    if volume_ml == 0:
        return f"{name} is empty, and all {len(others)} {cases} have it (median {median})" if min(usual) > 0 else None
    score = _robust_z(math.log(volume_ml), np.log(others))
    if abs(score) <= UNUSUAL:
        return None
    amount = "much" if score > 0 else "little"
    return (
        f"{name} has {millilitres(volume_ml)}, which is {amount} beside the {median} (median) of {len(others)} {cases}"
    )


def _robust_z(value: float, others: Array) -> float:
    middle = float(np.median(others))
    spread = _MAD_TO_SD * float(np.median(np.abs(others - middle)))
    return (value - middle) / max(spread, LEAST_SPREAD)


def millilitres(value: float) -> str:
    """Return a volume with three digits."""
    return f"{three_digits(value)} ml"


def three_digits(value: Any) -> str:
    """Return a number with three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
