"""Training labels: the model's own integers, by name, and ``ignore`` for what nobody looked at."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from mshub.dataset_json import read_labels
from mshub.errors import LabelError, TrainingError
from mshub.training_labels import (
    UNSURE_MARGIN_MM,
    refuse_unnamed,
    training_dataset,
    training_labels,
    unsure_region,
    without_ignore,
)

SHAPE = (9, 6, 13)
TARGETS = {"liver": 1, "spleen": 2, "kidney": 3}
IGNORE = 4
ALL = tuple(TARGETS)

LIVER, SPLEEN, KIDNEY = np.s_[1:4, 1:3, 2:9], np.s_[5:8, 0:2, 0:4], np.s_[5:9, 3:6, 6:12]


def scene(**boxes: tuple[int, Any]) -> np.ndarray:
    """Return a label map with (value, box) of each structure."""
    label = np.zeros(SHAPE, np.uint8)
    for value, box in boxes.values():
        label[box] = value
    return label


def expected(**boxes: tuple[int, Any]) -> np.ndarray:
    return scene(**boxes)


# -- by name ------------------------------------------------------------------------------------------------------


def test_integers_of_a_scene_become_the_models_by_name() -> None:
    label = scene(spleen=(1, SPLEEN), liver=(2, LIVER), kidney=(7, KIDNEY))
    trained = training_labels(label, {"spleen": 1, "liver": 2, "kidney": 7}, ALL, TARGETS, IGNORE)
    np.testing.assert_array_equal(trained, expected(liver=(1, LIVER), spleen=(2, SPLEEN), kidney=(3, KIDNEY)))
    assert trained.dtype == np.uint8


def test_integers_that_the_two_swap_do_not_run_into_each_other() -> None:
    label = scene(liver=(2, LIVER), spleen=(1, SPLEEN))
    trained = training_labels(label, {"liver": 2, "spleen": 1}, ALL, TARGETS, IGNORE)
    np.testing.assert_array_equal(trained, expected(liver=(1, LIVER), spleen=(2, SPLEEN)))


def test_the_label_itself_does_not_change() -> None:
    label = scene(liver=(2, LIVER))
    before = label.copy()
    training_labels(label, {"liver": 2}, ("liver",), TARGETS, IGNORE)
    np.testing.assert_array_equal(label, before)


def test_a_structure_that_was_reviewed_and_is_absent_teaches_background() -> None:
    label = scene(liver=(1, LIVER))
    for values in ({"liver": 1}, {"liver": 1, "spleen": 2, "kidney": 3}):
        trained = training_labels(label, values, ALL, TARGETS, IGNORE)
        np.testing.assert_array_equal(trained, expected(liver=(1, LIVER)))


def test_structures_of_other_models_are_background() -> None:
    label = scene(liver=(1, LIVER), other=(2, SPLEEN))
    trained = training_labels(label, {"liver": 1, "aorta": 2}, (*ALL, "aorta"), TARGETS, IGNORE)
    np.testing.assert_array_equal(trained, expected(liver=(1, LIVER)))


def test_a_label_stored_as_floats_is_read_too() -> None:
    label = scene(liver=(2, LIVER)).astype(np.float32)
    trained = training_labels(label, {"liver": 2}, ALL, TARGETS, IGNORE)
    np.testing.assert_array_equal(trained, expected(liver=(1, LIVER)))


def test_a_label_of_any_axis_order_stays_in_it() -> None:
    label = scene(liver=(2, LIVER), spleen=(1, SPLEEN))
    values = {"liver": 2, "spleen": 1}
    turned = training_labels(label.transpose(2, 1, 0), values, ("liver",), TARGETS, IGNORE)
    np.testing.assert_array_equal(
        turned.transpose(2, 1, 0), training_labels(label, values, ("liver",), TARGETS, IGNORE)
    )


# -- what nobody looked at ----------------------------------------------------------------------------------------


def test_with_an_unreviewed_structure_unlabelled_voxels_may_be_it() -> None:
    label = scene(liver=(1, LIVER), kidney=(2, KIDNEY))
    trained = training_labels(label, {"liver": 1, "kidney": 2}, ("liver", "kidney"), TARGETS, IGNORE)
    wanted = np.full(SHAPE, IGNORE)
    wanted[LIVER], wanted[KIDNEY] = 1, 3
    np.testing.assert_array_equal(trained, wanted)


def test_a_structure_that_was_painted_but_not_reviewed_is_ignored() -> None:
    label = scene(liver=(1, LIVER), spleen=(2, SPLEEN))
    nowhere = np.zeros(SHAPE, bool)
    trained = training_labels(label, {"liver": 1, "spleen": 2}, ("liver", "kidney"), TARGETS, IGNORE, nowhere)
    np.testing.assert_array_equal(trained, expected(liver=(1, LIVER), spleen=(IGNORE, SPLEEN)))


def test_where_an_unreviewed_structure_may_be_is_ignored_and_the_rest_is_background() -> None:
    label = scene(liver=(1, LIVER))
    unsure = np.zeros(SHAPE, bool)
    unsure[0:5, 0:3, 5:13] = True  # over a part of the liver, too
    trained = training_labels(label, {"liver": 1}, ("liver", "kidney"), TARGETS, IGNORE, unsure)
    wanted = np.where(unsure, IGNORE, 0)
    wanted[LIVER] = 1
    np.testing.assert_array_equal(trained, wanted)


def test_with_everything_reviewed_nothing_is_ignored_wherever_a_model_was_unsure() -> None:
    trained = training_labels(scene(liver=(1, LIVER)), {"liver": 1}, ALL, TARGETS, IGNORE, np.ones(SHAPE, bool))
    np.testing.assert_array_equal(trained, expected(liver=(1, LIVER)))


def test_with_nothing_reviewed_everything_is_ignored() -> None:
    trained = training_labels(scene(liver=(1, LIVER)), {"liver": 1}, (), TARGETS, IGNORE)
    assert np.all(trained == IGNORE)


@pytest.mark.parametrize(("ignore", "dtype"), [(255, np.uint8), (256, np.uint16), (300, np.uint16)])
def test_many_structures_need_16_bits(ignore: int, dtype: type) -> None:
    targets = {f"s{value}": value for value in range(1, ignore)}
    label = np.zeros(SHAPE, np.uint16)
    label[LIVER], label[SPLEEN] = 1, 2
    last = f"s{ignore - 1}"
    trained = training_labels(label, {last: 1, "s1": 2}, (last,), targets, ignore)
    assert trained.dtype == dtype
    assert np.all(trained[LIVER] == ignore - 1)
    assert np.all(trained[SPLEEN] == ignore)
    assert set(np.unique(trained)) == {ignore - 1, ignore}


# -- the margin ---------------------------------------------------------------------------------------------------


def plain_margin(found: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Return what lies within the margin of any voxel found, measured one by one."""
    near = np.zeros(found.shape, bool)
    centres = np.argwhere(found)
    for index in product(*map(range, found.shape)):
        steps = (centres - np.array(index)) * np.array(spacing)
        near[index] = np.min(np.linalg.norm(steps, axis=1)) <= UNSURE_MARGIN_MM
    return near


