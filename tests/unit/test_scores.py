"""Scores: Dice by its definition, structure by structure, whatever the numbers in the two label maps."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest

from mshub.scores import CaseScore, dice, dice_by_structure, mean_dice, score_case

SHAPE = (7, 5, 11)
NAMES = ("liver", "spleen", "kidney")


def random_labels(seed: int, values: tuple[int, ...] = (0, 1, 2, 3)) -> np.ndarray:
    """Return a label map of unequal dimensions in which each value occurs."""
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), SHAPE)


def plain_dice(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Dice coefficient of two masks by counting voxel after voxel."""
    both = sizes = 0
    for index in product(*map(range, one.shape)):
        both += bool(one[index]) and bool(other[index])
        sizes += bool(one[index]) + bool(other[index])
    return 1.0 if sizes == 0 else 2 * both / sizes


def boxes(**corners: tuple[slice, ...]) -> np.ndarray:
    """Return a label map in which box after box gets 1, 2..."""
    labels = np.zeros(SHAPE, np.uint8)
    for value, box in enumerate(corners.values(), start=1):
        labels[box] = value
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_dice_is_that_of_the_definition(seed: int) -> None:
    one, other = random_labels(seed) == 1, random_labels(seed + 100) > 1
    assert dice(one, other) == pytest.approx(plain_dice(one, other), abs=1e-12)
    assert dice(one, other) == dice(other, one)


def test_dice_does_not_overflow_on_large_masks() -> None:
    one = np.ones((128, 256, 3), bool)
    other = one.copy()
    other[64:] = False
    assert dice(one, other) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("one", "other", "expected"), [(0, 0, 1.0), (1, 1, 1.0), (0, 1, 0.0), (1, 0, 0.0)], ids=["00", "11", "01", "10"]
)
def test_dice_of_empty_and_full_masks(one: int, other: int, expected: float) -> None:
    assert dice(np.full(SHAPE, bool(one)), np.full(SHAPE, bool(other))) == expected


def test_every_structure_is_scored_by_its_name_though_the_two_number_them_differently() -> None:
    predicted_values = {"liver": 1, "spleen": 2, "kidney": 3}
    reviewed_values = {"kidney": 9, "liver": 4, "spleen": 1}
    predicted, reviewed = random_labels(1), random_labels(2, (0, 1, 4, 9))
    score = score_case("c1", "p1", predicted, predicted_values, reviewed, reviewed_values, NAMES)
    assert list(score.dice) == list(NAMES)
    for name in NAMES:
        expected = plain_dice(predicted == predicted_values[name], reviewed == reviewed_values[name])
        assert 0 < expected < 1
        assert score.dice[name] == pytest.approx(expected, abs=1e-12)
    assert (score.case_id, score.patient, score.missed) == ("c1", "p1", ())
    assert score.mean == pytest.approx(sum(score.dice.values()) / 3)


def test_the_same_label_numbered_differently_scores_1() -> None:
    predicted = random_labels(3)
    reviewed = np.array([0, 40, 2, 300], np.uint16)[predicted]
    values = {"liver": 40, "spleen": 2, "kidney": 300}
    score = score_case("c", "p", predicted, {"liver": 1, "spleen": 2, "kidney": 3}, reviewed, values, NAMES)
    assert score.dice == {"liver": 1.0, "spleen": 1.0, "kidney": 1.0}


def test_only_the_structures_asked_for_are_scored_and_in_their_order() -> None:
    values = {"liver": 1, "spleen": 2, "kidney": 3}
    labels = random_labels(4)
    assert list(score_case("c", "p", labels, values, labels, values, ("kidney", "liver")).dice) == ["kidney", "liver"]


VALUES = {"liver": 1, "spleen": 2}
BOTH = boxes(liver=np.s_[1:3, 1:4, 2:9], spleen=np.s_[4:6, 0:2, 3:7])
LIVER = boxes(liver=np.s_[1:3, 1:4, 2:9])


@pytest.mark.parametrize("reviewed_values", [VALUES, {"liver": 1}], ids=["declared", "without a number"])
def test_a_structure_absent_from_both_scores_1(reviewed_values: dict[str, int]) -> None:
    score = score_case("c", "p", LIVER, VALUES, LIVER, reviewed_values, ("liver", "spleen"))
    assert score.dice == {"liver": 1.0, "spleen": 1.0}
    assert score.missed == ()


@pytest.mark.parametrize("reviewed_values", [VALUES, {"liver": 1}], ids=["declared", "without a number"])
def test_a_structure_predicted_where_there_is_none_scores_0_and_is_not_missed(reviewed_values: dict[str, int]) -> None:
    score = score_case("c", "p", BOTH, VALUES, LIVER, reviewed_values, ("liver", "spleen"))
    assert score.dice == {"liver": 1.0, "spleen": 0.0}
    assert score.missed == ()


def test_a_structure_that_is_there_and_not_predicted_is_missed() -> None:
    score = score_case("c", "p", LIVER, VALUES, BOTH, VALUES, ("liver", "spleen"))
    assert score.dice == {"liver": 1.0, "spleen": 0.0}
    assert score.missed == ("spleen",)


def test_a_structure_predicted_elsewhere_scores_0_but_is_not_missed() -> None:
    elsewhere = boxes(liver=np.s_[1:3, 1:4, 2:9], spleen=np.s_[6:7, 3:5, 9:11])
    score = score_case("c", "p", elsewhere, VALUES, BOTH, VALUES, ("liver", "spleen"))
    assert score.dice["spleen"] == 0.0
    assert score.missed == ()


def test_a_value_without_a_name_is_not_taken_for_a_structure() -> None:
    reviewed = BOTH.copy()
    reviewed[reviewed == 0] = 7
    assert score_case("c", "p", BOTH, VALUES, reviewed, VALUES, ("liver", "spleen")).dice == {"liver": 1, "spleen": 1}


def test_a_score_survives_json() -> None:
    score = CaseScore("case-1", "3f", {"liver": 1 / 3, "Läsion": 1.0}, ("Läsion", "liver"))
    stored = json.loads(json.dumps(score.as_dict()))
    assert CaseScore.from_dict(stored) == score


def test_scores_of_label_maps_can_be_written_as_json() -> None:
    stored = json.dumps(score_case("c", "p", BOTH, VALUES, LIVER, VALUES, ("liver", "spleen")).as_dict())
    assert json.loads(stored) == {"case": "c", "patient": "p", "dice": {"liver": 1.0, "spleen": 0.0}, "missed": []}


ROUND = [
    CaseScore("a", "p", {"liver": 0.9, "spleen": 0.5}),
    CaseScore("b", "p", {"spleen": 0.1}),
    CaseScore("c", "q", {"kidney": 0.3, "liver": 0.6}),
]


def test_the_mean_over_cases_gives_each_case_the_same_weight() -> None:
    assert mean_dice(ROUND) == pytest.approx((0.7 + 0.1 + 0.45) / 3)


def test_there_is_no_mean_of_no_case() -> None:
    assert math.isnan(mean_dice([]))


def test_the_mean_of_a_structure_is_over_the_cases_it_was_reviewed_in() -> None:
    means = dice_by_structure(ROUND)
    assert list(means) == ["liver", "spleen", "kidney"]
    assert means == pytest.approx({"liver": 0.75, "spleen": 0.3, "kidney": 0.3})
    assert dice_by_structure([]) == {}
