"""Bodies of requests: what there is no room for is refused before it is read, or as soon as it shows."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from fastapi import HTTPException
from starlette.types import Message, Receive, Scope, Send

from lib.free_space import RESERVE_BYTES
from lib.server.bodies import IN_MEMORY_BYTES, LOOK_EVERY_BYTES, Bodies

MB = 2**20
LIMIT = 100 * MB


class Upload:
    """A request whose body comes in parts, and an app that reads it all."""

    def __init__(self, parts: Sequence[int], announced: int | None = None) -> None:
        self._parts, self.sent, self.read = list(parts), 0, 0
        headers = [] if announced is None else [(b"content-length", str(announced).encode())]
        self._scope: Scope = {"type": "http", "headers": headers}

    async def _receive(self) -> Message:
        size = self._parts.pop(0)
        self.sent += size
        return {"type": "http.request", "body": bytes(size), "more_body": bool(self._parts)}

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        more = True
        while more:
            message = await receive()
            self.read += len(message["body"])
            more = message["more_body"]

    async def _send(self, message: Message) -> None:
        """Nothing is answered here."""

    def arrives(self) -> None:
        asyncio.run(Bodies(self._app, lambda: LIMIT)(self._scope, self._receive, self._send))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much of the disk is free, which a test may change."""
    left = [RESERVE_BYTES + 40 * MB]

    def look(folder: Path) -> int:
        assert folder == Path(tempfile.gettempdir()), "where the web framework writes it"
        return left[0]

    monkeypatch.setattr("lib.free_space.free_bytes", look)
    return left


@pytest.mark.parametrize(("announced", "status"), [(41 * MB, 507), (LIMIT + 1, 413), (10**18, 413)])
def test_what_says_that_it_is_too_large_is_not_read(free: list[int], announced: int, status: int) -> None:
    upload = Upload([MB] * 200, announced)
    with pytest.raises(HTTPException) as refused:
        upload.arrives()
    assert (refused.value.status_code, upload.sent) == (status, 0)


def test_what_has_room_is_read_whole(free: list[int]) -> None:
    for upload in (Upload([MB] * 39, 39 * MB), Upload([MB] * 39), Upload([0])):
        free[0] = RESERVE_BYTES + 40 * MB
        upload.arrives()
        assert upload.read == upload.sent


def test_what_does_not_say_how_large_it_is_is_read_until_the_disk_is_full(free: list[int]) -> None:
    upload = Upload([MB] * 90)
    receive = upload._receive

    async def fill() -> Message:
        free[0] -= MB
        return await receive()

    upload._receive = fill  # type: ignore[method-assign]
    with pytest.raises(HTTPException) as refused:
        upload.arrives()
    assert refused.value.status_code == 507
    assert 40 * MB - 2 * LOOK_EVERY_BYTES < upload.sent <= 40 * MB


def test_what_does_not_say_how_large_it_is_is_read_up_to_the_limit(free: list[int]) -> None:
    free[0] = 10**12
    upload = Upload([MB] * 200)
    with pytest.raises(HTTPException) as refused:
        upload.arrives()
    assert (refused.value.status_code, upload.sent, upload.read) == (413, LIMIT + MB, LIMIT)
    assert "upload_gb" in str(refused.value.detail)


def test_people_can_log_in_while_the_disk_is_full(free: list[int]) -> None:
    free[0] = 0
    upload = Upload([IN_MEMORY_BYTES], IN_MEMORY_BYTES)
    upload.arrives()
    assert upload.read == IN_MEMORY_BYTES


@pytest.mark.parametrize("length", ["-1", "x", "", "1e9", "²"])
def test_an_odd_length_is_none(free: list[int], length: str) -> None:
    upload = Upload([MB])
    upload._scope["headers"] = [(b"content-length", length.encode("latin-1"))]
    upload.arrives()
    assert upload.read == MB
