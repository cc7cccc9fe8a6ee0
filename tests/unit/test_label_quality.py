"""Hints about a submitted label: what looks unfinished is told, and what anatomy explains is not."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import ndimage

from mshub.label_quality import MOST_HINTS, label_hints
from mshub.volumes import ENOUGH_CASES

SHAPE = (26, 33, 41)
SPACING = (0.5, 1.0, 2.0)  # voxels of 1 mm³
LIVER = np.s_[2:22, 3:23, 5:35]  # 20 x 20 x 30 voxels: 12 ml
NAMES = {"liver": 1}
USUAL = (11.0, 12.5, 13.0, 10.5, 12.0, 11.5, 12.2, 13.4, 12.9)


def block(value: int = 1) -> np.ndarray:
    """Return a label of one solid block."""
    label = np.zeros(SHAPE, np.uint8)
    label[LIVER] = value
    return label


def hints(label: np.ndarray, usual: Sequence[float] = (), **values: int) -> list[str]:
    """Return the hints about a label in which the liver, or `values`, was reviewed; `usual` volumes are the liver's."""
    named = values or NAMES
    return label_hints(label, named, list(named), SPACING, {"liver": usual})


def test_a_solid_block_of_the_usual_volume_looks_finished() -> None:
    assert hints(block(), USUAL) == []
    assert hints(block()) == [], "nothing is known of other cases"


def test_what_nobody_reviewed_is_not_looked_at() -> None:
    label = block()
    label[4, 4, 12], label[:, :, 20] = 0, 0
    assert label_hints(label, NAMES, [], SPACING, {"liver": [900.0] * 20}) == []


def test_a_hint_is_a_sentence_that_names_the_structure() -> None:
    label = block()
    label[:, :, 20], label[5:11, 5:11, 10:14], label[25, 32, 40] = 0, 0, 1
    found = hints(label, [900.0] * 8)
    assert len(found) == 4
    assert all(re.fullmatch(r"liver.*[.?]", hint) for hint in found)


# -- islands ------------------------------------------------------------------------------------------------------


def test_stray_strokes_are_counted_and_measured() -> None:
    label = block()
    label[24, 30, 2:5], label[0, 0, 0], label[25, 0:2, 38] = 1, 1, 1
    assert label_hints(label, NAMES, NAMES, (0.5, 1.5, 2.0), {}) == [
        "liver has 3 small islands apart from the rest (9 mm³ in all): stray strokes of the brush?"
    ]
    label[24:, :, :], label[0, 0, 0] = 0, 1
    assert hints(label) == ["liver has a small island apart from the rest (1 mm³ in all): stray strokes of the brush?"]


def test_what_touches_by_a_corner_is_no_island() -> None:
    label = block()
    label[22, 23, 35] = 1
    assert hints(label) == []
    label[22, 23, 35], label[23, 24, 36] = 0, 1
    assert len(hints(label)) == 1


@pytest.mark.parametrize(("voxels", "count"), [(9, 1), (10, 0)])
def test_an_island_is_below_a_hundredth_of_the_structure(voxels: int, count: int) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[2:12, 3:14, 4:13] = 1  # 990 voxels
    label[24, 0:voxels, 40] = 1
    assert len(hints(label)) == count


def test_a_structure_in_two_large_parts_has_no_island() -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[1:9, 3:23, 5:35] = label[17:25, 3:23, 5:35] = 1
    assert hints(label) == []


def test_a_structure_that_is_in_pieces_by_nature_has_no_islands() -> None:
    label = np.zeros(SHAPE, np.uint8)
    everywhere = np.random.default_rng(0).integers((0, 0, 0), SHAPE, size=(300, 3))
    label[tuple(everywhere.T)] = 1  # metastases, nearly all alone, each below a hundredth
    assert hints(label) == []


# -- slices -------------------------------------------------------------------------------------------------------


def test_a_skipped_slice_is_told_by_its_axis_and_number() -> None:
    for axis, letter in enumerate("ijk"):
        label = block()
        np.moveaxis(label, axis, 0)[12] = 0
        (hint,) = hints(label)
        assert hint == (f"liver: slice {letter} = 12 is empty (counted from 0), and the slices on both sides are not.")


def test_the_first_gaps_are_listed_and_the_others_counted() -> None:
    label = block()
    label[:, :, [8, 12, 13, 17, 21, 26, 27]] = 0
    assert hints(label) == [
        "liver: slices k = 8, 12 to 13, 17 and 3 more are empty (counted from 0), and the slices on both sides are not."
    ]
    label = block()
    label[:, 12:14] = 0
    assert "slices j = 12 to 13 are empty" in hints(label)[0]