@pytest.mark.parametrize("spacing", [(0.8, 1.7, 4.0), (4.0, 0.8, 1.7), (1.1, 1.3, 2.9)])
def test_the_margin_is_in_millimetres_along_every_axis(spacing: tuple[float, float, float]) -> None:
    predicted = np.zeros(SHAPE, np.uint8)
    predicted[4, 3, 6], predicted[0, 0, 0:2], predicted[8, 5, 12] = 2, 3, 1
    near = unsure_region(predicted, (2, 3), spacing)
    np.testing.assert_array_equal(near, plain_margin(np.isin(predicted, (2, 3)), spacing))


def test_a_voxel_reaches_as_many_neighbours_as_fit_into_the_margin() -> None:
    predicted = np.zeros(SHAPE, np.uint8)
    predicted[4, 3, 6] = 1
    near = unsure_region(predicted, (1,), (1.25, 2.75, 3.5))
    reach = [int(near[:, 3, 6].sum()), int(near[4, :, 6].sum()), int(near[4, 3, :].sum())]
    assert reach == [5, 3, 1]


def test_a_voxel_exactly_at_the_margin_is_in_it() -> None:
    predicted = np.zeros(SHAPE, np.uint8)
    predicted[4, 3, 6] = 1
    assert unsure_region(predicted, (1,), (9.0, UNSURE_MARGIN_MM, 9.0)).sum() == 3


