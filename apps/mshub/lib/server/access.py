"""Who may ask the server for what: the layer in front of every route.

Without users the server is one person's, on this machine only: requests from elsewhere, and pages of other sites that
make this person's browser send some, are refused. With users everybody logs in: people with a password (3D Slicer gets
a token, a browser a cookie) or, in a browser, by single sign-on; scripts with an API token.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime, timezone
from ipaddress import ip_address, ip_network
from pathlib import Path
from urllib.parse import quote, urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from lib import audit
from lib.server.offers import Offers
from lib.server.permissions import PUBLIC, SAFE, Permission, methods_at, permission_for
from lib.server.trail import Trail
from mshub.errors import MSHubError
from mshub.logins import Logins
from mshub.serve import is_loopback
from mshub.throttle import Throttle
from mshub.users import TOKEN_PREFIX, User, UserFile, user_file

logger = logging.getLogger(__name__)

COOKIE = "mshub_login"
USER = "mshub.user"
"""Where in the scope of a request its user is."""
PROBES = ("/health/live", "/health/ready")
"""What is asked whether the server works, also where nobody can be told who asks."""
LOCAL_USER = User("admin", "admin", datetime.fromtimestamp(0, timezone.utc))
"""Whoever uses a server without users: the person at this machine."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
REPEATING = ("/proxy/", "/viewer", "/ohif/")
"""Where a query may name a parameter several times: searches of DICOMweb, studies that the viewer opens."""
OTHER = ("(other)", "(none)")
"""Method and route, as metrics name them, of what this server does not offer: strangers choose neither."""


@dataclass
class Guards:
    """What the decisions rest on; one per `MSHUB_HOME`."""

    users: UserFile
    logins: Logins
    trail: Trail
    guesses: Throttle = field(default_factory=Throttle)
    """Wrong passwords by name and address."""
    strangers: Throttle = field(default_factory=lambda: Throttle(free=50, longest_s=10.0))
    """Wrong passwords by address: a whole clinic can share one."""
    offers: Offers = field(default_factory=Offers)

    @classmethod
    def of(cls, home: Path) -> Guards:
        """Return the guards of a server."""
        with _lock:
            if home not in _guards:
                users = user_file(home)
                _guards[home] = cls(users, Logins(home / "logins.json", users), Trail(audit.AuditLog(home)))
            return _guards[home]


_guards: dict[Path, Guards] = {}
_lock = threading.Lock()


