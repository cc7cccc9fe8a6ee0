"""What a report is made from: one round's facts, and the cases that are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mshub.geometry import Array, Volume, check_fits
from mshub.lineage import CANDIDATE
from mshub.scores import CaseScore


@dataclass(frozen=True, eq=False)
class Overlay:
    """A hold-out case to be shown as a slice.

    Attributes
    ----------
    case_id : str
    image : Volume
        The channel to look at.
    names : dict of str to int
        Structure -> value, one numbering for all three label maps. Only the structures a person reviewed: every other
        value is ignored, as nobody knows whether it is right.
    reviewed, after, before : ndarray of int
        Label maps on the image's grid, x, y, z. `before` is None without a version to compare with.
    dice_after, dice_before : float, optional
        Mean Dice of the case, for its caption.
    window : (float, float), optional
        Image values shown as black and white; by default what is found around the structures.
    """

    case_id: str
    image: Volume
    names: dict[str, int]
    reviewed: Array
    after: Array
    before: Array | None = None
    dice_after: float | None = None
    dice_before: float | None = None
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for labels in (self.reviewed, self.after, self.before):
            if labels is not None:
                check_fits(labels, self.image.grid)


@dataclass(frozen=True, eq=False)
class RoundReport:
    """Everything one page says about one training round.

    Attributes
    ----------
    model_id, title : str
    version : str or None
        The candidate; None when nothing was published.
    parent, original : str or None
        The version the training started from, and the one the lab began with.
    created : str
        ISO time.
    verdict : mapping
        `mshub.gate.Verdict.as_dict()`.
    recipe : mapping
        Name -> value; nested ones are shown on one line.
    lineage : sequence of mapping
        `mshub.lineage.rounds`, this round included, oldest first: ``version``, ``parent``, ``created``, ``cases``,
        ``held_out``, ``outcome``, ``mean_dice``. Where a mean was not measured, it is taken from `scores`.
    training_cases : sequence of mapping
        ``case``, ``structures`` (reviewed ones), ``started_from``, ``submitted``, ``client``. Nothing else is shown.
    held_out_cases : sequence of str
    scores : mapping of str to sequence of CaseScore
        Version -> scores on the hold-out cases; the candidate's under its version, or under `CANDIDATE`.
    losses : sequence of float
        Mean training loss of each epoch.
    overlays : sequence of Overlay
        Shown in this order; `worst_cases` picks them.
    seconds : mapping of str to float
        What took how long.
    notes : sequence of str
        Sentences for the reader.
    """

    model_id: str
    title: str
    version: str | None
    parent: str | None
    original: str | None
    created: str
    verdict: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    lineage: Sequence[Mapping[str, Any]] = ()
    training_cases: Sequence[Mapping[str, Any]] = ()
    held_out_cases: Sequence[str] = ()
    scores: Mapping[str, Sequence[CaseScore]] = field(default_factory=dict)
    losses: Sequence[float] = ()
    overlays: Sequence[Overlay] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def candidate(self) -> str:
        """The candidate's key in `scores`."""
        return self.version or CANDIDATE


def worst_cases(after: Iterable[CaseScore], before: Iterable[CaseScore] = (), count: int = 3) -> list[str]:
    """Return the ids of the cases a person should look at.

    Parameters
    ----------
    after : iterable of CaseScore
        The candidate's.
    before : iterable of CaseScore
        The serving version's. With them, the cases that lost most come first; cases without one come last.
    count : int
    """
    reference = {score.case_id: score.mean for score in before}

    def badness(score: CaseScore) -> tuple[bool, float]:
        known = score.case_id in reference
        return bool(reference) and not known, score.mean - reference.get(score.case_id, 0.0)

    return [score.case_id for score in sorted(after, key=badness)[:count]]
