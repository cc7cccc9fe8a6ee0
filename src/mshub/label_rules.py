"""What holds for labels wherever they come from: which names are one, which are reserved, what counts as a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TypeGuard
from unicodedata import category

import numpy as np

from mshub.errors import LabelError

BACKGROUND = "background"
IGNORE = "ignore"
MOST_LISTED = 150  # a message may name every structure of the largest models
MAX_VALUE = 2**16 - 1  # nnU-Net writes label maps of 16 bits


def refuse_unfit_names(names: Sequence[str]) -> None:
    """Refuse names of structures that nobody could tell apart, or that are reserved.

    Raises
    ------
    LabelError
        A name is blank, two differ only by case or white space, or one reads ``background`` or ``ignore``.
    """
    refuse_similar_names([BACKGROUND, IGNORE, *names])


def refuse_similar_names(names: Sequence[str]) -> None:
    """Refuse names that are blank or differ only by case or white space; reserved ones may be among them.

    Raises
    ------
    LabelError
        Lists the names.
    """
    counts = Counter(fold(name) for name in names)
    unprintable = [name for name in names if any(category(sign) in ("Cc", "Cs") for sign in name)]
    if unprintable:
        raise refusal(
            "Label names hold characters that cannot be shown",
            found=listed(map(ascii, unprintable)),
            expected="text",
            fix="rename them in dataset.json or in the card",
        )
    unfit = [name for name in names if counts[fold(name)] > 1 or not fold(name)]
    if unfit:
        raise refusal(
            "Label names are blank, or differ only by case or white space",
            found=listed(map(repr, unfit)),
            expected="names that can be told apart, none of them 'background' or 'ignore'",
            fix="rename them in dataset.json or in the card",
        )


def similar_names(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return at most `limit` of the known names that `name` may be a misspelling of, spelled as they are known."""
    spelled = {fold(structure): structure for structure in known}
    return [spelled[match] for match in get_close_matches(fold(name), spelled, n=limit)]


def fold(name: str) -> str:
    """Return what names of one structure have in common: no case, no surrounding or repeated white space."""
    return " ".join(name.split()).casefold()


def is_integer(value: object) -> TypeGuard[int]:
    """Tell whether `value` can be a label's value; True and False cannot."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def listed(items: Iterable[object]) -> str:
    """Return the items as messages show them, at most `MOST_LISTED`."""
    texts = list(map(str, items))
    more = f" and {len(texts) - MOST_LISTED:,} more" if len(texts) > MOST_LISTED else ""
    return ", ".join(texts[:MOST_LISTED]) + more


def refusal(problem: str, *, found: str, expected: str, fix: str) -> LabelError:
    """Return the error, in the form all messages about labels have."""
    return LabelError(f"{problem}. Found: {found}. Expected: {expected}. How to fix: {fix}.")
