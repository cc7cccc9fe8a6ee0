"""MONAI Label's FastAPI app with our routes and error answers: ``start_server --uvicorn_app lib.server.asgi:app``."""

from __future__ import annotations

import json
import shutil
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import HTTPException, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from monailabel import endpoints
from monailabel.config import settings
from monailabel.endpoints import activelearning, batch_infer, datastore, ohif, scoring, session
from monailabel.endpoints import logs as logs_of_monailabel
from monailabel.endpoints.user.auth import User, get_current_user
from monailabel.interfaces.utils.app import app_instance
from starlette.middleware import Middleware
from starlette.routing import Match
from starlette.types import Scope

from lib.faults import check_name
from lib.oidc_settings import OidcSettings
from lib.server import datastore_routes, process_routes, work_routes
from lib.server.access import LOCAL_USER, USER, Access
from lib.server.asked import Admin, AnyUser
from lib.server.bodies import Bodies
from lib.server.disconnects import Disconnects
from lib.server.error_answers import add_error_answers
from lib.server.health import Health
from lib.server.in_threads import in_threads, plain
from lib.server.json_input import JsonRoute
from lib.server.login import Login
from lib.server.oidc import SignOn
from lib.server.proxy import pass_on
from lib.server.sent_files import SentOnce
from lib.server.viewer import BuildFiles, add_viewer

# Read when monailabel.app is imported; empty would let the pages of every origin read images and labels. Not set in
# the environment, where MONAI Label 0.8.5 cannot write it back.
if not settings.MONAI_LABEL_CORS_ORIGINS:
    settings.MONAI_LABEL_CORS_ORIGINS = [f"http://127.0.0.1:{settings.MONAI_LABEL_SERVER_PORT}"]

from monailabel.app import app

# Its own login, which nobody passes, would refuse whom `lib.server.access` lets through.
settings.MONAI_LABEL_AUTH_ENABLE = False

__all__ = ["app"]


EXPORTING = CapacityLimiter(2)
"""How many exports are made at a time."""

STOCK_VIEWER = Path(ohif.__file__).parent / "static" / "ohif"
STOCK_FOLDERS = frozenset({".", "..", *(path.name for path in STOCK_VIEWER.glob("*") if path.is_dir())})
"""What is asked of the viewer that comes with MONAI Label and is no file."""


def info(user: AnyUser) -> Any:
    """Return what clients read first; a plain function, as the reviewed cases are counted and their files looked at."""
    return app_instance().info()


def report(user: AnyUser, model: str, name: str) -> Response:
    """Return the report of one training round; `name` is the version, with or without ``.html``."""
    name = name.removesuffix(".html")
    check_name("model", model)
    check_name("report", name)
    path = app_instance().store.home / "reports" / model / f"{name}.html"
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.html"))) or "none"
        raise HTTPException(404, f"There is no report {name!r} of {model!r} here. Known: {known}.")
    return FileResponse(path, media_type="text/html; charset=utf-8")


def logs(user: AnyUser, lines: int = 300) -> Response:
    """Return the last lines of the server's log as text."""
    log = app_instance().store.home / "logs" / "server.log"
    if not log.is_file():
        raise HTTPException(404, "This server was not started by mshub serve and keeps no log of its own.")
    with log.open(encoding="utf-8", errors="replace") as file:
        return PlainTextResponse("".join(deque(file, max(1, min(lines, 10_000)))))


def gpu(user: Admin) -> Any:
    """Return what ``nvidia-smi`` says of the GPUs; 404 on a machine that does not have it."""
    if shutil.which("nvidia-smi") is None:
        raise HTTPException(
            404, "This machine has no nvidia-smi, which NVIDIA's driver brings: nothing is known of GPUs."
        )
    return plain(logs_of_monailabel.gpu_info)(user=user)


def stock_viewer(user: AnyUser, path: str) -> Any:
    """Return a file of the viewer that comes with MONAI Label, and its page for what is none; 404 for a folder."""
    if path in STOCK_FOLDERS:
        raise HTTPException(404, f"{path!r} is a folder of the viewer, and no file.")
    return ohif.get_ohif(path)


def labels(user: AnyUser, image: str) -> dict[str, Any]:
    """Return what is known of the labels of one image, by tag, and which SEGs of the PACS are none, and why."""
    return dict(app_instance().labels_of(image))


