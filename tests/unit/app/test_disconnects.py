"""A client that hangs up: its prediction ends, its place in the queue is free, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from lib.activity import SHORTEST_RETRY_S, Activity, check_client, client_gone
from lib.faults import http_error
from lib.server.disconnects import Disconnects
from mshub.errors import Busy, Interrupted

Message = dict[str, Any]


def asked(endpoint: Callable[..., Any], messages: list[Message], hang_up_after_s: float | None) -> list[Message]:
    """Send a request in parts to an app, hang up or not, and return what it sent back."""
    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])], middleware=[Middleware(Disconnects)])
    sent: list[Message] = []

    async def run() -> None:
        parts, finished = iter(messages), asyncio.Event()

        async def receive() -> Message:
            for message in parts:
                return message
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(finished.wait(), hang_up_after_s)
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        await app(scope, receive, send)
        finished.set()

    asyncio.run(run())
    return sent


def body(*parts: bytes) -> list[Message]:
    return [
        {"type": "http.request", "body": part, "more_body": number < len(parts)} for number, part in enumerate(parts, 1)
    ]


def test_who_hangs_up_is_not_computed_for_any_more() -> None:
    ended: list[float] = []

    def work() -> None:
        began = time.monotonic()
        try:
            for _ in range(3000):
                check_client()
                time.sleep(0.02)
        except Interrupted:
            ended.append(time.monotonic() - began)

    async def compute(request: Request) -> Response:
        await request.body()
        await run_in_threadpool(work)
        return PlainTextResponse("too late")

    asked(compute, body(b""), hang_up_after_s=0.2)
    assert ended[0] < 30, "half of the work was done for nobody"


def test_who_waits_gets_the_whole_answer() -> None:
    async def echo(request: Request) -> Response:
        text = await request.body()
        await asyncio.to_thread(check_client)
        return PlainTextResponse(text + b"!")

    sent = asked(echo, body(b"a" * 10, b"b" * 10), hang_up_after_s=None)
    assert sent[0]["status"] == 200
    assert b"".join(message.get("body", b"") for message in sent) == b"a" * 10 + b"b" * 10 + b"!"


def test_who_hangs_up_in_the_middle_of_an_upload_is_gone() -> None:
    seen: list[bool] = []

    async def read(request: Request) -> Response:
        gone = client_gone.get()
        try:
            await request.body()
        finally:
            seen.append(bool(gone and gone.is_set()))
        return PlainTextResponse("")

    with pytest.raises(Exception):  # noqa: B017, PT011 -- Starlette's own
        asked(read, [body(b"part", b"")[0], {"type": "http.disconnect"}], hang_up_after_s=None)
    assert seen == [True]


def test_requests_do_not_hear_of_each_other() -> None:
    events: list[threading.Event | None] = []

    def note(request: Request) -> Response:
        events.append(client_gone.get())
        return PlainTextResponse("")

    for _ in range(2):
        asked(note, body(b""), hang_up_after_s=None)
    assert events[0] is not events[1]
    assert client_gone.get() is None
    check_client()


def test_where_nobody_can_hang_up_nothing_is_ended() -> None:
    check_client()


# -- the queue --------------------------------------------------------------------------------------------------------


def test_more_than_the_queue_holds_is_refused_with_a_time() -> None:
    activity = Activity(most=2)
    with activity.run("tiny", "a") as first, activity.run("tiny", "b"):
        with pytest.raises(Busy, match="2 predictions run and wait") as refused, activity.run("tiny", "c"):
            pass
        assert refused.value.retry_after_s == SHORTEST_RETRY_S
        first.predicting()
        first.progress(1, 101)
        first._started -= 1
        with pytest.raises(Busy) as refused, activity.run("tiny", "c"):
            pass
        assert 90 < refused.value.retry_after_s < 110
    with activity.run("tiny", "c"):
        pass
    assert activity.as_dict()["refused"] == 2
    assert activity.as_dict()["finished"] == 3


def test_a_refusal_tells_a_program_when_to_come_again() -> None:
    answer = http_error(Busy("full", 12.2))
    assert (answer.status_code, answer.headers) == (503, {"X-MSHub-Error": "busy", "Retry-After": "13"})
