"""A model of a lab's own: planned by nnU-Net on completely reviewed cases, ready to be trained."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from factories import make_model_folder, odd_grids
from mshub.cases import ReviewedCase
from mshub.catalogue import InputRules
from mshub.errors import TrainingError
from mshub.geometry import same_grid
from mshub.nnunet import model_writing as model_writing_module
from mshub.nnunet import planning
from mshub.nnunet.engine import check_weights
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.planning import plan_model
from mshub.nnunet.trainer import train_fold
from mshub.nnunet.training_set import prepare
from mshub.recipe import FROM_SCRATCH, Recipe
from mshub.volume_io import read_grid
from reviewed import VARIABLES, array_of, make_case, make_cases, write_label

DATASET: dict[str, Any] = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}}
pytestmark = pytest.mark.usefixtures("nnunet_environment")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> list[ReviewedCase]:
    """Three cases, one of them NRRD, and one more of which only a structure was reviewed."""
    folder = tmp_path_factory.mktemp("lab")
    return [
        make_case(folder, "one", shape=(24, 20, 16), affine=np.diag([1.2, 1.5, 2.0, 1])),
        make_case(folder, "two", shape=(22, 24, 18), affine=odd_grids()["-z+x-y"], seed=1),
        make_case(folder, "three", shape=(26, 20, 14), affine=np.diag([-1.3, 1.4, 2.2, 1]), ending=".nrrd", seed=2),
        make_case(folder, "four", shape=(24, 20, 16), affine=np.diag([9, 9, 9, 1]), reviewed=["liver"], seed=3),
    ]


@pytest.fixture(scope="module")
def planned(lab: list[ReviewedCase], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that nnU-Net really planned, in threads instead of processes; nobody may change it."""
    original = DatasetFingerprintExtractor.__init__

    def frugal(self: DatasetFingerprintExtractor, *args: Any) -> None:
        original(self, *args)
        self.num_foreground_voxels_for_intensitystats = 100_000  # of 100 million, drawn from some thousand voxels

    with pytest.MonkeyPatch.context() as patch:
        threads = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=ThreadPool))
        patch.setattr(fingerprint_extractor, "multiprocessing", threads)
        patch.setattr(DatasetFingerprintExtractor, "__init__", frugal)
        return plan_model(DATASET, lab, tmp_path_factory.mktemp("work"), seed=5)


@pytest.fixture
def plans(tmp_path: Path) -> dict[str, Any]:
    """Plans of a tiny network, of one channel."""
    content: dict[str, Any] = json.loads((make_model_folder(tmp_path / "tiny") / "plans.json").read_text())
    return content


