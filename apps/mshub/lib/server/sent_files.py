"""Temporary files as answers: they are removed however the answer ends.

Starlette forgets a response's background tasks where a client asks for a range that cannot be, or hangs up.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import anyio
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send


class SentOnce(FileResponse):
    """An answer that is a file of its own; parameters as `FileResponse`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file, or what is wrong with the request, and remove it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(partial(Path(self.path).unlink, missing_ok=True))