async def export(user: AnyUser, image: str, tag: str = "final", format: str = "nrrd") -> Response:
    """Return a stored label as a file; ``nrrd`` is what a viewer reads pixel by pixel, with its names in a header.

    A few are made at a time, as each holds volumes in memory; the others wait in the event loop and keep no thread.
    """
    check_name("label tag", tag)
    path, names = await to_thread.run_sync(app_instance().export_of, image, tag, format, limiter=EXPORTING)
    media = "application/octet-stream" if format == "nrrd" else "application/dicom"
    headers = {"X-MSHub-Segments": json.dumps(names)}
    return SentOnce(path, media_type=media, filename=f"{image}_{tag}{path.suffix}", headers=headers)


def channels(user: AnyUser, model: str, image: str) -> dict[str, Any]:
    """Return which series of the study a model would take for which channel, or why that cannot be told."""
    return dict(app_instance().channels_of(model, image))


def status() -> dict[str, Any]:
    """Return the server's version, models, running predictions and trainings."""
    return dict(app_instance().status())


async def proxy(user: AnyUser, request: Request, path: str) -> Response:
    """Pass a request of the viewer on to the PACS."""
    return await pass_on(request, path)


ROUTES = (
    *datastore_routes.ROUTES,
    *work_routes.ROUTES,
    *process_routes.ROUTES,
    ("GET", "/info/", info, "App"),
    ("GET", "/logs/", logs, "Others"),
    ("GET", "/logs/gpu", gpu, "Others"),
    ("GET", "/ohif/{path:path}", stock_viewer, "Others"),
    ("GET", "/mshub/status", status, "MSHub"),
    ("GET", "/mshub/reports/{model}/{name}", report, "MSHub"),
    ("GET", "/mshub/labels/{image}", labels, "MSHub"),
    ("GET", "/mshub/export/{image}", export, "MSHub"),
    ("GET", "/mshub/channels/{model}", channels, "MSHub"),
    ("GET", "/proxy/dicom/{path:path}", proxy, "PACS"),
    ("POST", "/proxy/dicom/{path:path}", proxy, "PACS"),
)
UPSTREAM = [module.router for module in (datastore, logs_of_monailabel, ohif, session)]
"""What is left to MONAI Label."""
OVERTAKEN = [
    *UPSTREAM,
    *(module.router for module in (activelearning, batch_infer, scoring)),
    *(module.router for module in (endpoints.infer, endpoints.info, endpoints.train)),
]
"""Where routes of MONAI Label are that ours stand in front of."""


def _home() -> Path:
    home: Path = app_instance().store.home
    return home


def _sign_on() -> SignOn | None:
    settings: OidcSettings | None = app_instance().config.oidc
    return _sign_on_of(settings) if settings else None


@cache
def _sign_on_of(settings: OidcSettings) -> SignOn:
    return SignOn(settings)


def _upload_limit() -> int:
    return int(app_instance().config.upload_gb * 2**30)


def _current_user(request: Request) -> User:
    """Return who asks, as routes want to know it; without users, nobody. What they may was decided before."""
    user = request.scope[USER]
    return User(username="" if user is LOCAL_USER else user.name, roles=[user.role])


def _is_program(scope: Scope) -> bool:
    """Return whether a file of the viewer's program is asked for, which anybody may have."""
    return BuildFiles(_home).matches(scope)[0] is Match.FULL


def _describe_ours() -> None:
    """Leave out of ``/openapi.json`` what ours stand in front of: of two, the last would be described."""
    ours = {(method, path) for method, path, *_ in ROUTES}
    for route in (route for router in OVERTAKEN for route in router.routes):
        if ours.issuperset((method, route.path) for method in route.methods):
            route.include_in_schema = False


def _extend(api: Any) -> None:
    routes = [
        JsonRoute(path, answer, methods=[method], tags=[tag], dependency_overrides_provider=api)
        for method, path, answer, tag in ROUTES
    ]
    health = Health(_home, status)
    api.router.routes[:0] = [*routes, *Login(_home, _sign_on).routes(), *health.routes(), *in_threads(UPSTREAM, api)]
    add_viewer(api, _home)
    _describe_ours()
    api.dependency_overrides[get_current_user] = _current_user
    origins = [str(origin) for origin in settings.MONAI_LABEL_CORS_ORIGINS]
    access = Middleware(Access, _home, _is_program, origins, health.requests.observe, lambda: _sign_on() is not None)
    api.user_middleware += [access, Middleware(Disconnects), Middleware(Bodies, _upload_limit)]
    add_error_answers(api)


_extend(app)
