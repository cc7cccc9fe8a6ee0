"""The next case: leased to one client, explained, spread over patients, now and then a random one for the hold-out."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fastapi import HTTPException

from lib.app import MSHubApp
from mshub.case_folders import PATIENTS
from mshub.holdout import HoldOut
from mshub.selection import STRATEGIES
from mshub.store import ModelStore
from mshub.uncertainty import StructureUncertainty, Uncertainty

pytestmark = pytest.mark.usefixtures("monailabel_here")

ONES = nib.Nifti1Image(np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6), np.diag([1.0, 2.0, 3.0, 1.0]))
EVERY = list(STRATEGIES)
OF_WAITING = [name for name, strategy in STRATEGIES.items() if not strategy.of_labelled]
LOOKS_AT_SCORES = ["uncertainty", "worst_first", "hybrid"]
MakeClinic = Callable[..., MSHubApp]


@pytest.fixture
def make_clinic(installed: ModelStore, tmp_path: Path) -> MakeClinic:
    """Return a function that makes an app with so many tiny images and the model ``tiny`` (liver, spleen)."""

    def make(count: int, patients: Sequence[str] = (), **conf: str) -> MSHubApp:
        studies = tmp_path / "studies"
        studies.mkdir(exist_ok=True)
        names = [f"case{number:03d}" for number in range(count)]
        for name in names:
            nib.save(ONES, studies / f"{name}.nii.gz")
        if patients:
            rows = [f"{name},{patient}" for name, patient in zip(names, patients, strict=True)]
            (studies / PATIENTS).write_text("\n".join(["case,patient", *rows]) + "\n")
        return MSHubApp(str(tmp_path / "app"), str(studies), {"device": "cpu", "audit_every": "0", **conf})

    return make


def measured(agreement: float, embedding: Sequence[float] = (0.0,), empty: bool = False) -> Uncertainty:
    liver = StructureUncertainty(0.0 if empty else 10.0, mirror_dice=None if empty else agreement)
    return Uncertainty({"liver": liver, "spleen": StructureUncertainty(5.0, mirror_dice=agreement)}, 0.1, 0.2,
                       tuple(embedding))  # fmt: skip


def know(app: MSHubApp, scores: dict[str, Uncertainty]) -> None:
    for image, uncertainty in scores.items():
        app.active_learning.casebook.index.keep_score(image, "tiny", "v1", uncertainty)


def ask(app: MSHubApp, strategy: str = "uncertainty", client: str = "ann", **more: Any) -> dict[str, Any]:
    return app.next_case({"strategy": strategy, "client_id": client, "model": "tiny", **more})


def label(app: MSHubApp, image: str) -> None:
    datastore = app.datastore()
    datastore.save_prediction(image, Path(datastore.get_image_uri(image)), "final", {})


# -- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", OF_WAITING)
@pytest.mark.parametrize("known", ["nothing", "some", "all"])
def test_every_strategy_works_whatever_is_known(make_clinic: MakeClinic, strategy: str, known: str) -> None:
    app = make_clinic(6)
    images = sorted(app.datastore().list_images())
    some = {"nothing": [], "some": images[:3], "all": images}[known]
    know(app, {image: measured(0.5 + number / 20, [number, 1]) for number, image in enumerate(some)})
    offered = [ask(app, strategy) for _ in images]
    assert sorted(sample["id"] for sample in offered) == images
    assert all(sample["why"] and Path(sample["path"]).is_file() for sample in offered)
    assert [sample["waiting"] for sample in offered] == [6] * 6
    assert {(sample["model"], sample["version"]) for sample in offered} == {("tiny", "v1")}


@pytest.mark.parametrize("strategy", LOOKS_AT_SCORES)
def test_what_the_model_is_least_sure_of_comes_first_and_says_so(make_clinic: MakeClinic, strategy: str) -> None:
    app = make_clinic(4)
    know(app, {"case000": measured(0.9), "case001": measured(0.31), "case002": measured(0.8)})
    sample = ask(app, strategy)
    if strategy == "hybrid":  # variety among the least sure: with nothing labelled, the most typical of these
        assert sample["id"] in ("case000", "case001", "case002")
        assert "unsure" in sample["why"]
    else:
        assert sample["id"] == "case001"
        assert "0.31" in sample["why"]


def test_scores_of_another_version_do_not_count(make_clinic: MakeClinic) -> None:
    app = make_clinic(2)
    app.active_learning.casebook.index.keep_score("case001", "tiny", "v0", measured(0.1))
    assert "not looked at yet" in ask(app)["why"]


def test_first_goes_through_the_list(make_clinic: MakeClinic) -> None:
    app = make_clinic(3)
    assert [ask(app, "first")["id"] for _ in range(3)] == ["case000", "case001", "case002"]


def test_what_a_client_wants_to_skip_is_offered_only_when_nothing_else_is_left(make_clinic: MakeClinic) -> None:
    app = make_clinic(2)
    assert ask(app, "first", skip=["case000"])["id"] == "case001"
    assert ask(app, "first", client="ben", skip=["case000"])["id"] == "case000"


def test_patients_nobody_has_looked_at_come_first(make_clinic: MakeClinic) -> None:
    app = make_clinic(6, ["p", "p", "p", "q", "q", "r"])
    label(app, "case000")
    know(app, {f"case00{number}": measured(0.2 if number < 3 else 0.9) for number in range(6)})
    order = [ask(app)["id"] for _ in range(5)]
    assert {order[0], order[1]} <= {"case003", "case004", "case005"}
    patients = {"case001": "p", "case002": "p", "case003": "q", "case004": "q", "case005": "r"}
    assert [patients[image] for image in order[:2]] in (["q", "r"], ["r", "q"])


def test_a_labelled_case_that_looks_wrong_is_offered_again(make_clinic: MakeClinic) -> None:
    app = make_clinic(3)
    for image in ("case000", "case001"):
        label(app, image)
        know(app, {image: measured(0.95)})
    look = app.active_learning.casebook.index.keep_label_dice
    look("case000", "tiny", "v1", {"liver": 0.93, "spleen": 0.9}, label_state="1")
    look("case001", "tiny", "v1", {"liver": 0.94, "spleen": 0.3}, label_state="1")
    sample = ask(app, "relabel")
    assert sample["id"] == "case001"
    assert "spleen" in sample["why"]
    assert "0.30" in sample["why"]


def test_without_labels_to_doubt_relabel_says_so(make_clinic: MakeClinic) -> None:
    sample = ask(make_clinic(2), "relabel")
    assert "id" not in sample
    assert "no label looks wrong" in sample["why"]


# -- for which model --------------------------------------------------------------------------------------------------


def test_a_client_that_names_no_model_is_offered_cases_for_the_one_it_used(make_clinic: MakeClinic) -> None:
    sample = make_clinic(2).next_sample({"strategy": "uncertainty", "client_id": "slicer"})
    assert sample["model"] == "tiny"  # the only one there is


def unopenable(app: MSHubApp, monkeypatch: pytest.MonkeyPatch, *images: str, status: int = 422) -> None:
    """Let some images be ones that cannot be opened, as series of a PACS with slices missing are."""
    datastore = app.datastore()
    path_of = datastore.get_image_uri

    def uri(image: str) -> str:
        if image in images:
            raise HTTPException(status, f"found a gap in {image}")
        return str(path_of(image))

    monkeypatch.setattr(datastore, "get_image_uri", uri)
    monkeypatch.setattr(datastore, "get_image_info", lambda image: {})


def test_a_case_that_cannot_be_opened_is_passed_over_and_said(
    make_clinic: MakeClinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_clinic(3)
    unopenable(app, monkeypatch, "case000", "case001")
    case = ask(app, "first")
    assert case["id"] == "case002"
    assert case["path"].endswith("case002.nii.gz")
    assert case["passed_over"] == {image: f"found a gap in {image}" for image in ("case000", "case001")}
    assert "id" not in ask(app, "first", client="bob"), "nobody else is offered them meanwhile"


def test_when_no_case_can_be_opened_the_reason_is_told(
    make_clinic: MakeClinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_clinic(2)
    unopenable(app, monkeypatch, "case000", "case001")
    with pytest.raises(HTTPException, match="found a gap in case000"):
        ask(app, "first")


def test_a_pacs_that_does_not_answer_is_no_reason_to_pass_over_a_case(
    make_clinic: MakeClinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_clinic(2)
    unopenable(app, monkeypatch, "case000", status=503)
    with pytest.raises(HTTPException) as refused:
        ask(app, "first")
    assert refused.value.status_code == 503


def test_an_unknown_model_is_a_404(make_clinic: MakeClinic) -> None:
    with pytest.raises(Exception, match="nonsense"):
        ask(make_clinic(1), model="nonsense")


# -- leases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", OF_WAITING)
def test_two_people_never_get_the_same_case(make_clinic: MakeClinic, strategy: str) -> None:
    app = make_clinic(4)
    offered = [ask(app, strategy, client)["id"] for client in ("ann", "ben", "ann", "ben")]
    assert len(set(offered)) == 4


def test_two_clients_asking_at_once_200_times_each_get_all_400_cases_once(make_clinic: MakeClinic) -> None:
    app = make_clinic(400)
    know(app, {f"case{number:03d}": measured(random.Random(number).random(), [number]) for number in range(300)})
    offered: dict[str, list[str]] = {"ann": [], "ben": []}

    def work(client: str) -> None:
        for _ in range(200):
            offered[client].append(ask(app, "uncertainty", client)["id"])

    threads = [threading.Thread(target=work, args=(client,)) for client in offered]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = Counter(image for images in offered.values() for image in images)
    assert set(counted) == set(app.datastore().list_images()), "none is lost"
    assert set(counted.values()) == {1}, "none is handed out twice"


def test_who_has_every_case_gets_one_of_them_again_and_another_is_told_when(make_clinic: MakeClinic) -> None:
    app = make_clinic(2)
    mine = [ask(app)["id"], ask(app)["id"]]
    assert ask(app)["id"] in mine
    sample = ask(app, client="ben")
    assert "id" not in sample
    assert "all 2 cases that wait are with other people" in sample["why"]


def test_a_lease_ends(make_clinic: MakeClinic) -> None:
    app = make_clinic(1, lease_minutes="0.001")
    assert ask(app)["id"] == "case000"
    time.sleep(0.1)
    assert ask(app, client="ben")["id"] == "case000"


def test_a_submitted_label_ends_the_lease(make_clinic: MakeClinic) -> None:
    app = make_clinic(1)
    image = ask(app)["id"]
    label(app, image)
    app.on_save_label(image, image)
    assert app.active_learning.casebook.index.leases() == {}


# -- the hold-out -----------------------------------------------------------------------------------------------------


def judging(app: MSHubApp) -> set[str]:
    return HoldOut(app.store.home / "models" / "tiny" / "holdout.json").judging(app.datastore().list_images())


@pytest.mark.parametrize("strategy", ["uncertainty", "first", "diversity"])
def test_cases_of_patients_who_judge_are_drawn_at_random_every_fifth_time_and_never_chosen(
    make_clinic: MakeClinic, strategy: str
) -> None:
    app = make_clinic(60, audit_every="5")
    judges = judging(app)
    assert 10 <= len(judges) <= 30
    know(app, {image: measured(0.1 if image in judges else 0.9) for image in app.datastore().list_images()})
    offered = [ask(app, strategy) for _ in range(20)]
    assert [sample["audit"] for sample in offered] == ([False] * 4 + [True]) * 4
    assert {sample["id"] for sample in offered if sample["audit"]} <= judges
    assert not {sample["id"] for sample in offered if not sample["audit"]} & judges
    assert "each fifth case" in offered[4]["why"]


def test_an_audit_is_noted_as_random_so_that_it_may_judge(make_clinic: MakeClinic) -> None:
    app = make_clinic(30, audit_every="1")
    sample = ask(app)
    assert sample["audit"]
    assert set(app.datastore().get_image_info(sample["id"])["strategy"]) == {"random"}
    chosen = make_clinic(30, audit_every="0")
    sample = ask(chosen, "first")
    assert set(chosen.datastore().get_image_info(sample["id"])["strategy"]) == {"first"}


def test_when_only_patients_who_judge_are_left_they_are_offered_at_random(make_clinic: MakeClinic) -> None:
    app = make_clinic(12, audit_every="5")
    judges = judging(app)
    offered = [ask(app) for _ in range(12)]
    assert {sample["id"] for sample in offered} == set(app.datastore().list_images()), "none is lost"
    assert {sample["id"] for sample in offered if sample["audit"]} == judges


def test_random_is_an_audit_whoever_it_draws(make_clinic: MakeClinic) -> None:
    app = make_clinic(12, audit_every="5")
    offered = [ask(app, "random") for _ in range(12)]
    assert all(sample["audit"] for sample in offered)


# -- when it no longer pays -------------------------------------------------------------------------------------------


def test_labels_submitted_as_the_model_made_them_are_a_reason_to_stop(make_clinic: MakeClinic) -> None:
    app = make_clinic(20)
    for number in range(12):
        app.active_learning.casebook.index.keep_agreement(
            f"case{number:03d}", "tiny", "v1", {"liver": 0.98}, 7, score=0.9
        )
    assert "nearly as the model made them" in ask(app)["hint"]


def test_nothing_is_said_without_evidence(make_clinic: MakeClinic) -> None:
    assert "hint" not in ask(make_clinic(2))
