"""A hint when rounds stopped paying: what versions' records say of their gains, and both sides of every limit."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from mshub.catalogue import draft_card, dump_card
from mshub.gate import GatePolicy, Verdict, judge
from mshub.lineage import CANDIDATE
from mshub.scores import CaseScore
from mshub.stopping import FEW_CASES, LABELS, ROUNDS, RoundGain, round_gains, stopping_hint
from mshub.store import ModelStore, ModelVersion

CARD = dump_card(draft_card("tiny", {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}}))
POLICY = GatePolicy(resamples=500)
SAME = [0.97] * LABELS
Scores = list[CaseScore]


def flat(count: int = 3, **changes: Any) -> list[RoundGain]:
    """Return rounds that gained nothing worth a word."""
    one = RoundGain("v2", new_cases=8, mean_gain=0.001, low=-0.003, high=0.004, held_out=11)
    return [replace(one, version=f"v{number + 2}", **changes) for number in range(count)]


def hint_of(rounds: Sequence[RoundGain] = (), recent: Sequence[float] = ()) -> str:
    hint = stopping_hint(rounds, recent)
    assert hint is not None
    return hint


# -- rounds -------------------------------------------------------------------------------------------------------


def test_three_rounds_that_gained_nothing_are_told_with_their_numbers_and_with_what_to_do() -> None:
    assert hint_of(flat()) == (
        "The last 3 rounds (24 new cases) changed the mean Dice on 11 held-out cases by +0.001: more cases of this "
        "kind hardly help. Label cases on which the model fails (strategy worst_first), correct labels that look wrong "
        "(strategy relabel), or stop here."
    )


def test_before_the_first_three_rounds_nothing_is_said() -> None:
    assert stopping_hint([], []) is None
    assert stopping_hint(flat(ROUNDS - 1, new_cases=50), []) is None
    assert stopping_hint(flat(ROUNDS), []) is not None


@pytest.mark.parametrize("number", range(ROUNDS))
def test_one_round_that_gained_is_enough_to_go_on(number: int) -> None:
    rounds = flat()
    rounds[number] = replace(rounds[number], mean_gain=0.0049)
    assert stopping_hint(rounds, []) is not None
    rounds[number] = replace(rounds[number], mean_gain=0.005)
    assert stopping_hint(rounds, []) is None


def test_only_the_last_three_rounds_count() -> None:
    good = flat(2, mean_gain=0.04, low=0.02, high=0.06)
    assert stopping_hint([*good, *flat()], []) is not None
    assert stopping_hint([*flat(), *good], []) is None
    assert stopping_hint([*good, *flat(2)], []) is None


def test_a_gain_that_cannot_be_ruled_out_is_no_reason_to_stop() -> None:
    assert stopping_hint(flat(high=0.0099), []) is not None
    assert stopping_hint(flat(high=0.0101), []) is None
    wide, narrow = flat(1, high=0.02), flat(2, high=0.004)
    assert stopping_hint([*wide, *narrow], []) is not None, "the bounds are pooled"
    assert stopping_hint([*wide, *wide, *narrow[:1]], []) is None


def test_rounds_of_a_few_cases_say_nothing_about_cases() -> None:
    assert stopping_hint(flat(new_cases=3), []) is None
    rounds = flat(new_cases=3)
    rounds[1] = replace(rounds[1], new_cases=FEW_CASES - 6)
    assert "(10 new cases)" in hint_of(rounds)


def test_rounds_without_new_cases_are_about_recipes_and_are_passed_over() -> None:
    again = flat(2, new_cases=0, mean_gain=0.03, high=0.05)
    assert "24 new cases" in hint_of([*flat(2), *again, *flat(1)])
    assert stopping_hint([*flat(2), *again], []) is None
    better = flat(1, mean_gain=0.03)
    assert stopping_hint([*better, *flat(2), *flat(5, new_cases=0)], []) is None


def test_rounds_nobody_judged_are_passed_over() -> None:
    unjudged = flat(2, mean_gain=None, low=None, high=None, held_out=0)
    assert "24 new cases" in hint_of([*flat(2), *unjudged, *flat(1)])
    assert stopping_hint([*flat(2), *unjudged], []) is None


def test_rounds_judged_by_one_patient_have_no_interval_and_rule_nothing_out() -> None:
    rounds = flat()
    rounds[1] = replace(rounds[1], low=None, high=None)
    assert stopping_hint(rounds, []) is None


def test_a_hold_out_that_grew_is_told_by_its_ends() -> None:
    rounds = [replace(one, held_out=held_out) for one, held_out in zip(flat(), (9, 11, 14), strict=True)]
    assert "on 9 to 14 held-out cases" in hint_of(rounds)


@pytest.mark.parametrize(("gain", "told"), [(-0.0001, "+0.000"), (-0.0049, "-0.005"), (0.0044, "+0.004")])
def test_small_losses_are_no_gains_either(gain: float, told: str) -> None:
    assert f"by {told}: " in hint_of(flat(mean_gain=gain))


def test_rounds_that_lost_are_no_reason_to_look_for_other_cases_but_for_what_went_wrong() -> None:
    hint = hint_of(flat(mean_gain=-0.03, low=-0.05, high=-0.01))
    assert "by -0.030: training on them does harm" in hint
    assert "recipe" in hint
    assert "hardly help" in hint_of(flat(mean_gain=-0.004))


def test_our_own_learning_curve_is_no_reason_to_stop() -> None:
    """The gains in docs/learning.md, with the intervals of a hold-out of a dozen cases."""
    curve = [0.056, 0.015, 0.002, 0.015, 0.013]
    rounds = [RoundGain("v", 10, gain, gain - 0.007, gain + 0.007, 9) for gain in curve]
    assert all(stopping_hint(rounds[:count], []) is None for count in range(len(rounds) + 1))


# -- labels -------------------------------------------------------------------------------------------------------


def test_labels_submitted_as_the_model_made_them_are_told() -> None:
    hint = hint_of(recent=SAME)
    assert hint.startswith("The last 10 labels were submitted nearly as the model made them (mean Dice 0.97)")
    assert "worst_first" in hint


def test_ten_labels_are_needed_and_one_that_was_changed_among_them_is_enough_to_go_on() -> None:
    assert stopping_hint([], SAME[1:]) is None
    for number in range(LABELS):
        changed = [*SAME[:number], 0.949, *SAME[number + 1 :]]
        assert stopping_hint([], changed) is None
    assert stopping_hint([], [0.95] * LABELS) is not None
    assert stopping_hint([], [float("nan"), *SAME[1:]]) is None


def test_only_the_last_ten_labels_count() -> None:
    assert stopping_hint([], [0.2, 0.3, *SAME]) is not None
    assert stopping_hint([], [*SAME, 0.2]) is None
    assert "(mean Dice 1.00)" in hint_of(recent=[*SAME, *[1.0] * LABELS])


def test_either_reason_is_enough_and_both_are_told_one_after_the_other() -> None:
    both = hint_of(flat(), SAME)
    assert both == f"{hint_of(flat())} {hint_of(recent=SAME)}"
    assert hint_of(flat(), [0.5] * LABELS) == hint_of(flat())
    assert hint_of(flat(1), SAME) == hint_of(recent=SAME)
    assert re.fullmatch(r"The last .*\. The last .*\.", both)


# -- a store ------------------------------------------------------------------------------------------------------


def scored(*dice: float, patients: int = 0) -> Scores:
    """Return cases with one structure, of as many patients, or of `patients`."""
    return [
        CaseScore(f"c{number}", f"p{number % (patients or len(dice))}", {"liver": value})
        for number, value in enumerate(dice)
    ]


def judged(candidate: Scores, **baselines: Scores) -> dict[str, Any]:
    """Return what a round writes of its scores and its verdict."""
    scores = {**baselines, CANDIDATE: candidate}
    return {
        "scores": {name: [score.as_dict() for score in found] for name, found in scores.items()},
        "verdict": judge(candidate, baselines, POLICY).as_dict(),
    }


def cases(*digests: str) -> list[dict[str, str]]:
    return [{"case": f"case-{digest}", "digest": digest} for digest in digests]


def publish(store: ModelStore, parent: str | None = None, **lineage: Any) -> ModelVersion:
    """Publish a version; with `lineage`, one that a training made."""
    record: dict[str, Any] = {"origin": {"how": "added"}, "labels": {"liver": 1}, "parent": parent, "card": CARD}
    if lineage:
        record["lineage"] = json.loads(json.dumps({"original": "v1", "held_out": [], **lineage}))
    with store.staging() as staging:
        (staging / "model").mkdir()
        (staging / "model" / "weights").write_text(str(len(store.versions("tiny"))))
        return store.publish("tiny", staging / "model", record, serve_first=False)


BEFORE, AFTER = scored(0.80, 0.70, 0.90), scored(0.82, 0.73, 0.91)


def test_a_gain_is_that_against_the_version_that_served_and_not_against_the_original(store: ModelStore) -> None:
    publish(store)
    publish(store, "v1", cases=cases("a", "b"), **judged(BEFORE, v1=scored(0.6, 0.6, 0.6)))
    publish(store, "v2", cases=cases("a", "b", "c"), **judged(AFTER, v2=BEFORE, v1=scored(0.6, 0.6, 0.6)))
    first, second = round_gains(store, "tiny")
    assert (first.version, first.new_cases, first.held_out) == ("v2", 2, 3)
    assert first.mean_gain == pytest.approx(0.2)
    assert (second.version, second.new_cases, second.held_out) == ("v3", 1, 3)
    assert second.mean_gain == pytest.approx(0.02)
    assert (second.low, second.high) == (0.01, 0.03)


@pytest.mark.parametrize("order", [("v2", "v1"), ("v1", "v2")])
def test_the_order_of_the_comparisons_does_not_matter(store: ModelStore, order: Sequence[str]) -> None:
    baselines = {"v1": scored(0.6, 0.6, 0.6), "v2": BEFORE}
    publish(store, "v2", cases=cases("a"), **judged(AFTER, **{name: baselines[name] for name in order}))
    assert round_gains(store, "tiny")[0].mean_gain == pytest.approx(0.02)


def test_versions_that_no_training_made_are_no_rounds(store: ModelStore) -> None:
    publish(store)
    publish(store)
    publish(store, "v1", cases=cases("a"), **judged(AFTER, v1=BEFORE))
    assert [one.version for one in round_gains(store, "tiny")] == ["v3"]
    assert round_gains(store, "not installed") == []


def test_rounds_without_anything_to_compare_with_have_no_gain(store: ModelStore) -> None:
    publish(store, cases=cases("a", "b"), original=None, **judged(AFTER))
    publish(store, "v1", cases=cases("a", "b", "c"), **judged([], v1=[]))
    publish(store, "v1", cases=cases("d"))
    assert round_gains(store, "tiny") == [
        RoundGain("v1", 2, None, None, None, 0),
        RoundGain("v2", 1, None, None, None, 0),
        RoundGain("v3", 1, None, None, None, 0),
    ]


def test_a_round_judged_by_one_patient_has_a_gain_and_no_interval(store: ModelStore) -> None:
    before, after = scored(0.8, 0.7, patients=1), scored(0.9, 0.7, patients=1)
    publish(store, "v1", cases=cases("a"), **judged(after, v1=before))
    (found,) = round_gains(store, "tiny")
    assert (found.mean_gain, found.low, found.high, found.held_out) == (pytest.approx(0.05), None, None, 2)


def test_new_cases_are_those_no_version_before_has_seen_refused_ones_included(store: ModelStore) -> None:
    worse = judged(scored(0.1, 0.1, 0.1), v1=BEFORE)
    assert worse["verdict"]["outcome"] == "refused"
    publish(store)
    publish(store, "v1", cases=cases("a", "b"), held_out=cases("h"), **judged(AFTER, v1=BEFORE))
    publish(store, "v2", cases=cases("a", "b", "c", "d"), held_out=cases("h"), unusable=["u"], **worse)
    publish(store, "v2", cases=cases("a", "b", "c", "d", "e", "u", "h"), **judged(AFTER, v2=BEFORE, v1=BEFORE))
    publish(store, "v2", cases=cases("a", "b", "c", "d", "e"), **judged(AFTER, v2=BEFORE, v1=BEFORE))
    found = round_gains(store, "tiny")
    assert [one.new_cases for one in found] == [2, 2, 1, 0]
    assert found[1].mean_gain == pytest.approx(-0.7)


def test_a_label_that_was_corrected_again_is_new(store: ModelStore) -> None:
    publish(store, cases=[{"case": "a", "digest": "first"}], **judged(AFTER, v0=BEFORE))
    publish(store, "v1", cases=[{"case": "a", "digest": "second"}], **judged(AFTER, v1=BEFORE))
    assert [one.new_cases for one in round_gains(store, "tiny")] == [1, 1]


def test_the_rounds_of_a_store_lead_to_the_hint(store: ModelStore) -> None:
    publish(store)
    held_out = [0.80, 0.70, 0.90, 0.75, 0.85, 0.66, 0.91, 0.83]
    shaken = [value + change for value, change in zip(held_out, [0.002, -0.001] * 4, strict=True)]
    for number in range(ROUNDS):
        trained = cases(*(f"d{case}" for case in range(4 * (number + 1))))
        serving = f"v{number + 1}"
        baselines = {serving: scored(*held_out), "v1": scored(*held_out)}
        publish(store, serving, cases=trained, **judged(scored(*shaken), **baselines))
    hint = hint_of(round_gains(store, "tiny"))
    assert hint.startswith("The last 3 rounds (12 new cases) changed the mean Dice on 8 held-out cases by +0.00")
    assert stopping_hint(round_gains(store, "tiny")[1:], []) is None


def test_a_verdict_of_an_older_build_without_comparisons_is_no_judgement(store: ModelStore) -> None:
    publish(store, cases=cases("a"), verdict={"outcome": "needs a person"})
    publish(store, cases=cases("b"), verdict=None)
    empty = Verdict("needs a person", (), (), POLICY).as_dict()
    publish(store, cases=cases("c"), verdict=empty)
    assert [one.mean_gain for one in round_gains(store, "tiny")] == [None] * 3
