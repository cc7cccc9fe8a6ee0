"""Lineage: what a version descends from, which cases it has seen, and the row it is in tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mshub.cases import ReviewedCase
from mshub.catalogue import draft_card, dump_card
from mshub.errors import ModelNotAvailable
from mshub.lineage import CANDIDATE, fitting_cases, new_cases, original, rounds, used_digests
from mshub.scores import CaseScore
from mshub.store import ModelStore, ModelVersion

CARD = dump_card(draft_card("tiny", {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}}))
KNOWN = ("liver", "spleen")


def publish(store: ModelStore, parent: str | None = None, model: str = "tiny", **lineage: Any) -> ModelVersion:
    """Publish a version; with `lineage`, one that a training made."""
    record = {"origin": {"how": "added"}, "labels": {"liver": 1}, "parent": parent, "card": CARD}
    if lineage:
        record["lineage"] = lineage
    with store.staging() as staging:
        (staging / "model").mkdir()
        (staging / "model" / "weights").write_text(json.dumps([len(store.versions(model)), parent]))
        return store.publish(model, staging / "model", record)


def make_case(folder: Path, name: str, **facts: Any) -> ReviewedCase:
    for kind in ("image", "label"):
        (folder / f"{name}.{kind}.nii.gz").write_text(f"{kind} {name}")
    case = {"values": {"liver": 1}, "reviewed": ("liver",), "patient": name, **facts}
    return ReviewedCase(name, (folder / f"{name}.image.nii.gz",), folder / f"{name}.label.nii.gz", **case)


def seen(*cases: ReviewedCase) -> list[dict[str, str]]:
    """Return what the record of a version keeps of its cases."""
    return [{"case": case.case_id, "digest": case.digest} for case in cases]


# -- descent ------------------------------------------------------------------------------------------------------


def test_what_was_installed_as_it_is_descends_from_itself(store: ModelStore) -> None:
    first = publish(store)
    assert original(store, first) == first


def test_the_original_is_found_through_a_chain_of_parents(store: ModelStore) -> None:
    first = publish(store)
    second = publish(store, "v1")
    third = publish(store, "v2")
    assert original(store, third) == original(store, second) == first


def test_branches_and_releases_installed_later_have_originals_of_their_own(store: ModelStore) -> None:
    for parent in (None, "v1", None, "v1", "v3", "v4"):
        publish(store, parent)
    origins = [original(store, version).version for version in store.versions("tiny")]
    assert origins == ["v1", "v1", "v3", "v1", "v3", "v1"]


def test_models_are_not_each_others_parents(store: ModelStore) -> None:
    publish(store)
    publish(store, model="other")
    child = publish(store, "v1", model="other")
    assert original(store, child).model_id == "other"


def test_a_parent_that_is_gone_is_named(store: ModelStore) -> None:
    orphan = publish(store, "v7")
    with pytest.raises(ModelNotAvailable, match="tiny has no version v7"):
        original(store, orphan)


# -- cases --------------------------------------------------------------------------------------------------------


def test_a_version_has_seen_what_it_was_trained_on_and_what_judged_it(store: ModelStore) -> None:
    version = publish(store, cases=[{"case": "a", "digest": "d1"}], held_out=[{"case": "b", "digest": "d2"}])
    assert used_digests(version) == {"d1", "d2"}
    assert used_digests(publish(store)) == set()


def test_new_cases_are_those_no_version_has_seen_as_they_are_now(store: ModelStore, tmp_path: Path) -> None:
    trained, judged, later, never = (make_case(tmp_path, name) for name in ("a", "b", "c", "d"))
    publish(store)
    publish(store, "v1", cases=seen(trained), held_out=seen(judged))
    publish(store, "v1", cases=seen(later), held_out=[])
    assert new_cases(store, "tiny", [trained, never, judged, later]) == [never]


def test_a_case_whose_label_was_corrected_is_new_again(store: ModelStore, tmp_path: Path) -> None:
    case = make_case(tmp_path, "a")
    publish(store, cases=seen(case), held_out=[])
    assert new_cases(store, "tiny", [case]) == []
    case.label.write_text("corrected once more")
    again = ReviewedCase.from_dict(case.as_dict())
    assert new_cases(store, "tiny", [again]) == [again]


def test_what_another_model_has_seen_is_new_to_this_one(store: ModelStore, tmp_path: Path) -> None:
    case = make_case(tmp_path, "a")
    publish(store, model="other", cases=seen(case), held_out=[])
    publish(store)
    assert new_cases(store, "tiny", [case]) == [case]
    assert new_cases(store, "not installed", [case]) == [case]


def test_cases_fit_with_one_structure_reviewed_and_the_right_number_of_channels(tmp_path: Path) -> None:
    liver, empty, other, nothing, two = (
        make_case(tmp_path, name, reviewed=reviewed)
        for name, reviewed in {
            "liver": ("liver", "aorta"),
            "empty": ("spleen",),  # looked at and not there: it has no value in the label
            "other": ("aorta",),
            "nothing": (),
            "two": ("liver",),
        }.items()
    )
    two = ReviewedCase.from_dict({**two.as_dict(), "images": [*map(str, two.images), "t2w.nii.gz"]})
    cases = [two, liver, empty, other, nothing]
    assert fitting_cases(cases, KNOWN, 1) == [liver, empty]
    assert fitting_cases(cases, KNOWN, 2) == [two]
    assert fitting_cases(cases, ("kidney",), 1) == []


# -- rows ---------------------------------------------------------------------------------------------------------


def test_every_version_is_a_row_oldest_first(store: ModelStore) -> None:
    first = publish(store)
    scores = [CaseScore("c", "p", {"liver": 0.9, "spleen": 0.5}), CaseScore("d", "q", {"liver": 0.6})]
    worse = [CaseScore("c", "p", {"liver": 0.1}), CaseScore("d", "q", {"liver": 0.2})]
    second = publish(
        store,
        "v1",
        cases=[{"case": "a", "digest": "1"}, {"case": "b", "digest": "2"}, {"case": "e", "digest": "3"}],
        held_out=[{"case": "c", "digest": "4"}, {"case": "d", "digest": "5"}],
        scores={"v1": [score.as_dict() for score in worse], CANDIDATE: [score.as_dict() for score in scores]},
        verdict={"outcome": "promoted", "summary": "better"},
    )
    assert rounds(store, "tiny") == [
        {
            "version": "v1",
            "parent": None,
            "created": first.record["created"],
            "cases": 0,
            "held_out": 0,
            "outcome": None,
            "mean_dice": None,
        },
        {
            "version": "v2",
            "parent": "v1",
            "created": second.record["created"],
            "cases": 3,
            "held_out": 2,
            "outcome": "promoted",
            "mean_dice": pytest.approx((0.7 + 0.6) / 2),
        },
    ]


def test_a_round_without_a_hold_out_has_an_outcome_and_no_dice(store: ModelStore) -> None:
    publish(store, cases=[], held_out=[], scores={CANDIDATE: []}, verdict={"outcome": "needs a person"})
    (row,) = rounds(store, "tiny")
    assert (row["outcome"], row["mean_dice"]) == ("needs a person", None)


def test_rows_are_in_order_of_number_and_can_be_written_as_json(store: ModelStore) -> None:
    for _ in range(11):
        publish(store)
    assert [row["version"] for row in rounds(store, "tiny")] == [f"v{number}" for number in range(1, 12)]
    assert json.loads(json.dumps(rounds(store, "tiny"))) == rounds(store, "tiny")
    assert rounds(store, "nothing") == []
