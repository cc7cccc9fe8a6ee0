"""Names and integers: what nnU-Net writes, what clients see, what clients send back."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from mshub.errors import LabelError
from mshub.labels import LabelMap, is_v1_style, refuse_unfit_names

BRATS = {
    "labels": {"background": 0, "whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing": 3},
    "regions_class_order": [1, 2, 3],
}


def label_map(labels, **more):
    return LabelMap.from_dataset_json({"labels": labels, **more})


def complaint(labels, **more):
    with pytest.raises(LabelError) as caught:
        label_map(labels, **more)
    return str(caught.value)


def many(count):
    return label_map({"background": 0} | {f"structure {n}": n for n in range(1, count + 1)})


@pytest.fixture
def abdomen():
    return label_map({"background": 0, "liver": 1, "spleen": 2, "kidney_right": 3})


@pytest.fixture
def reversed_regions():
    return label_map({"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[7, 3])


# -- reading dataset.json --------------------------------------------------------------------------------------------


def test_a_plain_model_keeps_its_integers(abdomen):
    assert abdomen.predicted == {"liver": 1, "spleen": 2, "kidney_right": 3}
    assert abdomen.published == {"liver": 1, "spleen": 2, "kidney_right": 3}
    assert not abdomen.has_regions
    assert abdomen.ignore_value is None


def test_names_are_listed_by_ascending_value_whatever_their_order_in_the_file():
    labels = label_map({"spleen": 2, "background": 0, "liver": 1})
    assert list(labels.predicted) == list(labels.published) == ["liver", "spleen"]


def test_the_ignore_label_is_neither_predicted_nor_published():
    labels = label_map({"background": 0, "liver": 1, "ignore": 2})
    assert labels.published == labels.predicted == {"liver": 1}
    assert labels.ignore_value == 2


def test_only_the_exact_name_ignore_is_special():
    assert label_map({"background": 0, "Ignore": 1}).predicted == {"Ignore": 1}


def test_a_list_of_one_is_a_plain_value():
    labels = label_map({"background": 0, "liver": [1], "spleen": [2]})
    assert labels.predicted == {"liver": 1, "spleen": 2}
    assert not labels.has_regions


def test_gaps_in_the_declared_values_are_closed_as_the_network_does():
    labels = label_map({"background": 0, "liver": 2, "spleen": 7, "kidney": 3})
    assert labels.predicted == labels.published == {"liver": 1, "kidney": 2, "spleen": 3}


def test_numpy_integers_are_integers():
    assert label_map({"background": np.int64(0), "liver": np.uint8(1)}).predicted == {"liver": 1}


def test_regions_are_written_as_the_class_order_says():
    labels = LabelMap.from_dataset_json(BRATS)
    assert labels.predicted == {"whole tumour": 1, "tumour core": 2, "enhancing": 3}
    assert labels.has_regions


def test_regions_are_published_by_ascending_predicted_value(reversed_regions):
    assert reversed_regions.predicted == {"core": 3, "whole": 7}
    assert reversed_regions.published == {"core": 1, "whole": 2}
    assert list(reversed_regions.published) == ["core", "whole"]


def test_the_ignore_label_takes_no_place_in_the_class_order():
    labels = label_map({"background": 0, "whole": [1, 2], "ignore": 3, "core": 2}, regions_class_order=[1, 2])
    assert labels.predicted == {"whole": 1, "core": 2}
    assert labels.ignore_value == 3


def test_a_background_region_takes_no_place_in_the_class_order():
    labels = label_map({"background": 0, "air": [0], "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    assert labels.predicted == {"whole": 1, "core": 2}


def test_the_class_order_is_not_read_without_regions():
    assert label_map({"background": 0, "liver": 1}, regions_class_order=None).predicted == {"liver": 1}


def test_version_one_labels_are_turned_around():
    labels = label_map({"0": "background", "2": "tumour", "1": "liver"})
    assert labels.predicted == {"liver": 1, "tumour": 2}


@pytest.mark.parametrize("name_of_zero", ["Background", "BG", "clear"])
def test_version_one_calls_the_background_what_it_likes(name_of_zero):
    assert label_map({"0": name_of_zero, "1": "liver"}).predicted == {"liver": 1}


def test_version_one_may_leave_the_background_out():
    assert label_map({"1": "liver"}).predicted == {"liver": 1}


def test_version_one_values_sort_as_numbers():
    labels = label_map({str(n): f"rib {n}" for n in range(12)})
    assert labels.names[8:] == ("rib 9", "rib 10", "rib 11")


def test_number_like_names_in_version_two_stay_names():
    assert label_map({"background": 0, "1": 1, "2": 2}).predicted == {"1": 1, "2": 2}


@pytest.mark.parametrize(
    ("labels", "is_v1"),
    [
        ({"0": "background", "1": "liver"}, True),
        ({"background": 0, "liver": 1}, False),
        ({"1": 1}, False),
        ({"0": "background", "liver": "1"}, False),
        ({}, False),
        (None, False),
    ],
)
def test_the_two_styles_are_told_apart(labels, is_v1):
    assert is_v1_style(labels) is is_v1


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [{}, {"labels": {}}, {"labels": None}, {"labels": ["liver"]}])
def test_missing_labels_are_refused(dataset):
    with pytest.raises(LabelError, match="no usable labels"):
        LabelMap.from_dataset_json(dataset)


@pytest.mark.parametrize(
    "labels", [{"background": 0}, {"background": 0, "ignore": 1}, {"0": "background"}, {"background": 0, "ignore": 2}]
)
def test_a_model_without_foreground_is_refused(labels):
    assert "no structure to segment" in complaint(labels)


def test_two_names_with_one_value_are_refused_and_named():
    message = complaint({"background": 0, "liver": 1, "spleen": 2, "kidney": 1})
    assert "liver = 1, kidney = 1" in message
    assert "spleen" not in message


def test_a_second_name_for_zero_is_refused():
    assert "background = 0, air = 0" in complaint({"background": 0, "air": 0, "liver": 1})


def test_two_version_one_numbers_that_are_equal_are_refused():
    assert "liver = 1, spleen = 1" in complaint({"0": "background", "1": "liver", "01": "spleen"})


def test_one_name_for_two_version_one_numbers_is_refused():
    assert "'lung', 'lung'" in complaint({"0": "background", "1": "lung", "2": "lung"})


@pytest.mark.parametrize("value", ["1", 1.0, 1.5, None, True, [], [1, "2"], [1, None], {"a": 1}, -1, [1, -2]])
def test_impossible_values_are_refused(value):
    message = complaint({"background": 0, "liver": value}, regions_class_order=[1])
    assert "'liver'" in message
    assert repr(value) in message


@pytest.mark.parametrize("labels", [{"liver": 1}, {"background": 1, "liver": 2}, {"background": [0], "liver": 1}])
def test_a_version_two_background_other_than_zero_is_refused(labels):
    assert "background: 0" in complaint(labels)


@pytest.mark.parametrize("twin", ["Liver", " liver", "LIVER "])
def test_names_that_differ_only_by_case_or_white_space_are_refused(twin):
    message = complaint({"background": 0, "liver": 1, twin: 2})
    assert f"'liver', {twin!r}" in message


@pytest.mark.parametrize("labels", [{"background": 0, "Background": 1}, {"0": "air", "1": "background"}])
def test_nothing_else_is_called_background(labels):
    assert "none of them 'background'" in complaint(labels)


@pytest.mark.parametrize("blank", ["", "  "])
def test_blank_names_are_refused(blank):
    assert repr(blank) in complaint({"background": 0, blank: 1})


@pytest.mark.parametrize("value", [0, 1, 3, [2]])
def test_the_ignore_label_is_one_above_all_others_as_nnunet_demands(value):
    labels = {"background": 0, "liver": 1, "ignore": value}
    if value == [2]:
        assert label_map(labels).ignore_value == 2
    else:
        assert "ignore: 2" in complaint(labels)


@pytest.mark.parametrize("order", [None, [], [1], [1, 2, 3, 4], "123", [1, 2, 0], [1, 2, -3], [1, 2, "3"], 3])
def test_regions_need_a_class_order_that_fits(order):
    message = complaint(BRATS["labels"], regions_class_order=order)
    assert "regions_class_order" in message
    assert "3 positive integers" in message
    assert repr(order) in message


def test_regions_without_the_key_are_refused():
    assert "regions_class_order: None" in complaint(BRATS["labels"])


def test_two_regions_written_as_one_value_are_refused():
    message = complaint({"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 1])
    assert "whole = 1, core = 1" in message


@pytest.mark.parametrize(
    "labels",
    [{}, {"background": 0}, {"liver": 1}, {"background": 0, "a": 1, "A": 2}, {"background": 0, "a": 1, "b": 1}],
)
def test_every_refusal_says_found_expected_and_how_to_fix(labels):
    message = complaint(labels)
    assert all(part in message for part in ("Found: ", "Expected: ", "How to fix: "))


@pytest.mark.parametrize("names", [["liver", "Liver"], [""], ["background"], ["IGNORE"], ["a b", "a  b"]])
def test_names_in_a_card_obey_the_same_rule(names):
    with pytest.raises(LabelError, match="told apart"):
        refuse_unfit_names(names)


def test_distinct_names_in_a_card_are_fine():
    refuse_unfit_names(["liver", "liver lesion"])


# -- the same as nnU-Net itself --------------------------------------------------------------------------------------

TRAINED = [
    {"labels": {"background": 0, "liver": 1, "spleen": 2}},
    {"labels": {"background": 0, "spleen": 2, "liver": 1, "ignore": 3}},
    {"labels": {"background": 0, "liver": 2, "spleen": 7, "kidney": 3}},
    {"labels": {"background": 0, "liver": [1], "spleen": 2}},
    BRATS,
    {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [7, 3]},
    {"labels": {"background": 0, "air": [0], "whole": [1, 2], "core": [2]}, "regions_class_order": [2, 1]},
    {"labels": {"background": 0, "whole": [1, 2], "ignore": 3, "core": 2}, "regions_class_order": [1, 2]},
]


@pytest.fixture
def label_manager():
    module = pytest.importorskip("nnunetv2.utilities.label_handling.label_handling")
    return lambda dataset: module.LabelManager(dataset["labels"], dataset.get("regions_class_order"))


@pytest.mark.parametrize("dataset", TRAINED, ids=lambda dataset: json.dumps(dataset["labels"]))
def test_predicted_values_are_those_nnunet_writes(label_manager, dataset):
    manager = label_manager(dataset)
    labels = LabelMap.from_dataset_json(dataset)
    heads = manager.num_segmentation_heads
    logits_czyx = np.where(np.eye(heads, dtype=bool), 5.0, -5.0).astype(np.float32).reshape(heads, 1, 1, heads)
    written = np.asarray(manager.convert_logits_to_segmentation(logits_czyx)).ravel().tolist()
    assert sorted(set(written) - {0}) == list(labels.values)


@pytest.mark.parametrize("dataset", TRAINED, ids=lambda dataset: json.dumps(dataset["labels"]))
def test_each_name_gets_the_value_of_its_own_output_channel(label_manager, dataset):
    manager = label_manager(dataset)
    labels = LabelMap.from_dataset_json(dataset)
    channels = manager.foreground_regions if manager.has_regions else manager.all_labels
    for channel, declared in enumerate(channels):
        if declared == 0:
            continue
        name = next(n for n, v in dataset["labels"].items() if v in (declared, [declared]) or v == _as_list(declared))
        logits_czyx = np.full((len(channels), 1, 1, 1), -5.0, dtype=np.float32)
        logits_czyx[channel] = 5
        assert int(np.asarray(manager.convert_logits_to_segmentation(logits_czyx)).item()) == labels.predicted[name]


def _as_list(declared):
    return list(declared) if isinstance(declared, tuple) else declared


@pytest.mark.parametrize("dataset", TRAINED, ids=lambda dataset: json.dumps(dataset["labels"]))
def test_regions_and_ignore_are_seen_where_nnunet_sees_them(label_manager, dataset):
    manager, labels = label_manager(dataset), LabelMap.from_dataset_json(dataset)
    assert (labels.has_regions, labels.ignore_value) == (manager.has_regions, manager.ignore_label)


# -- publishing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 43, 255, 256, 300])
def test_published_values_are_contiguous_from_one_and_never_background(count):
    published = many(count).published
    assert list(published.values()) == list(range(1, count + 1))
    assert "background" not in published


def test_the_table_maps_predicted_to_published(reversed_regions):
    lut = reversed_regions.to_published_lut()
    assert lut.tolist() == [0, 0, 0, 1, 0, 0, 0, 2]
    assert lut.dtype == np.uint8


@pytest.mark.parametrize(("count", "dtype"), [(255, np.uint8), (256, np.uint16)])
def test_the_smallest_type_that_holds_all_structures_is_used(count, dtype):
    labels = many(count)
    assert labels.dtype == labels.to_published_lut().dtype == dtype
    published = labels.publish(np.array([[0, count]], dtype=np.int32))
    assert published.dtype == dtype
    assert published.tolist() == [[0, count]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_any_integer_segmentation_is_published_voxel_by_voxel(reversed_regions, dtype):
    predicted_zyx = np.zeros((3, 4, 5), dtype=dtype)
    predicted_zyx[0, 1, 2], predicted_zyx[2, 3, 4] = 3, 7
    published_zyx = reversed_regions.publish(predicted_zyx)
    assert published_zyx.shape == (3, 4, 5)
    assert published_zyx.dtype == np.uint8
    assert (published_zyx[0, 1, 2], published_zyx[2, 3, 4], int(published_zyx.sum())) == (1, 2, 3)


def test_publishing_makes_a_new_array(abdomen):
    predicted = np.array([0, 1, 3], dtype=np.uint8)
    abdomen.publish(predicted)[:] = 9
    assert predicted.tolist() == [0, 1, 3]


def test_an_all_background_segmentation_stays_background(abdomen, reversed_regions):
    empty_zyx = np.zeros((2, 3, 4), dtype=np.uint8)
    assert not abdomen.publish(empty_zyx).any()
    assert not reversed_regions.publish(empty_zyx).any()


def test_an_array_without_voxels_is_published_as_it_is(abdomen):
    assert abdomen.publish(np.zeros((0, 4, 5), dtype=np.int16)).shape == (0, 4, 5)


@pytest.mark.parametrize("value", [4, 255, -1, 1000])
def test_a_predicted_value_without_a_name_is_an_error(abdomen, value):
    with pytest.raises(LabelError, match=rf"Found: {value}\. Expected: 0 \(background\), 1 \(liver\)"):
        abdomen.publish(np.array([0, 1, value], dtype=np.int32))


def test_a_value_in_a_gap_has_no_name_either(reversed_regions):
    with pytest.raises(LabelError, match="Found: 4, 5"):
        reversed_regions.publish(np.array([3, 4, 5, 7], dtype=np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_probabilities_and_masks_are_no_segmentation(abdomen, dtype):
    with pytest.raises(LabelError, match="must hold integers"):
        abdomen.publish(np.zeros((2, 2, 2), dtype=dtype))


# -- a client's choice -----------------------------------------------------------------------------------------------


def test_a_choice_is_returned_ascending_and_once(abdomen):
    assert abdomen.select([3, 1, 3]) == (1, 3)


def test_an_empty_choice_stays_empty(abdomen):
    assert abdomen.select([]) == ()


def test_a_choice_may_come_as_numpy_or_a_generator(abdomen):
    assert abdomen.select(value for value in np.array([2, 1])) == (1, 2)


@pytest.mark.parametrize("value", [0, 4, -1, "1", 1.0, True, None])
def test_an_unknown_choice_is_refused_and_the_known_ones_are_named(abdomen, value):
    with pytest.raises(LabelError) as caught:
        abdomen.select([1, value])
    assert f"Found: {value!r}." in str(caught.value)
    assert "1 (liver), 2 (spleen), 3 (kidney_right)" in str(caught.value)


def test_a_choice_means_published_values_not_predicted_ones(reversed_regions):
    assert reversed_regions.select([1, 2]) == (1, 2)
    with pytest.raises(LabelError):
        reversed_regions.select([7])


# -- what a client sends back ----------------------------------------------------------------------------------------


def test_renumbered_segments_are_mapped_by_name(abdomen):
    assert abdomen.from_names({"kidney_right": 1, "liver": 2, "spleen": 5}) == {1: 3, 2: 1, 5: 2}


def test_a_segmentation_need_not_have_every_structure(abdomen):
    assert abdomen.from_names({"spleen": 1}) == {1: 2}
    assert abdomen.from_names({}) == {}


@pytest.mark.parametrize("spelling", ["Liver", "LIVER", " liver ", "\tliver\n"])
def test_case_and_white_space_do_not_matter(abdomen, spelling):
    assert abdomen.from_names({spelling: 4}) == {4: 1}


def test_white_space_inside_a_name_does_not_matter_but_must_be_there():
    labels = label_map({"background": 0, "Liver  lesion": 1})
    assert labels.from_names({"liver lesion": 2}) == {2: 1}
    with pytest.raises(LabelError):
        labels.from_names({"liverlesion": 2})


def test_background_is_understood(abdomen):
    assert abdomen.from_names({"Background": 0, "liver": 1}) == {0: 0, 1: 1}


def test_an_unknown_name_is_refused_with_a_suggestion_and_the_known_names(abdomen):
    with pytest.raises(LabelError) as caught:
        abdomen.from_names({"liver": 1, "Splen": 2})
    assert "'Splen' (did you mean 'spleen'?)" in str(caught.value)
    assert "liver, spleen, kidney_right" in str(caught.value)


def test_suggestions_are_spelled_as_the_model_spells_them():
    with pytest.raises(LabelError, match="did you mean 'GTVp'"):
        label_map({"background": 0, "GTVp": 1}).from_names({"gtvp1": 1})


def test_all_unknown_names_are_listed_and_far_ones_get_no_suggestion(abdomen):
    with pytest.raises(LabelError, match=r"Found: 'Segment_1', 'xyz'\. Expected"):
        abdomen.from_names({"Segment_1": 1, "xyz": 2})


def test_the_ignore_label_is_no_structure():
    with pytest.raises(LabelError, match="'ignore'"):
        label_map({"background": 0, "liver": 1, "ignore": 2}).from_names({"ignore": 2})


def test_two_segments_of_one_structure_are_refused(abdomen):
    with pytest.raises(LabelError, match="'liver', 'Liver'"):
        abdomen.from_names({"liver": 1, "Liver": 2, "spleen": 3})


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, None])
def test_a_segment_needs_a_positive_integer(abdomen, value):
    with pytest.raises(LabelError, match="'liver' has an unusable integer"):
        abdomen.from_names({"liver": value})


def test_two_segments_cannot_have_one_integer(abdomen):
    with pytest.raises(LabelError, match="no other segment has"):
        abdomen.from_names({"liver": 1, "spleen": 1})


# -- card against dataset --------------------------------------------------------------------------------------------


def test_a_card_that_lists_the_same_names_passes(abdomen):
    abdomen.check_names(["liver", "spleen", "kidney_right"])
    abdomen.check_names(("liver", "spleen", "kidney_right"))


def test_missing_and_additional_names_are_told_apart(abdomen):
    with pytest.raises(LabelError, match="the model lacks pancreas, it also has spleen, kidney_right"):
        abdomen.check_names(["liver", "pancreas"])


@pytest.mark.parametrize("names", [["spleen", "liver", "kidney_right"], ["liver", "spleen", "kidney_right", "liver"]])
def test_the_same_names_in_another_order_or_number_are_a_mismatch(abdomen, names):
    with pytest.raises(LabelError, match="not their order and number"):
        abdomen.check_names(names)


def test_the_spelling_counts_in_a_card(abdomen):
    with pytest.raises(LabelError, match="lacks Liver"):
        abdomen.check_names(["Liver", "spleen", "kidney_right"])


# -- as an object ----------------------------------------------------------------------------------------------------


def test_a_label_map_is_ready_for_json(reversed_regions):
    assert json.loads(json.dumps(reversed_regions.as_dict())) == {
        "predicted": {"core": 3, "whole": 7},
        "published": {"core": 1, "whole": 2},
        "has_regions": True,
        "ignore_value": None,
    }


def test_values_from_numpy_are_ready_for_json_too():
    labels = label_map({"background": 0, "whole": [1, 2]}, regions_class_order=np.array([1]).tolist())
    assert json.dumps(labels.as_dict())
    assert json.dumps(label_map({"background": np.int64(0), "a": np.int64(1), "ignore": np.int64(2)}).as_dict())


def test_a_label_map_cannot_be_changed(abdomen):
    with pytest.raises(FrozenInstanceError):
        abdomen.names = ()
    abdomen.predicted["liver"] = 9
    abdomen.published.clear()
    assert abdomen.predicted["liver"] == abdomen.published["liver"] == 1


def test_equal_label_maps_are_equal_and_travel_between_processes(abdomen):
    assert pickle.loads(pickle.dumps(abdomen)) == copy.deepcopy(abdomen) == abdomen


def test_the_dataset_is_left_as_it_was():
    dataset = copy.deepcopy(BRATS)
    LabelMap.from_dataset_json(dataset)
    assert dataset == BRATS


def test_importing_labels_does_not_load_torch():
    code = "import sys, mshub.labels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
