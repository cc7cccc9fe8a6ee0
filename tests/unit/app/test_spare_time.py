"""What the server does while nobody needs it: it looks at cases, makes batches of pre-labels, and always gives way."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import HTTPException
from fastapi.testclient import TestClient

from factories import make_image
from lib import datastore as datastore_module
from lib.activelearning import spare_time as spare_time_module
from lib.activelearning.case_look import CaseLook
from lib.activelearning.spare_time import SpareTime
from lib.app import MSHubApp
from lib.conf import Config
from lib.infers import results_folder
from mshub.errors import Interrupted, MSHubError, PredictionError
from mshub.nnunet.engine import Engine
from mshub.store import ModelStore, ModelVersion
from mshub.uncertainty import Uncertainty
from mshub.volume_io import read_volume, write_volume
from waiting import eventually

pytestmark = pytest.mark.usefixtures("monailabel_here")

SHAPE = (29, 23, 14)
NAMES = ("a", "b", "c")


@pytest.fixture
def app(installed: ModelStore, tmp_path: Path) -> MSHubApp:
    """The app with the model ``tiny`` and three images, nobody at work."""
    for number, name in enumerate(NAMES):
        make_image(tmp_path / "studies" / f"{name}.nii.gz", SHAPE, seed=number)
    conf = {"device": "cpu", "profile": "balanced", "audit_every": "0"}
    return MSHubApp(str(tmp_path / "app"), str(tmp_path / "studies"), conf)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle server is one that nobody asks right now."""
    for name in ("IDLE_S", "BETWEEN_S", "PAUSE_S", "TROUBLE_S"):
        monkeypatch.setattr(spare_time_module, name, 0.001)


@pytest.fixture
def spare(app: MSHubApp) -> SpareTime:
    """The thread's work, one case at a time, by hand."""
    return spare_time_of(app)


def spare_time_of(app: MSHubApp, config: Config | None = None) -> SpareTime:
    look = CaseLook(app.active_learning.casebook, app._task, app._studies, app._infer_in_turn)
    learning = app.active_learning
    facts = (learning.casebook, learning.prelabels, app.store, config or app.config, app.activity, app.jobs)
    time.sleep(0.01)
    return SpareTime(*facts, look, app._studies, app._served, app._modalities)


@pytest.fixture
def running(app: MSHubApp) -> Iterator[SpareTime]:
    """The thread itself."""
    spare = spare_time_of(app)
    spare.start()
    yield spare
    spare.stop()
    spare.join(30)


until = partial(eventually, seconds=60, every_s=0.02)


def known(app: MSHubApp) -> set[str]:
    return set(app.active_learning.casebook.index.scores("tiny", "v1"))


def submit(app: MSHubApp, image: str) -> None:
    """Submit the model's own label, a corner of it painted over."""
    answer = app.infer({"model": "tiny", "image": image, "save_label": True})
    label = read_volume(Path(answer["file"]))
    array = label.array_xyz.copy()
    array[:8] = 0
    path = Path(answer["file"]).with_name(f"{image}.nii.gz")
    write_volume(path, array, label.grid)
    info = [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]
    app.datastore().save_label(image, str(path), "final", {"label_info": info})


# -- looking ----------------------------------------------------------------------------------------------------------


def test_waiting_cases_are_looked_at_one_by_one_until_all_are_known(app: MSHubApp, spare: SpareTime) -> None:
    for count in (1, 2, 3):
        assert spare.once() == 0.0
        assert len(known(app)) == count
    assert spare.once() > 0.0
    assert app.next_sample({"strategy": "uncertainty", "client_id": "ann"})["why"].startswith("the model is least sure")
    assert app.datastore().get_labels_by_image_id("a") == {}, "a look leaves no label"


def test_what_a_look_measures_is_what_a_prediction_measures(app: MSHubApp, spare: SpareTime) -> None:
    spare.once()
    (image,) = known(app)
    looked = app.active_learning.casebook.index.score(image, "tiny", "v1")
    answer = app.infer({"model": "tiny", "image": image})
    Path(answer["file"]).unlink()
    assert looked is not None
    assert looked.as_dict(embedding=False) == {
        key: value for key, value in answer["params"]["uncertainty"].items() if key != "embedding"
    }


