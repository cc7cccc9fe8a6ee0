"""The curves: Dice and training cases of every version, and the training loss, as SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from mshub.report.contents import RoundReport
from mshub.report.words import finite, outcome_of
from mshub.scores import mean_dice

INK, MUTED, GRID = "#1c2733", "#5b6875", "#d5dbe1"
BAD, UNSURE, ACCENT = "#b3261e", "#9a6700", "#1f5fa8"

#: More versions than this have their numbers in the table only, and not all their names under the axis.
MOST_NUMBERS = 14


def rounds_of(report: RoundReport) -> list[dict[str, Any]]:
    """Return the lineage; a version without a mean of its own gets that of this round, if it was scored in it."""

    def known(entry: Mapping[str, Any]) -> float | None:
        own = finite(entry.get("mean_dice"))
        return finite(mean_dice(report.scores.get(str(entry.get("version")), ()))) if own is None else own

    return [{**entry, "mean_dice": known(entry)} for entry in report.lineage]


def draw_learning_curve(lineage: Sequence[Mapping[str, Any]]) -> str | None:
    """Return Dice and training cases of every version as an SVG; None if fewer than two versions were measured."""
    rounds = [entry for entry in lineage if entry["mean_dice"] is not None]
    if len(rounds) < 2:
        return None
    figure = Figure(figsize=(9.6, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_dice(left, rounds)
    _draw_training_cases(right, rounds)
    for axes in (left, right):
        _tidy(axes)
        _label_versions(axes, rounds)
    return _svg(figure)


def _draw_dice(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    """Draw the mean Dice of every version, joined to the version it was trained from."""
    places = {entry["version"]: index for index, entry in enumerate(rounds) if entry.get("version")}
    dice = [float(entry["mean_dice"]) for entry in rounds]
    for index, entry in enumerate(rounds):
        serves = _has_served(entry)
        parent = places.get(entry.get("parent"))
        if parent is not None and parent < index:
            axes.plot([parent, index], [dice[parent], dice[index]], color=ACCENT if serves else MUTED,
                      linestyle="-" if serves else ":", linewidth=1.4, zorder=1)  # fmt: skip
        colour = ACCENT if serves else {"bad": BAD}.get(outcome_of(entry.get("outcome")).kind, UNSURE)
        axes.plot(index, dice[index], "o", color=colour, markerfacecolor=colour if serves else "white",
                  markersize=8, markeredgewidth=1.8)  # fmt: skip
    for index, value in enumerate(dice if len(rounds) <= MOST_NUMBERS else ()):
        axes.annotate(f"{value:.3f}", (index, value), (0, 8), textcoords="offset points", ha="center", fontsize=8,
                      color=INK, path_effects=[withStroke(linewidth=3, foreground="white")])  # fmt: skip
    spread = max(max(dice) - min(dice), 0.02)
    axes.set_ylim(min(dice) - 0.25 * spread, max(dice) + 0.35 * spread)
    _entitle(axes, "Mean Dice on hold-out cases")


def _has_served(entry: Mapping[str, Any]) -> bool:
    """Whether a version was promoted, or was there before any training."""
    outcome = entry.get("outcome")
    return not outcome or str(outcome).startswith("promoted")


def _draw_training_cases(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    counts = [finite(entry.get("cases")) or 0.0 for entry in rounds]
    bars = axes.bar(range(len(rounds)), counts, width=0.55, color="#9fb3c8")
    if len(rounds) <= MOST_NUMBERS:
        axes.bar_label(bars, fmt="%d", padding=2, fontsize=8, color=INK)
    axes.set_ylim(0, max(1.0, 1.18 * max(counts)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    _entitle(axes, "Cases trained on")


def _label_versions(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    """Write versions under the axis, with gaps where they would touch."""
    step = max(1, math.ceil(len(rounds) / MOST_NUMBERS))
    names = [str(entry.get("version") or "–") for entry in rounds]
    places = range(0, len(rounds), step)
    axes.set_xticks(list(places), [names[place] for place in places], parse_math=False)
    axes.set_xlim(-0.6, len(rounds) - 0.4)


def draw_loss_curve(losses: Sequence[float]) -> str | None:
    """Return the training loss as an SVG; None if there are fewer than two epochs to join."""
    known = [(epoch, loss) for epoch, loss in enumerate(losses, start=1) if finite(loss) is not None]
    if len(known) < 2:
        return None
    figure = Figure(figsize=(9.6, 2.5), layout="constrained")
    axes = figure.subplots()
    epochs, values = zip(*known, strict=True)
    axes.plot(epochs, values, color=ACCENT, linewidth=1.6, marker="o", markersize=3 if len(known) < 60 else 0)
    axes.set_xlim(1 - 0.02 * len(losses), len(losses) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Epoch")
    _entitle(axes, "Mean training loss")
    _tidy(axes)
    return _svg(figure)


def _tidy(axes: Axes) -> None:
    """Leave the data, and as little ink around it as needed."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axes.xaxis.label.set(color=MUTED, fontsize=9)


def _entitle(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=10, fontweight="bold")


def _svg(figure: Figure) -> str:
    """Return a figure as a data URI; text becomes outlines, so that it needs no font."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Creator": None, "Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
