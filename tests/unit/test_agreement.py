"""How a submitted label agrees with its pre-label: by name, by the definition of Dice, to the voxel."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mshub.agreement import Agreement, agreement
from mshub.errors import GeometryError
from mshub.scores import score_case

SHAPE = (7, 5, 11)
MODEL = {"liver": 1, "spleen": 2, "kidney": 3}
NAMES = tuple(MODEL)
NOTHING = np.zeros(SHAPE, np.uint8)


def random_labels(seed: int, values: tuple[int, ...] = (0, 1, 2, 3)) -> np.ndarray:
    """Return a label map of unequal dimensions in which each value occurs."""
    return np.random.default_rng(seed).choice(np.array(values, np.uint16), SHAPE)


def two_boxes(first: int, second: int) -> np.ndarray:
    """Return a label map of 2 x 3 x 4 and 2 x 2 x 6 voxels."""
    label = NOTHING.copy()
    label[0:2, 1:4, 2:6], label[4:6, 0:2, 3:9] = first, second
    return label


def by_name(label: np.ndarray, values: dict[str, int]) -> np.ndarray:
    """Return the structure's name in each voxel, empty for none."""
    names = np.full(label.shape, "", dtype="U20")
    for name, value in values.items():
        names[label == value] = name
    return names


# -- Dice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_dice_of_every_structure_is_the_gates_though_the_two_are_numbered_differently(seed: int) -> None:
    values = {"kidney": 9, "liver": 400, "spleen": 1}
    label, predicted = random_labels(seed, (0, 1, 9, 400)), random_labels(seed + 50)
    found = agreement(NAMES, label, values, predicted, MODEL)
    assert list(found.dice) == list(NAMES)
    assert found.dice == pytest.approx(score_case("c", "p", predicted, MODEL, label, values, NAMES).dice, abs=1e-12)
    assert min(found.dice.values()) > 0
    assert max(found.dice.values()) < 1


def test_exchanged_structures_score_0_and_not_above_1() -> None:
    found = agreement(MODEL, two_boxes(2, 1), MODEL, two_boxes(1, 2), MODEL)
    assert found.dice == {"liver": 0.0, "spleen": 0.0, "kidney": 1.0}
    assert found.edited_voxels == 24 + 24
    assert agreement(["liver", "spleen"], two_boxes(2, 1), MODEL, two_boxes(1, 2), MODEL).mean == 0.0


def test_a_label_that_was_only_numbered_anew_is_as_it_was() -> None:
    found = agreement(NAMES, two_boxes(40, 7), {"spleen": 7, "liver": 40}, two_boxes(1, 2), MODEL)
    assert found == Agreement({"liver": 1.0, "spleen": 1.0, "kidney": 1.0}, 0)


@pytest.mark.parametrize("values", [MODEL, {"liver": 1}], ids=["declared", "without a number"])
def test_absent_from_both_is_1_and_from_one_is_0(values: dict[str, int]) -> None:
    found = agreement(NAMES, two_boxes(1, 0), values, two_boxes(1, 2), MODEL)
    assert found.dice == {"liver": 1.0, "spleen": 0.0, "kidney": 1.0}
    assert found.edited_voxels == 24


def test_a_structure_half_of_which_was_rubbed_out_is_worked_out_by_hand() -> None:
    label = two_boxes(1, 2)
    label[0] = 0  # 12 of 24 voxels of the liver
    found = agreement(["liver"], label, MODEL, two_boxes(1, 2), MODEL)
    assert found == Agreement({"liver": pytest.approx(2 * 12 / (12 + 24))}, 12)


def test_only_structures_that_were_reviewed_and_that_the_model_knows_are_scored_in_its_order() -> None:
    label = random_labels(3, (0, 1, 2, 8))
    values = {"aorta": 8, "spleen": 2, "liver": 1}
    found = agreement(("aorta", "spleen", "liver"), label, values, random_labels(4), MODEL)
    assert list(found.dice) == ["liver", "spleen"]


def test_where_nothing_of_the_model_was_reviewed_there_is_no_mean() -> None:
    found = agreement(["aorta"], two_boxes(8, 0), {"aorta": 8}, two_boxes(1, 2), MODEL)
    assert found == Agreement({}, 24)
    assert found.mean is None


def test_the_mean_gives_every_structure_the_same_weight() -> None:
    assert Agreement({"liver": 0.9, "spleen": 0.5, "kidney": 1.0}, 3).mean == pytest.approx(0.8)