def test_a_prediction_for_a_client_is_kept_and_not_made_again(app: MSHubApp, spare: SpareTime) -> None:
    Path(app.infer({"model": "tiny", "image": "b", "client_id": "ann"})["file"]).unlink()
    assert known(app) == {"b"}
    time.sleep(0.01)
    spare.once()
    spare.once()
    assert spare.once() > 0
    assert known(app) == set(NAMES)


def test_what_another_profile_measured_is_not_comparable_and_not_kept(app: MSHubApp) -> None:
    Path(app.infer({"model": "tiny", "image": "b", "profile": "accurate"})["file"]).unlink()
    assert known(app) == set()


def test_an_image_that_was_replaced_is_looked_at_again(app: MSHubApp, spare: SpareTime) -> None:
    for _ in NAMES:
        spare.once()
    before = app.active_learning.casebook.index.score("a", "tiny", "v1")
    make_image(Path(app.studies) / "a.nii.gz", SHAPE, seed=77)
    assert spare.once() == 0.0
    assert app.active_learning.casebook.index.score("a", "tiny", "v1") != before


def test_nothing_is_known_of_an_image_that_comes_under_the_name_of_one_that_was_removed(
    app: MSHubApp, spare: SpareTime, serve: Callable[[object], TestClient]
) -> None:
    for _ in NAMES:
        spare.once()
    casebook, version = app.active_learning.casebook, app.store.current("tiny")
    assert set(casebook.scores(version)) == set(NAMES)
    assert serve(app).delete("/datastore/?id=a").status_code == 200
    make_image(Path(app.studies) / "a.nii.gz", SHAPE, seed=78)
    app.datastore().refresh()
    assert set(casebook.scores(version)) == {"b", "c"}
    assert serve(app).delete("/datastore/image?id=b").status_code == 200
    assert serve(app).delete("/datastore/image?id=b").status_code == 404
    assert set(casebook.scores(version)) == {"c"}


