"""No handler holds up the server: those that read and write files run in threads, MONAI Label's own ones too."""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, FastAPI, Form
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.routing import Match, Route

from lib.server import asgi
from lib.server.health import Health
from lib.server.in_threads import in_threads, plain
from lib.server.login import Login
from lib.server.permissions import PERMITTED

WAITING = {asgi.proxy, asgi.export, Health.live, Login.begin_sign_on, Login.finish_sign_on, Login.log_out}
"""Handlers that await what takes time, or do nothing."""


def answering(method: str, path: str) -> Any:
    """Return the route of the server that answers."""
    scope = {"type": "http", "method": method, "path": path.replace("{", "").replace("}", ""), "headers": []}
    return next(route for route in asgi.app.router.routes if route.matches(scope)[0] is Match.FULL)


@pytest.mark.parametrize("permission", PERMITTED, ids=lambda one: f"{one.method} {one.path}")
def test_no_handler_of_the_server_holds_up_its_loop(permission: Any) -> None:
    route = answering(permission.method, permission.path)
    if isinstance(route, APIRoute | Route) and route.path not in ("/", "/docs", "/openapi.json", "/favicon.ico"):
        handler = getattr(route.endpoint, "__func__", route.endpoint)
        assert not inspect.iscoroutinefunction(handler) or handler in WAITING
    else:
        assert route.path in ("/static", "/", "/docs", "/openapi.json", "/favicon.ico")


def test_a_handler_keeps_its_parameters_and_leaves_the_loop() -> None:
    router, loop = APIRouter(prefix="/kept"), threading.get_ident()

    @router.put("/{name}")
    async def keep(name: str, times: int = 1, note: Annotated[str, Form()] = "none") -> dict[str, Any]:
        return {"name": name, "times": times, "note": note, "is_loop": threading.get_ident() == loop}

    api = FastAPI()
    api.router.routes += in_threads([router], api)
    kept = TestClient(api).put("/kept/a?times=3", data={"note": "x"})
    assert kept.json() == {"name": "a", "times": 3, "note": "x", "is_loop": False}
    assert TestClient(api).put("/kept/a?times=many", data={"note": "x"}).status_code == 422


def test_one_that_waits_is_told_and_not_half_done() -> None:
    async def waits() -> None:
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="waits"):
        plain(waits)()