# -- edited voxels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_edited_voxels_are_those_whose_name_differs(seed: int) -> None:
    values = {"spleen": 3, "aorta": 5, "kidney": 1, "liver": 2}
    label, predicted = random_labels(seed, (0, 1, 2, 3, 5)), random_labels(seed + 50)
    found = agreement((*NAMES, "aorta"), label, values, predicted, MODEL)
    expected = np.count_nonzero(by_name(label, values) != by_name(predicted, MODEL))
    assert 0 < found.edited_voxels == expected < label.size


def test_a_structure_the_model_does_not_know_is_edited_where_it_is_drawn() -> None:
    values = {**MODEL, "aorta": 9}
    label = two_boxes(1, 2)
    label[3, :, 5] = 9  # 5 voxels of nothing
    label[0, 1, 2:4] = 9  # 2 of the liver
    assert agreement((*NAMES, "aorta"), label, values, two_boxes(1, 2), MODEL).edited_voxels == 7


def test_what_nobody_reviewed_is_unknown_and_not_edited() -> None:
    spleen_was_not_sent = two_boxes(1, 0)
    assert agreement(["liver"], spleen_was_not_sent, {"liver": 1}, two_boxes(1, 2), MODEL).edited_voxels == 0
    assert agreement(["liver", "spleen"], spleen_was_not_sent, MODEL, two_boxes(1, 2), MODEL).edited_voxels == 24


def test_a_reviewed_structure_drawn_over_an_unreviewed_one_is_edited() -> None:
    assert agreement(["liver"], two_boxes(1, 1), MODEL, two_boxes(1, 2), MODEL).edited_voxels == 24


def test_a_value_without_a_name_is_nothing() -> None:
    label = two_boxes(1, 2)
    label[label == 0] = 77
    assert agreement(NAMES, label, MODEL, two_boxes(1, 2), MODEL).edited_voxels == 0
    assert agreement(NAMES, NOTHING, {}, NOTHING, MODEL) == Agreement(dict.fromkeys(NAMES, 1.0), 0)


# -- whatever the arrays are --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64, np.float32])
@pytest.mark.parametrize("orders", ["CC", "FF", "CF", "FC"])
def test_types_and_memory_orders_change_nothing(dtype: type, orders: str) -> None:
    values = {"spleen": 3, "kidney": 1, "liver": 2}
    label, predicted = random_labels(1), random_labels(2)
    wanted = agreement(NAMES, label, values, predicted, MODEL)
    found = agreement(
        NAMES,
        np.asarray(label, dtype=dtype, order=orders[0]),
        values,
        np.asarray(predicted, dtype=np.uint8, order=orders[1]),
        MODEL,
    )
    assert found == wanted


def test_views_that_are_not_contiguous_are_read_as_they_look() -> None:
    label, predicted = random_labels(5), random_labels(6)
    turned = agreement(NAMES, label[::-1, :, ::2], MODEL, predicted[::-1, :, ::2], MODEL)
    assert turned == agreement(NAMES, label[::-1, :, ::2].copy(), MODEL, predicted[::-1, :, ::2].copy(), MODEL)


def test_a_client_may_number_its_segments_as_high_as_it_likes() -> None:
    highest = 2**32 - 1
    label = np.where(two_boxes(1, 0) == 1, highest, 0).astype(np.uint32)
    assert agreement(["liver"], label, {"liver": highest}, two_boxes(1, 2), MODEL) == Agreement({"liver": 1.0}, 0)


def test_neither_label_changes() -> None:
    label, predicted = random_labels(7), random_labels(8)
    before = label.copy(), predicted.copy()
    agreement(NAMES, label, MODEL, predicted, MODEL)
    np.testing.assert_array_equal(label, before[0])
    np.testing.assert_array_equal(predicted, before[1])


def test_labels_of_two_grids_are_refused_with_their_shapes() -> None:
    with pytest.raises(GeometryError, match=r"Found: \(7, 5, 11\) and \(7, 5, 1\).*Expected.*How to fix"):
        agreement(NAMES, NOTHING, MODEL, NOTHING[..., :1], MODEL)


def test_an_agreement_survives_json_with_plain_numbers() -> None:
    found = agreement(NAMES, random_labels(1), MODEL, random_labels(2), MODEL)
    stored = json.loads(json.dumps(found.as_dict()))
    assert stored.keys() == {"dice", "edited_voxels"}
    assert Agreement.from_dict(stored) == found
    assert {type(value) for value in found.dice.values()} == {float}
    assert type(found.edited_voxels) is int
