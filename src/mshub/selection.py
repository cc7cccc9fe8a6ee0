"""Which case to label next: strategies over what is known of the cases, free of servers, files and networks.

Each strategy puts the waiting cases in an order and says why. All of them work when nothing is known of some cases or
of any, and offer the cases of patients nobody has looked at first. What each of them is worth is measured in
docs/active-learning.md.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import numpy as np

from mshub.geometry import Array
from mshub.uncertainty import Uncertainty

USUAL, ENOUGH_TO_TELL = 0.9, 5
"""A structure found in this share of at least so many predictions is missed where it is not found."""
STRATIFIED = 2 / 3
"""Share of the class-stratified choices that are for one structure; the others are for all of them together."""
SHARPNESS, SHARP_AFTER = (1.0, 100.0), 50
"""How closely a class-stratified choice follows the scores: from the first label on, and after so many."""
DOUBTED_SHARE, DOUBTED_AT_LEAST = 1 / 3, 5
"""`hybrid` looks for variety among this share of the cases, the least sure ones."""


@dataclass(frozen=True)
class Case:
    """What a strategy knows of a case.

    Attributes
    ----------
    image : str
    patient : str
    uncertainty : Uncertainty or None
        Of the prediction of the version that serves, if it is known.
    expected_dice : tuple of (float, float, float) or None
        Calibrated predicted Dice, lower and upper bound, if enough cases were reviewed.
    label_dice : dict of str to float
        Of a labelled case: structure -> Dice of its label with what the version that serves sees.
    """

    image: str
    patient: str
    uncertainty: Uncertainty | None = None
    expected_dice: tuple[float, float, float] | None = None
    label_dice: dict[str, float] | None = None


@dataclass(frozen=True)
class Pool:
    """The cases of a model.

    Attributes
    ----------
    waiting : tuple of Case
        Without a label, with nobody at work on them, in the order of the list.
    taken : tuple of Case
        Labelled, or being labelled.
    """

    waiting: tuple[Case, ...]
    taken: tuple[Case, ...] = ()

    @cached_property
    def usual(self) -> frozenset[str]:
        """Structures that the model finds in nearly every case."""
        known = [case.uncertainty for case in (*self.waiting, *self.taken) if case.uncertainty]
        if len(known) < ENOUGH_TO_TELL:
            return frozenset()
        found = Counter(name for one in known for name in one.structures if name not in one.empty)
        return frozenset(name for name, count in found.items() if count >= USUAL * len(known))


@dataclass(frozen=True)
class Choice:
    """A case, and why it is the one."""

    image: str
    why: str
    score: float | None = None


Ranking = Callable[[Pool, Sequence[Case], random.Random], Iterator[Choice]]
"""Yields the cases of a part of the pool, the best first."""


@dataclass(frozen=True)
class Strategy:
    """A way to choose.

    Attributes
    ----------
    name, description : str
    ranking : callable
    of_labelled : bool
        It chooses among the labelled cases, not the waiting ones.
    is_random : bool
        Its choices say nothing about the cases, so that they may judge versions.
    """

    name: str
    description: str
    ranking: Ranking
    of_labelled: bool = False
    is_random: bool = False

    def ranked(self, pool: Pool, rng: random.Random) -> Iterator[Choice]:
        """Yield all cases, those of patients with the fewest cases taken first."""
        cases = pool.taken if self.of_labelled else pool.waiting
        taken = Counter(case.patient for case in pool.taken)
        for part in _spread(cases, Counter() if self.of_labelled else taken):
            yield from self.ranking(pool, part, rng)


def doubt(case: Case, usual: frozenset[str]) -> float | None:
    """Return 1 minus the mean agreement over the structures: 0 (sure) to 1; None where nothing is known.

    A structure that is usually found and is not counts as no agreement.
    """
    if case.uncertainty is None:
        return None
    values = list(_agreements(case.uncertainty, usual).values())
    return 1 - float(np.mean(values)) if values else 1.0


def worst_structure(case: Case, usual: frozenset[str]) -> tuple[str, float] | None:
    """Return the structure the model is least sure of, and its agreement; None where nothing is known or found."""
    if case.uncertainty is None:
        return None
    values = _agreements(case.uncertainty, usual)
    return min(values.items(), key=lambda item: item[1]) if values else None


def _agreements(uncertainty: Uncertainty, usual: frozenset[str]) -> dict[str, float]:
    known = {name: found.agreement for name, found in uncertainty.structures.items()}
    missed = {name: 0.0 for name in uncertainty.empty if name in usual}
    return {**{name: value for name, value in known.items() if value is not None}, **missed}


# -- the strategies ---------------------------------------------------------------------------------------------------


def _random(pool: Pool, cases: Sequence[Case], rng: random.Random) -> Iterator[Choice]:
    for case in rng.sample(cases, len(cases)):
        yield Choice(case.image, f"drawn at random from {_count(cases)}")


def _first(pool: Pool, cases: Sequence[Case], rng: random.Random) -> Iterator[Choice]:
    for case in cases:
        yield Choice(case.image, f"the first of {_count(cases)} in the list")


def _uncertainty(pool: Pool, cases: Sequence[Case], rng: random.Random) -> Iterator[Choice]:
    def why(case: Case) -> str:
        return f"the model is least sure of it: {_of_agreement(case, pool.usual)}"

    yield from _highest_first(cases, lambda case: doubt(case, pool.usual), why, rng)


def _class_stratified(pool: Pool, cases: Sequence[Case], rng: random.Random) -> Iterator[Choice]:
    """After ClaSP PE (arXiv 2601.13677): most choices are for one structure, each in turn, with noise that fades."""
    left, unknown = _split(cases)
    names = _structures(left)
    sharpness = _sharpness(len(pool.taken))
    doubts = {name: {case.image: _doubt_of(case, name, pool.usual) for case in left} for name in (None, *names)}
    while left:
        name = rng.choice(names) if names and rng.random() < STRATIFIED else None
        case = max(left, key=lambda case: math.log(max(doubts[name][case.image], 1e-6)) + _gumbel(rng) / sharpness)
        left.remove(case)
        best = doubts[name][case.image]
        what = f"for {name}" if name else "for all structures together"
        yield Choice(case.image, f"{what}, where the model is unsure: {_of_structure(case, name, pool.usual)}", best)
    yield from _unknown(unknown, rng)


def _diversity(pool: Pool, cases: Sequence[Case], rng: random.Random) -> Iterator[Choice]:
    """Farthest first (greedy k-centre): always the case least like those that were labelled or chosen before."""
    known, unknown = _split(cases)
    known, without = _with_embedding(known)
    yield from _farthest_first(pool, known, "")
    yield from _unknown([*without, *unknown], rng)


def _hybrid(pool: Pool, cases: Sequence[Case], rng: random.Random) -> Iterator[Choice]:
    """Variety among the cases the model is least sure of."""
    known, unknown = _by_score(cases, lambda case: doubt(case, pool.usual))
    order = [case for _, case in sorted(known, key=lambda item: -item[0])]
    while order:
        size = max(DOUBTED_AT_LEAST, math.ceil(len(order) * DOUBTED_SHARE))
        doubted, order = order[:size], order[size:]
        various, without = _with_embedding(doubted)
        yield from _farthest_first(pool, various, "the model is unsure of it, and it is ")
        for case in without:
            yield Choice(case.image, f"the model is unsure of it: {_of_agreement(case, pool.usual)}")
    yield from _unknown(unknown, rng)


def _worst_first(pool: Pool, cases: Sequence[Case], rng: random.Random) -> Iterator[Choice]:
    """The most likely failures: by the structure that is worst, whatever the others look like."""

    def why(case: Case) -> str:
        return f"the most likely failure: {_of_failure(case, pool.usual)}"

    yield from _highest_first(cases, lambda case: _failure(case, pool.usual), why, rng)


def _relabel(pool: Pool, cases: Sequence[Case], rng: random.Random) -> Iterator[Choice]:
    """Labelled cases in which the model is sure of something else than the label says."""
    suspected = [(*suspicion(case), case) for case in cases if case.label_dice and case.uncertainty]
    for score, name, case in sorted(suspected, key=lambda item: -item[0]):
        agreed = case.label_dice[name] if case.label_dice else 0.0
        why = f"its label looks wrong: {name} agrees with what the model sees to {agreed:.2f} (Dice)"
        sure = case.uncertainty.structures[name].agreement if case.uncertainty else None
        yield Choice(case.image, why + (f", though the model is sure ({sure:.2f})" if sure else ""), score)


def suspicion(case: Case) -> tuple[float, str]:
    """Return how much a label looks wrong, and in which structure: the model's sureness of another one, -1 to 1.

    A structure that neither the label nor the model has is not suspicious.
    """
    structures = case.uncertainty.structures if case.uncertainty else {}
    found = [
        ((structures[name].agreement or 0.0) - dice, name)
        for name, dice in (case.label_dice or {}).items()
        if name in structures
    ]
    return max(found, default=(-1.0, ""))


DEFAULT = "class_stratified"
"""The one that the table in docs/active-learning.md speaks for."""
STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy(DEFAULT, "Cases the model is unsure of, each structure in its turn", _class_stratified),
        Strategy("random", "A random case that has no label yet", _random, is_random=True),
        Strategy("first", "The first case of the list that has no label yet", _first),
        Strategy("uncertainty", "The case the model is least sure of", _uncertainty),
        Strategy("diversity", "The case least like those labelled so far", _diversity),
        Strategy("hybrid", "Variety among the cases the model is unsure of", _hybrid),
        Strategy("worst_first", "The case the model most probably fails on", _worst_first),
        Strategy("relabel", "A labelled case whose label looks wrong", _relabel, of_labelled=True),
    )
}


# -- private ----------------------------------------------------------------------------------------------------------


def _spread(cases: Sequence[Case], taken: Counter[str]) -> list[list[Case]]:
    """Return the cases in parts: those of patients with the fewest cases taken, then with one more..."""
    parts: dict[int, list[Case]] = {}
    for case in cases:
        parts.setdefault(taken[case.patient], []).append(case)
    return [parts[count] for count in sorted(parts)]


def _split(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    return [case for case in cases if case.uncertainty], [case for case in cases if not case.uncertainty]


def _by_score(
    cases: Sequence[Case], score: Callable[[Case], float | None]
) -> tuple[list[tuple[float, Case]], list[Case]]:
    """Return the cases with their scores, and those without one."""
    scored = [(score(case), case) for case in cases]
    return [(value, case) for value, case in scored if value is not None], [
        case for value, case in scored if value is None
    ]


def _highest_first(
    cases: Sequence[Case], score: Callable[[Case], float | None], why: Callable[[Case], str], rng: random.Random
) -> Iterator[Choice]:
    known, unknown = _by_score(cases, score)
    for value, case in sorted(known, key=lambda item: -item[0]):
        yield Choice(case.image, why(case), value)
    yield from _unknown(unknown, rng)


def _unknown(cases: Sequence[Case], rng: random.Random) -> Iterator[Choice]:
    for case in rng.sample(cases, len(cases)):
        yield Choice(case.image, f"drawn at random from {_count(cases)} the model has not looked at yet")


def _with_embedding(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    return [case for case in cases if _length(case)], [case for case in cases if not _length(case)]


def _farthest_first(pool: Pool, cases: Sequence[Case], words: str) -> Iterator[Choice]:
    if not cases:
        return
    taken = [case for case in _with_embedding(pool.taken)[0] if _length(case) == _length(cases[0])]
    everything = _standardised([*cases, *taken])
    own, others = everything[: len(cases)], everything[len(cases) :]
    left = list(range(len(cases)))
    distance = _nearest(own, others) if len(others) else None
    while left:
        if distance is None:  # nothing to be unlike: the most typical case
            chosen = min(left, key=lambda index: float(np.sum(own[index] ** 2)))
            why, score = f"{words}the most typical of {_count(cases)}", None
        else:
            chosen = max(left, key=distance.__getitem__)
            typical = median(distance[left]) or 1.0
            score = float(distance[chosen])
            why = f"{words}least like the cases labelled so far ({score / typical:.1f} times the usual distance)"
        left.remove(chosen)
        reached = _nearest(own, own[chosen : chosen + 1])
        distance = reached if distance is None else np.minimum(distance, reached)
        yield Choice(cases[chosen].image, why, score)


def _length(case: Case) -> int:
    return len(case.uncertainty.embedding) if case.uncertainty else 0


def _standardised(cases: Sequence[Case]) -> Array:
    """Return the embeddings, one row per case, every feature with mean 0 and spread 1 over the cases."""
    rows = np.array([case.uncertainty.embedding for case in cases if case.uncertainty], dtype=np.float64)
    spread = rows.std(axis=0)
    standardised: Array = (rows - rows.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return standardised


def _nearest(rows: Array, others: Array) -> Array:
    """Return each row's distance from the nearest of the others."""
    nearest: Array = np.full(len(rows), np.inf)
    for other in others:
        nearest = np.minimum(nearest, np.linalg.norm(rows - other, axis=1))
    return nearest


