"""``/proxy/dicom``: the viewer's way to the PACS this server was started with, and to nothing else.

MONAI Label's own drops the query, so filters and pages of a search do nothing, and blocks the server while the PACS
answers. Here a request is passed on as it came, with this server's credentials, and the answer as it arrives.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from functools import cache

import httpx
from fastapi import HTTPException, Request
from fastapi.responses import Response, StreamingResponse
from monailabel.config import settings
from starlette.background import BackgroundTask

from lib.pacs_session import CONNECT_S, READ_S, credentials

logger = logging.getLogger(__name__)

RESOURCES = ("studies", "series", "instances")
"""First parts of the paths of DICOMweb; a PACS has other services under the same roof."""
_PART = re.compile(r"(?!\.+$)[A-Za-z0-9.,_-]+")
"""UIDs, lists of frames, tags, words. What is escaped once more, the PACS would unfold to another path."""
_STORE = re.compile(r"studies(/[0-9.]+)?")
_SENT = ("accept", "accept-encoding", "content-type", "range")
_RETURNED = ("content-type", "content-encoding", "content-length", "content-range", "etag", "last-modified", "warning")
_METADATA = ("application/dicom+json", "application/json")


async def pass_on(request: Request, path: str) -> Response:
    """Pass one request on to the PACS, and its answer back.

    Addresses of the PACS within descriptions, where large values can be fetched, become addresses of this proxy.

    Raises
    ------
    HTTPException
        404 without a PACS or for a path that is none of DICOMweb's, 405 for anything but searching, retrieving and
        storing, 503 if the PACS does not answer.
    """
    root = settings.MONAI_LABEL_STUDIES.rstrip("/")
    if "://" not in root:
        raise HTTPException(404, "This server shows a folder of images, no PACS: there is nothing behind /proxy/dicom.")
    target = f"{root}/{_path(path, request.method)}"
    address = f"{target}?{_query(request.url.query)}" if request.url.query else target
    try:
        answer = await _asked(request, address)
        kind = answer.headers.get("content-type", "").partition(";")[0].strip()
        described = await answer.aread() if kind in _METADATA else b""
    except httpx.HTTPError as error:
        logger.warning("the PACS did not answer a request of the viewer: %r", error)
        raise HTTPException(503, f"The PACS at {root} does not answer ({type(error).__name__}).") from error
    if kind in _METADATA:
        body = described.replace(root.encode(), f"{request.base_url}proxy/dicom".encode())
        return Response(body, answer.status_code, media_type=kind)
    headers = {name: answer.headers[name] for name in _RETURNED if name in answer.headers}
    return StreamingResponse(
        _raw(answer), answer.status_code, headers=headers, background=BackgroundTask(answer.aclose)
    )


def _readable(encodings: str) -> str:
    """Return what remains of a browser's encodings: descriptions are read here, before they are passed on."""
    kept = [one.strip() for one in encodings.split(",") if one.partition(";")[0].strip() in ("gzip", "deflate")]
    return ", ".join(kept) or "identity"


async def _asked(request: Request, address: str) -> httpx.Response:
    """Send the request; once more where the PACS was just closing the connection, idle until then."""
    headers = {name: request.headers[name] for name in _SENT if name in request.headers}
    if "accept-encoding" in headers:
        headers["accept-encoding"] = _readable(headers["accept-encoding"])
    if request.method == "POST":
        sent = _client().build_request("POST", address, headers=headers, content=request.stream())
        return await _client().send(sent, stream=True)
    sent = _client().build_request("GET", address, headers=headers)
    try:
        return await _client().send(sent, stream=True)
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
        return await _client().send(sent, stream=True)


def _query(query: str) -> str:
    """Return the query with plain commas in lists of fields: Orthanc overlooks those that OHIF has escaped."""
    return re.sub(r"includefield=[^&]*", lambda match: match[0].replace("%2C", ","), query)


def _path(path: str, method: str) -> str:
    """Return the path below the PACS' root; MONAI Label's viewer puts the service's name in front of it."""
    service, _, rest = path.partition("/")
    prefix = ""
    if service in ("qido", "wado", "stow"):
        path = rest
        described = service == "qido" and path.endswith("metadata")  # some viewers ask the wrong service
        prefixes = {
            "qido": settings.MONAI_LABEL_WADO_PREFIX if described else settings.MONAI_LABEL_QIDO_PREFIX,
            "wado": settings.MONAI_LABEL_WADO_PREFIX,
            "stow": settings.MONAI_LABEL_STOW_PREFIX,
        }
        prefix = (prefixes[service] or "").strip("/")
    parts = path.split("/")
    if parts[0] not in RESOURCES or not all(map(_PART.fullmatch, parts)):
        raise HTTPException(404, f"{path[:80]!r} is no path of DICOMweb; expected one below {', '.join(RESOURCES)}.")
    if method == "POST" and not _STORE.fullmatch(path):
        raise HTTPException(405, f"Objects are stored at studies, not at {path[:80]!r}.")
    return f"{prefix}/{path}" if prefix else path


async def _raw(answer: httpx.Response) -> AsyncIterator[bytes]:
    async for part in answer.aiter_raw():
        yield part


@cache
def _client() -> httpx.AsyncClient:
    known = credentials()
    return httpx.AsyncClient(
        auth=known,
        timeout=httpx.Timeout(READ_S, connect=CONNECT_S),
        limits=httpx.Limits(max_connections=32),
        follow_redirects=False,
    )