class Access:
    """ASGI middleware that lets through what is permitted.

    Parameters
    ----------
    app : ASGI app
    find_home : callable
        Returns `MSHUB_HOME`.
    is_program : callable
        Says of a scope whether it asks for a file of the viewer's program, which holds nobody's data.
    origins : collection of str
        Sites whose pages may send requests, beside this server's own: MONAI Label's ``MONAI_LABEL_CORS_ORIGINS``.
    observe : callable, optional
        Told method, route, status and seconds of every answer.
    has_sign_on : callable, optional
        Says whether people can log in who are no users of this server: by single sign-on.
    """

    def __init__(
        self,
        app: ASGIApp,
        find_home: Callable[[], Path],
        is_program: Callable[[Scope], bool],
        origins: Collection[str] = (),
        observe: Callable[[str, str, int, float], None] | None = None,
        has_sign_on: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app, self._find_home, self._is_program, self._observe = app, find_home, is_program, observe
        self._has_sign_on = has_sign_on
        self._origins = {origin.rstrip("/") for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refused request, pass on any other."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(Request(scope), receive, send)
        else:
            raise RuntimeError(f"MSHub serves HTTP only; found {scope['type']}.")

    async def _answer(self, request: Request, receive: Receive, send: Send) -> None:
        guards = Guards.of(self._find_home())
        facts = audit.begin()
        permission, parameters = permission_for(request.method, request.scope["path"])
        user: User | None = None
        try:
            refusal, user = self._judged(request, permission, guards)
        except MSHubError as error:  # the file of users is damaged
            logger.error("%s", error)
            refusal = None if request.scope["path"] in PROBES else _refused(500, str(error))
        refusal = refusal or _doubled(request)
        request.scope[USER] = user
        began, status = time.perf_counter(), 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await (refusal or self._app)(request.scope, receive, note_status)
        finally:
            seconds = round(time.perf_counter() - began, 3)
            if self._observe is not None:
                self._observe(*(permission.method, permission.path) if permission else OTHER, status, seconds)
            guards.trail.tell(request, permission, parameters, user, status, {**facts, "seconds": seconds})

    def _judged(
        self, request: Request, permission: Permission | None, guards: Guards
    ) -> tuple[Response | None, User | None]:
        """Return the refusal, None if there is none, and who asked."""
        if permission is None:
            if request.method in SAFE and self._is_program(request.scope):
                return None, None
            return _not_offered(request), None
        if not guards.users and not self._has_sign_on():
            return self._judged_at_home(request), LOCAL_USER
        user, has_cookie = _user_of(request, guards)
        if permission.role == PUBLIC:
            return self._from_elsewhere(request, must_say=False), user
        if user is None and (request.method, permission.path) == ("GET", "/datastore/image"):
            user = guards.offers.take(request.query_params.get("image", ""), address_of(request))
        if user is None:
            return _asked_to_log_in(request), None
        if not user.may(permission.role):
            reason = f"{user.name} is {user.role} here; this needs {permission.role}. An admin can change that."
            return _refused(403, reason), user
        return (self._from_elsewhere(request, must_say=True) if has_cookie else None), user

    def _judged_at_home(self, request: Request) -> Response | None:
        """Return the refusal of a server that has no users, for all but the person at this machine."""
        if not _is_local(request):
            return _refused(
                403,
                "This server has no users yet and answers this machine only. Whoever runs it can add one: "
                "mshub users add NAME.",
            )
        host = host_name(request.headers.get("host", ""))
        if host not in LOCAL_NAMES:
            return _refused(403, f"The host {host[:80]!r} is not this machine; expected {', '.join(LOCAL_NAMES)}.")
        return self._from_elsewhere(request, must_say=False)

    def _from_elsewhere(self, request: Request, *, must_say: bool) -> Response | None:
        """Return the refusal of a request that changes something and that another site's page made a browser send."""
        if request.method in SAFE:
            return None
        origin, host = request.headers.get("origin", "").rstrip("/"), request.headers.get("host")
        if not origin and not must_say:
            return None  # no browser
        if origin in self._origins or (host and origin in (f"http://{host}", f"https://{host}")):
            return None
        return _refused(403, f"A page of {origin[:200] or 'an unnamed site'} may not ask this server for anything.")


def _user_of(request: Request, guards: Guards) -> tuple[User | None, bool]:
    """Return who asks, and whether a cookie says so: a browser sends it, whoever makes it send a request."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and token:
        known = guards.users.with_token if token.startswith(TOKEN_PREFIX) else guards.logins.user_of
        return known(token.strip()), False
    cookie = request.cookies.get(COOKIE, "")
    return (guards.logins.user_of(cookie), True) if cookie else (None, False)


def address_of(request: Request) -> str:
    """Return where a request comes from."""
    return request.client.host if request.client else ""


def network_of(request: Request) -> str:
    """Return where a request comes from; of IPv6 the network, as everybody there has addresses without number."""
    host = address_of(request)
    try:
        address = ip_address(host)
    except ValueError:
        return host
    return str(ip_network((address, 64), strict=False)) if address.version == 6 else host


def comes_from_one_person(request: Request) -> bool:
    """Return whether the address a request comes from is its client's own, not that of a proxy which keeps it back."""
    if _is_local(request):
        return host_name(request.headers.get("host", "")) in LOCAL_NAMES
    is_forwarded = bool(request.headers.get("x-forwarded-for", "").strip())
    return is_forwarded or not _is_proxy(address_of(request))


def _is_proxy(address: str) -> bool:
    """Return whether an address is that of a proxy, as uvicorn reads them: networks, and ``*`` for all, too."""
    named = os.environ.get("FORWARDED_ALLOW_IPS", "")
    return address in ProxyHeadersMiddleware(_no_app, named).trusted_hosts


async def _no_app(*_: object) -> None:
    """Answer nothing: nothing is asked."""


def _doubled(request: Request) -> Response | None:
    """Return the refusal of a query that names a parameter twice: which one counts, each program decides for itself."""
    names = [name for name, _ in request.query_params.multi_items()]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if not doubled or request.scope["path"].startswith(REPEATING):
        return None
    return _refused(400, f"The query names {', '.join(doubled)[:80]} more than once; expected each parameter once.")


def _asked_to_log_in(request: Request) -> Response:
    """Lead a person to the page where one logs in; tell a program what it lacks."""
    if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
        wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"/login?next={quote(wanted, safe='')}", 303)
    refusal = _refused(401, "Log in first: POST /auth/token with username and password, or send an API token.")
    refusal.headers["WWW-Authenticate"] = "Bearer"
    return refusal


def _not_offered(request: Request) -> Response:
    """Answer a request for what there is no permission for: 405 where another method may be used."""
    methods = methods_at(request.scope["path"])
    reason = f"{request.method[:20]} {request.url.path[:200]} is nothing this server offers."
    refusal = _refused(405 if methods else 404, reason)
    if methods:
        refusal.headers["Allow"] = ", ".join(methods)
    return refusal


def _refused(status: int, reason: str) -> Response:
    return JSONResponse({"detail": reason}, status)


def _is_local(request: Request) -> bool:
    """Return whether a request comes from this machine; over a socket of the file system it does."""
    if request.client is None:
        return True
    return is_loopback(request.client.host)


def host_name(host: str) -> str:
    """Return the name in a ``Host`` header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
