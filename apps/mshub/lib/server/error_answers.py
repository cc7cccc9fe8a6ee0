"""Errors as answers: a status, a code in ``X-MSHub-Error`` that programs can rely on, and a sentence."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException
from starlette.exceptions import HTTPException as StarletteHTTPException

from lib.faults import http_error
from mshub.errors import MSHubError, legible

logger = logging.getLogger(__name__)


def add_error_answers(api: FastAPI) -> None:
    """Let an app answer whatever is raised within it."""
    api.add_exception_handler(MSHubError, _on_our_error)
    api.add_exception_handler(json.JSONDecodeError, _on_bad_json)
    api.add_exception_handler(ImageNotFoundException, _on_not_found)
    api.add_exception_handler(LabelNotFoundException, _on_not_found)
    api.add_exception_handler(MONAILabelException, _on_monailabel_error)
    api.add_exception_handler(StarletteHTTPException, _on_http_error)
    api.add_exception_handler(RequestValidationError, _on_bad_fields)
    api.add_exception_handler(OSError, _on_system_error)
    api.add_exception_handler(Exception, _on_surprise)


def _answer(status_code: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an error with a code that programs can rely on, in ``X-MSHub-Error``: ours, or the name of the status."""
    named = {"X-MSHub-Error": HTTPStatus(status_code).phrase.lower().replace(" ", "-"), **(headers or {})}
    return JSONResponse({"detail": detail}, status_code=status_code, headers=named)


async def _on_our_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, MSHubError):
        return await _on_surprise(request, error)
    told = http_error(error)
    return _answer(told.status_code, told.detail, told.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, StarletteHTTPException) or not isinstance(error.detail, str):
        return await http_exception_handler(request, error)  # type: ignore[arg-type]
    return _answer(error.status_code, error.detail, error.headers)


async def _on_bad_fields(request: Request, error: Exception) -> JSONResponse:
    """Say in a sentence which fields of a request are missing or odd; without what was sent, which may be anything."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found[:10])
    return _answer(422, legible(f"The request is not what this address expects: {told}."))


async def _on_system_error(request: Request, error: Exception) -> JSONResponse:
    """Answer what the operating system refused; a full disk is no fault of the program's."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        logger.error("the disk is full: %s %s", request.method, request.url.path)
        return _answer(
            507, "The server's disk is full: what was sent is not stored. Free some space and send it again."
        )
    raise error


async def _on_bad_json(request: Request, error: Exception) -> JSONResponse:
    return _answer(400, f"The request holds invalid JSON: {error}.")


async def _on_not_found(request: Request, error: Exception) -> JSONResponse:
    return _answer(404, str(error))


async def _on_monailabel_error(request: Request, error: Exception) -> JSONResponse:
    return _answer(400, str(getattr(error, "msg", error)))


async def _on_surprise(request: Request, error: Exception) -> JSONResponse:
    """Answer what nobody foresaw; the trace is in the log, under the same words."""
    return _answer(500, f"{request.method} {request.url.path} failed ({type(error).__name__}); see the server's log.")