def test_only_the_structures_asked_for_make_unsure() -> None:
    predicted = scene(liver=(1, LIVER), spleen=(2, SPLEEN))
    near = unsure_region(predicted, [2], (50.0, 50.0, 50.0))
    np.testing.assert_array_equal(near, predicted == 2)


def test_a_structure_the_model_does_not_see_makes_nothing_unsure() -> None:
    for values in ([3], []):
        near = unsure_region(scene(liver=(1, LIVER)), values, (1.0, 2.0, 3.0))
        assert near.dtype == bool
        assert near.shape == SHAPE
        assert not near.any()


# -- the dataset.json to train with -------------------------------------------------------------------------------


def manager(dataset: dict[str, Any]) -> LabelManager:
    """Return nnU-Net's own reading of a dataset.json."""
    return LabelManager(dataset["labels"], dataset.get("regions_class_order"))


ORDINARY = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}, "numTraining": 3}
REGIONS = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
    "regions_class_order": [1, 2, 3],
}
DECLARED: dict[str, dict[str, Any]] = {
    "ordinary": ORDINARY,
    "with ignore": {"labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}},
    "ignore first": {"labels": {"ignore": 3, "background": 0, "spleen": 2, "liver": 1}},
    "regions": REGIONS,
    "regions with ignore": {**REGIONS, "labels": {**REGIONS["labels"], "ignore": 4}},
    "regions in KiTS's order": {
        "labels": {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumour": 2},
        "regions_class_order": [1, 3, 2],
    },
}


@pytest.mark.parametrize("dataset", DECLARED.values(), ids=DECLARED.keys())
def test_nnunet_trains_the_same_outputs_and_leaves_ignore_out(dataset: dict[str, Any]) -> None:
    before, after = manager(dataset), manager(training_dataset(dataset))
    assert after.num_segmentation_heads == before.num_segmentation_heads
    assert after.has_regions == before.has_regions
    assert after.all_regions == before.all_regions
    assert after.has_ignore_label
    assert after.ignore_label == max(after.all_labels) + 1


@pytest.mark.parametrize("dataset", DECLARED.values(), ids=DECLARED.keys())
def test_the_integers_to_train_on_are_those_nnunet_writes(dataset: dict[str, Any]) -> None:
    trained = training_dataset(dataset)
    assert read_labels(trained).predicted == read_labels(dataset).predicted
    assert set(read_labels(trained).predicted.values()) <= set(manager(trained).all_labels)


def test_integers_with_gaps_are_closed_as_nnunet_writes_them() -> None:
    dataset = {**ORDINARY, "labels": {"background": 0, "spleen": 52, "liver": 5, "ignore": 53}}
    trained = training_dataset(dataset)
    assert trained == {**ORDINARY, "labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}}
    assert manager(trained).all_labels == [0, 1, 2]
    assert dataset["labels"]["spleen"] == 52


def test_a_v1_dataset_json_is_turned_into_one_of_v2() -> None:
    trained = training_dataset({"labels": {"0": "air", "1": "liver", "2": "spleen"}})
    assert trained["labels"] == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}


def test_everything_else_in_dataset_json_is_kept() -> None:
    trained = training_dataset(ORDINARY)
    assert {key: value for key, value in trained.items() if key != "labels"} == {
        key: value for key, value in ORDINARY.items() if key != "labels"
    }


@pytest.mark.parametrize("name", ["ordinary", "regions", "regions in KiTS's order"])
def test_without_ignore_it_is_the_dataset_json_there_was(name: str) -> None:
    assert without_ignore(training_dataset(DECLARED[name])) == DECLARED[name]
    assert without_ignore(DECLARED[name]) == DECLARED[name]
    assert not manager(without_ignore(training_dataset(DECLARED[name]))).has_ignore_label


def test_the_dataset_json_given_does_not_change() -> None:
    for dataset in DECLARED.values():
        labels = dict(dataset["labels"])
        without_ignore(training_dataset(dataset))
        assert dataset["labels"] == labels


def test_labels_without_structures_are_refused() -> None:
    with pytest.raises(LabelError):
        training_dataset({"labels": {"background": 0}})


# -- regions ------------------------------------------------------------------------------------------------------


def read_back(dataset: dict[str, Any], voxels: np.ndarray) -> np.ndarray:
    """Return what nnU-Net writes when it has learned a label map of its own integers by heart."""
    labels = manager(dataset)
    learned = np.stack([np.isin(voxels, np.atleast_1d(region)) for region in labels.foreground_regions])
    return np.asarray(labels.convert_probabilities_to_segmentation(learned.astype(np.float32)))


def nested(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Yield the regions with every order of class values."""
    integers = sorted({int(value) for region in values.values() for value in np.atleast_1d(region)})
    for order in product(integers, repeat=len(values)):
        if len(set(order)) == len(order):
            yield {"labels": {"background": 0, **values}, "regions_class_order": list(order)}, list(order)


def test_a_region_based_model_is_trained_only_if_it_can_learn_back_what_it_writes() -> None:
    """Every order of class values for some regions that contain each other, judged by nnU-Net itself."""
    outcomes = []
    for values in (
        {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
        {"kidney": [1, 2, 3], "masses": [2, 3], "tumour": 2},
        {"whole": [1, 2, 3, 4], "core": [3, 4]},
    ):
        for dataset, order in nested(values):
            written = np.array(order)
            faithful = np.array_equal(read_back(dataset, written), written)
            try:
                training_dataset(dataset)
                accepted = True
            except TrainingError:
                accepted = False
            assert accepted == faithful, dataset
            outcomes.append(accepted)
    assert 0 < sum(outcomes) < len(outcomes)


def test_a_region_based_model_that_cannot_be_trained_names_the_region() -> None:
    dataset = {**REGIONS, "regions_class_order": [2, 1, 3]}
    with pytest.raises(TrainingError, match=r"writes core, whole as a value outside .*fine-tune it with nnU-Net"):
        training_dataset(dataset)


def test_a_reviewed_label_of_regions_is_learned_region_by_region() -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[LIVER], label[2, 1:3, 3:7], label[2, 2, 4] = 5, 9, 7
    values = {"whole": 5, "core": 9, "enhancing": 7}
    trained_on = training_dataset(REGIONS)
    targets = read_labels(trained_on).predicted
    trained = training_labels(label, values, tuple(values), targets, trained_on["labels"]["ignore"])
    np.testing.assert_array_equal(trained, np.select([label == 5, label == 9, label == 7], [1, 2, 3], 0))
    np.testing.assert_array_equal(read_back(trained_on, trained), trained)


def test_a_value_without_a_name_is_refused_before_it_is_learned_as_background() -> None:
    label = np.array([[0, 2], [5, 7]], np.uint8)
    refuse_unnamed(label, {"liver": 2, "spleen": 5, "kidney": 7})
    with pytest.raises(LabelError, match=r"Found: 7\. Expected: 2 \(liver\), 5 \(spleen\)"):
        refuse_unnamed(label, {"liver": 2, "spleen": 5})


def test_whole_numbers_saved_as_floats_are_labels_and_fractions_are_not() -> None:
    refuse_unnamed(np.array([0.0, 2.0]), {"liver": 2})
    with pytest.raises(LabelError, match=r"1\.5"):
        refuse_unnamed(np.array([0.0, 1.5, 2.0]), {"liver": 2})
