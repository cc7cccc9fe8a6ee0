"""Clients that hang up: what they asked for is told, so that nobody computes it on."""

from __future__ import annotations

import asyncio
import threading

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib.activity import client_gone


class Disconnects:
    """ASGI middleware that sets `client_gone` for the request when its client hangs up.

    Parameters
    ----------
    app : ASGI app
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as the app does, and listen meanwhile."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        listening = _Listening(receive)
        token = client_gone.set(listening.gone)
        try:
            await self._app(scope, listening.receive, send)
        finally:
            client_gone.reset(token)
            listening.stop()


class _Listening:
    """What comes in: handed on to the app until the body is complete, listened to from then on."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._listening: asyncio.Task[None] | None = None
        self.gone = threading.Event()

    async def receive(self) -> Message:
        """Return the next message; after the body, wait until the client hangs up."""
        if self._listening is None:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone.set()
            elif not message.get("more_body"):
                self._listening = asyncio.create_task(self._listen())
            return message
        await asyncio.shield(self._listening)
        return {"type": "http.disconnect"}

    def stop(self) -> None:
        """Stop listening."""
        if self._listening is not None:
            self._listening.cancel()

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone.set()
