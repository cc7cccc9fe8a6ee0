"""JSON that clients send, in bodies and in fields of forms: what this server could not answer or keep is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException, Request, params
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from lib.server.bodies import no_upload

DEEPEST = 100
"""Levels of lists and objects in one another."""
LARGEST = 2**63
"""Integers below are what databases and other programs read as they are."""


def read_json(text: str | bytes, what: str, *, finite: bool = True) -> Any:
    """Return what a client's JSON says.

    Parameters
    ----------
    text : str or bytes
    what : str
        Names it in a refusal.
    finite : bool
        Whether NaN and infinity, which Python's clients write and JSON does not know, are refused.

    Raises
    ------
    HTTPException
        400: it is no JSON, nested deeper than `DEEPEST`, or holds half a character or a number no other program reads.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise HTTPException(400, f"{what} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise _too_deep(what) from error
    _check(content, what, finite, 0)
    return content


def json_object(text: str, what: str) -> dict[str, Any]:
    """Return the object in a field of a form; nothing stands for an empty one."""
    content = read_json(text or "{}", what, finite=False)
    if not isinstance(content, dict):
        raise HTTPException(400, f"{what} is a JSON {type(content).__name__}; expected an object.")
    return content


class JsonRoute(APIRoute):
    """A route whose body is read by `read_json`, and refused where it is too large for one without an upload."""

    def get_route_handler(self) -> Callable[..., Any]:
        """Return what answers a request."""
        answer, is_small = super().get_route_handler(), self._has_body_without_upload()

        async def answer_strictly(request: Request) -> Any:
            receive = no_upload(request.scope, request.receive) if is_small else request.receive
            return await answer(_StrictRequest(request.scope, receive))

        return answer_strictly

    def _has_body_without_upload(self) -> bool:
        """Return whether a body is read, and read into memory."""
        return self.body_field is not None and not isinstance(self.body_field.field_info, params.File)


class _StrictRequest(Request):
    async def json(self) -> Any:
        """Return what the body says; in a thread, as a megabyte of it takes a quarter of a second."""
        return await run_in_threadpool(read_json, await self.body(), "The request's body")


def _check(value: Any, what: str, finite: bool, depth: int) -> None:
    if isinstance(value, dict | list) and depth >= DEEPEST:
        raise _too_deep(what)
    if isinstance(value, dict):
        for key, one in value.items():
            _check(key, what, finite, depth)
            _check(one, what, finite, depth + 1)
    elif isinstance(value, list):
        for one in value:
            _check(one, what, finite, depth + 1)
    elif isinstance(value, str):
        _check_text(value, what)
    elif isinstance(value, float) and finite and not math.isfinite(value):
        raise HTTPException(400, f"{what} holds the number {value}, which JSON does not know; expected a finite one.")
    elif isinstance(value, int) and abs(value) >= LARGEST:
        raise HTTPException(400, f"{what} holds an integer of {value.bit_length()} bits; expected one of 64 at most.")


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):x}"
        raise HTTPException(
            400, f"{what} holds {found}, half a character; expected text that UTF-8 can say."
        ) from error


def _too_deep(what: str) -> HTTPException:
    return HTTPException(400, f"{what} is nested too deeply; expected at most {DEEPEST} levels.")