def test_slices_drawn_here_and_there_and_never_filled_between_are_told() -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[2:22, 3:23, 5:36:6] = 1
    (hint,) = hints(label)
    assert hint.startswith("liver: slices k = 6 to 10, 12 to 16, 18 to 22 and 10 more are empty")


def test_an_end_that_was_drawn_on_one_slice_beyond_a_wide_gap_is_told() -> None:
    label = block()
    label[4:20, 5:20, 39] = 1
    assert "slices k = 35 to 38 are empty" in hints(label)[0]


def test_two_organs_of_a_pair_explain_the_gap_between_them() -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[1:10, 3:23, 5:35] = label[13:25, 3:23, 5:35] = 1  # mirror images: each lies over the other
    assert hints(label) == []


def test_parts_that_do_not_lie_over_each_other_explain_even_a_narrow_gap() -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[2:22, 3:12, 5:20] = label[2:22, 15:24, 21:38] = 1
    assert hints(label) == []


def test_a_stray_stroke_below_a_structure_leaves_no_slices_out() -> None:
    label = block()
    label[10, 10, 39] = 1
    (hint,) = hints(label)
    assert "small island" in hint


# -- holes --------------------------------------------------------------------------------------------------------


def test_a_hole_is_told_with_its_volume() -> None:
    label = block()
    label[5:11, 6:10, 10:18] = 0
    assert hints(label) == ["liver has a hole inside that no structure fills (192 mm³ in all)."]
    label[14:20, 14:20, 20:27] = 0
    assert hints(label) == ["liver has 2 holes inside that no structure fills (444 mm³ in all)."]


def test_holes_are_what_scipy_fills() -> None:
    label = block() * (np.random.default_rng(2).random(SHAPE) > 0.15).astype(np.uint8)
    filled = np.count_nonzero(ndimage.binary_fill_holes(label)) - np.count_nonzero(label)
    assert filled > 100
    (hint,) = (hint for hint in hints(label) if "hole" in hint)
    assert f"({filled:,} mm³ in all)" in hint


def test_a_cavity_that_is_open_is_no_hole() -> None:
    label = block()
    label[5:15, 6:16, 10:20] = 0
    label[15:23, 8, 12] = 0  # to the outside, one voxel wide
    assert hints(label) == []
    label = np.zeros(SHAPE, np.uint8)
    label[0:20, 3:23, 5:35] = 1
    label[0:10, 6:16, 10:20] = 0  # to the end of the image
    assert hints(label) == []


def test_a_tumour_in_a_liver_is_no_hole() -> None:
    label = block()
    label[5:15, 6:16, 10:20] = 2
    assert hints(label, liver=1, tumour=2) == []
    assert hints(label) == [], "whoever drew the tumour"
    label[12:15, 6:16, 10:20] = 0
    assert hints(label, liver=1, tumour=2) == ["liver has a hole inside that no structure fills (300 mm³ in all)."]


def test_a_hole_counts_from_a_hundredth_of_the_structure() -> None:
    label = block()
    label[5:12, 4:21, 10] = 0  # 119 of 12,000 voxels
    assert hints(label) == ["liver has a hole inside that no structure fills (119 mm³ in all)."]
    label[5, 4, 10] = 1
    assert hints(label) == []


def test_pinholes_of_a_small_structure_do_not_count() -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[3:12, 3:12, 3:12] = 1
    label[5:8, 5:8, 5:7] = 0  # 18 mm³ of 711
    assert hints(label) == []
    label[5:8, 5:8, 5:8] = 0
    assert hints(label) == ["liver has a hole inside that no structure fills (27 mm³ in all)."]


def test_a_millilitre_of_nothing_counts_in_the_largest_structure() -> None:
    label = block()
    label[10, 10, 10] = 0  # one voxel, and voxels of 1 ml
    found = label_hints(label, NAMES, NAMES, (10.0, 10.0, 10.0), {})
    assert found == ["liver has a hole inside that no structure fills (1,000 mm³ in all)."]
    assert label_hints(label, NAMES, NAMES, (10.0, 10.0, 9.9), {}) == []


# -- volumes ------------------------------------------------------------------------------------------------------


def test_an_unusual_volume_is_told_with_both_numbers() -> None:
    small = [volume / 10 for volume in USUAL]
    assert hints(block(), small) == [
        "liver has 12 ml, which is much beside the 1.22 ml (median) of 9 other reviewed cases."
    ]
    large = [volume * 100 for volume in USUAL]
    assert hints(block(), large) == [
        "liver has 12 ml, which is little beside the 1,220 ml (median) of 9 other reviewed cases."
    ]


def test_a_volume_is_in_millilitres_by_the_spacing() -> None:
    usual = {"liver": USUAL}
    assert label_hints(block(), NAMES, NAMES, SPACING, usual) == []
    (hint,) = label_hints(block(), NAMES, NAMES, (5.0, 1.0, 2.0), usual)
    assert "liver has 120 ml, which is much" in hint


