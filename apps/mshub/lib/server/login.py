"""Logging in: the three routes 3D Slicer asks, a page for browsers, and their way to a single sign-on and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

from fastapi import Form, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.routing import APIRoute

from lib import audit
from lib.server.access import COOKIE, LOCAL_USER, USER, Guards, network_of
from lib.server.oidc import BEGIN, CALLBACK, PENDING_S, SignOn
from mshub.logins import HOURS
from mshub.users import User

NO_STORE = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "strict-origin",  # with no referrer at all, browsers send forms with the origin "null"
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'",
}
START = "/viewer/"
LONGEST_ADDRESS = 4096
"""Of where somebody wants to go: it is kept while they are at the provider."""
SIGN_ON_COOKIE = "mshub_sign_on"
"""By which a browser is known that comes back from a single sign-on."""
FORM_BYTES = 64 * 2**10
"""Strangers may send these routes no more: uploads are kept on the disk before anybody looks at them."""

# The colours are those of the viewer, which opens next.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · MSHub</title>
<style>
  :root {{ color-scheme: dark; font: 15px/1.5 Inter, system-ui, sans-serif; }}
  body {{ margin: 0; min-height: 100vh; display: grid; place-items: center; background: #000; color: #fff; }}
  main {{ width: min(20rem, 86vw); padding: 2rem; background: #090c29; border: 1px solid #3a3f99;
          border-radius: .5rem; }}
  h1 {{ margin: 0; font-size: 1.5rem; }}
  h1 + p {{ margin: 0 0 1.5rem; color: #7bb2ce; font-size: .85rem; }}
  a {{ color: #348cfd; }}
  label {{ display: block; margin: 1rem 0 .25rem; color: #7bb2ce; }}
  input, button {{ box-sizing: border-box; width: 100%; padding: .6rem; font: inherit; border-radius: .25rem; }}
  input {{ background: #000; color: #fff; border: 1px solid #3a3f99; }}
  button {{ margin-top: 1.5rem; background: #348cfd; color: #000; border: 0; font-weight: 600; cursor: pointer; }}
  button:hover {{ background: #5acce6; }}
  .sign-on {{ display: block; margin-top: 1rem; padding: .6rem; border: 1px solid #348cfd; border-radius: .25rem;
              text-align: center; text-decoration: none; font-weight: 600; overflow-wrap: anywhere; }}
  .sign-on:hover {{ border-color: #5acce6; color: #5acce6; }}
  :focus-visible {{ outline: 2px solid #5acce6; outline-offset: 1px; }}
  .problem {{ margin: 0; padding: .5rem .75rem; background: #330e12; color: #ff9ea1; border-radius: .25rem; }}
</style></head>
<body><main><h1>MSHub</h1><p>nnU-Net models in OHIF and 3D Slicer. For research use.</p>{content}</main></body></html>
"""
FORM = """{problem}<form method="post" action="/login">
<label for="username">User name</label>
<input id="username" name="username" value="{name}" autocomplete="username" required{first}>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required{second}>
<input type="hidden" name="next" value="{next}">
<button>Log in</button></form>
"""
SIGN_ON = """<a class="sign-on" href="{address}">Sign in with {provider}</a>
"""
SIGNED_ON = """<p>You are logged in. <a href="{next}">Go on</a></p>
"""
WELCOME = """<p>You are logged in as <b>{name}</b> ({role}).</p>
<p><a href="{start}">Open the viewer</a></p>
<form method="post" action="/logout"><button>Log out</button></form>
"""
LOGGED_OUT = """<p>You are logged out of MSHub. If you signed in with {provider}, you are still logged in there, and
the next person at this browser could enter in your name.</p>
<a class="sign-on" href="{address}">Log out of {provider}</a>
<p><a href="/login">Log in again</a></p>
"""
OPEN = """<p>This server has no users: it answers this machine only, and nobody has to log in.</p>
<p><a href="{start}">Open the viewer</a></p>
"""


