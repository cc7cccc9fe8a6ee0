"""A round: a candidate version with its whole record, which serves only if the gate and the facts allow it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from factories import make_model_folder
from mshub import rounds as rounds_module
from mshub.audit_line import audit_file
from mshub.cases import ReviewedCase
from mshub.errors import ConfigError, ModelNotAvailable, PredictionError, StoreError, TrainingError
from mshub.evaluation import Evaluator
from mshub.holdout import HoldOut, patient_number
from mshub.install import add_model
from mshub.jobs import Job, JobRequest, Jobs
from mshub.lineage import new_cases, rounds
from mshub.nnunet import openvino_network, planning
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.openvino_library import is_installed
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, PredictOptions
from mshub.nnunet.trainer import Stopped
from mshub.recipe import FROM_SCRATCH, Recipe
from mshub.rounds import run_round
from mshub.store import ModelStore, ModelVersion
from mshub.volume_io import write_nifti
from reviewed import VARIABLES, array_of, make_case

RECIPE = Recipe(epochs=2, iterations=2, optimiser="sgd", learning_rate=1e-4, guard="none")
MODEL: dict[str, Any] = {"spacing_zyx_mm": (3.1, 1.3, 1.7), "patch": (8, 16, 20), "mirror_axes": None}
"""Of a model that predicts a case in one tile."""
SHAPE = (18, 14, 8)
JUDGES = ("patient 3", "patient 8", "patient 9")
"""Whom the hold-out takes of the first ten."""
FEW = (*JUDGES, "patient 0", "patient 1")
LENIENT = "min_cases = 1\nmean_lower_bound = -1.0\nworst_structure = -1.0\nworst_case = -1.0\nfirst_mean_dice = 0.0\n"
STRICT = "min_cases = 1\nmean_lower_bound = 1.0\n"
pytestmark = pytest.mark.usefixtures("nnunet_environment")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder that is fine-tuned."""
    return make_model_folder(tmp_path_factory.mktemp("model") / "tiny", **MODEL)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> list[ReviewedCase]:
    """Fourteen cases of twelve patients, three of whom judge."""
    path = tmp_path_factory.mktemp("lab")
    patients = [*(f"patient {number}" for number in range(12)), "patient 3", "patient 5"]
    return [
        replace(
            make_case(path, f"case{number}", shape=SHAPE, seed=number, patient=patient),
            facts={"client_id": f"reader {number}", "submitted": "2026-11-20", "started_from": {"version": "v1"}},
        )
        for number, patient in enumerate(patients)
    ]


@pytest.fixture
def few(lab: list[ReviewedCase]) -> list[ReviewedCase]:
    """Three cases that judge and two that train."""
    return [replace(next(case for case in lab if case.patient == patient)) for patient in FEW]


@pytest.fixture
def tiny(store: ModelStore, folder: Path) -> ModelStore:
    """A store with the model ``tiny`` and a gate that lets nearly everything pass."""
    add_model(store, "tiny", folder)
    policy(store, LENIENT)
    return store


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no pictures: most tests look at none."""
    monkeypatch.setattr(rounds_module, "report_round", lambda *_: None)


def policy(store: ModelStore, text: str) -> None:
    store.home.mkdir(parents=True, exist_ok=True)
    (store.home / "gate.toml").write_text(text)


def job_for(store: ModelStore, cases: Iterable[ReviewedCase], recipe: Recipe = RECIPE, **more: Any) -> Job:
    facts = {"parent": "v1", "device": "cpu", "client": "Slicer of Ann", **more}
    return Jobs(store.home).create(JobRequest("tiny", cases=tuple(cases), recipe=recipe, **facts))


def round_of(store: ModelStore, cases: Iterable[ReviewedCase], recipe: Recipe = RECIPE, **more: Any) -> ModelVersion:
    """Run a whole round; returns the version that came of it."""
    job = job_for(store, cases, recipe, **more)
    ended(store, job)
    return store.version("tiny", job.progress()["version"])


def ended(store: ModelStore, job: Job) -> None:
    """Run a round, after which its job is no longer open, as if its process had done it."""
    try:
        run_round(store, job)
    finally:
        job.tell(state="done")


def never(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a stage of a round fail if it is reached."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{name} is not to be called")

    monkeypatch.setattr(rounds_module, name, fail)


def predictions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Collect (version or ``candidate``, case) of every case that is predicted from now on.

    Where a version only looks at a new label, it is called ``v1's glance``.
    """
    asked: list[tuple[str, str]] = []
    original = Evaluator.predict

    def spy(self: Evaluator, case: ReviewedCase) -> Any:
        path = self._folder.path
        who = path.parent.name if path.name == "model" else path.name
        glance = "'s glance" if self._options.profile == PROFILES["balanced"] else ""
        asked.append((who + glance, case.case_id))
        return original(self, case)

    monkeypatch.setattr(Evaluator, "predict", spy)
    return asked


