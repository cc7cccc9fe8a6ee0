"""Whether a candidate version may serve: its scores on the hold-out against those of the versions before it.

The comparison is paired, case by case, and its intervals come from a bootstrap that resamples patients, as the scans of
one patient are no independent evidence. A candidate is compared with the current version and with the original one:
against the current version alone, a model can get worse in many steps each too small to see (arXiv 1912.12413).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mshub.errors import ConfigError, TrainingError
from mshub.model_card import did_you_mean
from mshub.scores import CaseScore

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Outcome = Literal["promoted", "refused", "needs a person"]

#: Resampling one patient always gives that patient: an interval needs a second one.
MIN_PATIENTS = 2
#: Dice changes are rounded to so many decimals: 0.7 - 0.8 must be -0.1, not a little less.
DECIMALS = 9
#: Reasons told in a summary; more than these are counted.
SUMMARISED = 3
#: So few doubtful labels never refuse a candidate, whatever their share: a person looks at them.
FEW_LABELS = 2

_PROMOTE = "look at its predictions, then serve it with `mshub promote ID VERSION`"
_RANGES: dict[str, tuple[float, float]] = {
    "min_cases": (1, 10_000),
    "mean_lower_bound": (-1, 1),
    "worst_structure": (-1, 1),
    "worst_case": (-1, 1),
    "first_mean_dice": (0, 1),
    "doubtful_labels": (0, 1),
    "confidence": (0.5, 0.999),
    "resamples": (100, 100_000),
    "seed": (0, 2**32 - 1),
}


@dataclass(frozen=True)
class GatePolicy:
    """The limits a candidate has to keep.

    Attributes
    ----------
    min_cases : int
        With fewer hold-out cases a person promotes.
    mean_lower_bound : float
        The lower bound of the mean Dice change must be above.
    worst_structure, worst_case : float
        The mean Dice change of no structure, and of no case, may be below.
    first_mean_dice : float
        The lower bound of the mean Dice of a first version, which has nothing to be compared with, must reach this.
    doubtful_labels : float
        No larger share of the new labels may look wrong: good held-out cases improve even when some of the labels that
        trained were bad.
    confidence : float
        Of the two-sided intervals whose lower bounds are meant: 0.95 leaves 2.5 % on each side.
    resamples, seed : int
        Of the bootstrap.
    automatic : bool
        False: a candidate that passes waits for a person all the same.
    """

    min_cases: int = 8
    mean_lower_bound: float = -0.01
    worst_structure: float = -0.03
    worst_case: float = -0.10
    first_mean_dice: float = 0.70
    doubtful_labels: float = 0.5
    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0
    automatic: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            _refuse_impossible(field.name, getattr(self, field.name), type(field.default))

    @classmethod
    def load(cls, path: Path) -> GatePolicy:
        """Read a policy from a TOML file with some of the attributes as keys; without a file, the defaults.

        Raises
        ------
        ConfigError
            The file cannot be read, or a key is unknown or has an impossible value.
        """
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(
                f"Gate policy {path} cannot be read. Found: {error}. Expected: a TOML file in UTF-8. How to fix: "
                "correct it, or remove it to use the defaults."
            ) from error
        try:
            _refuse_unknown(content, [field.name for field in fields(cls)])
            return cls(**content)
        except ConfigError as error:
            raise ConfigError(f"Gate policy {path}: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """Return the policy ready for JSON or TOML."""
        return asdict(self)


@dataclass(frozen=True)
class Change:
    """A mean and its bootstrap interval, in units of Dice."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A candidate against one other version, on the same cases.

    Attributes
    ----------
    baseline : str
        The other version, such as ``v2``.
    cases, patients : int
        How many there are.
    overall : Change
        Of the mean Dice of a case, averaged over cases.
    structures : dict of str to Change
        Structure -> change of its Dice, averaged over the cases in which it was reviewed.
    per_case : dict of str to float
        Case -> change of its mean Dice.
    lost : dict of str to tuple of str
        Case -> structures the candidate does not predict at all, though they are there and the other version finds
        them; only cases that have such.
    """

    baseline: str
    cases: int
    patients: int
    overall: Change
    structures: dict[str, Change]
    per_case: dict[str, float]
    lost: dict[str, tuple[str, ...]]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison ready for JSON."""
        return {**asdict(self), "lost": {case: list(names) for case, names in self.lost.items()}}


