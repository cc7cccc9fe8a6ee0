"""Numbers, times, outcomes and clauses of the gate, in the words of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
from markupsafe import Markup, escape

from mshub.report.contents import RoundReport


def finite(value: Any) -> float | None:
    """Return a number, or None for everything that has none to show: None, NaN, infinity."""
    known = isinstance(value, (int, float, np.number)) and math.isfinite(value)
    return float(value) if known else None


def dice_text(value: Any) -> str:
    """Return a Dice with three decimals."""
    number = finite(value)
    return "–" if number is None else f"{number:.3f}"


def change_text(value: Any) -> str:
    """Return a difference of two Dice with its sign."""
    number = finite(value)
    if number is None:
        return "–"
    text = f"{abs(number):.3f}"
    return text if float(text) == 0 else f"{'+' if number > 0 else '−'}{text}"


def plain_text(value: float) -> str:
    """Return a number as short as it can be told."""
    sign = "−" if value < 0 else ""
    return f"{sign}{abs(value):.6g}"


def duration_text(value: Any) -> str:
    """Return seconds as a person says them."""
    number = finite(value)
    if number is None:
        return "–"
    if number < 60:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def moment_text(value: Any) -> str:
    """Return an ISO time to the minute with its zone; anything else as it is."""
    text = str(value or "–")
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return text
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


def value_text(value: Any) -> str:
    """Return one value of a recipe or a policy on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return plain_text(float(value)) if math.isfinite(value) else "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{name_text(key)}: {value_text(item)}" for key, item in value.items()) or "–"
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(value_text(item) for item in value) or "–"
    return "–" if value is None or value == "" else str(value)


def name_text(key: Any) -> str:
    """Return a key such as ``learning_rate`` as words."""
    return str(key).replace("_", " ")


def count_text(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural where it needs one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def sentence(clause: str, report: RoundReport) -> Markup:
    """Return a clause of the gate as a sentence, with its commands as code one can paste."""
    promote = f"mshub promote {report.model_id} {report.version or 'VERSION'}"
    text = clause.replace("mshub promote ID VERSION", promote)
    text = text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:  # a backtick without its partner is text
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(parts)
    )


@dataclass(frozen=True)
class Outcome:
    """How a verdict is called and coloured."""

    badge: str
    kind: Literal["good", "bad", "unsure"]


def outcome_of(name: Any) -> Outcome:
    """Return how a verdict's outcome is called and coloured."""
    known = {"promoted": Outcome("Promoted", "good"), "refused": Outcome("Refused", "bad")}
    return known.get(str(name), Outcome("Needs a person", "unsure"))
