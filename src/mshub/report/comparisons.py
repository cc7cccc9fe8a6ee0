"""The tables: the candidate against other versions, or its Dice alone where there is none to compare with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from mshub.report.contents import RoundReport
from mshub.report.words import change_text, finite
from mshub.scores import CaseScore, dice_by_structure


@dataclass(frozen=True)
class Scale:
    """A horizontal axis, in percent of the width of what is drawn on it."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None], least: float = 0.02) -> Scale:
        """Return a scale that shows all the values, and at least a span of `least`."""
        known = [value for value in values if value is not None]
        low, high = min(known), max(known)
        spare = max(0.0, least - (high - low)) / 2
        return cls(low - spare, high + spare)

    def at(self, value: float) -> float:
        """Return where a value is; the ends leave room for a dot."""
        return round(4 + 92 * (value - self.low) / (self.high - self.low), 2)

    @property
    def ticks(self) -> list[float]:
        """Round values, about five."""
        places = MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        return [0.0 if abs(place) < 1e-12 else float(place) for place in places if self.low <= place <= self.high]


@dataclass(frozen=True)
class Row:
    """The change of one structure, of one case, or of all."""

    name: str
    cases: int
    before: float | None
    after: float | None
    change: float | None
    interval: tuple[float, float] | None = None
    limit: float | None = None
    violates: bool = False

    @property
    def kind(self) -> str:
        """``bad`` beyond a limit, ``good`` when better beyond doubt, ``plain`` otherwise."""
        if self.violates:
            return "bad"
        return "good" if self.interval and self.interval[0] > 0 else "plain"

    @property
    def interval_text(self) -> str:
        """Such as ``−0.002 to +0.013``."""
        return f"{change_text(self.interval[0])} to {change_text(self.interval[1])}" if self.interval else "–"

    @property
    def drawn(self) -> list[float | None]:
        """What an axis has to show."""
        return [0.0, self.change, self.limit, *(self.interval or ())]


@dataclass(frozen=True)
class Comparison:
    """The candidate against one other version, ready for the page.

    `structures` and `per_case` begin with what lost most.
    """

    baseline: str
    role: str
    confidence: str
    cases: int
    patients: int
    overall: Row
    structures: list[Row]
    per_case: list[Row]
    lost: list[tuple[str, str]]

    @property
    def scale(self) -> Scale:
        """The axis of all structures."""
        return Scale.of(value for row in (self.overall, *self.structures) for value in row.drawn)

    @property
    def case_scale(self) -> Scale:
        """The axis of the cases."""
        return Scale.of(value for row in self.per_case for value in row.drawn)


def comparisons_of(report: RoundReport) -> list[Comparison]:
    """Return the comparisons of a round's verdict, in its order."""
    return [_comparison(report, found) for found in report.verdict.get("comparisons") or ()]


def _comparison(report: RoundReport, found: Mapping[str, Any]) -> Comparison:
    policy, pairs = report.verdict.get("policy") or {}, _pairs(report, found)
    structures = [_structure_row(name, change, pairs, policy) for name, change in found["structures"].items()]
    per_case = [_case_row(case, change, pairs, policy) for case, change in found["per_case"].items()]
    return Comparison(
        baseline=str(found["baseline"]),
        role=_role(report, str(found["baseline"])),
        confidence=f"{100 * policy.get('confidence', 0.95):g}\N{NO-BREAK SPACE}%",
        cases=found["cases"],
        patients=found["patients"],
        overall=_overall_row(found, pairs, policy),
        structures=sorted(structures, key=_worst_first),
        per_case=sorted(per_case, key=_worst_first),
        lost=[(case, ", ".join(names)) for case, names in (found.get("lost") or {}).items()],
    )


def _worst_first(row: Row) -> float:
    return math.inf if row.change is None else row.change


def _role(report: RoundReport, baseline: str) -> str:
    roles = [(report.parent, "which it was trained from"), (report.original, "the original version")]
    return " and ".join(role for version, role in roles if version == baseline)


@dataclass(frozen=True)
class _Pair:
    """One case under both versions; `before` is None where that score is not at hand."""

    before: CaseScore | None
    after: CaseScore


def _pairs(report: RoundReport, found: Mapping[str, Any]) -> dict[str, _Pair]:
    """Return the scores behind a comparison, by case: only of the cases that it compared."""
    before = {score.case_id: score for score in report.scores.get(found["baseline"], ())}
    after = report.scores.get(report.candidate, ())
    return {
        score.case_id: _Pair(before.get(score.case_id), score) for score in after if score.case_id in found["per_case"]
    }


def _overall_row(found: Mapping[str, Any], pairs: Mapping[str, _Pair], policy: Mapping[str, Any]) -> Row:
    before = _mean(pair.before.mean if pair.before else None for pair in pairs.values())
    after = _mean(pair.after.mean for pair in pairs.values())
    interval, limit = _interval(found["overall"], found["patients"]), finite(policy.get("mean_lower_bound"))
    violates = interval is not None and limit is not None and interval[0] <= limit
    return Row(
        "All structures", found["cases"], before, after, finite(found["overall"]["mean"]), interval, limit, violates
    )


def _structure_row(name: str, change: Mapping[str, Any], pairs: Mapping[str, _Pair], policy: Mapping[str, Any]) -> Row:
    having = [pair for pair in pairs.values() if name in pair.after.dice]
    before = _mean(pair.before.dice.get(name) if pair.before else None for pair in having)
    after = _mean(pair.after.dice[name] for pair in having)
    mean, limit = finite(change["mean"]), finite(policy.get("worst_structure"))
    interval = _interval(change, len({pair.after.patient for pair in having}))
    return Row(name, len(having), before, after, mean, interval, limit, _is_below(mean, limit))


def _case_row(case: str, change: Any, pairs: Mapping[str, _Pair], policy: Mapping[str, Any]) -> Row:
    pair = pairs.get(case)
    before = pair.before.mean if pair and pair.before else None
    mean, limit = finite(change), finite(policy.get("worst_case"))
    return Row(case, 1, before, pair.after.mean if pair else None, mean, None, limit, _is_below(mean, limit))


def _is_below(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value < limit


def _interval(change: Mapping[str, Any], patients: int) -> tuple[float, float] | None:
    """Return an interval that says something: resampling one patient always gives that patient."""
    low, high = finite(change["low"]), finite(change["high"])
    return None if low is None or high is None or patients == 1 else (low, high)


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; None if a value is missing, as a mean of the others would be of other cases."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return float(np.mean(known)) if listed and len(known) == len(listed) else None


# -- a version without another to compare with ------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """The Dice of one structure in every case; of all structures together, each case's mean."""

    name: str
    values: list[float]

    @property
    def mean(self) -> float:
        """Mean over cases."""
        return float(np.mean(self.values))


def levels_of(report: RoundReport) -> list[Level]:
    """Return the levels of all structures together and of each, lowest first; none without scores."""
    scores = report.scores.get(report.candidate, ())
    if not scores:
        return []
    names = dice_by_structure(scores)
    levels = [Level(name, [score.dice[name] for score in scores if name in score.dice]) for name in names]
    return [Level("All structures", [score.mean for score in scores]), *sorted(levels, key=lambda level: level.mean)]


def level_scale(levels: Sequence[Level]) -> Scale | None:
    """Return the axis of all levels; None without any."""
    values = [value for level in levels for value in level.values]
    return Scale.of([*values, 1.0], least=0.1) if values else None
