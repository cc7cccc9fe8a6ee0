"""Preprocessed cases: nnU-Net's own, with labels mapped by name and unknown voxels as ``ignore``; each made once."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from factories import make_image, make_model_folder, odd_grids
from mshub.cases import ReviewedCase
from mshub.catalogue import InputRules
from mshub.errors import TrainingError
from mshub.geometry import Array
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.training_set import Predict, TrainingSet, prepare
from mshub.training_labels import UNSURE_MARGIN_MM
from mshub.volume_io import read_volume, write_nifti
from reviewed import SHAPE, array_of, make_case, make_cases, write_label

IGNORED = 3
"""What nnU-Net's ``ignore`` is in a model of liver and spleen."""
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
ORDER = {"regions_class_order": [1, 2, 3]}


@pytest.fixture
def model(liver_spleen: Path) -> ModelFolder:
    return ModelFolder.open(liver_spleen)


def prepared(
    model: ModelFolder, cases: Sequence[ReviewedCase], folder: Path, predict: Predict | None = None, **more: Any
) -> TrainingSet:
    return prepare(model, cases, folder, predict, lambda _: None, **more)


def stored(found: TrainingSet, case_id: str) -> tuple[Array, Array, dict[str, Any]]:
    """Return data, label map and properties of a case as nnU-Net's data loader reads them."""
    (identifier,) = [name for name, case in found.cases.items() if case.case_id == case_id]
    data, segmentation, _, properties = nnUNetDatasetBlosc2(str(found.folder), [identifier]).load_case(identifier)
    return np.asarray(data), np.asarray(segmentation), properties


def assert_as_nnunet(found: TrainingSet, case: ReviewedCase, model: ModelFolder, label: Array) -> None:
    """Compare a case with what nnU-Net makes of its images and of `label`, numbered as the model is trained."""
    path = write_label(case.label.with_name(f"{case.case_id}-expected.nii"), label, nifti_of(case))
    data, segmentation, properties = DefaultPreprocessor(verbose=False).run_case(
        [str(image) for image in case.images],
        str(path),
        model.plans_manager,
        model.configuration_manager,
        found.dataset,
    )
    data_found, segmentation_found, properties_found = stored(found, case.case_id)
    assert data_found.dtype == np.float32
    assert segmentation_found.dtype == np.int16
    np.testing.assert_array_equal(data_found, data)
    np.testing.assert_array_equal(segmentation_found, segmentation)
    for classes, places in properties.pop("class_locations").items():
        np.testing.assert_array_equal(properties_found["class_locations"][classes], places)
    for name, numbers in properties.pop("sitk_stuff", {}).items():
        np.testing.assert_array_equal(properties_found["sitk_stuff"][name], numbers, err_msg=name)  # -0 is 0
    for name, value in properties.items():
        np.testing.assert_equal(properties_found[name], value, err_msg=name)


def nifti_of(case: ReviewedCase) -> Path:
    """Return the first image as the NIfTI file it was made as, whatever format the case has."""
    return case.images[0].with_suffix(".nii")


