"""The gate: what a candidate must show on the hold-out before it may serve, rule by rule at both sides of its limit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from scipy.stats import bootstrap

from mshub.errors import ConfigError, TrainingError
from mshub.gate import Change, Comparison, GatePolicy, Verdict, compare, judge
from mshub.scores import CaseScore

POLICY = GatePolicy(resamples=2000)
Scores = list[CaseScore]


def hold_out(*dice: float, liver: str = "liver", patients: Sequence[str] = (), missed: Sequence[str] = ()) -> Scores:
    """Return cases c0, c1... with one structure; every case of a patient of its own, unless `patients` says whose.

    `missed` names cases in which the structure is not predicted at all.
    """
    owners = patients or [f"p{number}" for number in range(len(dice))]
    return [
        CaseScore(f"c{number}", owner, {liver: value}, (liver,) if f"c{number}" in missed else ())
        for number, (value, owner) in enumerate(zip(dice, owners, strict=True))
    ]


def two_structures(liver: float, spleen: float, cases: int = 10) -> Scores:
    """Return cases that all have the same two scores."""
    return [CaseScore(f"c{i}", f"p{i}", {"liver": liver, "spleen": spleen}) for i in range(cases)]


def noisy(generator: np.random.Generator, cases: int, mean: float = 0.8, spread: float = 0.04) -> list[float]:
    """Return as many different Dice coefficients."""
    return [float(value) for value in np.clip(generator.normal(mean, spread, cases), 0, 1)]


def looped_interval(
    changes: Sequence[tuple[str, float]], resamples: int = 20_000, tail: float = 0.025
) -> tuple[float, float]:
    """Return the interval of the mean of (patient, change) pairs, by the plainest loop there is."""
    by_patient: dict[str, list[float]] = {}
    for patient, change in changes:
        by_patient.setdefault(patient, []).append(change)
    dice = random.Random(11)
    means = []
    for _ in range(resamples):
        drawn = [change for _ in by_patient for change in by_patient[dice.choice(list(by_patient))]]
        means.append(fmean(drawn))
    means.sort()
    return means[int(tail * resamples)], means[int((1 - tail) * resamples) - 1]


# -- the numbers --------------------------------------------------------------------------------------------------


def test_the_changes_of_a_comparison_worked_out_by_hand() -> None:
    before = [
        CaseScore("a", "ann", {"liver": 0.80, "spleen": 0.60}),
        CaseScore("b", "ben", {"liver": 0.70}),
        CaseScore("c", "ben", {"liver": 0.90, "spleen": 0.50}),
    ]
    after = [
        CaseScore("a", "ann", {"liver": 0.82, "spleen": 0.64}),
        CaseScore("b", "ben", {"liver": 0.64}),
        CaseScore("c", "ben", {"liver": 0.90, "spleen": 0.62}),
    ]
    found = compare(after, before, "v3", POLICY)
    assert (found.baseline, found.cases, found.patients) == ("v3", 3, 2)
    assert found.per_case == {"a": 0.03, "b": -0.06, "c": 0.06}
    assert found.overall.mean == 0.01
    assert found.structures["liver"].mean == pytest.approx(-0.04 / 3)
    assert found.structures["spleen"].mean == 0.08
    assert found.lost == {}
    # Two patients: a draw is both, Ann twice, or Ben twice, and the outer two have a quarter of the draws each.
    assert (found.overall.low, found.overall.high) == (0.0, 0.03)
    assert (found.structures["spleen"].low, found.structures["spleen"].high) == (0.04, 0.12)


def test_the_interval_is_that_of_scipy_when_every_patient_has_one_case() -> None:
    generator = np.random.default_rng(3)
    before, after = noisy(generator, 17), noisy(generator, 17, mean=0.82)
    found = compare(hold_out(*after), hold_out(*before), "v1", GatePolicy(resamples=20_000)).overall
    changes = np.array(after) - np.array(before)
    reference = bootstrap((changes,), np.mean, n_resamples=20_000, method="percentile", rng=5).confidence_interval
    assert found.mean == pytest.approx(changes.mean())
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.001)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_interval_is_that_of_a_plain_loop_over_patients_with_unequal_numbers_of_cases(confidence: float) -> None:
    generator = np.random.default_rng(4)
    owners = ["a", "b", "b", "c", "d", "d", "d", "d", "e", "f", "g", "g", "h"]
    before, after = noisy(generator, len(owners)), noisy(generator, len(owners))
    policy = GatePolicy(resamples=20_000, confidence=confidence)
    found = compare(hold_out(*after, patients=owners), hold_out(*before, patients=owners), "v1", policy).overall
    changes = list(zip(owners, np.array(after) - np.array(before), strict=True))
    assert (found.low, found.high) == pytest.approx(looped_interval(changes, tail=(1 - confidence) / 2), abs=0.001)


def test_a_structure_is_compared_where_it_was_reviewed_and_draws_without_it_do_not_count() -> None:
    generator = np.random.default_rng(5)
    rare = {"c1": 0.05, "c4": -0.02, "c5": 0.01}  # of 6 patients, 3: every 64th draw has none of them
    before, after = [], []
    for number in range(6):
        case, liver = f"c{number}", float(generator.uniform(0.7, 0.9))
        extra = {"tumour": 0.5} if case in rare else {}
        before.append(CaseScore(case, f"p{number}", {"liver": liver, **extra}))
        moved = {name: value + rare[case] for name, value in extra.items()}
        after.append(CaseScore(case, f"p{number}", {"liver": liver, **moved}))
    found = compare(after, before, "v1", GatePolicy(resamples=20_000)).structures["tumour"]
    assert found.mean == pytest.approx(0.04 / 3)
    dice, means = random.Random(2), []
    for _ in range(20_000):
        drawn = [rare[case] for case in (f"c{dice.randrange(6)}" for _ in range(6)) if case in rare]
        means += [fmean(drawn)] if drawn else []
    expected = np.quantile(means, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.002)


def test_a_structure_reviewed_in_a_single_case_has_a_change_without_width() -> None:
    before, after = two_structures(0.8, 0.8), two_structures(0.81, 0.8)
    before[4].dice["tumour"], after[4].dice["tumour"] = 0.5, 0.6
    assert compare(after, before, "v1", POLICY).structures["tumour"] == Change(0.1, 0.1, 0.1)


def test_the_same_scores_have_no_change_at_all() -> None:
    scores = hold_out(*noisy(np.random.default_rng(6), 12))
    assert compare(scores, scores, "v1", POLICY).overall == Change(0.0, 0.0, 0.0)


def test_a_constant_gain_has_an_interval_without_width() -> None:
    dice = noisy(np.random.default_rng(7), 12, spread=0.02)
    found = compare(hold_out(*(value + 0.05 for value in dice)), hold_out(*dice), "v1", POLICY)
    assert found.overall == Change(0.05, 0.05, 0.05)
    assert set(found.per_case.values()) == {0.05}


def test_swapping_candidate_and_baseline_mirrors_the_interval() -> None:
    generator = np.random.default_rng(8)
    one, other = hold_out(*noisy(generator, 14)), hold_out(*noisy(generator, 14))
    there, back = compare(one, other, "v1", POLICY).overall, compare(other, one, "v1", POLICY).overall
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))


def test_a_comparison_can_be_repeated_in_any_order_of_cases_and_depends_on_the_seed() -> None:
    generator = np.random.default_rng(9)
    after, before = hold_out(*noisy(generator, 14)), hold_out(*noisy(generator, 14))
    found = compare(after, before, "v1", POLICY)
    assert compare(after, before, "v1", POLICY) == found
    assert compare(after[::-1], [*before[5:], *before[:5]], "v1", POLICY).overall == found.overall
    other = compare(after, before, "v1", GatePolicy(resamples=2000, seed=1))
    assert other.overall.mean == found.overall.mean
    assert other.overall.low != found.overall.low


def test_copies_of_the_cases_of_a_patient_do_not_narrow_the_interval() -> None:
    generator = np.random.default_rng(10)
    before, after = noisy(generator, 9), noisy(generator, 9)
    owners = [f"p{number}" for number in range(9)]
    once = compare(hold_out(*after, patients=owners), hold_out(*before, patients=owners), "v1", POLICY)
    scans = {"patients": owners * 4}
    four = compare(hold_out(*after * 4, **scans), hold_out(*before * 4, **scans), "v1", POLICY)
    independent = compare(hold_out(*after * 4), hold_out(*before * 4), "v1", POLICY)
    assert (once.cases, four.cases, once.patients, four.patients, independent.patients) == (9, 36, 9, 9, 36)
    assert (four.overall.low, four.overall.high) == pytest.approx((once.overall.low, once.overall.high))
    width, narrow = once.overall.high - once.overall.low, independent.overall.high - independent.overall.low
    assert narrow == pytest.approx(width / 2, rel=0.15)


def test_the_interval_of_versions_that_are_equal_in_truth_contains_zero_about_19_times_in_20() -> None:
    generator = np.random.default_rng(12)
    policy = GatePolicy(resamples=500)
    covered = 0
    for _ in range(300):
        skill = generator.normal(0.0, 0.02, 30).repeat(2)  # what the two cases of a patient have in common
        moved = skill + generator.normal(0.0, 0.01, 60)
        owners = [f"p{number // 2}" for number in range(60)]
        after = hold_out(*(float(value) for value in 0.8 + moved), patients=owners)
        found = compare(after, hold_out(*[0.8] * 60, patients=owners), "v1", policy).overall
        covered += found.low <= 0 <= found.high
    assert 0.90 <= covered / 300 <= 0.98  # a percentile interval of 30 patients covers a little less than it says


# -- what cannot be compared --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "before", "found"),
    [
        (hold_out(0.8, 0.8), hold_out(0.8), "cases only of the candidate: c1"),
        (hold_out(0.8), hold_out(0.8, 0.8, 0.8), "cases only of v1: c1, c2"),
        (hold_out(0.8), hold_out(0.8, liver="lung"), "structures of c0: liver and lung"),
        (hold_out(0.8), hold_out(0.8, patients=["ann"]), "patients of c0: p0 and ann"),
        ([], hold_out(0.8), "cases only of v1: c0"),
        ([], [], "no case"),
    ],
    ids=["more cases", "fewer cases", "structures", "patients", "none of the candidate", "none at all"],
)
def test_scores_of_different_things_are_not_compared(after: Scores, before: Scores, found: str) -> None:
    with pytest.raises(TrainingError, match=f"candidate and v1 cannot be compared. Found: {found}"):
        compare(after, before, "v1", POLICY)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.01, 1.01])
def test_what_is_no_dice_coefficient_is_refused_wherever_it_is(value: float) -> None:
    good, bad = hold_out(*[0.8] * 10), hold_out(*[0.8] * 9, value)
    with pytest.raises(TrainingError, match=r"the candidate has no usable score of c9\. Found: liver"):
        judge(bad, {"v1": good}, POLICY)
    with pytest.raises(TrainingError, match="v1 has no usable score of c9"):
        judge(good, {"v1": bad}, POLICY)
    with pytest.raises(TrainingError, match="the candidate has no usable score of c9"):
        judge(bad, {}, POLICY)


def test_a_case_without_a_reviewed_structure_is_refused() -> None:
    scores = [*hold_out(0.8), CaseScore("c1", "p1", {})]
    with pytest.raises(TrainingError, match=r"c1\. Found: no structure"):
        judge(scores, {"v1": scores}, POLICY)


def test_two_scores_of_one_case_are_refused() -> None:
    with pytest.raises(TrainingError, match="the candidate has several scores of c0"):
        judge(hold_out(0.8) * 2, {"v1": hold_out(0.8)}, POLICY)
    with pytest.raises(TrainingError, match="v1 has several scores of c0"):
        judge(hold_out(0.8), {"v1": hold_out(0.8) * 2}, POLICY)


# -- passing ------------------------------------------------------------------------------------------------------


def test_a_better_candidate_is_promoted_and_its_gain_told() -> None:
    verdict = judge(hold_out(*[0.82] * 10), {"v1": hold_out(*[0.80] * 10)}, POLICY)
    assert verdict.outcome == "promoted"
    assert verdict.reasons == ("mean Dice +0.020 [+0.020, +0.020] against v1 on 10 cases of 10 patients",)
    assert verdict.summary == f"promoted: {verdict.reasons[0]}."


def test_the_candidate_is_told_against_every_baseline() -> None:
    verdict = judge(hold_out(*[0.82] * 9), {"v2": hold_out(*[0.81] * 9), "v1": hold_out(*[0.75] * 9)}, POLICY)
    assert [comparison.baseline for comparison in verdict.comparisons] == ["v2", "v1"]
    assert [round(comparison.overall.mean, 9) for comparison in verdict.comparisons] == [0.01, 0.07]
    assert ["v2" in verdict.reasons[0], "v1" in verdict.reasons[1]] == [True, True]
    assert verdict.summary.count("mean Dice") == 2


def test_a_candidate_as_good_as_the_current_version_is_promoted() -> None:
    scores = hold_out(*noisy(np.random.default_rng(13), 12))
    assert judge(scores, {"v1": scores}, POLICY).outcome == "promoted"


def test_a_policy_that_is_not_automatic_leaves_a_passing_candidate_to_a_person() -> None:
    policy = GatePolicy(resamples=2000, automatic=False)
    verdict = judge(hold_out(*[0.82] * 10), {"v1": hold_out(*[0.80] * 10)}, policy)
    assert verdict.outcome == "needs a person"
    assert "automatic = false" in verdict.reasons[0]
    assert "mshub promote ID VERSION" in verdict.reasons[0]
    assert verdict.reasons[1].startswith("mean Dice +0.020")
    refused = judge(hold_out(*[0.60] * 10), {"v1": hold_out(*[0.80] * 10)}, policy)
    assert refused.outcome == "refused"


# -- every limit, at both sides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "outcome"), [(0.0099, "promoted"), (0.01, "refused"), (0.0101, "refused"), (0.0, "promoted")]
)
def test_the_lower_bound_of_the_mean_change_must_be_above_its_limit(loss: float, outcome: str) -> None:
    verdict = judge(hold_out(*[0.8 - loss] * 10), {"v1": hold_out(*[0.8] * 10)}, POLICY)
    assert verdict.outcome == outcome
    if outcome == "refused":
        assert verdict.reasons == (
            f"the mean Dice change against v1 has a lower 95 % bound of {-loss:+.4f}, which must be above -0.01: "
            "a loss cannot be ruled out",
        )


def test_a_gain_on_average_with_a_wide_interval_is_refused() -> None:
    after = hold_out(*[0.86, 0.74] * 4, 0.9, 0.8)
    verdict = judge(after, {"v1": hold_out(*[0.8] * 10)}, GatePolicy(worst_structure=-1, resamples=2000))
    comparison = verdict.comparisons[0]
    assert comparison.overall.mean > 0 > -0.01 > comparison.overall.low
    assert verdict.outcome == "refused"
    assert "a loss cannot be ruled out" in verdict.reasons[0]


def test_the_bound_is_that_of_the_confidence_asked_for() -> None:
    generator = np.random.default_rng(14)
    after, before = hold_out(*noisy(generator, 20, spread=0.02)), hold_out(*[0.8] * 20)
    strict, mild = (compare(after, before, "v1", GatePolicy(confidence=level)).overall for level in (0.99, 0.6))
    limit = (strict.low + mild.low) / 2
    verdicts = [
        judge(after, {"v1": before}, GatePolicy(confidence=level, mean_lower_bound=limit)) for level in (0.99, 0.6)
    ]
    assert [verdict.outcome for verdict in verdicts] == ["refused", "promoted"]
    assert "lower 99 % bound" in verdicts[0].reasons[0]


@pytest.mark.parametrize(("loss", "outcome"), [(0.0299, "promoted"), (0.03, "promoted"), (0.0301, "refused")])
def test_no_structure_may_get_worse_than_its_limit(loss: float, outcome: str) -> None:
    verdict = judge(two_structures(0.9, 0.7 - loss), {"v1": two_structures(0.8, 0.7)}, POLICY)
    assert verdict.outcome == outcome
    if outcome == "refused":
        assert verdict.reasons == (
            "the mean Dice of spleen changes by -0.0301 against v1, which must not be below -0.03: "
            "this structure got worse",
        )


@pytest.mark.parametrize(("loss", "outcome"), [(0.0999, "promoted"), (0.1, "promoted"), (0.1001, "refused")])
def test_no_case_may_get_worse_than_its_limit(loss: float, outcome: str) -> None:
    verdict = judge(hold_out(*[0.9] * 11, 0.8 - loss), {"v1": hold_out(*[0.8] * 12)}, POLICY)
    assert verdict.outcome == outcome
    if outcome == "refused":
        assert verdict.reasons == (
            "the mean Dice of c11 changes by -0.1001 against v1, which must not be below -0.1: "
            "this case got much worse",
        )


def test_a_case_is_its_mean_over_structures() -> None:
    before, after = two_structures(0.8, 0.8), two_structures(0.8, 0.8)
    after[3].dice.update(liver=0.62, spleen=0.8)
    found = compare(after, before, "v1", POLICY)
    assert found.per_case["c3"] == -0.09
    assert judge(after, {"v1": before}, GatePolicy(mean_lower_bound=-0.1)).outcome == "promoted"


def test_a_structure_that_is_newly_missed_is_refused_however_good_the_rest_is() -> None:
    before, after = two_structures(0.8, 0.05), two_structures(0.9, 0.05)
    after[7] = CaseScore("c7", "p7", {"liver": 0.9, "spleen": 0.0}, ("spleen",))
    verdict = judge(after, {"v1": before}, POLICY)
    assert verdict.outcome == "refused"
    assert verdict.reasons == ("predicts no spleen at all in c7, where v1 does",)
    assert verdict.comparisons[0].lost == {"c7": ("spleen",)}


def test_a_structure_the_other_version_misses_too_is_no_reason() -> None:
    before, after = hold_out(*[0.8] * 9, 0.0, missed=["c9"]), hold_out(*[0.8] * 9, 0.0, missed=["c9"])
    assert judge(after, {"v1": before}, POLICY).outcome == "promoted"
    found_again = hold_out(*[0.8] * 10)
    assert judge(found_again, {"v1": before}, POLICY).outcome == "promoted"


def test_a_case_that_cannot_be_predicted_is_refused_and_the_rest_compared() -> None:
    after, before = hold_out(*[0.82] * 9), hold_out(*[0.80] * 10)
    verdict = judge(after, {"v1": before}, POLICY, {"c9": "The network ran out\nof memory."})
    assert verdict.outcome == "refused"
    assert verdict.reasons == ("cannot predict c9: The network ran out of memory",)
    assert verdict.comparisons[0].cases == 9
    assert verdict.summary == "refused: cannot predict c9: The network ran out of memory."


def test_a_candidate_that_predicts_nothing_is_refused() -> None:
    verdict = judge([], {"v1": hold_out(0.8, 0.8)}, POLICY, {"c0": "broken", "c1": "broken"})
    assert (verdict.outcome, len(verdict.reasons), verdict.comparisons) == ("refused", 2, ())
    assert judge([], {}, POLICY, {"c0": "broken"}).outcome == "refused"


def test_every_violation_is_told_against_every_baseline() -> None:
    before = two_structures(0.8, 0.8)
    after = two_structures(0.65, 0.8)
    after[2] = CaseScore("c2", "p2", {"liver": 0.0, "spleen": 0.8}, ("liver",))
    verdict = judge(after, {"v2": before, "v1": before}, POLICY)
    assert verdict.outcome == "refused"
    kinds = ["lower 95 % bound", "mean Dice of liver", "mean Dice of c2", "predicts no liver at all in c2"]
    assert [kind in reason for kind, reason in zip(kinds * 2, verdict.reasons, strict=True)] == [True] * 8
    assert ["v2" in reason for reason in verdict.reasons] == [True] * 4 + [False] * 4
    assert verdict.summary.endswith("; and 5 more reasons.")


def test_small_steps_down_are_stopped_by_the_original_version() -> None:
    versions = [hold_out(*[0.8 - 0.005 * step] * 10) for step in range(4)]
    outcomes = [
        judge(versions[step], {"current": versions[step - 1], "v1": versions[0]}, POLICY).outcome for step in (1, 2, 3)
    ]
    assert outcomes == ["promoted", "refused", "refused"]
    assert judge(versions[3], {"current": versions[2]}, POLICY).outcome == "promoted"


# -- few cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cases", "outcome"), [(7, "needs a person"), (8, "promoted")])
def test_with_too_few_cases_a_person_promotes(cases: int, outcome: str) -> None:
    verdict = judge(hold_out(*[0.85] * cases), {"v1": hold_out(*[0.8] * cases)}, POLICY)
    assert verdict.outcome == outcome
    if outcome == "needs a person":
        assert verdict.reasons == (
            "judged by 7 hold-out cases of 7 patients, and at least 8 cases of 2 patients are needed: look at its "
            "predictions, then serve it with `mshub promote ID VERSION`",
            "mean Dice +0.050 [+0.050, +0.050] against v1 on 7 cases of 7 patients",
        )


@pytest.mark.parametrize(("owners", "outcome"), [(["p"] * 9, "needs a person"), (["p"] * 8 + ["q"], "promoted")])
def test_the_cases_of_one_patient_are_not_enough(owners: list[str], outcome: str) -> None:
    after, before = hold_out(*[0.85] * 9, patients=owners), hold_out(*[0.8] * 9, patients=owners)
    assert judge(after, {"v1": before}, POLICY).outcome == outcome


def test_the_bound_of_one_patient_has_no_width_and_judges_nothing() -> None:
    policy = GatePolicy(worst_structure=-0.03, resamples=2000)
    after, before = hold_out(0.78, 0.78, patients=["p", "p"]), hold_out(0.8, 0.8, patients=["p", "p"])
    verdict = judge(after, {"v1": before}, policy)
    assert verdict.outcome == "needs a person"
    assert verdict.reasons[1] == "mean Dice -0.020 against v1 on 2 cases of 1 patient"
    two = judge(hold_out(0.78, 0.78), {"v1": hold_out(0.8, 0.8)}, policy)
    assert two.outcome == "refused"


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (hold_out(0.65), "the mean Dice of c0"),
        (hold_out(0.75), "the mean Dice of liver"),
        (hold_out(0.8, missed=["c0"]), "predicts no liver"),
    ],
    ids=["case", "structure", "missed"],
)
def test_hard_limits_hold_for_a_single_case_too(after: Scores, reason: str) -> None:
    verdict = judge(after, {"v1": hold_out(0.8)}, POLICY)
    assert verdict.outcome == "refused"
    assert any(told.startswith(reason) for told in verdict.reasons)


@pytest.mark.parametrize("baselines", [{}, {"v1": []}], ids=["first version", "with a baseline"])
def test_without_hold_out_cases_a_person_promotes(baselines: dict[str, Scores]) -> None:
    verdict = judge([], baselines, POLICY)
    assert (verdict.outcome, verdict.comparisons) == ("needs a person", ())
    assert verdict.reasons[0].startswith("judged by 0 hold-out cases of 0 patients")
    assert len(verdict.reasons) == 1


def test_a_policy_of_one_case_asks_for_two_patients_still() -> None:
    policy = GatePolicy(min_cases=1, resamples=2000)
    assert judge(hold_out(0.9), {"v1": hold_out(0.8)}, policy).outcome == "needs a person"
    assert judge(hold_out(0.9, 0.9), {"v1": hold_out(0.8, 0.8)}, policy).outcome == "promoted"


# -- the labels themselves ------------------------------------------------------------------------------------------


def doubts_about(labels: int) -> dict[str, list[str]]:
    return {f"n{number}": ["liver and spleen look exchanged"] for number in range(labels)}


@pytest.mark.parametrize(
    ("doubtful", "new", "outcome"),
    [(0, 12, "promoted"), (1, 12, "needs a person"), (6, 12, "needs a person"), (7, 12, "refused"), (3, 3, "refused"),
     (2, 2, "needs a person"), (1, 1, "needs a person")],
)  # fmt: skip
def test_new_labels_that_look_wrong_leave_it_to_a_person_or_refuse(doubtful: int, new: int, outcome: str) -> None:
    scores, baselines = hold_out(*[0.85] * 10), {"v1": hold_out(*[0.8] * 10)}
    verdict = judge(scores, baselines, POLICY, doubts=doubts_about(doubtful), new_labels=new)
    assert verdict.outcome == outcome
    told = [f"look at the label of n{number}: liver and spleen look exchanged" for number in range(doubtful)]
    if outcome == "refused":
        told = [f"{doubtful} of {new} new labels look wrong, at most 50 % may: correct them and train again", *told]
        assert verdict.reasons == tuple(told)
    else:
        assert verdict.reasons[:-1] == tuple(told)
        assert verdict.reasons[-1].startswith("mean Dice +0.050")


def test_how_many_new_labels_may_look_wrong_is_the_policys() -> None:
    scores, baselines = hold_out(*[0.85] * 10), {"v1": hold_out(*[0.8] * 10)}
    outcomes = [
        judge(scores, baselines, replace(POLICY, doubtful_labels=share), doubts=doubts_about(5), new_labels=10).outcome
        for share in (0.49, 0.5, 1.0)
    ]
    assert outcomes == ["refused", "needs a person", "needs a person"]


# -- the first version --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dice", "outcome"), [(0.70, "promoted"), (0.6999, "needs a person"), (0.71, "promoted")])
def test_a_first_version_must_reach_a_level(dice: float, outcome: str) -> None:
    verdict = judge(hold_out(*[dice] * 10), {}, POLICY)
    assert (verdict.outcome, verdict.comparisons) == (outcome, ())
    found = f"mean Dice {dice:.3f} [{dice:.3f}, {dice:.3f}] on 10 cases of 10 patients"
    assert verdict.reasons[-1] == found
    if outcome == "needs a person":
        assert verdict.reasons[0].startswith(
            "the mean Dice of a first version must have a lower 95 % bound of at least 0.7, found 0.6999"
        )


def test_the_level_of_a_first_version_is_its_lower_bound_not_its_mean() -> None:
    scores = hold_out(*[0.95, 0.5] * 5)
    verdict = judge(scores, {}, POLICY)
    assert verdict.outcome == "needs a person"
    assert verdict.reasons[1].startswith("mean Dice 0.725 [0.5")


@pytest.mark.parametrize("dice", [0.95, 0.3])
def test_a_first_version_with_few_cases_needs_a_person_whatever_its_level(dice: float) -> None:
    verdict = judge(hold_out(*[dice] * 7), {}, POLICY)
    assert verdict.outcome == "needs a person"
    assert verdict.reasons[0].startswith("judged by 7 hold-out cases")


def test_a_first_version_waits_for_a_person_where_the_policy_says_so() -> None:
    assert judge(hold_out(*[0.9] * 10), {}, GatePolicy(automatic=False)).outcome == "needs a person"


# -- records ------------------------------------------------------------------------------------------------------


def test_a_verdict_goes_through_json() -> None:
    after = hold_out(*[0.82] * 9, 0.0, missed=["c9"])
    verdict = judge(after, {"v1": hold_out(*[0.80] * 10)}, POLICY)
    stored = verdict.as_dict()
    assert json.loads(json.dumps(stored)) == stored
    assert stored["outcome"] == "refused"
    assert stored["reasons"] == list(verdict.reasons)
    assert stored["policy"] == POLICY.as_dict()
    (comparison,) = stored["comparisons"]
    assert comparison == verdict.comparisons[0].as_dict()
    assert comparison["lost"] == {"c9": ["liver"]}
    assert comparison["per_case"]["c0"] == 0.02
    assert comparison["overall"]["mean"] == pytest.approx(-0.062)
    assert comparison["structures"]["liver"].keys() == {"mean", "low", "high"}


def test_a_summary_is_one_line_and_counts_what_it_leaves_out() -> None:
    def told(*reasons: str) -> str:
        return Verdict("refused", reasons, (), POLICY).summary

    assert told("one") == "refused: one."
    assert told("one", "two", "three") == "refused: one; two; three."
    assert told("one", "two", "three", "four") == "refused: one; two; three; and 1 more reason."


def test_numbers_are_plain_floats_even_if_scores_are_not() -> None:
    scores = [CaseScore(f"c{i}", f"p{i}", {"liver": np.float64(0.8)}) for i in range(8)]
    found: Comparison = compare(scores, scores, "v1", POLICY)
    assert {type(found.overall.low), type(found.per_case["c0"]), type(found.structures["liver"].mean)} == {float}


# -- the policy ---------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_rules_of_the_recipe() -> None:
    policy = GatePolicy()
    assert (policy.min_cases, policy.mean_lower_bound, policy.worst_structure) == (8, -0.01, -0.03)
    assert (policy.worst_case, policy.first_mean_dice, policy.confidence) == (-0.10, 0.70, 0.95)
    assert (policy.resamples, policy.seed, policy.automatic) == (10_000, 0, True)


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert GatePolicy.load(tmp_path / "gate.toml") == GatePolicy()


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    """Return what writes a policy file."""

    def write(text: str) -> Path:
        path = tmp_path / "gate.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_file_changes_what_it_names(written: Callable[[str], Path]) -> None:
    path = written("min_cases = 20\nworst_case = -1\nautomatic = false\n")
    assert GatePolicy.load(path) == GatePolicy(min_cases=20, worst_case=-1, automatic=False)
    assert GatePolicy.load(written("")) == GatePolicy()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("min_case = 3", r"unknown key 'min_case'. Did you mean 'min_cases'.* Known: min_cases, mean_lower"),
        ("[gate]\nmin_cases = 3", "unknown key 'gate'"),
        ("min_cases = 0", "min_cases is 0; expected a whole number from 1 to 10000"),
        ("min_cases = 8.0", "min_cases is 8.0; expected a whole number"),
        ("min_cases = true", "min_cases is True; expected a whole number"),
        ('min_cases = "8"', "min_cases is '8'; expected a whole number"),
        ("worst_case = -1.1", "worst_case is -1.1; expected a number from -1 to 1"),
        ("worst_structure = nan", "worst_structure is nan"),
        ("mean_lower_bound = -inf", "mean_lower_bound is -inf"),
        ("worst_case = false", "worst_case is False; expected a number"),
        ("first_mean_dice = 70", "first_mean_dice is 70; expected a number from 0 to 1"),
        ("confidence = 95", "confidence is 95; expected a number from 0.5 to 0.999"),
        ("confidence = 1.0", "confidence is 1.0"),
        ("resamples = 10", "resamples is 10; expected a whole number from 100 to 100000"),
        ("seed = -1", "seed is -1; expected a whole number from 0 to 4294967295"),
        ("automatic = 1", "automatic is 1; expected true or false"),
        ('automatic = "no"', "automatic is 'no'; expected true or false"),
        ("min_cases = ", "cannot be read. Found: Invalid value"),
    ],
)
def test_what_cannot_be_is_refused_with_the_file_and_the_key(
    written: Callable[[str], Path], line: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)gate\.toml.*{message}"):
        GatePolicy.load(written(line))


def test_a_policy_file_that_is_no_text_or_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gate.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        GatePolicy.load(tmp_path / "gate.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        GatePolicy.load(tmp_path)


def test_a_policy_made_in_code_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="worst_case is -2"):
        GatePolicy(worst_case=-2)