def names(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [row["case"] for row in rows]


# -- a whole round ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def promoted(folder: Path, lab: list[ReviewedCase], tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelStore, Job]:
    """A store in which a round with all cases ran and its candidate serves; nobody may change it."""
    store = ModelStore(tmp_path_factory.mktemp("promoted"))
    add_model(store, "tiny", folder)
    policy(store, LENIENT)
    job = job_for(store, [*lab, replace(lab[0], case_id="kidneys", reviewed=("kidney",), patient="patient 8")])
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.setenv(name, "")
            patch.delenv(name)
        run_round(store, job)
    return store, job


def test_a_candidate_that_passes_the_gate_serves(promoted: tuple[ModelStore, Job]) -> None:
    store, job = promoted
    assert store.current("tiny").version == "v2"
    assert [version.version for version in store.versions("tiny")] == ["v1", "v2"]
    last = store.history("tiny")[-1]
    assert (last["from"], last["to"], last["rollback"]) == ("v1", "v2", False)
    assert last["reason"].startswith("gate: promoted: mean Dice ")
    (told,) = audit_file(store.home).read_text().splitlines()
    assert {"action": "gate", "model": "tiny", "version": "v2", "job": job.id}.items() <= json.loads(told).items()
    assert store.verify("tiny", "v2").version == "v2"
    progress = job.progress()
    assert (progress["version"], progress["outcome"]) == ("v2", "promoted")
    assert progress["message"].startswith("promoted: mean Dice ")
    assert (progress["epoch"], progress["total_epochs"]) == (2, 2)


def test_the_version_says_where_it_comes_from(promoted: tuple[ModelStore, Job], lab: list[ReviewedCase]) -> None:
    store, job = promoted
    record = store.version("tiny", "v2").record
    lineage = record["lineage"]
    assert record["parent"] == lineage["original"] == "v1"
    assert record["origin"] == {"how": "fine-tuned", "from": "10 reviewed cases"}
    assert record["labels"] == {"liver": 1, "spleen": 2}
    assert record["card"] == store.version("tiny", "v1").record["card"]
    assert (lineage["job"], lineage["client"], lineage["device"]) == (job.id, "Slicer of Ann", "cpu")
    assert lineage["recipe"] == RECIPE.as_dict()
    assert lineage["trained_with"] == {"0": {"batch_size": 2, "patch_size": [8, 16, 20]}}
    assert len(lineage["losses"]) == 2
    assert all(np.isfinite(lineage["losses"]))
    assert lineage["left_out"] == {}
    assert lineage["verdict"]["outcome"] == "promoted"
    assert lineage["verdict"]["policy"]["min_cases"] == 1
    assert lineage["seconds"].keys() == {"looking at the new labels", "preparing", "training", "judging"}
    assert {version["baseline"] for version in lineage["verdict"]["comparisons"]} == {"v1"}


def test_every_case_is_recorded_on_the_side_its_patient_is_on(
    promoted: tuple[ModelStore, Job], lab: list[ReviewedCase]
) -> None:
    store, _ = promoted
    version = store.version("tiny", "v2")
    trained, held_out = (version.record["lineage"][key] for key in ("cases", "held_out"))
    judging = [case for case in lab if case.patient in JUDGES]
    assert names(held_out) == [case.case_id for case in judging] == ["case3", "case8", "case9", "case12"]
    assert sorted(names(trained)) == sorted(case.case_id for case in lab if case not in judging)
    by_name = {case.case_id: case for case in lab}
    for row in (*trained, *held_out):
        case = by_name[row["case"]]
        assert row == {"case": case.case_id, "digest": case.digest, "reviewed": list(case.reviewed), **case.facts}
    assert new_cases(store, "tiny", lab) == []
    assert rounds(store, "tiny")[1]["cases"] == 10
    assert "patient" not in json.dumps([trained, held_out])


def test_the_scores_are_those_of_the_published_weights(
    promoted: tuple[ModelStore, Job], lab: list[ReviewedCase]
) -> None:
    store, _ = promoted
    scores = store.version("tiny", "v2").record["lineage"]["scores"]
    assert scores.keys() == {"v1", "candidate"}
    for version, key in (("v1", "v1"), ("v2", "candidate")):
        predictor = NNUNetPredictor(ModelFolder.open(store.version("tiny", version).model_path), NetworkCache())
        for score in scores[key]:
            (case,) = [one for one in lab if one.case_id == score["case"]]
            found = predictor.predict(case.images, PredictOptions(device="cpu")).labels.array_xyz
            reviewed = array_of(case.label)
            for name, value in case.values.items():
                one, other = found == value, reviewed == value
                assert score["dice"][name] == pytest.approx(2 * np.sum(one & other) / (np.sum(one) + np.sum(other)))
    assert scores["v1"] != scores["candidate"], "something was learned"


def test_the_candidate_has_new_weights_and_is_a_model_folder_like_its_parent(
    promoted: tuple[ModelStore, Job],
) -> None:
    store, _ = promoted
    before, after = (ModelFolder.open(store.version("tiny", version).model_path) for version in ("v1", "v2"))
    assert (after.dataset, after.plans, after.folds) == (before.dataset, before.plans, before.folds)
    assert (after.trainer, after.mirror_axes) == (before.trainer, before.mirror_axes)
    old, new = (model.checkpoint("0")["network_weights"] for model in (before, after))
    assert old.keys() == new.keys()
    assert not torch.equal(old["decoder.seg_layers.1.weight"], new["decoder.seg_layers.1.weight"])
    assert not torch.equal(old["encoder.stages.0.0.convs.0.conv.weight"], new["encoder.stages.0.0.convs.0.conv.weight"])


def test_the_report_and_what_further_rounds_need_are_kept(promoted: tuple[ModelStore, Job]) -> None:
    store, job = promoted
    report = store.home / job.progress()["report"]
    assert report == store.home / "reports" / "tiny" / "v2.html"
    text = report.read_text(encoding="utf-8")
    assert [word for word in ("v2", "promoted", "case12", "liver", "reader 0") if word not in text] == []
    assert "could not be written" not in "".join(job.log_tail())
    assert not job.work.exists()
    assert len(list((store.home / "preprocessed" / "tiny").glob("*_seg.b2nd"))) == 10
    kept = {path.name: json.loads(path.read_text()) for path in (store.home / "scores" / "tiny").iterdir()}
    lineage = store.version("tiny", "v2").record["lineage"]
    assert {row["digest"] for row in lineage["held_out"]} == kept["v1.json"].keys() == kept["v2.json"].keys()
    assert list(kept["v2.json"].values()) == lineage["scores"]["candidate"]


# -- verdicts -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize(
    ("gate", "outcome"),
    [
        pytest.param(STRICT, "refused", id="limits violated"),
        pytest.param("", "needs a person", id="too few cases"),
        pytest.param(LENIENT + "automatic = false\n", "needs a person", id="a person decides"),
    ],
)
def test_a_candidate_that_does_not_pass_is_kept_and_does_not_serve(
    tiny: ModelStore, few: list[ReviewedCase], gate: str, outcome: str
) -> None:
    if outcome == "needs a person":  # so small a step violates no limit
        few_steps = replace(RECIPE, learning_rate=1e-9)
    policy(tiny, gate)
    version = round_of(tiny, few, RECIPE if outcome == "refused" else few_steps)
    assert version.version == "v2"
    assert version.record["lineage"]["verdict"]["outcome"] == outcome
    assert tiny.current("tiny").version == "v1"
    assert [step["to"] for step in tiny.history("tiny")] == ["v1"]


