"""From a prediction's own measure of how sure it is to the Dice it will probably reach, with an interval.

A network whose mirrored copies agree to 0.95 may be right to 0.95, or to 0.80 in a hospital it has never seen. A few
reviewed cases tell which: each is a pair of what the prediction said of itself and the Dice it then had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mshub.errors import TrainingError
from mshub.geometry import Array

MIN_CASES = 10
"""Below 9, no rank of the cases gives an interval of this level; below this, the line itself means little."""
MOST_CASES = 200
"""So many of the newest are used: they are what the next case will be like, and are fitted in a quarter of a second."""
LEVEL = 0.9
"""The coverage aimed at."""


@dataclass(frozen=True, eq=False)
class _Lines:
    """Lines of the Dice over the score, none falling."""

    slopes: Array
    intercepts: Array

    def at(self, scores: float | Array) -> Array:
        """Return the Dice on each line, at a score or at one score per line."""
        dice: Array = np.clip(self.intercepts + self.slopes * scores, 0, 1)
        return dice


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is known of a model's predictions: a line through (score, Dice), and how far cases lie from it.

    The line is Theil and Sen's (Sen, JASA 63, 1968): the median of the slopes between any two cases, right even where
    more than a quarter of the cases are not; it never falls. The interval is the jackknife+ (Barber, Candès, Ramdas and
    Tibshirani, Annals of Statistics 49, 2021, arXiv 1905.02928): the line is fitted anew without each case, and the
    case's distance from the line that has not seen it is how far the next one may be.

    What holds: if the next case is drawn like the cases before, whatever the distribution, its Dice is in the interval
    with a probability of at least 2 * `level` - 1 (the paper's theorem 1), and nearly always of about `level`. That is
    an average over sets of cases and over all scores, no promise for one set, or for the lowest scores.

    What breaks it: cases that active learning chose, as they are the hard ones and the next may be easy, or the other
    way round; labels made by correcting the prediction itself, which lie nearer to it than to the truth, so that every
    Dice here is too good; pairs of one version used for another; another scanner. For scores beyond those seen, the
    line is continued, and nothing but its straightness vouches for it.

    Attributes
    ----------
    cases : int
        How many the calibration was made from.
    level : float
        The coverage aimed at.
    """

    cases: int
    level: float
    _line: _Lines = field(repr=False)
    _left_out: _Lines = field(repr=False)
    _distances: Array = field(repr=False)

    @classmethod
    def fit(cls, pairs: Sequence[tuple[float, float]]) -> Calibration | None:
        """Calibrate by reviewed cases.

        Parameters
        ----------
        pairs : sequence of (float, float)
            Score of a prediction (`Uncertainty.agreement`, or 1 - doubt) and its Dice against the reviewed label, each
            0 to 1, oldest first. Pairs that are not finite are dropped: such a case was not measured.

        Returns
        -------
        Calibration or None
            None for fewer than `MIN_CASES` usable pairs.

        Raises
        ------
        TrainingError
            A score or Dice beyond 0 to 1: a mistake in what was measured, which no line should hide.
        """
        usable = [pair for pair in pairs if all(math.isfinite(value) for value in pair)][-MOST_CASES:]
        _refuse_impossible([value for pair in usable for value in pair])
        if len(usable) < MIN_CASES:
            return None
        scores, dice = np.array(usable, np.float64).T
        others = [~row for row in np.eye(len(usable), dtype=bool)]
        left_out = _fitted(scores, dice, others)
        line = _fitted(scores, dice, [np.ones(len(usable), bool)])
        return cls(len(usable), LEVEL, line, left_out, np.abs(dice - left_out.at(scores)))

    def predict(self, score: float) -> tuple[float, float, float]:
        """Return the expected Dice of a prediction, and the lower and upper end of its interval, each 0 to 1.

        None of the three falls when the score rises.

        Raises
        ------
        TrainingError
            The score is no number from 0 to 1.
        """
        _refuse_impossible([score])
        expected, others = float(self._line.at(score)[0]), self._left_out.at(score)
        rank = math.ceil(round(self.level * (self.cases + 1), 9))
        low = float(np.sort(others - self._distances)[self.cases - rank])
        high = float(np.sort(others + self._distances)[rank - 1])
        return expected, max(0.0, min(low, expected)), min(1.0, max(high, expected))


def _fitted(scores: Array, dice: Array, selections: Sequence[Array]) -> _Lines:
    """Fit a line to each of several selections of the cases."""
    rise, run = np.subtract.outer(dice, dice), np.subtract.outer(scores, scores)
    between = np.divide(rise, run, out=np.full(rise.shape, np.nan), where=run > 0)  # every two cases once
    slopes = np.array([_slope(between[np.ix_(chosen, chosen)]) for chosen in selections])
    chosen = zip(slopes, selections, strict=True)
    intercepts = np.array([np.median(dice[some] - slope * scores[some]) for slope, some in chosen])
    return _Lines(slopes, intercepts)


def _slope(between: Array) -> float:
    """Return the median slope, 0 if it would fall or if all scores are equal."""
    known = between[~np.isnan(between)]
    return max(0.0, float(np.median(known))) if known.size else 0.0


def _refuse_impossible(values: Sequence[float]) -> None:
    wrong = [value for value in values if not 0 <= value <= 1]
    if wrong:
        found = ", ".join(f"{value:g}" for value in wrong[:3])
        raise TrainingError(
            f"A predicted Dice cannot be calibrated. Found: {found}. Expected: "
            "scores and Dice coefficients from 0 to 1. How to fix: score the case again; a doubt is given as 1 - doubt."
        )
