"""Tables and plots of what `bench/active_learning.py` has done so far.

    python bench/active_learning_report.py      # writes docs/images/active-learning-*.png, prints Markdown tables

Only seeds of which every arm has all rounds are counted. Differences between arms are paired by seed, with 95 %
t-intervals. Whole curves are compared by the area under them, divided by its width: the mean Dice on the test cases on
the way, from the base model to the last round, per labelled case or per edited voxel. Edited voxels are those in which
the model's pre-label of a chosen case, at that time, differs from its reference label; the area ends where the arm of
the seed that needed least ends.

The penalty matrix is that of Ash et al. (BADGE, arXiv 1906.03671): entry (i, j) is the share of rounds in which arm i
beats arm j, by a two-sided paired t-test over the seeds at 5 %. The mean of a column is how often its arm is beaten.

Failures are ranked by AURC, the area under the risk-coverage curve: the cases are accepted in the order of falling
confidence, and the risk, 1 minus the mean Dice of those accepted, is averaged over all coverages (1 case, 2 cases...
all). Lower is better; 0 is a perfect model. Given are 100 times the mean over the seeds, and 95 % intervals from
bootstrap draws of the cases of each seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import integrate, stats

from active_learning import ARMS, BLIND, MISTAKES, OUT, ROOT, SHIFTED, mean_of, volume_ml
from mshub.geometry import Array
from mshub.selection import Case, Pool, doubt
from mshub.uncertainty import Uncertainty

Json = dict[str, Any]
SIGNIFICANT = 0.05
DRAWS = 1000
POINTS = 41
"""Of a curve per edited voxel."""
DOMAINS: dict[str, Callable[[str], bool]] = {
    "all": lambda _: True,
    "as they were": lambda name: not name.endswith(SHIFTED),
    "shifted": lambda name: name.endswith(SHIFTED),
}
COLOURS = {
    "random": "#8a939c",
    "foreground_random": "#5b6875",
    "uncertainty": "#1f5fa8",
    "class_stratified": "#2a9d8f",
    "diversity": "#d9822b",
    "hybrid": "#7b4fb0",
    "worst_first": "#b3261e",
    "oracle": "#1b1b1b",
}


# -- what was done ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """An arm in one seed.

    Attributes
    ----------
    dice : dict of str to ndarray
        Domain -> mean Dice on its test cases, of the base model and after each round.
    labelled, edited : ndarray
        Cases labelled, and voxels edited, until then.
    shifted : int
        Chosen cases that are shifted.
    """

    dice: dict[str, Array]
    labelled: Array
    edited: Array
    shifted: int


Curves = dict[str, list[Curve]]
"""Arm -> its curves, in the order of the seeds."""


def read(path: Path) -> Json:
    """Read a result."""
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def complete_seeds(out: Path, arms: Sequence[str], rounds: int) -> list[Path]:
    """Return the folders of the seeds in which all arms went through all rounds."""
    names = [f"{arm}-{number}.json" for arm in arms for number in range(1, rounds + 1)]
    folders = sorted(out.glob("seed-*"), key=lambda path: int(path.name.partition("-")[2]))
    return [folder for folder in folders if all((folder / name).is_file() for name in names)]


def curve_of(folder: Path, arm: str, rounds: int) -> Curve:
    """Read what an arm did in one seed."""
    steps = [read(folder / f"{arm}-{number}.json") for number in range(1, rounds + 1)]
    tests = [read(folder / "base.json")["test"], *(step["test"] for step in steps)]
    dice = {
        domain: np.array([np.mean([value for name, value in test.items() if chosen(name)]) for test in tests])
        for domain, chosen in DOMAINS.items()
    }
    labelled = np.cumsum([0, *(len(step["chosen"]) for step in steps)])
    edited = np.cumsum([0, *(sum(step["edited"].values()) for step in steps)])
    return Curve(dice, labelled, edited, sum(name.endswith(SHIFTED) for step in steps for name in step["chosen"]))


# -- areas and differences --------------------------------------------------------------------------------------------


def area(x: Array, y: Array, end: float) -> float:
    """Return the mean height of a piecewise linear curve from 0 to `end`."""
    inside = np.concatenate([x[x < end], [end]])
    return float(integrate.trapezoid(np.interp(inside, x, y), inside) / end)


def areas_per_case(curves: Curves) -> dict[str, Array]:
    """Return arm -> area per labelled case, one value per seed."""
    return {
        arm: np.array([area(one.labelled, one.dice["all"], one.labelled[-1]) for one in ones])
        for arm, ones in curves.items()
    }


def areas_per_voxel(curves: Curves) -> dict[str, Array]:
    """Return arm -> area per edited voxel, one value per seed, up to what every arm of the seed edited."""
    ends = np.min([[one.edited[-1] for one in ones] for ones in curves.values()], axis=0)
    return {
        arm: np.array([area(one.edited, one.dice["all"], end) for one, end in zip(ones, ends, strict=True)])
        for arm, ones in curves.items()
    }


def at_the_end(curves: Curves, domain: str) -> dict[str, Array]:
    """Return arm -> Dice after the last round, one value per seed."""
    return {arm: np.array([one.dice[domain][-1] for one in ones]) for arm, ones in curves.items()}


def interval(values: Array) -> tuple[float, float, float]:
    """Return the mean and its 95 % t-interval; without width for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def penalties(curves: Curves) -> Array:
    """Return the penalty matrix, axes (arm, beaten arm), in the order of the arms."""
    after = np.array([[one.dice["all"][1:] for one in ones] for ones in curves.values()])  # (arm, seed, round)
    beats = np.zeros((len(after), len(after)))
    for one, first in enumerate(after):
        for other, second in enumerate(after):
            beats[one, other] = np.mean(is_better(first, second)) if one != other else 0.0
    return beats


