"""Files as answers: one that is gone is a 404, and temporary ones are removed however the answer ends.

Starlette takes a file that is gone by then for a fault of the program's, and forgets a response's background tasks
where a client asks for a range that cannot be, or hangs up.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import anyio
from fastapi import HTTPException
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send


class Sent(FileResponse):
    """An answer that is a file others may remove; parameters as `FileResponse`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file; 404 if it is gone."""
        try:
            await super().__call__(scope, receive, send)
        except RuntimeError as error:
            if Path(self.path).is_file():
                raise
            raise HTTPException(404, f"The file {self.filename!r} is not there any more.") from error


def sent(answer: FileResponse) -> Sent:
    """Return a file that MONAI Label answers with as one that may be gone."""
    return Sent(answer.path, media_type=answer.media_type, filename=answer.filename)


class SentOnce(FileResponse):
    """An answer that is a file of its own; parameters as `FileResponse`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file, or what is wrong with the request, and remove it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(partial(Path(self.path).unlink, missing_ok=True))