def test_labelled_cases_are_compared_with_what_the_version_sees(app: MSHubApp, spare: SpareTime) -> None:
    submit(app, "b")
    time.sleep(0.01)
    for _ in NAMES:
        assert spare.once() == 0.0
    assert spare.once() > 0
    ((image, (_, dice)),) = app.active_learning.casebook.index.label_dice("tiny", "v1").items()
    submitted = app.datastore().get_label_info("b", "final")["agreement"]["dice"]
    assert image == "b"
    assert dice == pytest.approx(submitted)
    assert 0 < min(dice.values()) < 1


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Let something happen while a network is at work for the first time."""

    def happen(what: Callable[[], Any]) -> None:
        logits, waiting = Engine.logits, [what]

        def late(self: Engine, *given: Any, **options: Any) -> Any:
            found = logits(self, *given, **options)
            if waiting:
                waiting.pop()()
            return found

        monkeypatch.setattr(Engine, "logits", late)

    return happen


def test_a_label_that_is_submitted_during_a_look_is_looked_at_again(
    app: MSHubApp, spare: SpareTime, meanwhile: Callable[[Callable[[], Any]], None]
) -> None:
    """It was read with the names of the label before it, and kept as what the version sees of the new one."""

    def renumbered() -> None:
        path = Path(app.datastore().get_label_uri("b", "final"))
        label = read_volume(path)
        write_volume(swapped, np.array([0, 2, 1], np.uint8)[label.array_xyz], label.grid)
        time.sleep(1.1)  # labels of one second are the same to the case index
        info = [{"name": "liver", "idx": 2}, {"name": "spleen", "idx": 1}]
        app.datastore().save_label("b", str(swapped), "final", {"label_info": info})

    swapped = app.config.home / "swapped.nii.gz"
    submit(app, "b")
    meanwhile(renumbered)
    version, index = app.store.current("tiny"), app.active_learning.casebook.index
    spare._look.compare(version, "b", lambda: None)
    submitted = app.datastore().get_label_info("b", "final")
    ((state, dice),) = index.label_dice("tiny", "v1").values()
    assert dice == pytest.approx(submitted["agreement"]["dice"]), "the label that was looked at is the old one"
    assert state != str(submitted["ts"]), "the new one is looked at as well"


def test_an_image_that_is_replaced_while_it_is_segmented_gets_nothing_of_the_old_one(
    app: MSHubApp, spare: SpareTime, meanwhile: Callable[[Callable[[], Any]], None]
) -> None:
    seeds = iter(range(90, 99))

    def replace_image() -> None:
        make_image(Path(app.studies) / "a.nii.gz", SHAPE, seed=next(seeds))

    version, index = app.store.current("tiny"), app.active_learning.casebook.index
    meanwhile(replace_image)
    before = set(results_folder().iterdir())
    with pytest.raises(HTTPException, match="The image a was replaced while it was segmented") as error:
        app.infer({"model": "tiny", "image": "a", "save_label": True})
    assert error.value.status_code == 409
    assert app.datastore().get_labels_by_image_id("a") == {}
    assert known(app) == set()
    assert set(results_folder().iterdir()) == before
    meanwhile(replace_image)
    spare._look.measure(version, "a", lambda: None)
    assert known(app) == set()
    submit(app, "a")
    index.forget_image("a")
    meanwhile(replace_image)
    spare._look.compare(version, "a", lambda: None)
    assert (known(app), index.label_dice("tiny", "v1")) == (set(), {})
    spare._look.compare(version, "a", lambda: None)
    assert (known(app), set(index.label_dice("tiny", "v1"))) == ({"a"}, {"a"})


def test_a_pre_label_that_is_replaced_while_a_correction_is_checked_is_not_taken_for_its_own(
    app: MSHubApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = datastore_module.read_correction

    def read_late(*given: Any) -> Any:
        correction = read(*given)
        if not other:
            label = read_volume(Path(app.datastore().get_label_uri("b", "original")))
            path = app.config.home / "other.nii.gz"
            write_volume(path, np.array([0, 2, 1], np.uint8)[label.array_xyz], label.grid)
            params = {"model": "another", "model_version": "v7", "label_names": {"liver": 2, "spleen": 1}}
            other.append(app.datastore().save_prediction("b", path, "original", {"params": params}))
        return correction

    other: list[str] = []
    monkeypatch.setattr(datastore_module, "read_correction", read_late)
    submit(app, "b")
    told = app.datastore().get_label_info("b", "final")
    assert other
    assert told["started_from"] == {"model": "tiny", "version": "v1"}
    assert told["doubts"] == []
    assert min(told["agreement"]["dice"].values()) > 0
    app.on_save_label("b", "b")
    (row,) = app.active_learning.casebook.index.agreements("tiny", "v1")
    assert row.score is None, "what is known of the pre-label that is there now says nothing of this one"


def test_an_image_that_cannot_be_predicted_is_tried_once(app: MSHubApp, spare: SpareTime) -> None:
    (Path(app.studies) / "a.nii.gz").write_bytes(b"no volume")
    while spare.once() == 0.0:
        pass
    assert known(app) == {"b", "c"}
    assert set(app.active_learning.casebook.index.failures("tiny", "v1")) == {"a"}


def test_of_many_cases_only_a_sample_is_looked_at(app: MSHubApp) -> None:
    config = Config(app.config.home, device="cpu", profile="balanced", idle_cases=2)
    spare = spare_time_of(app, config)
    while spare.once() == 0.0:
        pass
    assert len(known(app)) == 2


def test_no_budget_no_look(app: MSHubApp) -> None:
    spare = spare_time_of(app, Config(app.config.home, device="cpu", profile="balanced", idle_minutes=0))
    assert spare.once() > 0
    assert known(app) == set()


def test_the_budget_of_an_hour_is_kept(app: MSHubApp) -> None:
    spare = spare_time_of(app, Config(app.config.home, device="cpu", profile="balanced", idle_minutes=0.0001))
    spare.once()
    assert spare.once() > 0
    assert len(known(app)) == 1


# -- giving way -------------------------------------------------------------------------------------------------------


def test_nothing_is_begun_while_a_client_waits(app: MSHubApp, spare: SpareTime) -> None:
    with app.activity.run("tiny", "a", "ann"):
        spare.once()
    assert known(app) == set()


def test_a_look_ends_before_the_next_pass_when_a_client_comes(
    app: MSHubApp, running: SpareTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's prediction runs in the middle of a look that would never have ended."""
    logits, looking, passes = Engine.logits, threading.Event(), []

    def slow(self: Engine, data: Any, *, check: Any = None, **options: Any) -> Any:
        if check is None or threading.current_thread() is not running or looking.is_set():
            return logits(self, data, check=check, **options)
        looking.set()
        while True:
            passes.append(None)
            check()
            time.sleep(0.01)

    monkeypatch.setattr(Engine, "logits", slow)
    running.wake()
    assert looking.wait(30)
    answer = app.infer({"model": "tiny", "image": "c", "client_id": "ann"})
    assert np.count_nonzero(read_volume(Path(answer["file"])).array_xyz)
    until(lambda: known(app) == set(NAMES))
    assert passes


