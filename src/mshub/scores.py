"""How well a predicted label agrees with a reviewed one, structure by structure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mshub.geometry import Array


@dataclass(frozen=True)
class CaseScore:
    """Agreement of one prediction with one reviewed label.

    Attributes
    ----------
    case_id, patient : str
    dice : dict of str to float
        Structure -> Dice coefficient, 0 to 1; only structures a person reviewed in this case. A structure that is
        absent from both scores 1; one that is predicted where there is none scores 0.
    missed : tuple of str
        Structures the reviewed label has and the prediction lacks altogether.
    """

    case_id: str
    patient: str
    dice: dict[str, float]
    missed: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Mean Dice over the reviewed structures."""
        return float(np.mean(list(self.dice.values())))

    def as_dict(self) -> dict[str, Any]:
        """Return the score ready for JSON; `CaseScore.from_dict` reads it back."""
        return {"case": self.case_id, "patient": self.patient, "dice": self.dice, "missed": list(self.missed)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> CaseScore:
        """Read what `as_dict` wrote."""
        return cls(stored["case"], stored["patient"], dict(stored["dice"]), tuple(stored["missed"]))


def dice(one: Array, other: Array) -> float:
    """Return the Dice coefficient 2 |A and B| / (|A| + |B|) of two masks; 1 when both are empty."""
    total = int(np.count_nonzero(one)) + int(np.count_nonzero(other))
    return 2 * int(np.count_nonzero(one & other)) / total if total else 1.0


def score_case(
    case_id: str,
    patient: str,
    predicted: Array,
    predicted_values: Mapping[str, int],
    reviewed: Array,
    reviewed_values: Mapping[str, int],
    structures: Collection[str],
) -> CaseScore:
    """Score one prediction.

    Parameters
    ----------
    case_id, patient : str
    predicted, reviewed : ndarray of int
        Label maps of the same shape.
    predicted_values, reviewed_values : mapping of str to int
        Structure -> value in each of the two; a structure the reviewed label does not have counts as empty there.
    structures : collection of str
        The structures to score: those a person reviewed. All are in `predicted_values`.
    """
    scores, missed = {}, []
    for name in structures:
        found = predicted == predicted_values[name]
        expected = reviewed == reviewed_values[name] if name in reviewed_values else np.zeros(reviewed.shape, bool)
        scores[name] = dice(found, expected)
        if expected.any() and not found.any():
            missed.append(name)
    return CaseScore(case_id, patient, scores, tuple(missed))


def mean_dice(scores: Collection[CaseScore]) -> float:
    """Return the mean over cases of each case's mean Dice; NaN without cases."""
    return float(np.mean([score.mean for score in scores])) if scores else float("nan")


def dice_by_structure(scores: Collection[CaseScore]) -> dict[str, float]:
    """Return structure -> mean Dice over the cases in which it was reviewed, in order of first appearance."""
    names = dict.fromkeys(name for score in scores for name in score.dice)
    return {name: float(np.mean([score.dice[name] for score in scores if name in score.dice])) for name in names}