def count_preprocessed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the cases nnU-Net preprocesses from now on."""
    counted: list[int] = []
    original = DefaultPreprocessor.run_case_npy

    def spy(*args: Any, **options: Any) -> Any:
        counted.append(1)
        return original(*args, **options)

    monkeypatch.setattr(DefaultPreprocessor, "run_case_npy", spy)
    return counted


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- as nnU-Net makes them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "grid", "case_options"),
    [
        pytest.param({}, "oblique-left-handed", {}, id="oblique"),
        pytest.param({"transpose": (2, 0, 1)}, "-z+x-y", {}, id="transposed"),
        pytest.param({"transpose": (1, 2, 0), "reader": "NibabelIO"}, "+y+z+x", {}, id="NibabelIO, transposed"),
        pytest.param({"reader": "NibabelIOWithReorient"}, "oblique", {}, id="NibabelIOWithReorient, oblique"),
        pytest.param({"reader": "NibabelIOWithReorient"}, "-z+x-y", {}, id="NibabelIOWithReorient"),
        pytest.param({"reader": "SimpleITKIOWithReorient"}, "+x-y+z", {}, id="SimpleITKIOWithReorient"),
        pytest.param({"patch": (20, 24)}, "thick-first-axis", {}, id="2d"),
        pytest.param({"spacing_zyx_mm": (5.0, 1.2, 1.4)}, "very-anisotropic", {}, id="anisotropic"),
        pytest.param({"channels": ("T1w", "T2w")}, "-y-x-z", {"channels": 2}, id="two channels"),
        pytest.param({}, "-x-y+z", {"ending": ".nrrd"}, id="NRRD"),
        pytest.param({"reader": "SimpleITKIOWithReorient"}, "oblique", {"ending": ".nrrd"}, id="NRRD, reoriented"),
    ],
)
def test_a_case_is_preprocessed_as_nnunet_does(
    tmp_path: Path, options: dict[str, Any], grid: str, case_options: dict[str, Any]
) -> None:
    model = ModelFolder.open(make_model_folder(tmp_path / "model", **options))
    case = make_case(
        tmp_path, "case", values={"spleen": 4, "liver": 9}, affine=odd_grids()[grid], shape=(29, 23, 14), **case_options
    )
    found = prepared(model, [case], tmp_path / "set")
    drawn = array_of(case.label.with_suffix(".nii"))
    expected = np.select([drawn == 9, drawn == 4], [1, 2], 0)
    assert set(np.unique(stored(found, "case")[1])) >= {0, 1, 2}, "every structure is there, or this proves little"
    assert_as_nnunet(found, case, model, expected)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_the_format_of_the_files_makes_no_difference(tmp_path: Path, ending: str) -> None:
    model = ModelFolder.open(make_model_folder(tmp_path / "model", reader="NibabelIO"))  # reads nothing but NIfTI
    affine = odd_grids()["-z+x-y"]
    nifti = make_case(tmp_path, "nifti", affine=affine)
    other = make_case(tmp_path, "other", affine=affine, ending=ending)
    found = prepared(model, [nifti, other], tmp_path / "set")
    for one, two in zip(stored(found, "nifti")[:2], stored(found, "other")[:2], strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("orientation", ["LPS", "SAR"])
def test_input_is_turned_as_for_predictions_and_its_label_with_it(
    tmp_path: Path, model: ModelFolder, orientation: str
) -> None:
    case = make_case(tmp_path, "case", affine=odd_grids()["oblique-left-handed"])
    files = {}
    for path in (*case.images, case.label):
        turned = read_volume(path).turned(orientation)
        files[path] = tmp_path / f"turned-{path.name}"
        write_nifti(files[path], turned.array_xyz, turned.grid)
    of_turned = replace(case, case_id="turned", images=(files[case.images[0]],), label=files[case.label])
    found = prepared(model, [case], tmp_path / "set", rules=InputRules(orientation=orientation))
    expected = prepared(model, [of_turned], tmp_path / "other")
    for one, two in zip(stored(found, "case")[:2], stored(expected, "turned")[:2], strict=True):
        np.testing.assert_array_equal(one, two)
    plain = prepared(model, [case], tmp_path / "third")
    assert stored(found, "case")[0].shape != stored(plain, "case")[0].shape or np.any(
        stored(found, "case")[0] != stored(plain, "case")[0]
    )


def test_input_is_clipped_as_for_predictions(tmp_path: Path, model: ModelFolder) -> None:
    case = make_case(tmp_path, "case")
    source = nib.load(case.images[0])
    clipped = np.clip(np.asarray(source.dataobj), -60, 75).astype(np.int16)
    nib.save(nib.Nifti1Image(clipped, source.affine, source.header), tmp_path / "clipped.nii")
    of_clipped = replace(case, case_id="clipped", images=(tmp_path / "clipped.nii",))
    found = prepared(model, [case], tmp_path / "set", rules=InputRules((-60.0, 75.0)))
    expected = prepared(model, [of_clipped], tmp_path / "other")
    np.testing.assert_array_equal(stored(found, "case")[0], stored(expected, "clipped")[0])
    assert np.any(stored(found, "case")[0] != stored(prepared(model, [case], tmp_path / "third"), "case")[0])


# -- labels -------------------------------------------------------------------------------------------------------


def test_what_is_no_structure_of_the_model_is_background(tmp_path: Path, model: ModelFolder) -> None:
    case = make_case(tmp_path, "case", values={"kidney": 1, "spleen": 3, "liver": 2})
    drawn = array_of(case.label)
    assert {1, 2, 3} <= set(np.unique(drawn))
    found = prepared(model, [case], tmp_path / "set")
    assert_as_nnunet(found, case, model, np.select([drawn == 2, drawn == 3], [1, 2], 0))


def test_declared_values_with_gaps_are_trained_without(tmp_path: Path) -> None:
    labels = {"background": 0, "spleen": 7, "liver": 3}
    model = ModelFolder.open(make_model_folder(tmp_path / "model", labels=labels))
    case = make_case(tmp_path, "case", values={"liver": 3, "spleen": 7})
    found = prepared(model, [case], tmp_path / "set")
    assert found.dataset["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    drawn = array_of(case.label)
    assert_as_nnunet(found, case, model, np.select([drawn == 3, drawn == 7], [1, 2], 0))


def test_without_a_prediction_everything_unlabelled_is_unknown_where_a_structure_was_not_reviewed(
    tmp_path: Path, model: ModelFolder
) -> None:
    case = make_case(tmp_path, "case", reviewed=["liver"])
    found = prepared(model, [case], tmp_path / "set")
    drawn = array_of(case.label)
    assert_as_nnunet(found, case, model, np.where(drawn == 1, 1, IGNORED))
    assert found.dataset["labels"] == {"background": 0, "liver": 1, "spleen": 2, "ignore": IGNORED}


def test_with_a_prediction_only_what_lies_near_the_unreviewed_structure_is_unknown(
    tmp_path: Path, model: ModelFolder
) -> None:
    case = make_case(tmp_path, "case", values={"spleen": 5, "liver": 4}, reviewed=["liver"])
    predicted = np.zeros(SHAPE, np.uint8)
    predicted[9:12, 7:10, 4:6], predicted[0:8] = 2, 1
    found = prepared(model, [case], tmp_path / "set", lambda _: (predicted, {"liver": 1, "spleen": 2}))
    drawn = array_of(case.label)
    expected = np.where(_near(predicted == 2, (1.7, 1.3, 3.1)), IGNORED, 0)
    assert np.sum(expected == IGNORED) > np.sum(predicted == 2) + 20, "there is a margin"
    expected[drawn == 5] = IGNORED
    expected[drawn == 4] = 1
    assert_as_nnunet(found, case, model, expected)


def _near(mask: Array, spacing: Sequence[float]) -> Array:
    """Return which voxels lie within the margin of any of `mask`, by comparing all with all."""
    where = np.argwhere(np.ones(mask.shape, bool)) * spacing
    distances = np.linalg.norm(where[:, None] - (np.argwhere(mask) * spacing)[None], axis=-1).min(axis=1)
    near: Array = (distances <= UNSURE_MARGIN_MM).reshape(mask.shape)
    return near


def test_the_version_is_not_asked_about_completely_reviewed_cases(tmp_path: Path, model: ModelFolder) -> None:
    def predict(case: ReviewedCase) -> tuple[Array, dict[str, int]]:
        raise AssertionError(f"{case.case_id} is known")

    assert len(prepared(model, make_cases(tmp_path, 2), tmp_path / "set", predict).cases) == 2


def test_ignore_is_declared_only_where_something_is_unknown(tmp_path: Path) -> None:
    labels = {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    model = ModelFolder.open(make_model_folder(tmp_path / "model", labels=labels))
    whole, partial = make_case(tmp_path, "whole"), make_case(tmp_path, "partial", reviewed=["spleen"], seed=1)
    assert "ignore" not in prepared(model, [whole], tmp_path / "set").dataset["labels"]
    assert prepared(model, [whole, partial], tmp_path / "set").dataset["labels"]["ignore"] == 3
    assert "ignore" not in prepared(model, [whole], tmp_path / "set").dataset["labels"], "the cached case is as it was"


def test_regions_are_trained_on_as_nnunet_numbers_them(tmp_path: Path) -> None:
    model = ModelFolder.open(make_model_folder(tmp_path / "model", labels=REGIONS, dataset_extra=ORDER))
    case = make_case(tmp_path, "case", values={"whole": 4, "core": 5, "enhancing": 6})
    found = prepared(model, [case], tmp_path / "set")
    assert found.dataset["labels"] == REGIONS
    drawn = array_of(case.label)
    assert_as_nnunet(found, case, model, np.where(drawn, drawn - 3, 0))
    assert {(1, 2, 3), (2, 3), 3} <= stored(found, "case")[2]["class_locations"].keys()


# -- made once ----------------------------------------------------------------------------------------------------


def test_a_second_training_preprocesses_nothing(
    tmp_path: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [*make_cases(tmp_path, 2), make_case(tmp_path, "partial", reviewed=["liver"], seed=7)]
    asked: list[str] = []

    def predict(case: ReviewedCase) -> tuple[Array, dict[str, int]]:
        asked.append(case.case_id)
        return np.ones(SHAPE, np.uint8) * 2, {"liver": 1, "spleen": 2}

    first = prepared(model, cases, tmp_path / "set", predict)
    before, counted = contents(tmp_path / "set"), count_preprocessed(monkeypatch)
    second = prepared(model, cases, tmp_path / "set", predict)
    assert (counted, asked) == ([], ["partial"])
    assert contents(tmp_path / "set") == before
    assert second == first


def test_a_further_round_preprocesses_what_is_new_and_drops_what_is_stale(
    tmp_path: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = make_cases(tmp_path, 3)
    first = prepared(model, cases, tmp_path / "set")
    write_label(cases[1].label, array_of(cases[1].label)[::-1], cases[1].images[0])
    renumbered = replace(cases[2], values={"liver": 2, "spleen": 1})
    changed = [replace(cases[0]), replace(cases[1]), renumbered]  # new objects: digests are computed anew
    counted = count_preprocessed(monkeypatch)
    second = prepared(model, changed, tmp_path / "set")
    assert len(counted) == 2
    assert len(second.cases.keys() & first.cases.keys()) == 1
    assert_as_nnunet(second, changed[1], model, array_of(cases[1].label))
    drawn = array_of(cases[2].label)
    assert_as_nnunet(second, renumbered, model, np.select([drawn == 2, drawn == 1], [1, 2], 0))
    endings = (".b2nd", "_seg.b2nd", ".pkl", ".json")
    assert contents(second.folder).keys() == {name + ending for name in second.cases for ending in endings}


def test_other_plans_or_another_input_range_make_other_cases(
    tmp_path: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = make_cases(tmp_path, 2)
    finer = ModelFolder.open(make_model_folder(tmp_path / "finer", spacing_zyx_mm=(2.0, 1.4, 1.4)))
    counted = count_preprocessed(monkeypatch)
    found = [
        prepared(model, cases, tmp_path / "set"),
        prepared(finer, cases, tmp_path / "set"),
        prepared(finer, cases, tmp_path / "set", rules=InputRules((-50.0, 50.0))),
    ]
    assert len(counted) == 6
    assert len({name for one in found for name in one.cases}) == 6


def test_a_new_version_of_the_model_is_asked_anew_about_unreviewed_structures(tmp_path: Path) -> None:
    """What the version before missed must not be learned as background for good."""
    models = [ModelFolder.open(make_model_folder(tmp_path / name, seed=3)) for name in ("v1", "v2")]
    case = make_case(tmp_path, "partial", reviewed=["liver"])
    whole = make_case(tmp_path, "whole", seed=1)
    blind, seeing = np.zeros(SHAPE, np.uint8), np.full(SHAPE, 2, np.uint8)
    names = {"liver": 1, "spleen": 2}
    first = prepared(models[0], [case, whole], tmp_path / "set", lambda _: (blind, names))
    second = prepared(models[1], [case, whole], tmp_path / "set", lambda _: (seeing, names))
    assert np.sum(stored(second, "partial")[1] == 0) < 0.1 * np.sum(stored(second, "partial")[1] == IGNORED)
    assert len(first.cases.keys() & second.cases.keys()) == 1, "the completely reviewed case is as it was"


def test_files_under_two_names_are_one_case(tmp_path: Path, model: ModelFolder) -> None:
    case = make_case(tmp_path, "case")
    found = prepared(model, [case, replace(case, case_id="copy")], tmp_path / "set")
    assert len(found.cases) == 1
    assert found.left_out == {}


def _no_facts(folder: Path, identifier: str) -> None:
    (folder / f"{identifier}.json").unlink()
    (folder / f"{identifier}.b2nd").write_bytes(b"half of")


def _cut(folder: Path, identifier: str) -> None:
    _no_facts(folder, identifier)
    (folder / f"{identifier}_seg.b2nd").unlink()
    (folder / f"{identifier}.pkl").write_bytes(pickle.dumps({})[:2])


@pytest.mark.parametrize("damage", [_no_facts, _cut])
def test_a_case_that_a_killed_training_left_half_written_is_made_again(
    tmp_path: Path, model: ModelFolder, damage: Callable[[Path, str], None]
) -> None:
    cases = make_cases(tmp_path, 2)
    first = prepared(model, cases, tmp_path / "set")
    before = [stored(first, case.case_id) for case in cases]
    (tmp_path / "set" / ".0123.part").write_bytes(b"never renamed")
    damage(tmp_path / "set", next(iter(first.cases)))
    second = prepared(model, cases, tmp_path / "set")
    for case, expected in zip(cases, before, strict=True):
        for one, other in zip(stored(second, case.case_id)[:2], expected[:2], strict=True):
            np.testing.assert_array_equal(one, other)
    assert not (tmp_path / "set" / ".0123.part").exists()


def test_a_training_killed_while_it_says_that_a_case_is_whole_can_be_started_again(
    tmp_path: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = make_cases(tmp_path, 2)

    original = Path.replace

    def written(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text.encode()[:3])
        raise KeyboardInterrupt

    def renamed(path: Path, target: Path) -> Path:
        if target.suffix == ".json":
            raise KeyboardInterrupt
        return original(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", written)
        patch.setattr(Path, "replace", renamed)
        with pytest.raises(KeyboardInterrupt):
            prepared(model, cases, tmp_path / "set")
    assert len(prepared(model, cases, tmp_path / "set").cases) == 2


# -- cases that cannot be used ------------------------------------------------------------------------------------


def _cut_image(case: ReviewedCase) -> ReviewedCase:
    case.images[0].write_bytes(case.images[0].read_bytes()[:700])
    return case


def _constant_image(case: ReviewedCase) -> ReviewedCase:
    write_label(case.images[0], np.ones(SHAPE), case.images[0])
    return case


def _label_elsewhere(case: ReviewedCase) -> ReviewedCase:
    other = make_image(case.label.with_name("other.nii"), SHAPE, odd_grids()["oblique"])
    write_label(case.label, array_of(case.label), other)
    return case


def _no_image(case: ReviewedCase) -> ReviewedCase:
    case.images[0].unlink()
    return case


def _no_label(case: ReviewedCase) -> ReviewedCase:
    case.label.unlink()
    return case


def _nameless_value(case: ReviewedCase) -> ReviewedCase:
    write_label(case.label, np.where(array_of(case.label) == 2, 7, 1), case.images[0])
    return case


def _thin_slices(case: ReviewedCase) -> ReviewedCase:
    make_image(case.images[0], (22, 18, 2), np.diag([1.7, 1.3, 0.4, 1.0]))
    write_label(case.label, np.ones((22, 18, 2)), case.images[0])
    return case


def _two_images(case: ReviewedCase) -> ReviewedCase:
    return replace(case, images=case.images * 2)


BREAKAGES = [
    pytest.param(_cut_image, r"broken_0000\.nii", id="image cut off"),
    pytest.param(_constant_image, "same value", id="image without content"),
    pytest.param(_label_elsewhere, "the label of broken.*its image", id="label on another grid"),
    pytest.param(_nameless_value, "values that no structure has. Found: 7", id="an integer without a name"),
    pytest.param(_no_image, r"broken_0000\.nii", id="image gone"),
    pytest.param(_no_label, r"broken-label\.nii", id="label gone"),
    pytest.param(_thin_slices, "nnU-Net cannot preprocess broken", id="thin slices, resampled to none"),
    pytest.param(_two_images, "needs 1", id="another number of channels"),
]


@pytest.mark.parametrize(("breakage", "reason"), BREAKAGES)
def test_a_broken_case_is_left_out_and_named(
    tmp_path: Path, model: ModelFolder, breakage: Callable[[ReviewedCase], ReviewedCase], reason: str
) -> None:
    broken = breakage(make_case(tmp_path, "broken", seed=9))
    cases, told = [broken, *make_cases(tmp_path, 2)], []
    found = prepare(model, cases, tmp_path / "set", None, told.append)
    assert [case.case_id for case in found.cases.values()] == ["case0", "case1"]
    assert list(found.left_out) == ["broken"]
    assert re.search(reason, found.left_out["broken"])
    assert told == [1, 2, 3], "progress counts it"


def test_a_case_nnunet_cannot_preprocess_is_left_out_and_named(
    tmp_path: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = make_cases(tmp_path, 3)
    original = DefaultPreprocessor.run_case_npy
    shapes: list[int] = []

    def fails_once(*args: Any, **options: Any) -> Any:
        shapes.append(1)
        if len(shapes) == 2:
            raise RuntimeError("resampled to nothing")
        return original(*args, **options)

    monkeypatch.setattr(DefaultPreprocessor, "run_case_npy", fails_once)
    found = prepared(model, cases, tmp_path / "set")
    assert list(found.left_out) == ["case1"]
    assert "nnU-Net cannot preprocess case1 (RuntimeError: resampled to nothing)" in found.left_out["case1"]


def test_a_version_that_cannot_predict_a_case_does_not_cost_the_others(tmp_path: Path, model: ModelFolder) -> None:
    from mshub.errors import PredictionError

    def predict(case: ReviewedCase) -> tuple[Array, dict[str, int]]:
        raise PredictionError("the network failed")

    cases = [make_case(tmp_path, "partial", reviewed=["liver"]), *make_cases(tmp_path, 1)]
    found = prepared(model, cases, tmp_path / "set", predict)
    assert found.left_out == {"partial": "the network failed"}


def test_when_no_case_can_be_used_the_reasons_are_told(tmp_path: Path, model: ModelFolder) -> None:
    cases = [_no_image(case) for case in make_cases(tmp_path, 2)]
    with pytest.raises(TrainingError, match=r"None of the reviewed cases.*case0: .*case1: .*case1_0000\.nii"):
        prepared(model, cases, tmp_path / "set")


def test_a_region_based_model_does_not_learn_from_a_partial_review(tmp_path: Path) -> None:
    model = ModelFolder.open(make_model_folder(tmp_path / "model", labels=REGIONS, dataset_extra=ORDER))
    values = {"whole": 1, "core": 2, "enhancing": 3}
    whole = make_case(tmp_path, "whole", values=values)
    partial = make_case(tmp_path, "partial", values=values, reviewed=["core"], seed=1)
    found = prepared(model, [partial, whole], tmp_path / "set")
    assert [case.case_id for case in found.cases.values()] == ["whole"]
    assert found.left_out["partial"].startswith("whole, enhancing was not reviewed.")
    with pytest.raises(TrainingError, match="partial: whole, enhancing was not reviewed"):
        prepared(model, [partial], tmp_path / "set")


def test_cases_that_say_nothing_at_all_are_refused(tmp_path: Path, model: ModelFolder) -> None:
    case = make_case(tmp_path, "case", values={"spleen": 1}, reviewed=["liver"])
    with pytest.raises(TrainingError, match="Nothing can be learned"):
        prepared(model, [case], tmp_path / "set")
    known = make_case(tmp_path, "known", seed=1)
    assert len(prepared(model, [case, known], tmp_path / "set").cases) == 2