@pytest.fixture
def raw(tmp_path: Path, plans: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a copy of nnU-Net's raw dataset will be, as nnU-Net would have planned on it; `plans` come out."""
    copy = tmp_path / "raw-copy"

    def plan(cases: int) -> dict[str, Any]:
        shutil.copytree(raw_dataset(), copy)
        assert json.loads((copy / "dataset.json").read_text())["numTraining"] == cases
        return plans

    monkeypatch.setattr(planning, "_plan", plan)
    return copy


def raw_dataset() -> Path:
    """Return the folder nnU-Net is told about."""
    return Path(os.environ[VARIABLES[0]]) / planning.NAME


def labels_in(raw: Path) -> list[np.ndarray[Any, Any]]:
    return [array_of(path) for path in sorted((raw / "labelsTr").iterdir())]


# -- planned by nnU-Net -------------------------------------------------------------------------------------------


def test_nnunet_plans_a_model_that_can_be_opened(planned: Path) -> None:
    model = ModelFolder.open(planned)
    check_weights(model)
    assert model.labels.names == ("liver", "spleen")
    assert (model.folds, model.trainer, model.configuration) == (("0",), "nnUNetTrainer", "3d_fullres")
    assert model.channels == ("CT",)
    assert model.mirror_axes == (0, 1, 2)
    assert model.plans["dataset_name"] == planning.NAME


def test_it_looks_at_the_completely_reviewed_cases_as_they_are(planned: Path, lab: list[ReviewedCase]) -> None:
    fingerprint = json.loads((planned.parent / "preprocessed" / planning.NAME / "dataset_fingerprint.json").read_text())
    expected = [
        DatasetFingerprintExtractor.analyze_case(
            [str(case.images[0].with_suffix(".nii"))], str(case.label.with_suffix(".nii")), SimpleITKIO
        )
        for case in lab[:3]
    ]
    assert fingerprint["shapes_after_crop"] == [list(one[0]) for one in expected]
    np.testing.assert_allclose(fingerprint["spacings"], [one[1] for one in expected], rtol=1e-5)
    found = fingerprint["foreground_intensity_properties_per_channel"]["0"]
    files = [(case.images[0].with_suffix(".nii"), case.label.with_suffix(".nii")) for case in lab[:3]]
    voxels = [array_of(image)[array_of(label) > 0] for image, label in files]
    assert found["max"] <= max(one.max() for one in voxels)
    assert found["mean"] == pytest.approx(np.mean([one.mean() for one in voxels]), rel=0.02)
    spacing = ModelFolder.open(planned).configuration_manager.spacing
    np.testing.assert_allclose(spacing, np.median([one[1] for one in expected], axis=0), rtol=1e-5)


def test_only_the_model_is_left_of_what_it_wrote(planned: Path) -> None:
    assert planned.name == "planned"
    assert not (planned.parent / "raw").exists()
    assert not (planned.parent / "planned.part").exists()


def test_the_planned_model_is_trained_from_scratch(planned: Path, lab: list[ReviewedCase], tmp_path: Path) -> None:
    model = ModelFolder.open(planned)
    found = prepare(model, lab, tmp_path / "set", None, lambda _: None)
    assert len(found.cases) == 4, "what was not planned on is trained on all the same"
    recipe = Recipe(**{**vars(FROM_SCRATCH), "epochs": 1, "iterations": 1, "batch_size": 1})
    fit = train_fold(model, "0", found, recipe, torch.device("cpu"), tmp_path / "work", lambda _: None, lambda: False)
    assert len(fit.losses) == 1
    assert any(not torch.equal(fit.weights[name], value) for name, value in _weights(model).items())


def _weights(model: ModelFolder) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = model.checkpoint("0")["network_weights"]
    return weights


def test_the_seed_decides_about_the_weights(planned: Path) -> None:
    model = ModelFolder.open(planned)
    again, other = (planning._random_weights(DATASET, model.plans, model.configuration, seed) for seed in (5, 6))
    stored = _weights(model)
    assert all(torch.equal(again[name], value) for name, value in stored.items())
    assert not all(torch.equal(other[name], value) for name, value in stored.items())


@pytest.mark.usefixtures("raw")
def test_the_environment_is_left_as_it_was(
    tmp_path: Path, plans: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process that makes batches, as planning needs it, would hold up the training on a GPU that follows."""
    seen: list[dict[str, str]] = []

    def plan(_: int) -> dict[str, Any]:
        seen.append({name: os.environ[name] for name in VARIABLES})
        return plans

    monkeypatch.setattr(planning, "_plan", plan)
    monkeypatch.setenv("nnUNet_n_proc_DA", "7")
    plan_model(DATASET, make_cases(tmp_path, 1), tmp_path / "work", seed=0)
    assert seen[0]["nnUNet_n_proc_DA"] == "1"
    assert Path(seen[0]["nnUNet_raw"]) == tmp_path / "work" / "raw"
    assert {name: os.environ.get(name) for name in VARIABLES} == {**dict.fromkeys(VARIABLES), "nnUNet_n_proc_DA": "7"}


def test_what_nnunet_cannot_plan_is_an_error_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise ValueError("no axis is long enough")

    overwrite: list[bool] = []
    monkeypatch.setattr(DatasetFingerprintExtractor, "run", lambda _, anew=False: overwrite.append(anew))
    monkeypatch.setattr(ExperimentPlanner, "plan_experiment", fail)
    monkeypatch.setattr(ExperimentPlanner, "__init__", lambda *_: None)
    with pytest.raises(TrainingError, match=r"could not plan a network.*ValueError: no axis is long enough"):
        plan_model(DATASET, make_cases(tmp_path, 1), tmp_path / "work", seed=0)
    assert not (tmp_path / "work" / "planned").exists()
    assert overwrite == [True], "what a killed job left of a fingerprint is not read"


def test_a_plan_that_was_killed_while_it_was_written_leaves_nothing_that_looks_whole(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(content: Any, path: Path) -> None:
        path.write_bytes(b"half of")
        raise KeyboardInterrupt

    cases = make_cases(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(model_writing_module.torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            plan_model(DATASET, cases, tmp_path / "work", seed=0)
    assert not (tmp_path / "work" / "planned").exists()
    shutil.rmtree(raw)
    check_weights(ModelFolder.open(plan_model(DATASET, cases, tmp_path / "work", seed=0)))


# -- what it is planned on ----------------------------------------------------------------------------------------


def test_nnunets_raw_dataset_has_the_models_integers_on_the_images_grids(raw: Path, tmp_path: Path) -> None:
    """Two channels, other integers than the label file's, gaps, and a format nnU-Net is not told about."""
    dataset = {
        "channel_names": {"0": "T1w", "1": "T2w"},
        "labels": {"background": 0, "spleen": 7, "liver": 3},
        "description": "kept",
    }
    case = make_case(
        tmp_path,
        "case",
        channels=2,
        values={"kidney": 4, "spleen": 1, "liver": 9},
        affine=odd_grids()["oblique-left-handed"],
        ending=".nrrd",
    )
    make_model_folder(tmp_path / "two", channels=("T1w", "T2w"))
    two_channels = json.loads((tmp_path / "two" / "plans.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_plan", _copying(raw, two_channels))
        model = ModelFolder.open(plan_model(dataset, [case], tmp_path / "work", seed=0))
    assert model.labels.names == ("liver", "spleen")
    assert json.loads((raw / "dataset.json").read_text())["description"] == "kept"
    images = sorted((raw / "imagesTr").iterdir())
    assert [path.name for path in images] == ["case00000_0000.nii.gz", "case00000_0001.nii.gz"]
    for path, original in zip(images, case.images, strict=True):
        assert same_grid(read_grid(path), read_grid(original))
        np.testing.assert_array_equal(array_of(path), array_of(original.with_suffix(".nii")))
    drawn = array_of(case.label.with_suffix(".nii"))
    (label,) = labels_in(raw)
    np.testing.assert_array_equal(label, np.select([drawn == 9, drawn == 1], [1, 2], 0))


def test_nnunet_looks_at_intensities_as_the_model_will_see_them(raw: Path, tmp_path: Path) -> None:
    case = make_case(tmp_path, "case")
    original = array_of(case.images[0])
    low, high = (float(value) for value in np.percentile(original, (10, 90)))
    plan_model(DATASET, [case], tmp_path / "work", seed=0, rules=InputRules((low, high)))
    (image,) = (raw / "imagesTr").iterdir()
    np.testing.assert_allclose(array_of(image), np.clip(original, low, high), rtol=1e-6)


def _copying(raw: Path, plans: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    def plan(_: int) -> dict[str, Any]:
        shutil.copytree(raw_dataset(), raw)
        return plans

    return plan


def test_cases_that_were_not_completely_reviewed_are_not_planned_on(raw: Path, tmp_path: Path) -> None:
    cases = [
        make_case(tmp_path, "partial", reviewed=["spleen"], seed=1),
        make_case(tmp_path, "whole", values={"liver": 1, "spleen": 2, "kidney": 3}, seed=2),
        make_case(tmp_path, "empty", values={"liver": 1}, reviewed=["liver", "spleen"], seed=3),
    ]
    plan_model(DATASET, cases, tmp_path / "work", seed=0)
    labels = labels_in(raw)
    assert [sorted(np.unique(label)) for label in labels] == [[0, 1, 2], [0, 1]]


def test_without_a_completely_reviewed_case_nothing_is_planned(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 2, reviewed=["liver"])
    with pytest.raises(TrainingError, match=r"None of the 2 cases has all structures reviewed \(liver, spleen\)"):
        plan_model(DATASET, cases, tmp_path / "work", seed=0)


def test_cases_that_cannot_be_read_do_not_cost_the_others(raw: Path, tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 5)
    cases[0].images[0].write_bytes(b"no image")
    cases[1].label.unlink()
    write_label(cases[2].label, np.ones((3, 4, 5)), cases[2].images[0])
    write_label(cases[3].label, array_of(cases[3].label) * 3, cases[3].images[0])  # integers that have no name
    plan_model(DATASET, cases, tmp_path / "work", seed=0)
    (label,) = labels_in(raw)
    np.testing.assert_array_equal(label, array_of(cases[4].label))
    assert len(list((raw / "imagesTr").iterdir())) == 1


@pytest.mark.usefixtures("raw")
def test_when_no_case_can_be_read_the_reasons_are_told(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 2)
    for case in cases:
        case.label.unlink()
    with pytest.raises(TrainingError, match=r"None of the completely reviewed cases can be read.*case1-label\.nii"):
        plan_model(DATASET, cases, tmp_path / "work", seed=0)


def test_what_an_interrupted_plan_left_is_not_planned_on(raw: Path, tmp_path: Path) -> None:
    stale = tmp_path / "work" / "raw" / planning.NAME / "imagesTr" / "case00009_0000.nii.gz"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"half of")
    plan_model(DATASET, make_cases(tmp_path, 1), tmp_path / "work", seed=0)
    assert len(list((raw / "imagesTr").iterdir())) == 1


# -- sides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("kidney_left", "kidney_right"),
        ("Left Kidney",),
        ("liver", "RightKidney"),
        ("leftkidney",),
        ("lung-l", "lung-r"),
        ("R lung",),
        ("lesion_right_of_midline",),  # this one and the next lose mirroring for nothing, which does little harm
        ("L1", "L2"),
    ],
)
def test_structures_told_apart_by_their_side_are_not_mirrored(names: Sequence[str]) -> None:
    assert planning._mirror_axes(names, [16, 24, 24]) is None


@pytest.mark.parametrize("names", [("liver", "spleen"), ("ulna", "colon"), ("whole tumour", "core"), ("T1", "T2")])
def test_others_are_mirrored_along_every_axis(names: Sequence[str]) -> None:
    assert planning._mirror_axes(names, [16, 24, 24]) == (0, 1, 2)
    assert planning._mirror_axes(names, [24, 24]) == (0, 1)


@pytest.mark.usefixtures("raw")
def test_the_model_folder_says_that_sides_are_not_mirrored(tmp_path: Path) -> None:
    dataset = {**DATASET, "labels": {"background": 0, "kidney_left": 1, "kidney_right": 2}}
    cases = make_cases(tmp_path, 1, values={"kidney_left": 1, "kidney_right": 2})
    assert ModelFolder.open(plan_model(dataset, cases, tmp_path / "work", seed=0)).mirror_axes is None


def test_without_a_3d_configuration_the_2d_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = json.loads((make_model_folder(tmp_path / "2d", patch=(24, 20)) / "plans.json").read_text())
    monkeypatch.setattr(planning, "_plan", lambda _: flat)
    model = ModelFolder.open(plan_model(DATASET, make_cases(tmp_path, 1), tmp_path / "work", seed=0))
    assert (model.configuration, model.mirror_axes) == ("2d", (0, 1))
    check_weights(model)