class Login:
    """The routes, for the users of `MSHUB_HOME`.

    Parameters
    ----------
    find_home : callable
        Returns `MSHUB_HOME`.
    find_sign_on : callable, optional
        Returns the single sign-on; None if there is none.
    """

    def __init__(self, find_home: Callable[[], Path], find_sign_on: Callable[[], SignOn | None] = lambda: None) -> None:
        self._find_home, self._find_sign_on = find_home, find_sign_on

    def routes(self) -> list[APIRoute]:
        """Return them all."""
        answers: list[tuple[str, str, Callable[..., Any]]] = [
            ("GET", "/auth/", self.enabled),
            ("POST", "/auth/token", self.token),
            ("GET", "/auth/token/valid", self.valid),
            ("GET", "/login", self.page),
            ("POST", "/login", self.log_in),
            ("GET", BEGIN, self.begin_sign_on),
            ("GET", CALLBACK, self.finish_sign_on),
            ("POST", "/logout", self.log_out),
        ]
        return [
            APIRoute(path, answer, methods=[method], tags=["Access"], max_body_size=FORM_BYTES)
            for method, path, answer in answers
        ]

    def enabled(self) -> dict[str, Any]:
        """Say whether one has to log in; 3D Slicer asks first."""
        enabled = bool(self._guards().users) or self._find_sign_on() is not None
        return {"enabled": enabled, "client_id": "mshub", "realm": "mshub"}

    def token(
        self, request: Request, username: Annotated[str, Form()], password: Annotated[str, Form()]
    ) -> JSONResponse:
        """Return a token for ``Authorization: Bearer``, good for a working day: how 3D Slicer and scripts log in."""
        token = self._opened(request, username, password)
        content = {"access_token": token, "token_type": "bearer", "expires_in": int(HOURS * 3600)}
        return JSONResponse(content, headers=NO_STORE)

    def valid(self, request: Request) -> dict[str, Any]:
        """Return who is logged in."""
        user: User = request.scope[USER]
        return {"username": user.name, "role": user.role}

    def page(self, request: Request, next: str = START) -> HTMLResponse:
        """Return the page where people log in, or see that they are."""
        user = request.scope.get(USER)
        if user is LOCAL_USER:
            return _page("No login", OPEN.format(start=START))
        if user is not None:
            return _page("Logged in", WELCOME.format(name=escape(user.name), role=escape(user.role), start=START))
        return self._form("", next)

    def log_in(
        self,
        request: Request,
        username: Annotated[str, Form()] = "",
        password: Annotated[str, Form()] = "",
        next: Annotated[str, Form()] = START,
    ) -> Response:
        """Log a browser in, and lead it where it wanted to go."""
        try:
            token = self._opened(request, username, password)
        except HTTPException as error:
            return self._form(username, next, error)
        return _remembered(request, token, RedirectResponse(_within(next), 303, headers=NO_STORE))

    async def begin_sign_on(self, request: Request, next: str = START) -> Response:
        """Lead a browser to the provider of the single sign-on."""
        try:
            address, cookie = await self._sign_on().begin(request, _within(next))
        except HTTPException as error:
            return self._form("", next, error)
        answer = RedirectResponse(address, 303, headers=NO_STORE)
        # Lax: the way back begins at another site.
        answer.set_cookie(
            SIGN_ON_COOKIE,
            cookie,
            PENDING_S,
            path=BEGIN,
            httponly=True,
            samesite="lax",
            secure=_is_https(request),
        )
        return answer

    async def finish_sign_on(self, request: Request, state: str = "", code: str = "") -> Response:
        """Log a browser in that comes back from the provider, and lead it where it wanted to go.

        By a page that goes on of itself: a redirect would still begin at the provider's site, and browsers withhold our
        strict cookie from what begins there.
        """
        guards, sign_on = self._guards(), self._sign_on()
        try:
            claims, next = await sign_on.finish(request.cookies.get(SIGN_ON_COOKIE, ""), state, code)
            user, is_guest = sign_on.user_of(claims, guards.users)
        except HTTPException as error:
            answer: Response = self._form("", START, error)
        else:
            audit.note(user=user.name, role=user.role)
            address = quote(next, safe=":/%#?=@[]!$&'()*+,;")
            page = _page("Logged in", SIGNED_ON.format(next=escape(address)), headers={"Refresh": f"0; url={address}"})
            answer = _remembered(request, guards.logins.open(user, is_guest=is_guest), page)
        answer.delete_cookie(SIGN_ON_COOKIE, BEGIN, httponly=True, samesite="lax")
        return answer

    async def log_out(self, request: Request) -> Response:
        """End a browser's login; who signed in at a provider is told how to log out there, too."""
        await run_in_threadpool(self._guards().logins.close, request.cookies.get(COOKIE, ""))
        answer: Response = RedirectResponse("/login", 303, headers=NO_STORE)
        if (sign_on := self._find_sign_on()) and (address := await _end_of(sign_on)):
            told = LOGGED_OUT.format(address=escape(address), provider=escape(sign_on.settings.provider))
            answer = _page("Logged out", told)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return answer

    def _guards(self) -> Guards:
        return Guards.of(self._find_home())

    def _sign_on(self) -> SignOn:
        sign_on = self._find_sign_on()
        if sign_on is None:
            raise HTTPException(404, "This server has no single sign-on: log in with a password.")
        return sign_on

    def _form(self, name: str, next: str, error: HTTPException | None = None) -> HTMLResponse:
        """Return the page where people log in, and why they were not; the cursor is where something is missing."""
        problem = f'<p class="problem" role="alert">{escape(str(error.detail))}</p>' if error else ""
        first, second = ("", " autofocus") if name else (" autofocus", "")
        content = FORM.format(problem=problem, name=escape(name), next=escape(next), first=first, second=second)
        if sign_on := self._find_sign_on():
            address = f"{sign_on.settings.public_url.rstrip('/')}{BEGIN}?next={quote(next, safe='')}"
            content += SIGN_ON.format(address=escape(address), provider=escape(sign_on.settings.provider))
        return _page("Log in", content, error.status_code if error else 200, error.headers if error else None)

    def _opened(self, request: Request, name: str, password: str) -> str:
        """Return the token of a new login; whoever guesses has to wait longer and longer."""
        guards, address = self._guards(), network_of(request)
        key = f"{name[:64]}@{address}"
        wait = guards.strangers.attempt(address)
        if not wait and (wait := guards.guesses.attempt(key)):
            guards.strangers.take_back(address)  # no password is tried
        if wait > 0:
            seconds = math.ceil(wait)
            raise HTTPException(
                429, f"Too many wrong passwords; try again in {seconds} s.", headers={"Retry-After": str(seconds)}
            )
        user = guards.users.with_password(name, password)
        if user is None:
            audit.note(tried=name[:64])
            raise HTTPException(401, "The user name or the password is wrong.")
        guards.guesses.succeeded(key)
        guards.strangers.take_back(address)
        audit.note(user=user.name, role=user.role)
        return guards.logins.open(user)


async def _end_of(sign_on: SignOn) -> str:
    try:
        return await sign_on.end()
    except HTTPException:  # it is down
        return ""


def _within(address: str) -> str:
    """Return an address of this server; of another one, the start."""
    parts = urlsplit(address)
    is_own = address.startswith("/") and not address.startswith(("//", "/\\")) and not (parts.scheme or parts.netloc)
    return address if is_own and address.isprintable() and len(address) <= LONGEST_ADDRESS else START


def _remembered(request: Request, token: str, answer: Response) -> Response:
    """Return an answer with the cookie that keeps a browser logged in."""
    answer.set_cookie(COOKIE, token, int(HOURS * 3600), httponly=True, samesite="strict", secure=_is_https(request))
    return answer


def _is_https(request: Request) -> bool:
    return request.url.scheme == "https"


def _page(title: str, content: str, status: int = 200, headers: Mapping[str, str] | None = None) -> HTMLResponse:
    page = PAGE.format(title=title, content=content)
    return HTMLResponse(page, status, headers={**NO_STORE, **(headers or {})})