def test_how_unusual_is_a_robust_z_score_of_the_logarithm() -> None:
    middle, spread = np.log(12.0), 0.2
    others = np.exp(middle + spread * np.array([-1, -1, -1, -1, 0, 1, 1, 1, 1]) / 1.4826)
    beyond, within = np.exp(4.1 * spread), np.exp(3.9 * spread)
    assert hints(block(), others * within) == hints(block(), others / within) == []
    assert len(hints(block(), others * beyond)) == len(hints(block(), others / beyond)) == 1
    assert hints(block(), [*others * within, 1e9, 1e-9]) == [], "two absurd ones change little"


def test_cases_that_happen_to_be_alike_are_no_tight_limit() -> None:
    assert hints(block(), [12 * 1.45] * 9) == []
    assert len(hints(block(), [12 * 1.55] * 9)) == 1


def test_a_few_other_cases_say_nothing() -> None:
    assert hints(block(), [900.0] * (ENOUGH_CASES - 1)) == []
    assert hints(block(), [900.0] * (ENOUGH_CASES - 1) + [0.0, float("nan"), float("inf"), -1.0]) == []
    assert len(hints(block(), [900.0] * ENOUGH_CASES)) == 1


@pytest.mark.parametrize("values", [{"liver": 1, "spleen": 2}, {"liver": 1}], ids=["declared", "without a number"])
def test_a_structure_every_other_case_has_is_missed(values: dict[str, int]) -> None:
    def found(*volumes: float) -> list[str]:
        return label_hints(block(), values, ["liver", "spleen"], SPACING, {"spleen": volumes})

    assert found(*[150.0, 160.0] * 4) == [
        "spleen is empty, and all 8 other reviewed cases have it (median 155 ml): was it left out?"
    ]
    assert found(*[150.0] * 20, 0.0) == [], "there are patients without one"
    assert found(*[150.0] * 7) == []
    assert found() == []


# -- the list -----------------------------------------------------------------------------------------------------


def test_what_matters_most_comes_first_whatever_structure_it_is_of() -> None:
    label = block()
    label[25, 32, 40] = 1
    label[:, :, 20] = 0
    found = label_hints(label, NAMES, ["liver", "spleen"], SPACING, {"spleen": [150.0] * 8})
    assert [hint.split()[0] for hint in found] == ["spleen", "liver:", "liver"]
    assert "slice" in found[1]
    assert "island" in found[2]


@pytest.mark.parametrize("count", [MOST_HINTS, MOST_HINTS + 1, 30])
def test_a_long_list_is_cut_and_says_so(count: int) -> None:
    names = [f"s{number}" for number in range(count)]
    found = label_hints(block(9), {}, names, SPACING, dict.fromkeys(names, [10.0] * 8))
    assert len(found) == MOST_HINTS
    told = sum("is empty" in hint for hint in found)
    if count == MOST_HINTS:
        assert told == count
    else:
        assert found[-1] == f"{count - told} more hints about this label are not listed."


# -- whatever the array is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64])
@pytest.mark.parametrize("order", ["C", "F", "turned"])
def test_types_and_memory_orders_change_nothing(dtype: type, order: str) -> None:
    label = block()
    label[:, :, 20], label[:, 9], label[5:9, 12:16, 10:14], label[25, 32, 40] = 0, 0, 0, 1
    if order == "turned":
        same = np.ascontiguousarray(label.transpose(1, 2, 0).astype(dtype)).transpose(2, 0, 1)[::-1][::-1]
    else:
        same = np.asarray(label, dtype=dtype, order=order)
    np.testing.assert_array_equal(same, label)
    found = hints(same, [900.0] * 8)
    assert found == hints(label, [900.0] * 8)
    assert [hint.split("=")[0] for hint in found[1:3]] == ["liver: slice j ", "liver: slice k "]


def test_a_client_may_number_its_segments_as_high_as_it_likes() -> None:
    highest = 2**32 - 1
    label = np.where(block() == 1, highest, 0).astype(np.uint32)
    label[:, :, 20], label[0, 0, 0] = 0, 3
    found = hints(label, liver=highest, spleen=3)
    assert found == hints(np.where(label == highest, 1, label).astype(np.uint8), liver=1, spleen=3)
    assert "slice k = 20 is empty" in found[0]


def test_the_label_itself_does_not_change() -> None:
    label = block()
    label[5:9, 5:9, 10:14], label[25, 32, 40] = 0, 1
    before = label.copy()
    hints(label, USUAL)
    np.testing.assert_array_equal(label, before)


def test_an_empty_label_is_no_error() -> None:
    assert hints(np.zeros(SHAPE, np.uint8)) == []
    assert label_hints(np.zeros(SHAPE, np.uint8), {}, [], SPACING, {}) == []
