"""Bodies of requests: refused before they are read, or while they are, where they are too large or the disk is full.

The web framework writes a form of more than a megabyte to the disk before any of our code sees it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib.faults import as_http_errors
from lib.free_space import check_space

IN_MEMORY_BYTES = 2**20
"""Bodies up to here stay in memory: people can log in, and ask for the next case, while the disk is full. A body
without an upload may not be larger."""
LOOK_EVERY_BYTES = 16 * 2**20


class Bodies:
    """ASGI middleware that lets the app read no more than there is room for.

    Parameters
    ----------
    app : ASGI app
    find_limit : callable
        Returns how many bytes a body may have.
    """

    def __init__(self, app: ASGIApp, find_limit: Callable[[], int]) -> None:
        self._app, self._find_limit = app, find_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as the app does; what is too large is an error of the app's when it wants to read it."""
        is_request = scope["type"] == "http"
        await self._app(scope, _Body(scope, receive, self._find_limit).receive if is_request else receive, send)


def no_upload(scope: Scope, receive: Receive) -> Receive:
    """Return what reads a body that holds no upload: `IN_MEMORY_BYTES` at most, or else 413."""
    announced, read = _announced(scope), 0

    async def read_on() -> Message:
        nonlocal read
        _check_small(announced)
        message = await receive()
        read += len(message.get("body", b""))
        _check_small(read)
        return message

    return read_on


def _check_small(nbytes: int) -> None:
    if nbytes > IN_MEMORY_BYTES:
        raise HTTPException(
            413,
            f"The request holds {nbytes / 2**20:,.1f} MiB or more; expected {IN_MEMORY_BYTES // 2**20} MiB at most at "
            "an address that takes no files. Ask for less at once, such as fewer images.",
        )


def _announced(scope: Scope) -> int:
    """Return how many bytes a request says that it holds; 0 if it does not say."""
    length = Headers(scope=scope).get("content-length", "")
    return int(length[:20]) if length.isdecimal() else 0


class _Body:
    """The body of one request, as far as it has come."""

    def __init__(self, scope: Scope, receive: Receive, find_limit: Callable[[], int]) -> None:
        self._announced = _announced(scope)
        self._receive, self._find_limit = receive, find_limit
        self._read, self._room = 0, IN_MEMORY_BYTES

    async def receive(self) -> Message:
        """Return the next message.

        Raises
        ------
        HTTPException
            413: the body is, or becomes, too large; 507: the disk has no room for it.
        """
        self._check(self._announced)
        message = await self._receive()
        self._read += len(message.get("body", b""))
        self._check(self._read)
        return message

    def _check(self, nbytes: int) -> None:
        """Refuse a body of `nbytes`; the disk is looked at when that is more than there was room for."""
        if nbytes <= self._room:
            return
        if nbytes > (limit := self._find_limit()):
            raise HTTPException(
                413,
                f"The request holds {nbytes / 1e6:,.0f} MB or more; expected {limit / 1e6:,.0f} MB at most. "
                "Whoever runs the server can allow more: --conf upload_gb=GB.",
            )
        ahead = max(nbytes - self._read, LOOK_EVERY_BYTES)
        with as_http_errors():
            check_space(Path(tempfile.gettempdir()), ahead)
        self._room = min(self._read + ahead, limit)