@dataclass(frozen=True)
class Verdict:
    """What becomes of a candidate, and why.

    Attributes
    ----------
    outcome : str
        ``promoted``, ``refused`` or ``needs a person``.
    reasons : tuple of str
        Clauses for people: every violated limit, or why a person is needed and what was found, or the gain.
    comparisons : tuple of Comparison
        One for every baseline; none for a first version, or where no case could be scored.
    policy : GatePolicy
    """

    outcome: Outcome
    reasons: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    policy: GatePolicy

    @property
    def summary(self) -> str:
        """One sentence for a log or a model's history."""
        told, more = self.reasons[:SUMMARISED], len(self.reasons) - SUMMARISED
        rest = f"; and {_count(more, 'more reason')}" if more > 0 else ""
        return f"{self.outcome}: {'; '.join(told)}{rest}."

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict ready for JSON."""
        return {
            "outcome": self.outcome,
            "summary": self.summary,
            "reasons": list(self.reasons),
            "comparisons": [comparison.as_dict() for comparison in self.comparisons],
            "policy": self.policy.as_dict(),
        }


def judge(
    candidate: Sequence[CaseScore],
    baselines: Mapping[str, Sequence[CaseScore]],
    policy: GatePolicy,
    failures: Mapping[str, str] = {},
    doubts: Mapping[str, Sequence[str]] = {},
    new_labels: int = 0,
) -> Verdict:
    """Decide whether a candidate may serve.

    Parameters
    ----------
    candidate : sequence of CaseScore
        Its scores on the hold-out cases.
    baselines : mapping of str to sequence of CaseScore
        Version -> its scores on the same cases: the current version and the original one. Empty for a first version.
    policy : GatePolicy
    failures : mapping of str to str
        Case -> what went wrong, for cases the candidate could not predict. They are compared no further.
    doubts : mapping of str to sequence of str
        Case -> why its reviewed label should be looked at, for new labels only: with one, a person decides; too many
        are a violated limit.
    new_labels : int
        Reviewed labels that no version which served has seen.

    Returns
    -------
    Verdict
        ``refused`` if a limit is violated against any baseline, or a case failed. Otherwise ``needs a person`` if there
        are too few cases or patients, if a first version is not good enough to serve unseen, or if the policy asks for
        it. Otherwise ``promoted``.

    Raises
    ------
    TrainingError
        The versions were not scored on the same cases and structures, or a score is no number from 0 to 1.
    """
    scores = _without(failures, candidate)
    others = {name: _without(failures, baseline) for name, baseline in baselines.items()}
    _refuse_unusable(scores, "the candidate")
    comparisons = tuple(compare(scores, other, name, policy) for name, other in others.items() if scores or other)
    level = _level(scores, policy) if scores and not baselines else None
    violations = [f"cannot predict {case}: {_clause(error)}" for case, error in failures.items()]
    violations += [reason for comparison in comparisons for reason in _violations(comparison, policy)]
    looks = [f"look at the label of {case}: {doubt}" for case, odd in doubts.items() for doubt in odd]
    if len(doubts) > max(FEW_LABELS, policy.doubtful_labels * new_labels):
        violations += [_doubtful(len(doubts), new_labels, policy), *looks]
    if violations:
        return Verdict("refused", tuple(violations), comparisons, policy)
    findings = [_gain(comparison) for comparison in comparisons] + ([_reached(level, scores)] if level else [])
    if open_questions := [*looks, *_doubts(scores, level, policy)]:
        return Verdict("needs a person", (*open_questions, *findings), comparisons, policy)
    return Verdict("promoted", tuple(findings), comparisons, policy)


def compare(candidate: Sequence[CaseScore], baseline: Sequence[CaseScore], name: str, policy: GatePolicy) -> Comparison:
    """Compare a candidate with the version `name`, both scored on the same cases in any order.

    Raises
    ------
    TrainingError
        As `judge`; also without any case.
    """
    before = {score.case_id: score for score in baseline}
    _refuse_unusable(candidate, "the candidate")
    _refuse_unusable(baseline, name)
    _refuse_differences(candidate, before, name)
    names = list(dict.fromkeys(structure for score in candidate for structure in score.dice))
    changes = np.array([_changes(score, before[score.case_id], names) for score in candidate])
    per_case = np.round(np.nanmean(changes, axis=1), DECIMALS)
    patients = [score.patient for score in candidate]
    overall, *structures = _means(np.column_stack([per_case, changes]), patients, policy)
    lost = {score.case_id: _lost(score, before[score.case_id]) for score in candidate}
    return Comparison(
        baseline=name,
        cases=len(candidate),
        patients=len(set(patients)),
        overall=overall,
        structures=dict(zip(names, structures, strict=True)),
        per_case={score.case_id: float(change) for score, change in zip(candidate, per_case, strict=True)},
        lost={case: missed for case, missed in lost.items() if missed},
    )


# -- numbers ----------------------------------------------------------------------------------------------------------


def _means(values: npt.NDArray[np.float64], patients: Sequence[str], policy: GatePolicy) -> list[Change]:
    """Return the mean of every column with its percentile interval from a cluster bootstrap.

    Patients are drawn with replacement, each with all its cases (Davison and Hinkley, Bootstrap Methods and their
    Application, 1997, section 3.8, strategy 1).

    Parameters
    ----------
    values : ndarray, shape (cases, columns)
        NaN where a case says nothing. A draw of patients who all say nothing of a column does not count for it.
    patients : sequence of str
        Whose case each row is.
    policy : GatePolicy

    Returns
    -------
    list of Change
        One per column.
    """
    known = ~np.isnan(values)
    names = np.array(sorted(set(patients)))  # sorted: the order of the cases must not matter
    membership = (names[:, None] == np.array(patients)).astype(np.float64)
    sums, counts = membership @ np.where(known, values, 0.0), membership @ known
    generator = np.random.default_rng(policy.seed)
    draws = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=policy.resamples)
    with np.errstate(invalid="ignore"):
        means = (draws @ sums) / (draws @ counts)
    tail = (1 - policy.confidence) / 2
    low, high = np.nanquantile(means, [tail, 1 - tail], axis=0)
    rows = np.round([sums.sum(axis=0) / counts.sum(axis=0), low, high], DECIMALS).T
    return [Change(*(float(number) for number in row)) for row in rows]


def _level(scores: Sequence[CaseScore], policy: GatePolicy) -> Change:
    """Return the mean Dice itself with its interval."""
    return _means(np.array([[score.mean] for score in scores]), [score.patient for score in scores], policy)[0]


def _changes(after: CaseScore, before: CaseScore, names: Sequence[str]) -> list[float]:
    """Return the Dice change of each structure in one case, NaN where it was not reviewed."""
    return [
        round(after.dice[name] - before.dice[name], DECIMALS) if name in after.dice else float("nan") for name in names
    ]


def _lost(after: CaseScore, before: CaseScore) -> tuple[str, ...]:
    return tuple(name for name in after.missed if name not in before.missed)


def _without(failures: Mapping[str, str], scores: Sequence[CaseScore]) -> list[CaseScore]:
    return [score for score in scores if score.case_id not in failures]


# -- reasons ----------------------------------------------------------------------------------------------------------


def _violations(found: Comparison, policy: GatePolicy) -> Iterator[str]:
    """Yield a clause for every limit that a comparison violates."""
    name = found.baseline
    if found.patients >= MIN_PATIENTS and found.overall.low <= policy.mean_lower_bound:
        yield (
            f"the mean Dice change against {name} has a lower {_percent(policy)} bound of {found.overall.low:+.4f}, "
            f"which must be above {policy.mean_lower_bound:+g}: a loss cannot be ruled out"
        )
    for structure, change in found.structures.items():
        if change.mean < policy.worst_structure:
            yield (
                f"the mean Dice of {structure} changes by {change.mean:+.4f} against {name}, which must not be below "
                f"{policy.worst_structure:+g}: this structure got worse"
            )
    for case, moved in found.per_case.items():
        if moved < policy.worst_case:
            yield (
                f"the mean Dice of {case} changes by {moved:+.4f} against {name}, which must not be below "
                f"{policy.worst_case:+g}: this case got much worse"
            )
    for case, structures in found.lost.items():
        yield from (f"predicts no {structure} at all in {case}, where {name} does" for structure in structures)


def _doubtful(doubtful: int, new_labels: int, policy: GatePolicy) -> str:
    return (
        f"{doubtful} of {_count(new_labels, 'new label')} look wrong, at most {100 * policy.doubtful_labels:g} % may: "
        "correct them and train again"
    )


def _doubts(scores: Sequence[CaseScore], level: Change | None, policy: GatePolicy) -> Iterator[str]:
    """Yield why a candidate that violates no limit is not promoted without a person; `level` of a first version."""
    patients = len({score.patient for score in scores})
    if len(scores) < policy.min_cases or patients < MIN_PATIENTS:
        yield (
            f"judged by {_count(len(scores), 'hold-out case')} of {_count(patients, 'patient')}, and at least "
            f"{_count(policy.min_cases, 'case')} of {MIN_PATIENTS} patients are needed: {_PROMOTE}"
        )
    elif level and level.low < policy.first_mean_dice:
        yield (
            f"the mean Dice of a first version must have a lower {_percent(policy)} bound of at least "
            f"{policy.first_mean_dice:g}, found {level.low:.4f}: {_PROMOTE}"
        )
    elif not policy.automatic:
        yield f"passed, and the policy leaves every promotion to a person (automatic = false): {_PROMOTE}"


def _gain(found: Comparison) -> str:
    interval = f" [{found.overall.low:+.3f}, {found.overall.high:+.3f}]" if found.patients >= MIN_PATIENTS else ""
    numbers = f"{_count(found.cases, 'case')} of {_count(found.patients, 'patient')}"
    return f"mean Dice {found.overall.mean:+.3f}{interval} against {found.baseline} on {numbers}"


def _reached(level: Change, scores: Sequence[CaseScore]) -> str:
    patients = len({score.patient for score in scores})
    interval = f" [{level.low:.3f}, {level.high:.3f}]" if patients >= MIN_PATIENTS else ""
    return f"mean Dice {level.mean:.3f}{interval} on {_count(len(scores), 'case')} of {_count(patients, 'patient')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _clause(sentence: str) -> str:
    return " ".join(sentence.split()).rstrip(".")


def _percent(policy: GatePolicy) -> str:
    return f"{100 * policy.confidence:g} %"


# -- checks -----------------------------------------------------------------------------------------------------------


def _refuse_unknown(content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise ConfigError(f"found the unknown key {key!r}.{did_you_mean(key, known)} Known: {', '.join(known)}.")


def _refuse_impossible(key: str, value: object, kind: type) -> None:
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{key} is {value!r}; expected true or false.")
        return
    low, high = _RANGES[key]
    right_kind = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not (right_kind and low <= value <= high):  # type: ignore[operator]
        noun = "whole number" if kind is int else "number"
        raise ConfigError(f"{key} is {value!r}; expected a {noun} from {low:.10g} to {high:.10g}.")


def _refuse_unusable(scores: Sequence[CaseScore], whose: str) -> None:
    """Refuse repeated cases, cases without a structure, and what is no Dice coefficient."""
    cases = [score.case_id for score in scores]
    if repeated := sorted({case for case in cases if cases.count(case) > 1}):
        raise TrainingError(f"{whose} has several scores of {', '.join(repeated)}. Expected one per case: score again.")
    for score in scores:
        wrong = [f"{name} {value}" for name, value in score.dice.items() if not 0 <= value <= 1]
        if wrong or not score.dice:
            raise TrainingError(
                f"{whose} has no usable score of {score.case_id}. Found: {', '.join(wrong) or 'no structure'}. "
                "Expected: a Dice coefficient from 0 to 1 for every reviewed structure. How to fix: score it again, or "
                "leave a case without a reviewed structure out of the hold-out."
            )


def _refuse_differences(candidate: Sequence[CaseScore], before: Mapping[str, CaseScore], name: str) -> None:
    """Refuse scores that are not of the same cases, patients and structures, or of none."""
    cases = {score.case_id for score in candidate}
    parts = [("cases only of the candidate", cases - before.keys()), (f"cases only of {name}", before.keys() - cases)]
    found = [f"{what}: {', '.join(sorted(some))}" for what, some in parts if some]
    for score in candidate:
        other = before.get(score.case_id, score)
        if score.dice.keys() != other.dice.keys():
            found.append(f"structures of {score.case_id}: {_names(score)} and {_names(other)}")
        if score.patient != other.patient:
            found.append(f"patients of {score.case_id}: {score.patient} and {other.patient}")
    if found or not candidate:
        raise TrainingError(
            f"The candidate and {name} cannot be compared. Found: {'; '.join(found) or 'no case'}. Expected: scores of "
            "the same cases, patients and structures. How to fix: score both versions on the same hold-out."
        )


def _names(score: CaseScore) -> str:
    return ", ".join(sorted(score.dice)) or "none"
