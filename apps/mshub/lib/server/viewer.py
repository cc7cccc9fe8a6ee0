"""OHIF, served beside MONAI Label's own routes: the published build as it is, and MSHub's extension of it.

OHIF's build names its files from the root of the server (``/app.bundle.<hash>.js``), while ``/`` is MONAI Label's. So
its page is at ``/viewer/``, and its files are answered last, where no other route wants the path: every answer the
server gave without OHIF stays what it was. Nothing in the build is changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from mimetypes import guess_type
from pathlib import Path

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

__all__ = ["OHIF_VERSION", "add_viewer", "viewer_folder"]

OHIF_VERSION = "3.13.2"
EXTENSION = Path(__file__).resolve().parents[2] / "ohif"

HASHED = re.compile(r"(^|/|\.bundle\.)[0-9a-f]{16}\.\w+$")
FOR_A_YEAR = "public, max-age=31536000, immutable"
ASK_AGAIN = "no-cache"
ENCODINGS = (("br", ".br"), ("gzip", ".gz"))
# Pages and settings of the build that are replaced here, or that would cache the whole server in the browser.
NOT_SERVED = frozenset({"index.html", "app-config.js", "sw.js", "google.js", "silent-refresh.html", "package.json"})

ABSENT = """<!doctype html><html lang="en"><meta charset="utf-8"><title>MSHub viewer</title>
<body style="font-family: sans-serif; max-width: 40em; margin: 4em auto; line-height: 1.5">
<h1>The viewer is not installed</h1>
<p>This server found no OHIF {version} in <code>{folder}</code>. Expected its build there, with <code>index.html</code>.
Run <code>make viewer</code> in the MSHub checkout and reload this page; the server need not be restarted.</p>
<p>MONAI Label's own viewer is at <a href="/ohif/">/ohif/</a>.</p></body></html>"""


def viewer_folder(home: Path) -> Path | None:
    """Return the folder of OHIF's build below `home` (`MSHUB_HOME`), or None where it is not installed."""
    folder = home / "viewer" / OHIF_VERSION
    return folder if (folder / "index.html").is_file() else None


def add_viewer(api: FastAPI, find_home: Callable[[], Path]) -> None:
    """Serve OHIF at ``/viewer/``.

    Parameters
    ----------
    api : FastAPI
        The server's app; routes it gets later go before OHIF's files only if they are put in front.
    find_home : callable
        Returns `MSHUB_HOME`; asked at each request, so that an installed viewer is seen without a restart.
    """
    viewer = Viewer(find_home)
    pages = [
        Route("/app-config.js", viewer.settings),
        Route("/viewer", viewer.start),
        Route("/viewer/extension/{path:path}", viewer.extension),
        Route("/viewer/{path:path}", viewer.page),
    ]
    api.router.routes[:0] = pages
    api.router.routes.append(BuildFiles(find_home))


class Viewer:
    """The pages of OHIF and the files of MSHub's extension."""

    def __init__(self, find_home: Callable[[], Path]) -> None:
        self._find_home = find_home

    def start(self, request: Request) -> Response:
        """Lead to the study list."""
        return RedirectResponse("/viewer/")

    def page(self, request: Request) -> Response:
        """Return OHIF's one page for every address below ``/viewer/``; a page that says so where it is absent."""
        folder = viewer_folder(self._find_home())
        if folder is None:
            missing = ABSENT.format(version=OHIF_VERSION, folder=f"MSHUB_HOME/viewer/{OHIF_VERSION}")
            return HTMLResponse(missing, status_code=404)
        return FileResponse(folder / "index.html", media_type="text/html", headers={"Cache-Control": ASK_AGAIN})

    def settings(self, request: Request) -> Response:
        """Return OHIF's settings, which name MSHub's extension and mode."""
        return _answer(EXTENSION / "app-config.js", EXTENSION, "")

    def extension(self, request: Request) -> Response:
        """Return one file of the extension."""
        path = str(request.path_params["path"])
        file = _inside(EXTENSION, path)
        if file is None:
            raise HTTPException(404, f"The viewer's extension has no file {path!r}.")
        return _answer(file, EXTENSION, "")


class BuildFiles(BaseRoute):
    """The files of OHIF's build, for paths that are a file of it; no match for any other path or method."""

    def __init__(self, find_home: Callable[[], Path]) -> None:
        self._find_home = find_home

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Say whether `scope` asks for a file of the build."""
        if scope["type"] != "http" or scope["method"] not in {"GET", "HEAD"} or self._file(scope) is None:
            return Match.NONE, {}
        return Match.FULL, {}

    def _file(self, scope: Scope) -> Path | None:
        path = str(scope["path"]).removeprefix("/")
        folder = viewer_folder(self._find_home())
        if folder is None or path in NOT_SERVED or path.startswith("_") or path.endswith("/"):
            return None
        return _inside(folder, path)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the file, compressed where a compressed copy lies beside it and the browser takes it."""
        folder, file = viewer_folder(self._find_home()), self._file(scope)
        if folder is None or file is None:
            raise HTTPException(404, "The viewer was removed while this file was asked for; reload the page.")
        await _answer(file, folder, _accepted(scope))(scope, receive, send)


def _inside(folder: Path, path: str) -> Path | None:
    """Return the file at `path` if it truly lies in `folder`, whatever dots and links are on the way."""
    if path.startswith(("/", "\\")):
        return None
    root = folder.resolve()
    try:
        file = (root / path).resolve()
        return file if file.is_relative_to(root) and file.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def _accepted(scope: Scope) -> str:
    """Return the encodings the browser takes, as it said it."""
    return ",".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"accept-encoding")


def _answer(file: Path, folder: Path, accepted: str) -> FileResponse:
    """Return `file` of `folder` with its type, how long it may be kept, and the smallest copy of it."""
    name = file.relative_to(folder.resolve()).as_posix()
    headers = {
        "Cache-Control": FOR_A_YEAR if HASHED.search(name) else ASK_AGAIN,
        "X-Content-Type-Options": "nosniff",
        "Vary": "Accept-Encoding",
    }
    for encoding, copy in _copies(file):
        if encoding in accepted:
            headers["Content-Encoding"] = encoding
            return FileResponse(copy, media_type=_media_type(file), headers=headers)
    return FileResponse(file, media_type=_media_type(file), headers=headers)


def _copies(file: Path) -> Iterator[tuple[str, Path]]:
    for encoding, suffix in ENCODINGS:
        copy = file.with_name(file.name + suffix)
        if copy.is_file():
            yield encoding, copy


def _media_type(file: Path) -> str:
    """Return the type browsers insist on; what the operating system's table says differs between machines."""
    known = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".css": "text/css"}
    return known.get(file.suffix) or guess_type(file.name)[0] or "application/octet-stream"