def _structures(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(name for case in cases if case.uncertainty for name in case.uncertainty.structures))


def _doubt_of(case: Case, name: str | None, usual: frozenset[str]) -> float:
    """Return the doubt about one structure, or about all; nothing to learn about a structure that is just absent."""
    if name is None:
        return doubt(case, usual) or 0.0
    agreements = _agreements(case.uncertainty, usual) if case.uncertainty else {}
    return 1 - agreements.get(name, 1.0)


def _sharpness(labelled: int) -> float:
    low, high = SHARPNESS
    return float(low * (high / low) ** min(1.0, labelled / SHARP_AFTER))


def _gumbel(rng: random.Random) -> float:
    return -math.log(-math.log(min(max(rng.random(), 1e-12), 1 - 1e-12)))


def _failure(case: Case, usual: frozenset[str]) -> float | None:
    if case.uncertainty is None:
        return None
    worst = worst_structure(case, usual)
    return 1 - worst[1] if worst else 1.0


def _of_agreement(case: Case, usual: frozenset[str]) -> str:
    found, score = case.uncertainty, doubt(case, usual)
    if found is None or score is None:
        return "nothing is known of it"
    missed = [name for name in found.empty if name in usual]
    if len(found.empty) == len(found.structures):
        return "it found nothing"
    return f"{_measure(found)} {1 - score:.2f} (Dice)" + (f", {', '.join(missed)} not found" if missed else "")