def test_a_mistake_in_the_policy_is_told_before_anything_is_done(
    tiny: ModelStore, few: list[ReviewedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy(tiny, "min_case = 1\n")
    never(monkeypatch, "prepare")
    with pytest.raises(ConfigError, match="min_case"):
        run_round(tiny, job_for(tiny, few))
    assert not (tiny.home / "models" / "tiny" / "holdout.json").exists()


@pytest.mark.usefixtures("without_report")
def test_without_a_case_that_judges_a_person_does(tiny: ModelStore, lab: list[ReviewedCase]) -> None:
    chosen = [replace(case, audit=False) for case in lab[:2]]
    version = round_of(tiny, chosen)
    lineage = version.record["lineage"]
    assert (lineage["held_out"], lineage["scores"]) == ([], {"v1": [], "candidate": []})
    assert lineage["verdict"]["outcome"] == "needs a person"
    assert len(lineage["cases"]) == 2


@pytest.mark.usefixtures("without_report")
def test_a_doubtful_label_needs_a_person(tiny: ModelStore, few: list[ReviewedCase]) -> None:
    few[-1] = replace(few[-1], facts={"doubts": ["the liver has ten times the usual volume"]})
    verdict = round_of(tiny, few).record["lineage"]["verdict"]
    assert verdict["outcome"] == "needs a person"
    assert f"look at the label of {few[-1].case_id}: the liver has ten times" in verdict["reasons"][0]


def as_the_model_sees(model: ModelFolder, case: ReviewedCase, folder: Path, change: dict[int, int]) -> ReviewedCase:
    """Give a case the model's own prediction for a label, with values exchanged."""
    found = NNUNetPredictor(model, NetworkCache()).predict(case.images, PredictOptions(device="cpu")).labels
    changed = np.zeros_like(found.array_xyz)
    for old, new in change.items():
        changed[found.array_xyz == old] = new
    path = folder / f"{case.case_id}.nii.gz"
    write_nifti(path, changed, found.grid)
    return replace(case, label=path, values={"liver": 1, "spleen": 2}, facts={})


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize(
    ("change", "odd", "outcome", "reason"),
    [
        pytest.param({1: 2, 2: 1}, 3, "refused", "liver and spleen look exchanged", id="exchanged"),
        pytest.param({}, 3, "refused", "nothing is left of what the model saw", id="emptied"),
        pytest.param({1: 2, 2: 1}, 1, "needs a person", "liver and spleen look exchanged", id="one exchanged"),
        pytest.param({1: 1, 2: 2}, 3, "promoted", "mean Dice ", id="unchanged"),
    ],
)
def test_new_labels_that_look_wrong_to_the_parent_never_make_a_version_that_serves(
    tiny: ModelStore,
    few: list[ReviewedCase],
    tmp_path: Path,
    change: dict[int, int],
    odd: int,
    outcome: str,
    reason: str,
) -> None:
    policy(tiny, LENIENT)
    model = ModelFolder.open(tiny.version("tiny", "v1").model_path)
    changes = [change] * odd + [{1: 1, 2: 2}] * (5 - odd)
    cases = [as_the_model_sees(model, case, tmp_path, each) for case, each in zip(few, changes, strict=True)]
    verdict = round_of(tiny, cases, replace(RECIPE, learning_rate=1e-9)).record["lineage"]["verdict"]
    assert (verdict["outcome"], tiny.current("tiny").version) == (outcome, "v2" if outcome == "promoted" else "v1")
    assert reason in verdict["summary"]
    assert sum(text.startswith("look at the label of ") for text in verdict["reasons"]) == (
        0 if outcome == "promoted" else odd
    )


@pytest.mark.usefixtures("without_report")
def test_a_candidate_that_cannot_predict_a_case_is_refused(
    tiny: ModelStore, few: list[ReviewedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Evaluator.predict

    def predict(self: Evaluator, case: ReviewedCase) -> Any:
        if self._folder.path.name == "candidate" and case.patient == JUDGES[1]:
            raise PredictionError("the network failed")
        return original(self, case)

    monkeypatch.setattr(Evaluator, "predict", predict)
    lineage = round_of(tiny, few).record["lineage"]
    assert lineage["verdict"]["outcome"] == "refused"
    assert lineage["verdict"]["reasons"][0] == "cannot predict case8: the network failed"
    assert names(lineage["held_out"]) == ["case3", "case8", "case9"]
    assert names(lineage["scores"]["candidate"]) == ["case3", "case9"]


# -- cases --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_report")
def test_patients_who_judge_never_train_whatever_comes_in_later_rounds(
    tiny: ModelStore, lab: list[ReviewedCase]
) -> None:
    versions = [
        round_of(tiny, [case for case in lab if case.case_id in ("case0", "case2", "case3", "case9")]),
        round_of(tiny, [replace(case) for case in reversed(lab)], parent="v2"),
        round_of(tiny, [replace(case) for case in lab if case.case_id not in ("case0", "case9")], parent="v3"),
    ]
    owner = {case.case_id: case.patient for case in lab}
    sides = [
        {key: {owner[name] for name in names(version.record["lineage"][key])} for key in ("cases", "held_out")}
        for version in versions
    ]
    trained = set().union(*(side["cases"] for side in sides))
    judged = set().union(*(side["held_out"] for side in sides))
    assert trained.isdisjoint(judged)
    assert judged == set(JUDGES)
    assert [len(version.record["lineage"]["cases"]) for version in versions] == [2, 10, 9]
    assert [version.record["parent"] for version in versions] == ["v1", "v2", "v3"]
    assert versions[-1].record["lineage"]["original"] == "v1"
    assert versions[-1].record["lineage"]["scores"].keys() == {"v3", "v1", "candidate"}


@pytest.mark.usefixtures("without_report")
def test_a_version_predicts_a_held_out_case_once_and_its_label_again_only_when_it_changes(
    tiny: ModelStore, lab: list[ReviewedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [case for case in lab if case.case_id in ("case0", "case2", "case3", "case8")]
    asked = predictions(monkeypatch)
    round_of(tiny, chosen)
    judged = [("v1", "case3"), ("v1", "case8"), ("candidate", "case3"), ("candidate", "case8")]
    assert asked == [*(("v1's glance", f"case{number}") for number in (0, 2, 3, 8)), *judged]
    asked.clear()
    more = [replace(case) for case in lab if case in chosen or case.case_id == "case9"]
    found = round_of(tiny, more, parent="v2").record["lineage"]["scores"]
    assert asked == [
        ("v2's glance", "case9"),
        ("v2", "case9"),
        ("v1", "case9"),
        *(("candidate", f"case{number}") for number in (3, 8, 9)),
    ]
    assert [names(found[name]) for name in ("v2", "v1")] == [["case3", "case8", "case9"]] * 2
    asked.clear()
    changed = [replace(case, reviewed=("liver",)) if case.case_id == "case8" else replace(case) for case in more]
    round_of(tiny, changed, parent="v3")
    assert asked[:3] == [("v3's glance", "case8"), ("v3", "case8"), ("v1", "case8")]


@pytest.mark.usefixtures("without_report")
def test_a_case_that_got_another_name_is_still_one_case(tiny: ModelStore, few: list[ReviewedCase]) -> None:
    round_of(tiny, few)
    renamed = [replace(case, case_id=f"new-{case.case_id}") for case in few]
    lineage = round_of(tiny, renamed, replace(RECIPE, seed=1), parent="v2").record["lineage"]
    for scores in lineage["scores"].values():
        assert names(scores) == ["new-case3", "new-case8", "new-case9"]


@pytest.mark.usefixtures("without_report")
def test_the_same_files_under_two_names_judge_twice_without_an_error(tiny: ModelStore, few: list[ReviewedCase]) -> None:
    lineage = round_of(tiny, [*few, replace(few[0], case_id="copy")]).record["lineage"]
    assert names(lineage["scores"]["candidate"]) == ["case3", "case8", "case9", "copy"]


@pytest.mark.usefixtures("without_report")
def test_cases_without_a_structure_or_channel_of_the_model_are_ignored(
    tiny: ModelStore, few: list[ReviewedCase]
) -> None:
    foreign = [
        replace(few[-1], case_id="kidneys", reviewed=("kidney",)),
        replace(few[-1], case_id="two-channels", images=few[-1].images * 2),
    ]
    lineage = round_of(tiny, [*foreign, *few]).record["lineage"]
    assert {*names(lineage["cases"]), *names(lineage["held_out"])} == {case.case_id for case in few}
    assert lineage["left_out"] == {}
    with pytest.raises(TrainingError, match=r"None of the 2 reviewed cases fits tiny: .*1 channel.*liver, spleen"):
        run_round(tiny, job_for(tiny, foreign))


def test_cases_of_judging_patients_alone_train_nothing(
    tiny: ModelStore, few: list[ReviewedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    HoldOut(tiny.home / "models" / "tiny" / "holdout.json").split(few)
    never(monkeypatch, "prepare")
    with pytest.raises(TrainingError, match="All 3 reviewed cases belong to patients that judge"):
        run_round(tiny, job_for(tiny, few[:3]))


@pytest.mark.usefixtures("without_report")
def test_broken_cases_of_either_side_cost_nothing_but_themselves(
    tiny: ModelStore, tmp_path: Path, few: list[ReviewedCase]
) -> None:
    def broken(name: str, patient: str, damage: Callable[[Path], Any]) -> ReviewedCase:
        case = make_case(tmp_path, name, shape=SHAPE, patient=patient, seed=40)
        damage(case.images[0])
        return case

    cases = [
        *few,
        broken("gone-training", "patient 0", Path.unlink),
        broken("gone-judging", "patient 3", Path.unlink),
        broken("garbage-training", "patient 0", lambda path: path.write_bytes(b"garbage")),
        broken("garbage-judging", "patient 3", lambda path: path.write_bytes(b"rubbish")),
    ]
    lineage = round_of(tiny, cases).record["lineage"]
    assert names(lineage["held_out"]) == ["case3", "case8", "case9"]
    assert names(lineage["cases"]) == ["case0", "case1"]
    assert sorted(lineage["left_out"]) == ["garbage-judging", "garbage-training", "gone-judging", "gone-training"]
    assert all(f"{name}_0000.nii" in reason for name, reason in lineage["left_out"].items())
    assert len(lineage["unusable"]) == 2  # what can be read has been looked at, and is not new the next time
    assert lineage["verdict"]["outcome"] == "promoted"


def test_when_no_file_is_there_the_round_says_so(tiny: ModelStore, tmp_path: Path) -> None:
    case = make_case(tmp_path, "gone", shape=SHAPE)
    case.images[0].unlink()
    with pytest.raises(TrainingError, match=r"None of the reviewed cases can be read.*gone_0000\.nii"):
        run_round(tiny, job_for(tiny, [case]))


# -- folds and versions -------------------------------------------------------------------------------------------


def test_an_unknown_fold_is_told_before_anything_is_prepared(
    tiny: ModelStore, few: list[ReviewedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    never(monkeypatch, "prepare")
    with pytest.raises(TrainingError, match="The recipe asks for fold 3, 4; tiny has fold 0"):
        run_round(tiny, job_for(tiny, few, replace(RECIPE, folds=("0", "3", "4"))))
    assert [version.version for version in tiny.versions("tiny")] == ["v1"]


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize(("chosen", "trained"), [((), ("0", "1")), (("1",), ("1",))])
def test_all_folds_are_trained_or_those_of_the_recipe(
    store: ModelStore, tmp_path: Path, few: list[ReviewedCase], chosen: tuple[str, ...], trained: tuple[str, ...]
) -> None:
    add_model(store, "tiny", make_model_folder(tmp_path / "two", folds=("0", "1"), **MODEL))
    version = round_of(store, few, replace(RECIPE, folds=chosen, epochs=1))
    parent, candidate = (ModelFolder.open(one.model_path) for one in (store.version("tiny", "v1"), version))
    assert candidate.folds == trained
    for fold in trained:
        before, after = (model.checkpoint(fold)["network_weights"] for model in (parent, candidate))
        assert max(float((before[name] - after[name]).abs().max()) for name in before) < 0.01, "of the same fold"
    assert tuple(version.record["folds"]) == tuple(version.record["lineage"]["trained_with"]) == trained
    assert len(version.record["lineage"]["losses"]) == 1


def test_a_parent_that_is_not_there_is_an_error(tiny: ModelStore, few: list[ReviewedCase]) -> None:
    with pytest.raises(ModelNotAvailable, match="tiny has no version v7"):
        run_round(tiny, job_for(tiny, few, parent="v7"))


@pytest.mark.usefixtures("without_report")
def test_the_same_training_again_makes_no_second_version_and_says_so(tiny: ModelStore, few: list[ReviewedCase]) -> None:
    policy(tiny, STRICT)
    round_of(tiny, few)
    policy(tiny, LENIENT)
    with pytest.raises(TrainingError, match=r"the very weights of v2.*it is promoted.*`mshub promote tiny v2`"):
        round_of(tiny, few)
    assert [version.version for version in tiny.versions("tiny")] == ["v1", "v2"]
    assert tiny.current("tiny").version == "v1"


# -- interrupted --------------------------------------------------------------------------------------------------


def killing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Let the process die where `owner.name` is called."""

    def die(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, die)


@pytest.mark.usefixtures("without_report")
def test_a_job_killed_before_its_promotion_promotes_without_training_again(
    tiny: ModelStore, few: list[ReviewedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_for(tiny, few)
    with monkeypatch.context() as patch:
        killing(patch, ModelStore, "promote")
        with pytest.raises(KeyboardInterrupt):
            run_round(tiny, job)
    assert tiny.current("tiny").version == "v1"
    for stage in ("prepare", "train_fold", "judge"):
        never(monkeypatch, stage)
    run_round(tiny, job)
    assert [version.version for version in tiny.versions("tiny")] == ["v1", "v2"]
    assert tiny.current("tiny").version == "v2"
    assert job.progress()["outcome"] == "promoted"
    assert not job.work.exists()


def test_a_job_killed_after_its_promotion_does_not_promote_again(
    tiny: ModelStore, few: list[ReviewedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person may have rolled it back meanwhile."""
    job = job_for(tiny, few)
    killing(monkeypatch, rounds_module, "report_round")
    with pytest.raises(KeyboardInterrupt):
        run_round(tiny, job)
    assert tiny.current("tiny").version == "v2"
    tiny.rollback("tiny")
    monkeypatch.setattr(rounds_module, "report_round", lambda *_: None)
    run_round(tiny, job)
    assert tiny.current("tiny").version == "v1"
    assert len(tiny.history("tiny")) == 3


def test_a_version_promoted_meanwhile_goes_on_serving(
    tiny: ModelStore, few: list[ReviewedCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidate passed against another version than the one that serves now."""
    add_model(tiny, "tiny", make_model_folder(tmp_path / "other", seed=4, **MODEL))
    publish, reported = ModelStore.publish, []

    def meanwhile(self: ModelStore, *args: Any, **options: Any) -> ModelVersion:
        version = publish(self, *args, **options)
        self.promote("tiny", "v2", "a person did")
        return version

    job = job_for(tiny, few)
    monkeypatch.setattr(ModelStore, "publish", meanwhile)
    monkeypatch.setattr(rounds_module, "report_round", lambda _store, _job, version: reported.append(version.version))
    for _ in range(2):  # and so it is when the job is started again
        with pytest.raises(StoreError, match=r"v3 passed the gate, but v2 was promoted meanwhile.*promote tiny v3`"):
            run_round(tiny, job)
        assert tiny.current("tiny").version == "v2"
        assert len(tiny.history("tiny")) == 2
    assert [version.version for version in tiny.versions("tiny")] == ["v1", "v2", "v3"]
    assert reported == ["v3", "v3"], "the person who decides has a report to look at"


@pytest.mark.usefixtures("without_report")
def test_a_version_promoted_before_the_judging_is_what_the_candidate_is_compared_with(
    tiny: ModelStore, few: list[ReviewedCase], tmp_path: Path
) -> None:
    add_model(tiny, "tiny", make_model_folder(tmp_path / "other", seed=4, **MODEL))
    tiny.promote("tiny", "v2", "a person did")
    lineage = round_of(tiny, few, parent="v1").record["lineage"]
    assert lineage["scores"].keys() == {"v2", "candidate"}


@pytest.mark.usefixtures("without_report")
def test_a_stopped_job_goes_on_where_it_was(
    tiny: ModelStore, few: list[ReviewedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in each of its stages, it does nothing twice and ends as if nobody had stopped it."""
    job, asked = job_for(tiny, few), predictions(monkeypatch)
    stages: list[str] = []
    stops = ["looking at new label 4 of 5", "preparing case 1 of 2", "epoch 1", "judging the candidate: case 2 of 3"]
    tell = Job.tell

    def stopping(self: Job, **facts: Any) -> None:
        tell(self, **facts)
        stages.append(facts.get("stage") or f"epoch {facts.get('epoch')}")
        if stops and stages[-1] == stops[0]:
            stops.pop(0)
            self.ask_to_stop()

    monkeypatch.setattr(Job, "tell", stopping)
    for prepared in (0, 1, 2, 2):
        with pytest.raises(Stopped):
            run_round(tiny, job)
        assert len(list((tiny.home / "preprocessed" / "tiny").glob("*.json"))) == prepared
        assert [version.version for version in tiny.versions("tiny")] == ["v1"]
        (job.path / "stop").unlink()
    run_round(tiny, job)
    assert stops == []
    assert [stage for stage in stages if stage in ("epoch 1", "epoch 2")] == ["epoch 1", "epoch 2"]
    assert len(asked) == len(set(asked)) == 11, "no case was predicted twice"
    assert tiny.current("tiny").version == "v2"


# -- from scratch -------------------------------------------------------------------------------------------------

DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}, "name": "Abdomen"}


@pytest.fixture
def planned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """nnU-Net plans the tiny network, whatever the cases; collects on how many cases it did."""
    asked: list[int] = []
    plans = json.loads((folder / "plans.json").read_text())

    def plan(cases: int) -> dict[str, Any]:
        asked.append(cases)
        return dict(plans)

    monkeypatch.setattr(planning, "_plan", plan)
    return asked


def scratch(store: ModelStore, cases: Iterable[ReviewedCase]) -> Job:
    recipe = replace(FROM_SCRATCH, epochs=1, iterations=2)
    return job_for(store, cases, recipe, parent=None, dataset=DATASET)


@pytest.mark.usefixtures("without_report")
def test_a_model_trained_from_scratch_waits_for_a_person(
    store: ModelStore, few: list[ReviewedCase], planned: list[int]
) -> None:
    job = scratch(store, few)
    run_round(store, job)
    version = store.version("tiny", "v1")
    lineage = version.record["lineage"]
    assert (version.record["parent"], lineage["original"]) == (None, None)
    assert version.record["origin"] == {"how": "trained here", "from": "2 reviewed cases"}
    assert lineage["verdict"]["outcome"] == "needs a person"
    assert lineage["scores"].keys() == {"candidate"}
    assert lineage["seconds"].keys() == {"looking at the new labels", "planning", "preparing", "training", "judging"}
    assert planned == [2], "cases that judge are not planned on"
    assert "tiny" not in store.installed()
    assert store.catalogue().get("tiny").title == "Abdomen"
    store.promote("tiny", "v1", "a person looked at it")
    assert store.current("tiny").version == "v1"


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("gate", [LENIENT, LENIENT.replace("first_mean_dice = 0.0", "first_mean_dice = 0.99")])
def test_a_first_version_serves_by_itself_only_where_the_gate_says_so(
    store: ModelStore, few: list[ReviewedCase], planned: list[int], gate: str
) -> None:
    policy(store, gate)
    run_round(store, scratch(store, few))
    assert ("tiny" in store.installed()) == (gate == LENIENT)


@pytest.mark.usefixtures("without_report")
def test_a_killed_training_from_scratch_is_not_planned_again(
    store: ModelStore, few: list[ReviewedCase], planned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = scratch(store, few)
    with monkeypatch.context() as patch:
        killing(patch, rounds_module, "train_fold")
        with pytest.raises(KeyboardInterrupt):
            run_round(store, job)
    run_round(store, job)
    assert planned == [2]
    assert [version.version for version in store.versions("tiny")] == ["v1"]


def test_a_training_from_scratch_needs_a_case_with_one_of_its_structures(
    store: ModelStore, few: list[ReviewedCase]
) -> None:
    dataset = {**DATASET, "labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}}
    kidneys = [replace(case, reviewed=("kidney",)) for case in few]
    with pytest.raises(TrainingError, match=r"expected 1 channel.*at least one of liver, spleen reviewed"):
        run_round(store, job_for(store, kidneys, FROM_SCRATCH, parent=None, dataset=dataset))


@pytest.mark.usefixtures("without_report", "planned")
def test_a_first_version_whose_job_was_killed_after_it_was_published_still_gets_its_card(
    store: ModelStore, few: list[ReviewedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = scratch(store, few)
    with monkeypatch.context() as patch:
        killing(patch, ModelStore, "keep_card")
        with pytest.raises(KeyboardInterrupt):
            run_round(store, job)
    assert [version.version for version in store.versions("tiny")] == ["v1"]
    run_round(store, job)
    assert store.catalogue().get("tiny").title == "Abdomen"


@pytest.mark.usefixtures("without_report")
def test_a_model_trained_from_scratch_can_be_continued(
    store: ModelStore, few: list[ReviewedCase], planned: list[int]
) -> None:
    policy(store, LENIENT)
    ended(store, scratch(store, few))
    version = round_of(store, [replace(case) for case in few])
    assert (version.version, version.record["parent"]) == ("v2", "v1")
    assert version.record["lineage"]["original"] == "v1"
    assert store.current("tiny").version == "v2"


def test_the_hold_out_takes_the_patients_these_tests_count_on() -> None:
    assert [f"patient {number}" for number in range(10) if patient_number(f"patient {number}") < 1 / 3] == list(JUDGES)


@pytest.mark.skipif(not is_installed(), reason="OpenVINO is an extra: make openvino")
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_openvino_prepares_what_is_about_to_serve(
    promoted: tuple[ModelStore, Job], engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSHUB_ENGINE", engine)
    store = ModelStore(tmp_path / "home")
    shutil.copytree(promoted[0].home / "models", store.home / "models")
    rounds_module._prepare(store, store.current("tiny"))
    folds = ModelFolder.open(store.current("tiny").model_path).folds
    kept = list((store.home / "openvino").glob(f"*{openvino_network.SUFFIX}"))
    assert len(kept) == (len(folds) if engine == "auto" else 0)