def is_better(first: Array, second: Array) -> Array:
    """Return by round whether the first arm is significantly better; both have axes (seed, round)."""
    difference = first - second
    if len(difference) < 2:
        return np.zeros(difference.shape[1], bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = difference.mean(0) / stats.sem(difference, axis=0)
    better: Array = t > stats.t.ppf(1 - SIGNIFICANT / 2, len(difference) - 1)
    return better


# -- ranking failures -------------------------------------------------------------------------------------------------

SCORES = (
    "mirror_dice", "fold_dice", "soft_dice", "1 - entropy_foreground", "1 - entropy_border", "1 - doubt", "agreement",
    "log volume",
)  # fmt: skip
REFERENCE = "mirror_dice"
"""The score the others are compared with."""
RANKINGS = {
    "base model, two folds, test cases": "ranking-base",
    "base model, one fold, pool": "pool",
    "after all rounds of `random`, one fold, test cases": "ranking-tuned",
}


def confidences(found: Json) -> dict[str, Array]:
    """Return score -> confidence of each case; minus infinity where nothing was found, no score that is never known."""
    cases = [Case(name, name, Uncertainty.from_dict(one["uncertainty"])) for name, one in found.items()]
    usual = Pool(tuple(cases)).usual
    columns: dict[str, list[float | None]] = {name: [] for name in SCORES}
    for case, one in zip(cases, found.values(), strict=True):
        known = case.uncertainty
        if known is None:
            continue
        for name in ("mirror_dice", "fold_dice", "soft_dice", "agreement"):
            columns[name].append(getattr(known, name))
        columns["1 - entropy_foreground"].append(opposite(known.entropy_foreground))
        columns["1 - entropy_border"].append(opposite(known.entropy_border))
        columns["1 - doubt"].append(opposite(doubt(case, usual)))
        columns["log volume"].append(float(np.log(volume_ml(one))) if volume_ml(one) > 0 else None)
    return {
        name: np.array([-np.inf if value is None else value for value in column])
        for name, column in columns.items()
        if any(value is not None for value in column)
    }


def opposite(value: float | None) -> float | None:
    """Return 1 - value, None for None."""
    return None if value is None else 1 - value


def aurc(confidence: Array, risk: Array) -> Array:
    """Return the area under the risk-coverage curve of each row, times 100; axes (draw, case)."""
    order = np.argsort(-confidence, axis=-1, kind="stable")
    accepted = np.cumsum(np.take_along_axis(risk, order, -1), -1) / np.arange(1, risk.shape[-1] + 1)
    mean: Array = 100 * accepted.mean(-1)
    return mean


def spearman(one: Array, other: Array) -> Array:
    """Return the rank correlation of each row; axes (draw, case)."""
    first, second = (stats.rankdata(values, axis=-1) for values in (one, other))
    first, second = (values - values.mean(-1, keepdims=True) for values in (first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        rho: Array = (first * second).sum(-1) / np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    return rho


@dataclass(frozen=True)
class Ranked:
    """How a score ranks: AURC and rank correlation, the first value of each that of all cases, then of the draws."""

    aurc: Array
    rho: Array


def ranked(files: Iterable[Path]) -> dict[str, Ranked]:
    """Return score -> how it ranks, the mean over the files, with the bounds ``optimal`` and ``random``."""
    rng = np.random.default_rng(0)
    sums: dict[str, list[Ranked]] = {}
    for file in files:
        found = read(file)
        risk = np.array([1 - mean_of(one) for one in found.values()])
        draws = np.vstack([np.arange(len(risk)), rng.integers(len(risk), size=(DRAWS, len(risk)))])
        for name, score in {**confidences(found), "optimal": -risk}.items():
            one = Ranked(aurc(score[draws], risk[draws]), spearman(score[draws], -risk[draws]))
            sums.setdefault(name, []).append(one)
        by_chance = Ranked(100 * risk[draws].mean(-1), np.zeros(DRAWS + 1))
        sums.setdefault("random", []).append(by_chance)
    return {
        name: Ranked(np.mean([one.aurc for one in ones], 0), np.nanmean([one.rho for one in ones], 0))
        for name, ones in sums.items()
    }


def bounds(values: Array) -> tuple[float, float, float]:
    """Return the value of all cases and the 95 % interval of the draws."""
    low, high = np.nanpercentile(values[1:], (2.5, 97.5))
    return float(values[0]), float(low), float(high)


# -- wrong labels -----------------------------------------------------------------------------------------------------


def average_precision(hits: Array) -> float:
    """Return the mean precision at the places of the hits."""
    places = np.flatnonzero(hits)
    return float(np.mean(np.arange(1, len(places) + 1) / (places + 1)))


def found_wrong(draws: Sequence[Sequence[Json]]) -> dict[str, float]:
    """Return how well wrong labels were found, the mean over the draws: k is the number of wrong labels."""
    columns: dict[str, list[float]] = {}
    for draw in draws:
        hits = np.array([case["mistake"] is not None for case in draw])
        count = int(hits.sum())
        columns.setdefault("average precision", []).append(average_precision(hits))
        columns.setdefault("recall at k", []).append(hits[:count].mean())
        columns.setdefault("recall at 2k", []).append(hits[: 2 * count].sum() / count)
        for mistake in MISTAKES:
            places = [place for place, case in enumerate(draw) if case["mistake"] == mistake]
            columns.setdefault(mistake, []).extend(float(place < count) for place in places)
    return {name: float(np.mean(values)) for name, values in columns.items()}


def by_chance(draws: Sequence[Sequence[Json]]) -> dict[str, float]:
    """Return the same for random orders."""
    rng = np.random.default_rng(0)
    return found_wrong([[draw[index] for index in rng.permutation(len(draw))] for draw in draws for _ in range(20)])


# -- tables -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def spread(values: Array, digits: int = 4) -> str:
    """Write a paired difference: mean and interval, bold where the interval lies on one side of 0."""
    mean, low, high = interval(values)
    text = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def curve_table(curves: Curves) -> str:
    """Return mean Dice per round, and what was chosen."""
    rounds = len(next(iter(curves.values()))[0].labelled) - 1
    rows = []
    for arm, ones in curves.items():
        dice = np.mean([one.dice["all"] for one in ones], axis=0)
        chosen = np.mean([one.shifted for one in ones])
        edited = np.mean([one.edited[-1] for one in ones]) / 1000
        rows.append([arm, *(f"{value:.4f}" for value in dice), f"{edited:.1f}", f"{chosen:.1f}"])
    cases = next(iter(curves.values()))[0].labelled
    head = ["arm", *(f"{cases[number]} cases" for number in range(rounds + 1))]
    return table([*head, "edited voxels, thousands", f"shifted of {cases[-1]}"], rows)


def difference_table(curves: Curves) -> str:
    """Return the differences to random, paired by seed."""
    measures = {
        "area per case": areas_per_case(curves),
        "area per edited voxel": areas_per_voxel(curves),
        **{f"last round, {domain}": at_the_end(curves, domain) for domain in DOMAINS},
    }
    mean = [f"{np.mean(values[BLIND]):.4f}" for values in measures.values()]
    rows = [[f"{BLIND} (Dice)", *mean]]
    for arm in curves:
        if arm != BLIND:
            rows.append([arm, *(spread(values[arm] - values[BLIND]) for values in measures.values())])
    return table(["arm", *measures], rows)


def penalty_table(arms: Sequence[str], beats: Array) -> str:
    """Return the penalty matrix, and the mean of each column over the other arms."""
    rows = [
        [arm, *("" if one == other else f"{value:.2f}" for other, value in enumerate(row))]
        for one, (arm, row) in enumerate(zip(arms, beats, strict=True))
    ]
    return table(["beats", *arms], [*rows, ["**penalty**", *(f"**{value:.3f}**" for value in penalty_of(beats))]])


def penalty_of(beats: Array) -> Array:
    """Return the mean of each column without the diagonal."""
    mean: Array = beats.sum(0) / max(1, len(beats) - 1)
    return mean


def ranking_table(scores: dict[str, Ranked]) -> str:
    """Return AURC and rank correlation of each score, and the difference to the reference on the same draws."""
    rows = []
    for name, one in scores.items():
        if name in ("optimal", "random"):
            rows.append([f"({name})", f"{one.aurc[0]:.2f}", "", ""])
            continue
        value, low, high = bounds(one.aurc)
        change = bounds(one.aurc - scores[REFERENCE].aurc)
        rho = bounds(one.rho)
        rows.append([
            name,
            f"{value:.2f} ({low:.2f} to {high:.2f})",
            "" if name == REFERENCE else f"{change[0]:+.2f} ({change[1]:+.2f} to {change[2]:+.2f})",
            f"{rho[0]:.2f} ({rho[1]:.2f} to {rho[2]:.2f})",
        ])  # fmt: skip
    return table(["score", "AURC x 100", f"against {REFERENCE}", "Spearman's rho"], rows)


def relabel_table(folders: Sequence[Path]) -> str:
    """Return how well `relabel` finds wrong labels: the mean over the seeds."""
    rows = []
    for name, file in {"base model, two folds": "relabel-base", "after all rounds": "relabel-tuned"}.items():
        draws = [read(folder / f"{file}.json")["draws"] for folder in folders]
        seeds = [found_wrong(one) for one in draws]
        rows.append([name, *(percent([seed[key] for seed in seeds]) for key in seeds[0])])
    chance = by_chance([draw for one in draws for draw in one])
    return table(
        ["model", *seeds[0]], [*rows, ["(random order)", *(f"{100 * value:.0f} %" for value in chance.values())]]
    )


def percent(values: Sequence[float]) -> str:
    """Write a mean over seeds and its interval."""
    mean, low, high = (100 * value for value in interval(np.array(values)))
    return f"{mean:.0f} % ({max(low, 0):.0f} to {min(high, 100):.0f})"


# -- plots ------------------------------------------------------------------------------------------------------------


def figure_of(width: float, height: float) -> Figure:
    """Return an empty figure that can be saved."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


Budget = tuple[Array, dict[str, Array]]
"""Positions, and arm -> Dice there, axes (seed, position)."""


def per_case(curves: Curves) -> Budget:
    """Return Dice against labelled cases."""
    positions = next(iter(curves.values()))[0].labelled
    return positions, {arm: np.array([one.dice["all"] for one in ones]) for arm, ones in curves.items()}


def per_voxel(curves: Curves) -> Budget:
    """Return Dice against edited voxels, in thousands, as far as every arm of every seed went."""
    end = min(one.edited[-1] for ones in curves.values() for one in ones)
    at = np.linspace(0, end, POINTS)
    dice = {arm: np.array([np.interp(at, one.edited, one.dice["all"]) for one in ones]) for arm, ones in curves.items()}
    return at / 1000, dice


def draw_curves(path: Path, paths: Budget, label: str) -> None:
    """Draw each arm beside random, with the interval of their paired difference, and all together."""
    x, dice = paths
    others = [arm for arm in dice if arm != BLIND]
    columns = -(-(len(others) + 1) // 2)
    figure = figure_of(3 * columns, 5.4)
    panels = list(figure.subplots(2, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, arm in zip(panels, others, strict=False):
        draw_beside_random(axes, x, dice, arm)
    for arm in dice:
        panels[len(others)].plot(x, dice[arm].mean(0), color=COLOURS[arm], label=arm, linewidth=1.4)
    panels[len(others)].set_title("all, means", fontsize=9)
    panels[len(others)].legend(fontsize=6)
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.supxlabel(label, fontsize=9)
    figure.supylabel("mean Dice on the test cases", fontsize=9)
    figure.savefig(path, dpi=130)


def draw_beside_random(axes: Axes, x: Array, dice: dict[str, Array], arm: str) -> None:
    """Draw one arm and random; the band is the 95 % interval of the difference between the two."""
    intervals = np.array([interval(values) for values in (dice[arm] - dice[BLIND]).T]).T
    usual = dice[BLIND].mean(0)
    axes.fill_between(x, usual + intervals[1], usual + intervals[2], color=COLOURS[arm], alpha=0.18, linewidth=0)
    axes.plot(x, usual, "--", color=COLOURS[BLIND], label=BLIND)
    axes.plot(x, usual + intervals[0], color=COLOURS[arm], label=arm, linewidth=1.8)
    axes.set_title(arm, fontsize=9)


def draw_penalties(path: Path, arms: Sequence[str], beats: Array) -> None:
    """Draw the penalty matrix, and the penalties below it."""
    figure = figure_of(6.2, 5.6)
    axes = figure.add_subplot()
    shown = np.vstack([beats, penalty_of(beats)])
    axes.imshow(shown, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(shown):
        if row != column:
            colour = "white" if value > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.axhline(len(arms) - 0.5, color="black", linewidth=1)
    axes.set_xticks(range(len(arms)), arms, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(arms) + 1), [*arms, "penalty"], fontsize=8)
    axes.set(xlabel="is beaten (lower is better)", ylabel="beats")
    axes.set_title("share of rounds in which one arm beats another (p < 0.05)", fontsize=9)
    figure.savefig(path, dpi=130)


def draw_rankings(path: Path, rankings: dict[str, dict[str, Ranked]]) -> None:
    """Draw AURC of every score for every model, between the optimal and the random order."""
    figure = figure_of(4.2 * len(rankings), 3.6)
    panels = figure.subplots(1, len(rankings), squeeze=False)[0]
    for axes, (title, scores) in zip(panels, rankings.items(), strict=True):
        names = [name for name in SCORES if name in scores]
        values = np.array([bounds(scores[name].aurc) for name in names])
        errors = np.abs(values[:, 1:] - values[:, :1]).T
        axes.errorbar(values[:, 0], names, xerr=errors, fmt="o", color="#1f5fa8", capsize=2)
        for bound, style in (("optimal", ":"), ("random", "--")):
            axes.axvline(scores[bound].aurc[0], color="#b3261e", linestyle=style, label=bound)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        axes.set_title(title.replace("`", ""), fontsize=8)
        axes.tick_params(labelsize=8)
    panels[0].legend(fontsize=7)
    figure.supxlabel("AURC x 100: lower is better", fontsize=9)
    figure.savefig(path, dpi=130)


# -- the command line -------------------------------------------------------------------------------------------------


def report(out: Path, images: Path, arms: Sequence[str]) -> str:
    """Draw the plots and return the tables."""
    sizes = read(out / "sizes.json")
    folders = complete_seeds(out, arms, sizes["rounds"])
    if not folders:
        raise SystemExit(f"{out} has no seed in which {', '.join(arms)} went through all {sizes['rounds']} rounds.")
    curves = {arm: [curve_of(folder, arm, sizes["rounds"]) for folder in folders] for arm in arms}
    beats = penalties(curves)
    rankings = {title: ranked(folder / f"{file}.json" for folder in folders) for title, file in RANKINGS.items()}
    draw_curves(images / "active-learning-cases.png", per_case(curves), "labelled cases")
    draw_curves(images / "active-learning-voxels.png", per_voxel(curves), "edited voxels, thousands")
    draw_penalties(images / "active-learning-penalties.png", arms, beats)
    draw_rankings(images / "active-learning-failures.png", rankings)
    parts = {
        f"Dice on the test cases, mean over {len(folders)} seeds": curve_table(curves),
        "Difference to random, paired by seed": difference_table(curves),
        "Penalty matrix": penalty_table(arms, beats),
        **{f"Failure ranking: {title}": ranking_table(scores) for title, scores in rankings.items()},
        "Wrong labels found by `relabel`": relabel_table(folders),
    }
    told = f"Sizes: {json.dumps(sizes)}\n\nSeeds: {', '.join(folder.name for folder in folders)}\n"
    return "\n".join([told, *(f"## {title}\n\n{text}" for title, text in parts.items())])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Tables and plots of bench/active_learning.py.")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of results")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    arguments = parser.parse_args()
    arguments.images.mkdir(parents=True, exist_ok=True)
    text = report(arguments.out, arguments.images, arguments.arms)
    (arguments.out / "tables.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