def _of_structure(case: Case, name: str | None, usual: frozenset[str]) -> str:
    if name is None or case.uncertainty is None:
        return _of_agreement(case, usual)
    if name in case.uncertainty.empty:
        return f"it did not find {name}" if name in usual else _of_agreement(case, usual)
    return f"{_measure(case.uncertainty)} {case.uncertainty.structures[name].agreement or 0:.2f} (Dice)"


def _of_failure(case: Case, usual: frozenset[str]) -> str:
    worst = worst_structure(case, usual)
    expected = f"; expected Dice {_interval(case.expected_dice)}" if case.expected_dice else ""
    if worst is None or case.uncertainty is None:
        return "it found nothing" + expected
    name, agreement = worst
    if name in case.uncertainty.empty:
        return f"it did not find {name}" + expected
    return f"for {name}, {_measure(case.uncertainty)} {agreement:.2f} (Dice)" + expected


def _measure(found: Uncertainty) -> str:
    voters = [
        *(["folds"] if found.fold_dice is not None else []),
        *(["mirrored copies"] if found.mirror_dice is not None else []),
    ]
    return f"{' and '.join(voters)} agree to" if voters else "its own probabilities expect"


def _interval(expected: tuple[float, float, float]) -> str:
    return f"{expected[0]:.2f} ({expected[1]:.2f} to {expected[2]:.2f})"


def _count(cases: Sequence[Case]) -> str:
    return f"{len(cases)} case{'s' if len(cases) != 1 else ''}"