def test_a_look_gives_way_to_a_training(app: MSHubApp, spare: SpareTime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.jobs, "open", lambda: ["a training"])
    spare.once()
    assert known(app) == set()


def test_a_pacs_that_does_not_answer_is_no_failure_of_the_image(
    app: MSHubApp, spare: SpareTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: Any) -> None:
        raise HTTPException(503, "The PACS does not answer.")

    monkeypatch.setattr(CaseLook, "measure", down)
    with pytest.raises(HTTPException):
        spare.once()
    assert app.active_learning.casebook.index.failures("tiny", "v1") == {}


# -- batches ----------------------------------------------------------------------------------------------------------


def batch_of(app: MSHubApp, **request: Any) -> dict[str, Any]:
    return app.start_prelabelling("tiny", request)


def prelabelled(app: MSHubApp) -> set[str]:
    return {image for image in NAMES if "original" in app.datastore().get_labels_by_image_id(image)}


def test_a_batch_gives_every_waiting_case_a_pre_label(app: MSHubApp, spare: SpareTime) -> None:
    submit(app, "b")
    batch = batch_of(app, client_id="ann")
    assert (batch["total"], batch["ended"], batch["state"]) == (2, 0, "running")
    time.sleep(0.01)
    spare.once()
    told = app.active_learning.prelabels.status(batch["id"])
    assert (told["ended"], told["counts"]["done"]) == (1, 1)
    spare.once()
    assert app.active_learning.prelabels.status(batch["id"])["state"] == "done"
    assert prelabelled(app) == set(NAMES)
    info = app.datastore().get_label_info("a", "original")
    assert info["params"]["model_version"] == "v1"
    assert "embedding" not in info["params"]["uncertainty"]


def test_a_batch_takes_the_cases_in_the_order_of_the_strategy(app: MSHubApp, spare: SpareTime) -> None:
    for _ in NAMES:
        spare.once()
    doubts = {image: app.active_learning.casebook.index.score(image, "tiny", "v1") for image in NAMES}
    order = sorted(NAMES, key=lambda image: doubts[image].agreement)  # type: ignore[union-attr]
    batch_of(app, strategy="uncertainty", limit=2)
    spare.once()
    assert prelabelled(app) == {order[0]}
    spare.once()
    assert prelabelled(app) == set(order[:2])
    assert app.active_learning.prelabels.all()[0]["state"] == "done"


