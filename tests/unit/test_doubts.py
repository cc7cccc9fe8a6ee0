"""What is odd about a reviewed label beside a prediction."""

from __future__ import annotations

import numpy as np

from mshub.doubts import label_doubts, swapped_names

BOTH = {"liver": 1, "spleen": 2}
NOTHING = np.zeros((12, 9, 7), np.uint8)


def two_boxes(first: int, second: int) -> np.ndarray:
    array = np.zeros((12, 9, 7), np.uint8)
    array[1:5, 1:8, 1:6], array[7:11, 2:7, 1:6] = first, second
    return array


def test_two_structures_each_where_the_model_saw_the_other_look_exchanged() -> None:
    found = swapped_names(two_boxes(4, 9), {"spleen": 4, "liver": 9}, two_boxes(1, 2), BOTH)
    assert found == [("liver", "spleen")]


def test_a_correction_in_another_numbering_does_not_look_exchanged() -> None:
    assert swapped_names(two_boxes(9, 4), {"spleen": 4, "liver": 9}, two_boxes(1, 2), BOTH) == []


def test_one_structure_painted_over_another_is_a_correction() -> None:
    reviewed = two_boxes(2, 2)  # the model called part of the spleen liver
    assert swapped_names(reviewed, BOTH, two_boxes(1, 2), BOTH) == []


def test_structures_the_model_missed_are_no_doubt() -> None:
    assert swapped_names(two_boxes(1, 2), BOTH, NOTHING, BOTH) == []
    assert swapped_names(NOTHING, BOTH, two_boxes(1, 2), BOTH) == []


def test_an_exchange_is_told_in_a_clause() -> None:
    (doubt,) = label_doubts(BOTH, two_boxes(2, 1), BOTH, two_boxes(1, 2), BOTH)
    assert doubt == "liver and spleen look exchanged: each lies where the model saw the other"
    assert label_doubts(["liver"], two_boxes(2, 1), BOTH, two_boxes(1, 2), BOTH) == [], "nobody looked at the spleen"


def test_a_label_of_which_nothing_is_left_is_doubtful() -> None:
    doubt = ["nothing is left of what the model saw"]
    assert label_doubts(BOTH, NOTHING, BOTH, two_boxes(1, 0), BOTH) == doubt
    assert label_doubts(BOTH, NOTHING, {}, two_boxes(1, 0), BOTH) == doubt, "an absent structure needs no number"
    assert label_doubts(BOTH, two_boxes(7, 0), {**BOTH, "kidney": 7}, two_boxes(1, 0), BOTH) == doubt
    assert label_doubts(["spleen"], NOTHING, BOTH, two_boxes(1, 0), BOTH) == [], "the model saw no spleen"
    assert label_doubts(BOTH, NOTHING, BOTH, NOTHING, BOTH) == []


def test_a_removed_or_moved_structure_is_a_correction() -> None:
    assert label_doubts(BOTH, two_boxes(1, 0), BOTH, two_boxes(1, 2), BOTH) == []
    assert label_doubts(BOTH, two_boxes(0, 1), BOTH, two_boxes(1, 0), BOTH) == []
