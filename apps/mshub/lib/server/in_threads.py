"""MONAI Label's own handlers, run in threads: each is ``async def``, awaits nothing, and reads or writes files.

As they are, the whole server stands still while one of them works.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from lib.server.json_input import JsonRoute


def in_threads(routers: Iterable[APIRouter], api: FastAPI) -> Iterator[APIRoute]:
    """Yield routes of `api` that answer as those of `routers` do, without holding up the server."""
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute) and inspect.iscoroutinefunction(route.endpoint):
                # The original is in the description of the interface already.
                yield JsonRoute(
                    route.path,
                    plain(route.endpoint),
                    methods=route.methods,
                    include_in_schema=False,
                    dependency_overrides_provider=api,
                )


def plain(answer: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """Return a coroutine function as a plain one, with the same parameters; it may await nothing that takes time."""

    def run(**arguments: Any) -> Any:
        coroutine = answer(**arguments)
        try:
            coroutine.send(None)
        except StopIteration as end:
            return end.value
        coroutine.close()
        raise RuntimeError(f"{answer.__name__} of MONAI Label waits for something; it cannot run in a thread")

    run.__name__, run.__doc__ = answer.__name__, answer.__doc__
    run.__signature__ = inspect.signature(answer, eval_str=True)  # type: ignore[attr-defined]
    return run