@pytest.mark.parametrize(
    "error", [HTTPException(502, "fewer slices than listed"), MemoryError(), PredictionError("the GPU is gone")]
)
def test_trouble_of_one_case_holds_up_no_others(
    app: MSHubApp, spare: SpareTime, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tried, prelabel = Counter[str](), spare._look.prelabel

    def odd(version: ModelVersion, image: str, check: Any) -> None:
        tried[image] += 1
        if image == "a":
            raise error
        prelabel(version, image, check)

    monkeypatch.setattr(spare._look, "prelabel", odd)
    batch = batch_of(app, strategy="first")["id"]
    for _ in range(6):
        time.sleep(0.01)
        spare.once()
    assert app.active_learning.prelabels.status(batch)["state"] == "done"
    assert prelabelled(app) == {"b", "c"}
    assert tried == {"a": 3, "b": 1, "c": 1}


@pytest.mark.parametrize("error", [HTTPException(502, "fewer slices than listed"), PredictionError("the GPU is gone")])
def test_a_case_that_meets_with_trouble_is_left_alone_and_not_called_bad(
    app: MSHubApp, spare: SpareTime, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    measure = spare._look.measure

    def odd(version: ModelVersion, image: str, check: Any) -> None:
        if image == "a":
            raise error
        measure(version, image, check)

    monkeypatch.setattr(spare._look, "measure", odd)
    for _ in range(8):
        with suppress(Exception):
            spare.once()
    assert known(app) == {"b", "c"}
    assert app.active_learning.casebook.index.failures("tiny", "v1") == {}


def test_a_case_waits_as_long_as_the_pacs_is_away(
    app: MSHubApp, spare: SpareTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise HTTPException(503, "The PACS does not answer.")

    with monkeypatch.context() as patch:
        patch.setattr(spare._look, "prelabel", away)
        batch = batch_of(app, images=["a"])["id"]
        for _ in range(9):
            time.sleep(0.01)
            spare.once()
        assert app.active_learning.prelabels.status(batch)["counts"]["waiting"] == 1
    time.sleep(0.01)
    spare.once()
    assert prelabelled(app) == {"a"}


def test_chosen_cases_only_and_those_done_already_are_passed_over(app: MSHubApp, spare: SpareTime) -> None:
    Path(app.infer({"model": "tiny", "image": "c", "save_label": True})["file"]).unlink()
    batch = batch_of(app, images=["c", "a"], strategy="first")
    time.sleep(0.01)
    while app.active_learning.prelabels.status(batch["id"])["state"] == "running":
        spare.once()
    assert app.active_learning.prelabels.status(batch["id"])["counts"] == {
        "waiting": 0, "running": 0, "done": 1, "failed": 0, "skipped": 1
    }  # fmt: skip
    assert prelabelled(app) == {"a", "c"}


def test_a_limit_is_of_cases_there_is_something_to_do_for(app: MSHubApp) -> None:
    Path(app.infer({"model": "tiny", "image": "a", "save_label": True})["file"]).unlink()
    app.active_learning.casebook.index.lease(["b"], "ben", 60, model="tiny")
    batch = batch_of(app, strategy="first", limit=2)
    assert batch["total"] == 1, "a has its pre-label, and ben has b in work"
    assert batch_of(app, strategy="first", limit=2, again=True)["total"] == 2


def test_what_somebody_has_in_work_keeps_its_pre_label(app: MSHubApp, spare: SpareTime) -> None:
    batch = batch_of(app, images=["a", "b"], strategy="first")["id"]
    app.active_learning.casebook.index.lease(["a"], "ben", 60, model="tiny")
    spare.once()
    spare.once()
    assert prelabelled(app) == {"b"}
    assert app.active_learning.prelabels.status(batch)["counts"]["skipped"] == 1


def test_a_bad_image_is_told_and_does_not_end_the_batch(app: MSHubApp, spare: SpareTime) -> None:
    (Path(app.studies) / "a.nii.gz").write_bytes(b"no volume")
    batch = batch_of(app, strategy="first")
    for _ in NAMES:
        spare.once()
    told = app.active_learning.prelabels.status(batch["id"])
    assert (told["state"], told["counts"]["done"]) == ("done", 2)
    assert [failure["image"] for failure in told["failures"]] == ["a"]
    assert told["failures"][0]["message"]


def test_a_stopped_batch_goes_on_where_it_was_also_after_a_restart(app: MSHubApp, spare: SpareTime) -> None:
    batch = batch_of(app, strategy="first")["id"]
    spare.once()
    app.active_learning.prelabels.stop(batch)
    assert spare.once() == 0.0  # looks at a case instead
    assert prelabelled(app) == {"a"}
    app.active_learning.casebook.index.close()
    again = MSHubApp(str(Path(app.studies).parent / "app"), app.studies, {"device": "cpu", "profile": "balanced"})
    again.active_learning.resume(batch)
    spare = spare_time_of(again)
    spare.once()
    spare.once()
    assert prelabelled(again) == set(NAMES)


def test_a_batch_that_is_interrupted_loses_no_case(
    app: MSHubApp, spare: SpareTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise Interrupted("Somebody else goes first.")

    batch = batch_of(app, strategy="first")["id"]
    with monkeypatch.context() as patched:
        patched.setattr(CaseLook, "prelabel", interrupted)
        spare.once()
    assert app.active_learning.prelabels.status(batch)["counts"]["waiting"] == 3
    for _ in NAMES:
        spare.once()
    assert prelabelled(app) == set(NAMES)


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"images": ["nowhere"]}, 404, "nowhere"),
        ({"images": "a"}, 400, "list of image ids"),
        ({"limit": 0}, 400, "number of cases"),
        ({"limit": True}, 400, "number of cases"),
        ({"strategy": "relabel"}, 400, "Known: class_stratified, random, first"),
        ({"imagse": ["a"]}, 400, "imagse"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(app: MSHubApp, request_: dict[str, Any], status: int, words: str) -> None:
    with pytest.raises(HTTPException) as caught:
        app.start_prelabelling("tiny", request_)
    assert caught.value.status_code == status
    assert words in str(caught.value.detail)
    assert app.active_learning.prelabels.all() == []


def test_an_unknown_batch_is_a_404(app: MSHubApp) -> None:
    for ask in (app.active_learning.prelabels.status, app.active_learning.prelabels.stop, app.active_learning.resume):
        with pytest.raises(HTTPException) as caught:
            ask(7)
        assert caught.value.status_code == 404


# -- the dice of MONAI Label ------------------------------------------------------------------------------------------


def test_the_dice_of_submitted_labels_is_told_per_structure(app: MSHubApp) -> None:
    submit(app, "b")
    found = app.scoring({"method": "dice"})
    expected = app.datastore().get_label_info("b", "final")["agreement"]["dice"]
    assert found["dice"] == pytest.approx(expected)
    assert found["cases"]["b"]["version"] == "v1"
    assert set(app.info()["scoring"]) == {"dice"}


def test_a_submission_is_told_how_much_was_changed(app: MSHubApp) -> None:
    submit(app, "b")
    told = app.on_save_label("b", "b")
    assert told["agreement"]["edited_voxels"] > 0
    assert isinstance(told["hints"], list)
    (row,) = app.active_learning.casebook.index.agreements("tiny", "v1")
    assert (row.image, row.edited_voxels) == ("b", told["agreement"]["edited_voxels"])
    assert row.score == app.datastore().get_label_info("b", "original")["params"]["uncertainty"]["agreement"]


def test_what_dice_to_expect_is_told_once_ten_cases_were_reviewed(app: MSHubApp) -> None:
    answer = app.infer({"model": "tiny", "image": "a"})
    assert answer["params"]["expected_dice"] is None
    score = answer["params"]["uncertainty"]["agreement"]
    keep = app.active_learning.casebook.index.keep_agreement
    for number in range(10):
        keep(f"old{number}", "tiny", "v1", {"liver": 0.7 + number / 100}, 5, score=score - 0.1 + number / 50)
    expected = app.infer({"model": "tiny", "image": "a"})["params"]["expected_dice"]
    assert expected["low"] <= expected["dice"] <= expected["high"]
    assert (expected["cases"], 0.6 < expected["dice"] < 0.9) == (10, True)


def test_an_unusual_volume_is_flagged(app: MSHubApp) -> None:
    found = app.infer({"model": "tiny", "image": "a"})["params"]
    assert found["flags"] == []
    measured = Uncertainty.from_dict(found["uncertainty"])
    large = {name: replace(one, volume_ml=one.volume_ml * 50) for name, one in measured.structures.items()}
    for number in range(8):
        app.active_learning.casebook.index.keep_score(f"other{number}", "tiny", "v1", Uncertainty(large))
    flags = app.infer({"model": "tiny", "image": "a"})["params"]["flags"]
    assert len(flags) == 2
    assert "little beside" in flags[0]


def test_what_is_measured_cannot_spoil_a_prediction(app: MSHubApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise MSHubError("The disk is full.")

    monkeypatch.setattr(app.active_learning.casebook.index, "keep_score", broken)
    assert Path(app.infer({"model": "tiny", "image": "a", "client_id": "ann"})["file"]).is_file()
