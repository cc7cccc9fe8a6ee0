"""Strategies: the order they put cases in, and what they say of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from mshub.selection import STRATEGIES, Case, Choice, Pool, doubt, suspicion, worst_structure
from mshub.uncertainty import StructureUncertainty, Uncertainty

NOTHING_USUAL: frozenset[str] = frozenset()
OF_WAITING = [name for name, strategy in STRATEGIES.items() if not strategy.of_labelled]


def structure(agreement: float | None) -> StructureUncertainty:
    """Return what is measured of a structure; None: it was not found."""
    return StructureUncertainty(0.0) if agreement is None else StructureUncertainty(7.0, mirror_dice=agreement)


def case(name: str, *agreements: float | None, patient: str = "", embedding: Sequence[float] = ()) -> Case:
    known = {f"organ{number}": structure(value) for number, value in enumerate(agreements)}
    return Case(name, patient or name, Uncertainty(known, embedding=tuple(embedding)) if known else None)


def order(strategy: str, waiting: Sequence[Case], taken: Sequence[Case] = (), seed: int = 0) -> list[str]:
    return [choice.image for choice in ranked(strategy, waiting, taken, seed)]


def ranked(strategy: str, waiting: Sequence[Case], taken: Sequence[Case] = (), seed: int = 0) -> list[Choice]:
    return list(STRATEGIES[strategy].ranked(Pool(tuple(waiting), tuple(taken)), random.Random(seed)))


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", OF_WAITING)
@pytest.mark.parametrize("seed", range(3))
def test_every_case_is_offered_once_whatever_is_known_of_it(strategy: str, seed: int) -> None:
    draw = random.Random(seed)
    known = [case(f"k{n}", draw.random(), draw.random(), embedding=(draw.random(), n)) for n in range(9)]
    odd = [case("nothing found", None, None), case("no embedding", 0.5, 0.4), case("other length", 0.5, 0.4,
           embedding=(1.0, 2.0, 3.0))]  # fmt: skip
    unknown = [case(f"u{n}") for n in range(4)]
    taken = [case("t0"), case("t1", 0.9, 0.8, embedding=(0.1, 0.2)), case("t2", 0.9, None)]
    for waiting in ([], unknown, known, [*known, *unknown], [*known, *odd[:2], *unknown], odd[:2]):
        offered = ranked(strategy, waiting, taken, seed)
        assert Counter(choice.image for choice in offered) == Counter(one.image for one in waiting)
        assert all(choice.why for choice in offered)


@pytest.mark.parametrize("strategy", [name for name in OF_WAITING if name not in ("random", "first")])
def test_what_is_known_comes_before_what_is_not(strategy: str) -> None:
    waiting = [case("u0"), case("k0", 0.9, embedding=(1.0,)), case("u1"), case("k1", 0.2, embedding=(2.0,))]
    assert set(order(strategy, waiting)[:2]) == {"k0", "k1"}


@pytest.mark.parametrize("strategy", OF_WAITING)
def test_patients_with_fewer_cases_taken_come_first(strategy: str) -> None:
    waiting = [case("p1", 0.1, patient="p", embedding=(9.0,)), case("q1", 0.9, patient="q", embedding=(1.0,)),
               case("r1", 0.8, patient="r", embedding=(1.1,))]  # fmt: skip
    taken = [case("p0", 0.1, patient="p"), case("p00", patient="p"), case("r0", patient="r")]
    assert order(strategy, waiting, taken) == ["q1", "r1", "p1"]


# -- what they look at ------------------------------------------------------------------------------------------------


def test_doubt_is_what_is_missing_to_full_agreement() -> None:
    assert doubt(case("a", 0.9, 0.7), NOTHING_USUAL) == pytest.approx(0.2)
    assert doubt(case("a"), NOTHING_USUAL) is None
    assert doubt(case("a", None, None), NOTHING_USUAL) == 1.0


def test_folds_and_mirrored_copies_count_alike_and_probabilities_only_without_them() -> None:
    every = StructureUncertainty(5.0, mirror_dice=0.7, fold_dice=0.6, soft_dice=0.95)
    assert every.agreement == pytest.approx(0.65)
    assert StructureUncertainty(5.0, mirror_dice=0.7, soft_dice=0.95).agreement == 0.7
    assert StructureUncertainty(5.0, soft_dice=0.95).agreement == 0.95
    assert StructureUncertainty(0.0).agreement is None


def test_a_structure_that_is_always_found_is_missed_where_it_is_not() -> None:
    usual = [case(f"c{n}", 0.9, 0.9) for n in range(20)]
    odd = case("odd", 0.9, None)
    assert Pool(tuple(usual[:3])).usual == frozenset(), "too few to tell"
    assert Pool((*usual, odd)).usual == {"organ0", "organ1"}
    assert doubt(odd, Pool((*usual, odd)).usual) == pytest.approx(0.55)
    assert order("uncertainty", [*usual, odd])[0] == "odd"
    assert "organ1 not found" in ranked("uncertainty", [*usual, odd])[0].why


def test_a_structure_that_is_often_absent_is_not_missed() -> None:
    pool = Pool(tuple(case(f"c{n}", 0.9, 0.5 if n % 2 else None) for n in range(20)))
    assert pool.usual == {"organ0"}
    assert order("uncertainty", pool.waiting)[0] != "c0"


def test_uncertainty_goes_by_all_structures_and_worst_first_by_the_worst() -> None:
    waiting = [case("all middling", 0.6, 0.6, 0.6), case("one failed", 0.95, 0.9, 0.2), case("fine", 0.9, 0.9, 0.9)]
    assert order("uncertainty", waiting) == ["all middling", "one failed", "fine"]
    assert order("worst_first", waiting) == ["one failed", "all middling", "fine"]
    assert worst_structure(waiting[1], NOTHING_USUAL) == ("organ2", 0.2)
    assert "organ2" in ranked("worst_first", waiting)[0].why


def test_the_expected_dice_is_told_where_it_is_known() -> None:
    known = case("a", 0.5)
    waiting = [Case("a", "a", known.uncertainty, expected_dice=(0.61, 0.42, 0.8))]
    assert "expected Dice 0.61 (0.42 to 0.80)" in ranked("worst_first", waiting)[0].why


def test_each_structure_gets_its_turn() -> None:
    """organ0 is doubtful everywhere and would be all that uncertainty looks at."""
    waiting = [case(f"a{n}", 0.1, 0.95, 0.95) for n in range(30)]
    waiting += [case(f"b{n}", 0.9, 0.2, 0.95) for n in range(5)] + [case(f"c{n}", 0.9, 0.95, 0.3) for n in range(5)]
    taken = [case(f"t{n}", patient=f"t{n}") for n in range(60)]  # so many that the choice is sharp
    first = Counter(order("class_stratified", waiting, taken, seed)[0][0] for seed in range(200))
    assert first["b"] > 25
    assert first["c"] > 25
    assert order("uncertainty", waiting)[0][0] == "a"


def test_choices_follow_the_scores_more_closely_the_more_is_labelled() -> None:
    waiting = [case("worst", 0.2), *(case(f"c{n}", 0.5 + n / 40) for n in range(12))]
    few, many = [], [case(f"t{n}", patient=f"t{n}") for n in range(60)]
    hits = [
        sum(order("class_stratified", waiting, taken, seed)[0] == "worst" for seed in range(100))
        for taken in (few, many)
    ]
    assert hits[0] < 60
    assert hits[1] > 90


def test_diversity_begins_with_the_typical_and_goes_on_with_the_farthest() -> None:
    waiting = [case("middle", 0.5, embedding=(0.1, 0.0)), case("left", 0.5, embedding=(-5.0, 0.2)),
               case("right", 0.5, embedding=(6.0, 0.1)), case("near right", 0.5, embedding=(5.8, 0.0))]  # fmt: skip
    found = order("diversity", waiting)
    assert found[0] in ("middle", "near right")
    assert found[-1] in ("near right", "right")
    assert set(found[:3]) >= {"left"}


def test_diversity_keeps_away_from_what_is_labelled() -> None:
    waiting = [case("like it", 0.5, embedding=(1.0, 1.0)), case("unlike it", 0.5, embedding=(9.0, -3.0))]
    taken = [case("t", 0.5, embedding=(1.1, 0.9))]
    found = ranked("diversity", waiting, taken)
    assert [choice.image for choice in found] == ["unlike it", "like it"]
    assert "least like the cases labelled so far" in found[0].why


def test_no_feature_counts_more_for_being_large() -> None:
    waiting = [case("a", 0.5, embedding=(0.0, 1000.0)), case("b", 0.5, embedding=(1.0, 1010.0))]
    taken = [case("t0", 0.5, embedding=(0.0, 1020.0)), case("t1", 0.5, embedding=(0.0, 1011.0))]
    assert order("diversity", waiting, taken)[0] == "b", "far in the small feature"


def test_hybrid_takes_variety_among_the_doubtful_only() -> None:
    sure = [case(f"sure{n}", 0.95, embedding=(float(n), 50.0)) for n in range(14)]
    doubtful = [case(f"d{n}", 0.2 + n / 100, embedding=(float(n), 0.0)) for n in range(10)]
    found = order("hybrid", [*sure, *doubtful], [case("t", 0.9, embedding=(0.0, 0.0))])
    assert found[0] == "d7"
    assert {name[0] for name in found[:8]} == {"d"}, "a third of 24 cases"


# -- labels that look wrong -------------------------------------------------------------------------------------------


def labelled(name: str, agreements: Sequence[float], dice: Sequence[float]) -> Case:
    known = case(name, *agreements)
    return Case(name, name, known.uncertainty, label_dice={f"organ{n}": value for n, value in enumerate(dice)})


def test_a_label_is_doubted_where_the_model_is_sure_of_something_else() -> None:
    right = labelled("right", (0.95, 0.9), (0.94, 0.9))
    hard = labelled("hard", (0.4, 0.9), (0.35, 0.9))  # the model does not know either
    wrong = labelled("wrong", (0.95, 0.9), (0.93, 0.2))
    found = ranked("relabel", [], [right, hard, wrong, case("not looked at")])
    assert found[0].image == "wrong"
    assert "organ1 agrees with what the model sees to 0.20" in found[0].why
    assert len(found) == 3
    assert suspicion(wrong) == (pytest.approx(0.7), "organ1")


def test_a_structure_absent_from_label_and_prediction_is_not_suspicious() -> None:
    absent = Case("a", "a", Uncertainty({"organ0": structure(None)}), label_dice={"organ0": 1.0})
    assert suspicion(absent)[0] <= 0
