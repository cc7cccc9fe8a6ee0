"""When to stop: a hint that further rounds of the same kind hardly pay.

Labels cost a person's day. nnU-Net learns most from the first corrections, and its curve is soon flat: what a round
still adds is then smaller than what a hold-out of a dozen cases can tell from nothing. Whoever is labelling should hear
so, with the numbers, and decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mshub.gate import MIN_PATIENTS
from mshub.lineage import used_digests
from mshub.store import ModelStore, ModelVersion

ROUNDS = 3
"""So many judged rounds in a row: one or two are chance."""
SMALL_GAIN = 0.005
"""Of the mean Dice: less than what tells one training from the next (docs/learning.md)."""
GAIN_RULED_OUT = 0.01
"""The rounds' gain must be below this by its upper bound too: otherwise nobody knows yet."""
FEW_CASES = 10
"""With fewer new cases in all of the rounds, it is too early to say that cases do not help."""
LABELS = 10
"""So many submitted labels in a row."""
NEARLY_THE_SAME = 0.95
"""Dice of a submitted label with its pre-label from which a person hardly changed it."""


@dataclass(frozen=True)
class RoundGain:
    """What one round gained.

    Attributes
    ----------
    version : str
        The candidate, such as ``v3``, whether it was promoted or not.
    new_cases : int
        Cases it was trained on that no version before it had seen as they are.
    mean_gain : float or None
        Change of the mean Dice on the held-out cases against the version that served; None where nothing was compared.
    low, high : float or None
        Its interval, at the confidence of the gate's policy (95 % unless a lab changed it); None for held-out cases of
        one patient, of which there is no interval.
    held_out : int
        Cases it was compared on.
    """

    version: str
    new_cases: int
    mean_gain: float | None
    low: float | None
    high: float | None
    held_out: int


def round_gains(store: ModelStore, model_id: str) -> list[RoundGain]:
    """Return what every round of a model gained, oldest first; versions that no training made are no rounds."""
    gains: list[RoundGain] = []
    seen: set[str] = set()
    for version in store.versions(model_id):
        if "lineage" in version.record:
            gains.append(_gain(version, seen))
        seen |= used_digests(version)
    return gains


def _gain(version: ModelVersion, seen: set[str]) -> RoundGain:
    lineage = version.record["lineage"]
    new = {case["digest"] for case in lineage.get("cases", [])} - seen
    found = _against_serving(lineage)
    if found is None:
        return RoundGain(version.version, len(new), None, None, None, 0)
    mean, low, high = (_finite(found["overall"][key]) for key in ("mean", "low", "high"))
    known = None not in (mean, low, high) and found["patients"] >= MIN_PATIENTS
    return RoundGain(version.version, len(new), mean, *((low, high) if known else (None, None)), found["cases"])


def _against_serving(lineage: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the comparison with the version that served; with the original only where that one served."""
    found: Sequence[Mapping[str, Any]] = (lineage.get("verdict") or {}).get("comparisons") or ()
    others = [comparison for comparison in found if comparison["baseline"] != lineage.get("original")]
    return next(iter([*others, *found]), None)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


# -- the hint ---------------------------------------------------------------------------------------------------------


def stopping_hint(rounds: Sequence[RoundGain], recent: Sequence[float]) -> str | None:
    """Return what speaks for stopping, in sentences; None if nothing does, or if too little is known.

    A rule of thumb, not a test. The last `ROUNDS` judged rounds with new cases must each have gained less than
    `SMALL_GAIN`, and all of them together, by the mean of their upper bounds, less than `GAIN_RULED_OUT`. That mean
    bounds the mean gain however the rounds depend on each other: they share their held-out cases. The numbers are where
    nnU-Net's curves go flat (docs/learning.md: gains of 0.01 to 0.06 in the first five rounds, +0.002 in one of them,
    so that a single small gain says nothing), below what the gate can tell apart.

    Parameters
    ----------
    rounds : sequence of RoundGain
        Oldest first, as `round_gains` returns them.
    recent : sequence of float
        Mean Dice of the labels submitted last with the pre-labels they started from, newest last; 0 to 1.
    """
    found = [hint for hint in (_of_rounds(rounds), _of_labels(recent)) if hint]
    return " ".join(found) or None


def _of_rounds(rounds: Sequence[RoundGain]) -> str | None:
    last = [one for one in rounds if one.mean_gain is not None and one.new_cases > 0][-ROUNDS:]
    gains = [one.mean_gain for one in last if one.mean_gain is not None]
    highs = [one.high for one in last if one.high is not None]
    new_cases = sum(one.new_cases for one in last)
    if len(highs) < ROUNDS or new_cases < FEW_CASES:
        return None
    if max(gains) >= SMALL_GAIN or float(np.mean(highs)) >= GAIN_RULED_OUT:
        return None
    gain = round(float(np.mean(gains)), 3) + 0.0  # no -0.000
    return (
        f"The last {ROUNDS} rounds ({new_cases} new cases) changed the mean Dice on {_held_out(last)} held-out cases "
        f"by {gain:+.3f}: {_advice(gain)}"
    )


def _held_out(rounds: Sequence[RoundGain]) -> str:
    fewest, most = min(one.held_out for one in rounds), max(one.held_out for one in rounds)
    return f"{fewest}" if fewest == most else f"{fewest} to {most}"


def _advice(gain: float) -> str:
    if gain <= -SMALL_GAIN:
        return (
            "training on them does harm. Look at the labels that trained, the strategy relabel shows the odd ones, and "
            "at the recipe, before you label more."
        )
    return (
        "more cases of this kind hardly help. Label cases on which the model fails (strategy worst_first), correct "
        "labels that look wrong (strategy relabel), or stop here."
    )


def _of_labels(recent: Sequence[float]) -> str | None:
    last = list(recent)[-LABELS:]
    if len(last) < LABELS or not all(value >= NEARLY_THE_SAME for value in last):
        return None
    return (
        f"The last {LABELS} labels were submitted nearly as the model made them (mean Dice {np.mean(last):.2f}): it "
        "has little to learn from cases of this kind, or nobody looks closely any more. Label cases on which it fails "
        "(strategy worst_first), or stop here."
    )
