"""A calibrated predicted Dice: its line, and whether its interval covers what it promises."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from statistics import median

import numpy as np
import pytest
from scipy.stats import theilslopes

from mshub.calibration import LEVEL, MIN_CASES, MOST_CASES, Calibration
from mshub.errors import TrainingError

Pairs = list[tuple[float, float]]
GRID = [float(score) for score in np.linspace(0, 1, 101)]


def straight(count: int = 12, slope: float = 1.5, intercept: float = -0.5) -> Pairs:
    """Return cases on a line, the scores from 0.5 to 0.95."""
    return [(float(score), float(intercept + slope * score)) for score in np.linspace(0.5, 0.95, count)]


def drawn(rng: np.random.Generator, count: int, noise: str = "even") -> Pairs:
    """Return cases as they come: a skewed score, and a Dice that scatters about a line."""
    scores = rng.beta(12, 2, count)
    spread = {
        "even": rng.normal(0, 0.05, count),
        "uneven": rng.normal(0, 0.02 + 0.2 * (1 - scores)),
        "failing": np.where(rng.random(count) < 0.08, -0.6, rng.normal(0, 0.03, count)),
        "useless score": rng.uniform(-0.3, 0.3, count),
    }[noise]
    dice = np.clip(1.4 * scores - 0.5 + spread, 0, 1)
    return [(float(score), float(value)) for score, value in zip(scores, dice, strict=True)]


def fitted(pairs: Pairs) -> Calibration:
    calibration = Calibration.fit(pairs)
    assert calibration is not None
    return calibration


def plain_line(pairs: Pairs) -> tuple[float, float]:
    """Return slope and intercept of the line by the plainest loop there is."""
    ordered = [(one, other) if one[0] < other[0] else (other, one) for one, other in combinations(pairs, 2)]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in ordered if b[0] > a[0]]
    slope = max(0.0, median(slopes)) if slopes else 0.0
    return slope, median(dice - slope * score for score, dice in pairs)


def plain_prediction(pairs: Pairs, score: float) -> float:
    slope, intercept = plain_line(pairs)
    return min(1.0, max(0.0, intercept + slope * score))


def plain_interval(pairs: Pairs, score: float, alpha: float = 0.1) -> tuple[float, float]:
    """Return the jackknife+ interval as the paper defines it, for one score."""
    lows, highs = [], []
    for number, (known, dice) in enumerate(pairs):
        others = pairs[:number] + pairs[number + 1 :]
        distance = abs(dice - plain_prediction(others, known))
        lows.append(plain_prediction(others, score) - distance)
        highs.append(plain_prediction(others, score) + distance)
    rank = math.ceil((1 - alpha) * (len(pairs) + 1) - 1e-9)
    return sorted(lows)[len(pairs) - rank], sorted(highs)[rank - 1]


# -- the line -----------------------------------------------------------------------------------------------------


def test_cases_on_a_line_are_predicted_exactly_and_without_doubt() -> None:
    calibration = fitted(straight())
    for score in (0.5, 0.71, 0.95):
        assert calibration.predict(score) == pytest.approx((1.5 * score - 0.5,) * 3)
    assert (calibration.cases, calibration.level) == (12, LEVEL)


@pytest.mark.parametrize("seed", range(5))
def test_the_line_is_that_of_scipys_theil_and_sen(seed: int) -> None:
    pairs = [(round(score, 2), dice) for score, dice in drawn(np.random.default_rng(seed), 21)]  # some scores equal
    scores, dice = np.array(pairs).T
    slope, intercept, *_ = theilslopes(dice, scores, method="joint")
    assert slope > 0
    middle = float(np.median(scores))
    assert fitted(pairs).predict(middle)[0] == pytest.approx(intercept + slope * middle)


def test_a_quarter_of_the_cases_may_fail_without_bending_the_line() -> None:
    pairs = straight(20)
    for number in (3, 8, 13, 15, 19):
        pairs[number] = (pairs[number][0], 0.0)
    assert fitted(pairs).predict(0.8)[0] == pytest.approx(1.5 * 0.8 - 0.5, abs=0.02)


def test_the_line_is_continued_beyond_the_scores_seen_up_to_what_a_dice_can_be() -> None:
    assert fitted(straight()).predict(0.4) == pytest.approx((0.1,) * 3)
    assert fitted(straight()).predict(0.2) == pytest.approx((0.0,) * 3)
    assert fitted(straight(slope=0.8, intercept=0.22)).predict(1.0) == pytest.approx((1.0,) * 3)


@pytest.mark.parametrize("noise", ["even", "uneven", "failing", "useless score"])
@pytest.mark.parametrize("count", [10, 37])
def test_nothing_falls_when_the_score_rises_and_all_of_it_is_a_dice(noise: str, count: int) -> None:
    for seed in range(10):
        calibration = fitted(drawn(np.random.default_rng(seed), count, noise))
        predicted = [calibration.predict(score) for score in GRID]
        assert all(0 <= low <= expected <= high <= 1 for expected, low, high in predicted)
        for before, after in pairwise(predicted):
            assert all(one <= other for one, other in zip(before, after, strict=True))


def test_a_score_that_says_the_contrary_of_the_truth_says_nothing() -> None:
    calibration = fitted([(score, 1 - score) for score, _ in straight()])
    assert calibration.predict(0.5)[0] == calibration.predict(0.95)[0] == pytest.approx(0.275)


@pytest.mark.parametrize("score", [0.0, 0.93, 1.0])
def test_scores_that_are_all_equal_leave_the_spread_of_the_dice(score: float) -> None:
    dice = [0.70, 0.72, 0.75, 0.78, 0.80, 0.81, 0.83, 0.85, 0.88, 0.90, 0.91]
    expected, low, high = fitted([(score, value) for value in dice]).predict(score)
    assert expected == 0.81
    # Without 0.70 the median is 0.82, without 0.91 it is 0.805: 0.12 and 0.105 from the case left out.
    assert low == pytest.approx(0.82 - 0.12)
    assert high == pytest.approx(0.82 + 0.12)
    assert fitted([(score, 0.8)] * 10).predict(0.5) == pytest.approx((0.8, 0.8, 0.8))


def test_one_score_apart_from_equal_ones_does_not_break_the_line_without_it() -> None:
    calibration = fitted([(0.9, 0.8)] * 10 + [(0.5, 0.4)])
    assert calibration.predict(0.9)[0] == pytest.approx(0.8)
    assert calibration.predict(0.5)[0] == pytest.approx(0.4)


# -- the interval -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 11, 19, 20, 29])
def test_the_interval_is_the_jackknife_plus_of_the_paper(count: int) -> None:
    pairs = drawn(np.random.default_rng(count), count, "uneven")
    calibration = fitted(pairs)
    for score in (0.3, 0.7, 0.85, 0.99):
        expected, low, high = calibration.predict(score)
        wanted_low, wanted_high = plain_interval(pairs, score)
        assert expected == pytest.approx(plain_prediction(pairs, score))
        assert low == pytest.approx(max(0.0, min(wanted_low, expected)))
        assert high == pytest.approx(min(1.0, max(wanted_high, expected)))


@pytest.mark.parametrize("noise", ["even", "uneven", "failing", "useless score"])
@pytest.mark.parametrize("count", [10, 15, 30])
def test_the_interval_covers_nine_of_ten_new_cases(noise: str, count: int) -> None:
    rng = np.random.default_rng(7)
    covered = []
    for _ in range(120):
        calibration = fitted(drawn(rng, count, noise))
        for score, dice in drawn(rng, 15, noise):
            _, low, high = calibration.predict(score)
            covered.append(low <= dice <= high)
    assert np.mean(covered) >= 0.88


def test_the_interval_is_narrow_where_the_score_tells_the_dice_and_wide_where_it_does_not() -> None:
    def width(noise: str) -> float:
        _, low, high = fitted(drawn(np.random.default_rng(3), 60, noise)).predict(0.85)
        return high - low

    assert 0.1 < width("even") < 0.25
    assert width("useless score") > 0.45


def test_the_order_of_the_cases_does_not_matter() -> None:
    pairs = drawn(np.random.default_rng(4), 14)
    assert fitted(pairs[::-1]).predict(0.8) == pytest.approx(fitted(pairs).predict(0.8))


# -- which cases --------------------------------------------------------------------------------------------------


def test_fewer_than_ten_cases_calibrate_nothing() -> None:
    assert Calibration.fit(straight(MIN_CASES - 1)) is None
    assert Calibration.fit([]) is None
    assert fitted(straight(MIN_CASES)).cases == MIN_CASES == 10


def test_cases_that_were_not_measured_are_dropped() -> None:
    unknown = [(math.nan, 0.5), (0.5, math.nan), (math.inf, 0.1), (0.2, -math.inf)]
    calibration = fitted([*unknown[:2], *straight(), *unknown[2:]])
    assert calibration.cases == 12
    assert calibration.predict(0.8) == fitted(straight()).predict(0.8)
    assert Calibration.fit([*straight(MIN_CASES - 1), *unknown]) is None


@pytest.mark.parametrize("pair", [(1.01, 0.5), (-0.01, 0.5), (0.5, 1.33), (0.5, -0.1), (95.0, 0.9)])
def test_what_is_no_dice_is_refused_even_among_too_few(pair: tuple[float, float]) -> None:
    wrong = f"{next(value for value in pair if not 0 <= value <= 1):g}"
    with pytest.raises(TrainingError, match=rf"Found: {wrong}\. Expected: .* from 0 to 1\. How to fix: "):
        Calibration.fit([*straight(), pair])
    with pytest.raises(TrainingError):
        Calibration.fit([pair])


@pytest.mark.parametrize("score", [math.nan, math.inf, -0.1, 1.1])
def test_what_is_no_score_is_not_predicted(score: float) -> None:
    with pytest.raises(TrainingError, match=f"Found: {score:g}"):
        fitted(straight()).predict(score)


def test_of_very_many_cases_the_newest_count() -> None:
    old, new = straight(50, slope=0.2, intercept=0.1), straight(MOST_CASES)
    calibration = fitted([*old, *new])
    assert calibration.cases == MOST_CASES
    assert calibration.predict(0.7) == fitted(new).predict(0.7)


def test_predictions_are_plain_numbers() -> None:
    pairs = [(np.float32(score), np.float64(dice)) for score, dice in straight()]
    assert {type(value) for value in fitted(pairs).predict(np.float64(0.7))} == {float}
