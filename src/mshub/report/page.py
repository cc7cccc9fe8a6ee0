"""Puts the page together: what was decided, what to do next, tables, curves and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from mshub.atomic_file import replace_text
from mshub.report.canvas import AFTER, BEFORE, DIFFERENT, REVIEWED
from mshub.report.comparisons import Comparison, comparisons_of, level_scale, levels_of
from mshub.report.contents import RoundReport
from mshub.report.curves import draw_learning_curve, draw_loss_curve, rounds_of
from mshub.report.slices import draw_picture
from mshub.report.words import (
    change_text,
    count_text,
    dice_text,
    duration_text,
    finite,
    moment_text,
    name_text,
    outcome_of,
    plain_text,
    sentence,
    value_text,
)
from mshub.scores import mean_dice

_TEMPLATES = Environment(
    loader=PackageLoader("mshub.report", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters.update(
    dice=dice_text, change=change_text, duration=duration_text, moment=moment_text, value=value_text,
    words=name_text, count=count_text, plain=plain_text,
)  # fmt: skip


def write_report(path: Path, report: RoundReport) -> None:
    """Write the report as one self-contained HTML file, which is the old or the whole new one at any moment."""
    replace_text(path, render_report(report))


def render_report(report: RoundReport) -> str:
    """Return the report as HTML."""
    comparisons, levels, rounds = comparisons_of(report), levels_of(report), rounds_of(report)
    return _TEMPLATES.get_template("page.html.j2").render(
        report=report,
        outcome=outcome_of(report.verdict["outcome"]),
        reasons=[sentence(reason, report) for reason in report.verdict["reasons"]],
        steps=_next_steps(report),
        tiles=_tiles(report, comparisons),
        comparisons=comparisons,
        levels=[] if comparisons else levels,
        level_scale=level_scale(levels),
        rounds=rounds,
        curve=draw_learning_curve(rounds),
        loss=draw_loss_curve(report.losses),
        pictures=[draw_picture(overlay) for overlay in report.overlays],
        colours={"reviewed": REVIEWED, "before": BEFORE, "after": AFTER, "different": DIFFERENT},
        outcome_of=outcome_of,
    )


@dataclass(frozen=True)
class _Step:
    """What a person can do next, and the command for it."""

    text: str
    command: str | None = None


def _next_steps(report: RoundReport) -> list[_Step]:
    """Return what to do, the likeliest first."""
    version, kind = report.version, outcome_of(report.verdict["outcome"]).kind
    if version is None:
        return [_Step("Nothing was published in this round: the version that serves keeps serving.")]
    promote = f"mshub promote {report.model_id} {version}"
    if kind == "unsure":
        return [_Step(f"{version} waits. Look at its predictions first; to let it serve:", promote)]
    if kind == "bad":
        return [
            _Step(f"Nothing changes for users. {version} is kept, but not used; to let it serve all the same:", promote)
        ]
    served = _Step(f"{version} serves from now on; nothing needs to be done.")
    back = _Step("To go back to the version that served before:", f"mshub rollback {report.model_id}")
    return [served, back] if report.parent else [served]


@dataclass(frozen=True)
class _Tile:
    """One of the numbers a reader takes away."""

    label: str
    value: str
    detail: str = ""


def _tiles(report: RoundReport, comparisons: Sequence[Comparison]) -> list[_Tile]:
    tiles = _dice_tiles(report, comparisons)
    if report.held_out_cases:
        tiles.append(_Tile("Hold-out cases", str(len(report.held_out_cases)), "never trained on"))
    tiles.append(_Tile("Training cases", str(len(report.training_cases))))
    if report.seconds:
        tiles.append(_Tile("Time", duration_text(sum(report.seconds.values()))))
    return tiles


def _dice_tiles(report: RoundReport, comparisons: Sequence[Comparison]) -> list[_Tile]:
    if not comparisons:
        level = finite(mean_dice(report.scores.get(report.candidate, ())))
        return [] if level is None else [_Tile("Mean Dice", dice_text(level))]
    first = comparisons[0]
    row = first.overall
    interval = f"{row.interval_text} ({first.confidence})" if row.interval else ""
    levels = f"{dice_text(row.before)} → {dice_text(row.after)}"
    return [
        _Tile("Mean Dice", levels, f"{first.baseline} → {report.candidate}"),
        _Tile("Mean change", change_text(row.change), interval),
    ]
