"""Turn errors into HTTP answers with a status, a code and a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import HTTPException

from mshub.errors import Busy, MSHubError

LONGEST_NAME = 200
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{LONGEST_NAME - 1}}}")


def http_error(error: MSHubError) -> HTTPException:
    """Return the answer for an error of ours; its text is written for the user."""
    headers = {"X-MSHub-Error": error.code}
    if isinstance(error, Busy):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return HTTPException(status_code=error.http_status, detail=str(error), headers=headers)


@contextmanager
def as_http_errors() -> Iterator[None]:
    """Translate `MSHubError` raised in the block; everything else passes through."""
    try:
        yield
    except MSHubError as error:
        raise http_error(error) from error


def not_found(what: str, name: str, known: list[str]) -> HTTPException:
    """Return a 404 that names what was asked for and some of what there is."""
    some = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
    return HTTPException(status_code=404, detail=f"There is no {what} {name!r} here. Known: {some or 'none'}.")


def check_name(what: str, name: str) -> None:
    """Refuse an id or tag that could be more than a file name."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise HTTPException(
            400,
            f"The {what} {name[:80]!r} is refused: expected up to {LONGEST_NAME} letters, digits, '.', '_' and '-', "
            "without '..'.",
        )
