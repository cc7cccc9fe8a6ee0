"""Who may ask the server for what: every route and role, and what a stranger, a script and another site's page get."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Match, Mount, Route
from starlette.types import Receive, Scope, Send

from factories import make_image
from lib import audit
from lib.app import MSHubApp
from lib.conf import Config
from lib.server import access, asgi, trail
from lib.server.access import COOKIE, USER, Access, Guards
from lib.server.error_answers import add_error_answers
from lib.server.login import FORM_BYTES, Login, _within
from lib.server.offers import GOOD_FOR_S
from lib.server.permissions import PERMITTED, PUBLIC, permission_for
from mshub import log_lines
from mshub import users as users_module
from mshub.bundled import app_folder
from mshub.errors import Busy, ConfigError
from mshub.throttle import FREE
from mshub.users import ROLES, UserFile, user_file

PASSWORDS = {role: f"the {role}s password" for role in ROLES}
LOCAL = ("127.0.0.1", 50000)
CLOSED = {
    # Weights are programs to those who load them carelessly, and these write and read them.
    ("GET", "/model/{model}"),
    ("PUT", "/model/{model}"),
    ("DELETE", "/model/{model}"),
    ("GET", "/model/info/{model}"),
    # Pathology, which this app does not do.
    ("POST", "/infer/wsi/{model}"),
    ("POST", "/infer/wsi_v2/{model}"),
    # Starts the app a second time beside itself.
    ("POST", "/reload"),
}


@pytest.fixture(autouse=True)
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    salt = users_module.bcrypt.gensalt
    monkeypatch.setattr(users_module.bcrypt, "gensalt", lambda: salt(4))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "mshub-home"
    path.mkdir()
    monkeypatch.setenv("MSHUB_HOME", str(path))
    yield path
    access._guards.pop(path, None)


@pytest.fixture
def users(home: Path) -> UserFile:
    file = user_file(home)
    for role in reversed(ROLES):
        file.add(role, PASSWORDS[role], role)
    return file


@pytest.fixture
def api(home: Path) -> FastAPI:
    """An app that answers everything there is a permission for with who asked."""
    api = FastAPI(
        openapi_url=None, middleware=[Middleware(Access, lambda: home, lambda scope: scope["path"] == "/app.js")]
    )
    api.router.routes[:0] = Login(lambda: home).routes()

    async def whoever(request: Request) -> dict[str, Any]:
        audit.note(version="v3")
        user = request.scope[USER]
        return {"user": user.name if user else None, "role": user.role if user else None}

    api.add_api_route("/{path:path}", whoever, methods=["GET", "HEAD", "POST", "PUT", "DELETE"])
    return api


def client(api: FastAPI, address: tuple[str, int] = LOCAL, **options: Any) -> TestClient:
    options = {"base_url": "http://127.0.0.1:8000", "follow_redirects": False, **options}
    return TestClient(api, client=address, raise_server_exceptions=False, **options)


def logged_in(api: FastAPI, role: str) -> TestClient:
    """Return a client with a token, as 3D Slicer gets it."""
    somebody = client(api, ("10.1.2.3", 50000), base_url="http://mshub.clinic:8000")
    answer = somebody.post(
        "/auth/token", data={"username": role, "password": PASSWORDS[role], "grant_type": "password"}
    )
    answer.raise_for_status()
    somebody.headers["Authorization"] = f"{answer.json()['token_type']} {answer.json()['access_token']}"
    return somebody


def in_browser(api: FastAPI, role: str) -> TestClient:
    browser = client(api, ("10.1.2.3", 50000), base_url="http://mshub.clinic:8000")
    answer = browser.post("/login", data={"username": role, "password": PASSWORDS[role], "next": "/viewer/?x=1"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/viewer/?x=1")
    return browser


def lines(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "logs" / "audit.jsonl").read_text().splitlines()]


def example(path: str) -> str:
    """Return an address of a route."""
    return path.replace("{path:path}", "studies/1.2/series").replace("{", "").replace("}", "")


# -- the table --------------------------------------------------------------------------------------------------------


def routes_of(app: Any) -> set[tuple[str, str]]:
    """Return (method, path) of every route of an app, those of included routers too."""
    found = set()
    for route in app.router.routes:
        for one in getattr(getattr(route, "original_router", None), "routes", [route]):
            methods = getattr(one, "methods", None) or {"GET"}
            found |= {(method, one.path) for method in methods if hasattr(one, "path") and method != "HEAD"}
    return found


ROUTES = sorted(routes_of(asgi.app))
SAME = {"/static": "/static/{path:path}"}
"""A folder of files is a route without a pattern."""


def needed(method: str, path: str) -> str | None:
    """Return the role that a route of the server needs; None for one that is closed."""
    permission, _ = permission_for(method, example(SAME.get(path, path)))
    return permission.role if permission else None


def test_every_route_is_permitted_to_somebody_or_closed_on_purpose() -> None:
    assert {route for route in ROUTES if needed(*route) is None} == CLOSED
    listed = {(permission.method, permission.path) for permission in PERMITTED}
    assert listed - {(method, SAME.get(path, path)) for method, path in ROUTES} == set()


def test_whoever_only_looks_changes_nothing() -> None:
    for permission in PERMITTED:
        if permission.method != "GET" and permission.path not in ("/login", "/logout", "/auth/token"):
            assert permission.role in ("annotator", "admin"), permission


@pytest.mark.parametrize("path", ["/train/", "/train/{model}", "/datastore/", "/datastore/image", "/datastore/label"])
def test_only_an_admin_deletes_and_trains(path: str) -> None:
    methods = {permission.method: permission.role for permission in PERMITTED if permission.path == path}
    assert {role for method, role in methods.items() if method in ("DELETE", "POST")} == {"admin"}


@pytest.fixture
def server(home: Path, serve: Callable[[object], TestClient], monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """The server's own app, as it is assembled, but for its routes: each says only that it was reached."""

    async def reached(route: Any, scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(f"reached {route.path}")(scope, receive, send)

    for kind in (APIRoute, Route, Mount):
        monkeypatch.setattr(kind, "handle", reached)
    app = SimpleNamespace(store=SimpleNamespace(home=home), config=Config(home))
    serve(app)
    return asgi.app


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, str]]:
    """A file with one user of each role, and a token of each."""
    home = tmp_path_factory.mktemp("known")
    file = user_file(home)
    for role in reversed(ROLES):
        file.add(role, PASSWORDS[role], role)
    tokens = {role: file.create_token(role, "", 1) for role in ROLES}
    return (home / "users.json").read_bytes(), tokens


@pytest.mark.parametrize("role", ["nobody", *ROLES])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_of_the_assembled_server_everybody_reaches_what_the_role_may_and_nothing_else(
    server: FastAPI, home: Path, known: tuple[bytes, dict[str, str]], method: str, path: str, role: str
) -> None:
    (home / "users.json").write_bytes(known[0])
    headers = {"Authorization": f"Bearer {known[1][role]}"} if role in ROLES else {}
    somebody = client(server, ("10.1.2.3", 50000), base_url="http://mshub.clinic", headers=headers)
    answer = somebody.request(method, example(SAME.get(path, path)))
    needs = needed(method, path)
    if (method, path) in CLOSED:
        assert answer.status_code == 404
        assert "nothing this server offers" in answer.json()["detail"]
    elif needs == PUBLIC or (role in ROLES and ROLES.index(role) >= ROLES.index(str(needs))):
        assert answer.status_code == 200
        assert answer.text.removeprefix("reached ") in (path, SAME.get(path), "/proxy/dicom/{path:path}")
    else:
        assert answer.status_code == (403 if role in ROLES else 401)


def test_a_refused_stranger_is_told_how_to_get_in_and_is_in_the_audit_log(
    api: FastAPI, users: UserFile, home: Path
) -> None:
    answer = client(api, ("10.1.2.3", 1), base_url="http://mshub.clinic").get("/info/")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    (line,) = lines(home)
    assert (line["user"], line["from"], line["action"], line["status"]) == (None, "10.1.2.3", "GET /info/", 401)


@pytest.mark.parametrize(
    "path",
    ["/elsewhere", "/infer", "/infer/a/b", "/datastore/image/../../x", "//infer/x", "/INFO/", "info/", "/info/\n"],
)
def test_what_nobody_thought_of_is_closed(path: str) -> None:
    assert permission_for("GET", path) == (None, {})
    assert permission_for("PATCH", "/info/") == (None, {})


def test_another_method_of_an_open_route_is_405_and_is_told_which_may_be_used(api: FastAPI, users: UserFile) -> None:
    for address in ("/proxy/dicom/studies/1.2", "/datastore/label"):
        answer = client(api).patch(address)
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == {
            one.method for one in PERMITTED if permission_for(one.method, address)[0] is one
        }


# -- without users ----------------------------------------------------------------------------------------------------


def test_without_users_the_person_at_this_machine_may_everything_that_is_open(api: FastAPI) -> None:
    assert client(api).post("/train/").json() == {"user": "admin", "role": "admin"}
    assert client(api, base_url="http://localhost:8000").get("/info/").status_code == 200
    assert client(api, ("::1", 1), base_url="http://[::1]:8000").get("/info/").status_code == 200
    assert client(api).get("/auth/").json()["enabled"] is False
    assert "no users" in client(api).get("/login").text
    assert client(api).post("/reload").status_code == 404


@pytest.mark.parametrize("address", ["10.1.2.3", "192.168.0.7", "::2", "example"])
def test_without_users_nobody_else_gets_anything(api: FastAPI, address: str) -> None:
    for method, path in (("GET", "/info/"), ("POST", "/infer/tiny"), ("GET", "/login"), ("GET", "/viewer/")):
        answer = client(api, (address, 1)).request(method, path)
        assert answer.status_code == 403
        assert "mshub users add" in answer.json()["detail"]


def test_a_name_that_leads_to_this_machine_is_not_this_machine(api: FastAPI) -> None:
    """A page may have a name of its own resolved to 127.0.0.1, and read what it likes."""
    answer = client(api, base_url="http://rebound.example:8000").get("/datastore/image?image=a")
    assert answer.status_code == 403


def test_a_page_without_an_origin_is_not_the_page_of_a_host_without_a_name(api: FastAPI) -> None:
    guard = Access(api, Path, lambda scope: False)
    scope = {"type": "http", "method": "POST", "headers": [(b"host", b""), (b"origin", b"null")]}
    assert guard._from_elsewhere(Request(scope), must_say=True) is not None


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "https://127.0.0.1:8000x"])
def test_without_users_pages_of_other_sites_change_nothing(api: FastAPI, origin: str) -> None:
    assert client(api).post("/infer/tiny", headers={"Origin": origin}).status_code == 403
    assert client(api).post("/infer/tiny", headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200
    assert client(api).post("/infer/tiny").status_code == 200


def test_when_the_last_user_goes_the_server_is_closed_to_others(api: FastAPI, users: UserFile) -> None:
    somebody = logged_in(api, "viewer")
    for role in ROLES:
        users.remove(role)
    assert somebody.get("/info/").status_code == 403


# -- logging in -------------------------------------------------------------------------------------------------------


def test_slicer_asks_logs_in_and_is_known(api: FastAPI, users: UserFile) -> None:
    assert client(api).get("/auth/").json()["enabled"] is True
    slicer = logged_in(api, "annotator")
    assert slicer.get("/auth/token/valid").json() == {"username": "annotator", "role": "annotator"}
    assert slicer.get("/info/").json()["user"] == "annotator"
    slicer.headers["Authorization"] = "bearer nonsense"
    assert slicer.get("/auth/token/valid").status_code == 401


def test_a_browser_is_led_to_the_page_and_back(api: FastAPI, users: UserFile) -> None:
    stranger = client(api, headers={"Accept": "text/html,*/*"})
    answer = stranger.get("/viewer/view?StudyInstanceUIDs=1.2.3")
    assert (answer.status_code, answer.headers["location"]) == (
        303,
        "/login?next=%2Fviewer%2Fview%3FStudyInstanceUIDs%3D1.2.3",
    )
    page = stranger.get(answer.headers["location"])
    assert page.status_code == 200
    assert 'value="/viewer/view?StudyInstanceUIDs=1.2.3"' in page.text
    assert page.headers["cache-control"] == "no-store"
    browser = in_browser(api, "annotator")
    assert browser.get("/viewer/").json()["user"] == "annotator"
    assert "logged in as <b>annotator</b>" in browser.get("/login").text
    kept = browser.cookies[COOKIE]
    assert browser.post("/logout", headers={"Origin": "http://mshub.clinic:8000"}).status_code == 303
    browser.cookies.set(COOKIE, kept)
    assert browser.get("/info/").status_code == 401


def test_slicer_gets_the_image_it_was_offered_once_without_saying_who_asks(
    api: FastAPI, users: UserFile, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotator = users.user("annotator")
    assert annotator is not None
    offers = Guards.of(home).offers
    offers.make(annotator, "case 1", "10.1.2.3")
    here, elsewhere = (
        client(api, (address, 1), base_url="http://mshub.clinic") for address in ("10.1.2.3", "10.1.2.4")
    )
    assert elsewhere.get("/datastore/image?image=case+1").status_code == 401
    assert here.get("/datastore/image?image=case+2").status_code == 401
    assert here.get("/datastore/label?label=case+1&image=case+1&tag=final").status_code == 401
    assert here.delete("/datastore/image?id=case+1&image=case+1").status_code == 401
    assert here.get("/datastore/image?image=case+1").json() == {"user": "annotator", "role": "annotator"}
    assert here.get("/datastore/image?image=case+1").status_code == 401
    assert [line["user"] for line in lines(home) if line["status"] == 200] == ["annotator"]
    offers.make(annotator, "case 1", "10.1.2.3")
    now = time.monotonic()
    monkeypatch.setattr("lib.server.offers.time.monotonic", lambda: now + GOOD_FOR_S + 1)
    assert here.get("/datastore/image?image=case+1").status_code == 401


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_cookie_is_for_this_site_and_for_no_script(api: FastAPI, users: UserFile, scheme: str) -> None:
    answer = client(api, base_url=f"{scheme}://127.0.0.1:8000").post(
        "/login", data={"username": "viewer", "password": PASSWORDS["viewer"]}
    )
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert ("secure" in cookie) == (scheme == "https")


def test_a_cookie_needs_this_servers_own_page(api: FastAPI, users: UserFile) -> None:
    browser = in_browser(api, "annotator")
    assert browser.post("/infer/tiny", headers={"Origin": "http://mshub.clinic:8000"}).status_code == 200
    for origin in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {}):
        assert browser.post("/infer/tiny", headers=origin).status_code == 403
        assert browser.get("/info/", headers=origin).status_code == 200


@pytest.mark.parametrize("name", ["annotator", "eve", "", "<script>alert(1)</script>"])
def test_a_wrong_password_says_no_more_than_that(api: FastAPI, users: UserFile, name: str) -> None:
    answer = client(api).post("/auth/token", data={"username": name, "password": "wrong"})
    if name:
        assert (answer.status_code, answer.json()["detail"]) == (401, "The user name or the password is wrong.")
    page = client(api).post("/login", data={"username": name, "password": "wrong", "next": '"><script>'})
    assert page.status_code == 401
    assert "<script>" not in page.text
    assert COOKIE not in page.cookies


@pytest.fixture
def in_one_moment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no time go by for whoever guesses, however slow the machine is."""
    for throttle in (Guards.of(home).guesses, Guards.of(home).strangers):
        monkeypatch.setattr(throttle, "_now", lambda: 0.0)


@pytest.mark.usefixtures("in_one_moment")
def test_guessing_has_to_wait_and_others_do_not(api: FastAPI, users: UserFile) -> None:
    for _ in range(FREE):
        assert client(api).post("/auth/token", data={"username": "viewer", "password": "x"}).status_code == 401
    right = {"username": "viewer", "password": PASSWORDS["viewer"]}
    answer = client(api).post("/auth/token", data=right)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert client(api).post("/login", data=right).status_code == 429
    assert client(api, ("127.0.0.2", 1)).post("/auth/token", data=right).status_code == 200


@pytest.mark.usefixtures("in_one_moment")
def test_neighbours_of_ipv6_wait_together(api: FastAPI, users: UserFile) -> None:
    statuses = [
        client(api, (f"2001:db8:1:2::{number:x}", 1))
        .post("/auth/token", data={"username": "viewer", "password": "x"})
        .status_code
        for number in range(FREE + 1)
    ]
    assert statuses == [401] * FREE + [429]
    right = {"username": "viewer", "password": PASSWORDS["viewer"]}
    assert client(api, ("2001:db8:1:3::1", 1)).post("/auth/token", data=right).status_code == 200


@pytest.mark.usefixtures("in_one_moment")
def test_who_tries_many_names_has_to_wait_too(api: FastAPI, users: UserFile) -> None:
    somebody = client(api)
    right = {"username": "viewer", "password": PASSWORDS["viewer"]}
    for _ in range(3):
        assert somebody.post("/auth/token", data=right).status_code == 200  # counts as nothing
    statuses = [
        somebody.post("/auth/token", data={"username": f"name{number}", "password": "x"}).status_code
        for number in range(51)
    ]
    assert statuses == [401] * 50 + [429]
    assert client(api, ("127.0.0.2", 1)).post("/auth/token", data=right).status_code == 200


@pytest.mark.parametrize("path", ["/login", "/auth/token"])
@pytest.mark.parametrize("kind", ["file", "form", "unannounced"])
def test_strangers_upload_nothing(api: FastAPI, users: UserFile, path: str, kind: str) -> None:
    large = b"x" * (FORM_BYTES + 1)
    sent: dict[str, Any] = {
        "file": {"files": {"username": ("a.bin", large)}},
        "form": {"data": {"username": large.decode()}},
        "unannounced": {
            "content": iter([b"username=", large]),
            "headers": {"Content-Type": "application/x-www-form-urlencoded"},
        },
    }[kind]
    assert client(api).post(path, **sent).status_code == 413


def test_scripts_have_tokens_of_their_own(api: FastAPI, users: UserFile) -> None:
    token = users.create_token("admin", "export", 1, "viewer")
    script = client(api, ("10.9.9.9", 1), headers={"Authorization": f"Bearer {token}"})
    assert script.get("/info/").json() == {"user": "admin", "role": "viewer"}
    assert script.post("/train/").status_code == 403
    users.remove("viewer")
    users.revoke_token(users.tokens()[0].number)
    assert script.get("/info/").status_code == 401


def test_a_damaged_file_of_users_closes_the_server(api: FastAPI, users: UserFile, home: Path) -> None:
    slicer = logged_in(api, "admin")
    (home / "users.json").write_text("{")
    answer = slicer.get("/info/")
    assert answer.status_code == 500
    assert "damaged" in answer.json()["detail"]
    assert client(api).get("/info/").status_code == 500


def test_a_file_of_users_that_goes_away_closes_the_server(api: FastAPI, users: UserFile, home: Path) -> None:
    slicer = logged_in(api, "admin")
    (home / "users.json").rename(home / "elsewhere")
    assert slicer.get("/info/").status_code == 500
    assert "is gone" in client(api).post("/train/").json()["detail"]
    (home / "elsewhere").rename(home / "users.json")
    assert slicer.get("/info/").status_code == 200


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("/viewer/?a=1", True),
        ("https://evil.example", False),
        ("//evil.example", False),
        ("/\\evil.example", False),
        ("javascript:alert(1)", False),
        ("", False),
        ("/a\r\nSet-Cookie: x", False),
        ("/" + "a" * 4096, False),
    ],
)
def test_one_is_led_to_this_server_only(address: str, kept: bool) -> None:
    assert _within(address) == (address if kept else "/viewer/")


# -- the audit log ----------------------------------------------------------------------------------------------------


def test_the_audit_log_says_who_did_what_without_an_id(api: FastAPI, users: UserFile, home: Path) -> None:
    slicer = logged_in(api, "annotator")
    slicer.post("/infer/tiny?image=mueller_hans_1950")
    slicer.put("/datastore/label?image=mueller_hans_1950&tag=final")
    slicer.get("/info/")
    stat_mode = stat.S_IMODE((home / "logs" / "audit.jsonl").stat().st_mode)
    text = (home / "logs" / "audit.jsonl").read_text()
    login, infer, label = lines(home)
    assert stat_mode == 0o600
    assert "mueller" not in text
    assert PASSWORDS["annotator"] not in text
    assert (login["user"], login["action"], login["status"]) == ("annotator", "POST /auth/token", 200)
    assert (infer["user"], infer["role"], infer["from"]) == ("annotator", "annotator", "10.1.2.3")
    assert (infer["action"], infer["model"], infer["version"]) == ("POST /infer/{model}", "tiny", "v3")
    assert infer["image"] == label["image"] == audit.AuditLog(home).hashed("mueller_hans_1950")
    assert label["tag"] == "final"


@pytest.mark.parametrize(
    ("method", "address"),
    [
        ("DELETE", "/datastore/image?id=SERVED&image=other&label=other"),
        ("DELETE", "/datastore/?image=other&id=SERVED"),
        ("DELETE", "/datastore/label?image=other&label=other&id=SERVED&tag=final"),
        ("GET", "/datastore/label?image=other&id=other&label=SERVED&tag=final"),
        ("HEAD", "/datastore/label?label=other&image=SERVED&tag=final"),
        ("PUT", "/datastore/label/info?id=other&image=other&label=SERVED&tag=final"),
        ("GET", "/datastore/image?id=other&image=SERVED"),
        ("GET", "/datastore/image?image=SERVED&x=image%3Dother"),
        ("GET", "/mshub/export/SERVED?image=other&id=other"),
        ("GET", "/datastore/image?image=SERVED&session_id=other"),
        ("PUT", "/datastore/label?image=SERVED&session_id=other"),
    ],
)
def test_the_audit_log_names_the_image_that_was_served(
    api: FastAPI, users: UserFile, home: Path, method: str, address: str
) -> None:
    assert logged_in(api, "admin").request(method, address).status_code == 200
    assert lines(home)[-1]["image"] == audit.AuditLog(home).hashed("SERVED")


def test_the_audit_log_looks_where_each_route_does() -> None:
    for one in PERMITTED:
        for method in (one.method, "HEAD") if one.path == "/datastore/label" and one.method == "GET" else (one.method,):
            scope = {"type": "http", "method": method, "path": example(one.path), "headers": []}
            route = next(route for route in asgi.app.router.routes if route.matches(scope)[0] is Match.FULL)
            taken = {field.alias for field in route.dependant.query_params} if hasattr(route, "dependant") else set()
            if named := taken & {"image", "id", "label"}:
                assert named == {trail.IMAGE_NAMES.get((method, one.path), "image")}, f"{method} {one.path}"


def test_no_parameter_is_named_twice(api: FastAPI, users: UserFile, home: Path) -> None:
    viewer = logged_in(api, "viewer")
    for query in ("image=harmless&image=SECRET", "image=&image=SECRET", "image=a&tag=x&im%61ge=b", "image&image=b"):
        answer = viewer.get(f"/datastore/image?{query}")
        assert (answer.status_code, "image more than once" in answer.json()["detail"]) == (400, True)
    assert lines(home)[-1]["status"] == 400
    assert viewer.get("/proxy/dicom/studies?includefield=1&includefield=2").status_code == 200
    assert viewer.get("/viewer/?StudyInstanceUIDs=1&StudyInstanceUIDs=2").status_code == 200
    assert client(api, ("10.1.2.3", 1)).get("/datastore/image?image=a&image=b").status_code == 401


@pytest.mark.parametrize(
    ("address", "host", "forwarded", "proxies", "expected"),
    [
        ("127.0.0.1", "127.0.0.1:8000", None, None, True),
        ("127.0.0.1", "mshub.clinic", None, None, False),
        ("10.1.2.3", "mshub.clinic", None, None, True),
        ("10.9.9.9", "mshub.clinic", None, "10.9.9.9", False),
        ("10.9.9.9", "mshub.clinic", " ", "10.0.0.1, 10.9.0.0/16", False),
        ("10.1.2.3", "mshub.clinic", "10.1.2.3", "10.9.9.9", True),
        ("10.9.9.8", "mshub.clinic", "10.9.9.8", "10.9.0.0/16", True),
        ("10.1.2.3", "mshub.clinic", None, "10.9.9.9", True),
        ("10.1.2.3", "mshub.clinic", None, "*", False),
        ("10.1.2.3", "mshub.clinic", "10.1.2.3", "*", True),
    ],
)
def test_an_address_is_one_persons_if_it_is_no_silent_proxys(
    monkeypatch: pytest.MonkeyPatch, address: str, host: str, forwarded: str | None, proxies: str | None, expected: bool
) -> None:
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if proxies is not None:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", proxies)
    headers = {"host": host} | ({} if forwarded is None else {"x-forwarded-for": forwarded})
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert access.comes_from_one_person(Request({"type": "http", "headers": raw, "client": (address, 5)})) is expected


def test_a_study_read_in_many_requests_is_one_line(api: FastAPI, users: UserFile, home: Path) -> None:
    for role in ("viewer", "annotator"):
        reader = logged_in(api, role)
        for number in range(5):
            reader.get(f"/proxy/dicom/studies/1.2.3/series/4/instances/{number}/frames/1")
    read = [line for line in lines(home) if line["action"].startswith("GET /proxy")]
    assert [line["user"] for line in read] == ["viewer", "annotator"]
    assert len({line["study"] for line in read}) == 1
    assert "1.2.3" not in json.dumps([{**line, "from": ""} for line in read])


def test_images_have_pseudonyms_in_texts(clinic: MSHubApp, tmp_path: Path) -> None:
    make_image(tmp_path / "studies" / "mueller-hans.nii.gz", (9, 9, 9))
    clinic.datastore().refresh()
    pseudonyms = audit.Pseudonyms(tmp_path)
    studies = clinic.datastore()
    one, two = pseudonyms.of("mueller-hans"), pseudonyms.of("mr")
    text = "mueller-hans: /x/mueller-hans.nii.gz is cut, and mr_0001.nii.gz. Of mueller nothing, (mueller-hans)."
    assert pseudonyms.hide(text, studies.image_of) == f"{one}: /x/{one} is cut, and {two}. Of mueller nothing, ({one})."


def test_what_looks_like_a_uid_has_a_pseudonym_whether_or_not_it_is_in_the_datastore(tmp_path: Path) -> None:
    pseudonyms = audit.Pseudonyms(tmp_path)
    seg, series = "1.2.276.0.7230010.3.1.4.8323329.1234.5", f"2.25.{2**120}"
    text = (
        f"the SEG {seg} in the PACS is left out: of {series}.\nGET /studies/{seg}/series/{series}/metadata, {seg}.dcm; "
        "DICOM 1.2.840.10008.1.2.4.90 and 1.2.840.10008.5.1.4.1.1.66.4, 10.250.250.250:8042, 2.13.0.1, 12.5"
    )
    expected = text.replace(seg, pseudonyms.of(seg)).replace(series, pseudonyms.of(series))
    assert pseudonyms.hide(text, lambda _: None) == expected


def test_short_ids_have_pseudonyms_where_they_are_no_other_word(tmp_path: Path) -> None:
    pseudonyms = audit.Pseudonyms(tmp_path)
    images = {"a", "7", "AB", "p1", "no", "P2"}
    text = (
        "a: cut; a label of AB, and (P2): no pre-label of p1: 7 of 9 tiles, at 10:07:59,700\n"
        "GET /datastore/image?image=a&x=7 'no' /labels/7/, A-7, AB-1, a.b, no. 77"
    )
    hidden = pseudonyms.hide(text, lambda word: word if word in images else None)
    assert hidden == (
        "{a}: cut; a label of {AB}, and ({P2}): no pre-label of {p1}: 7 of 9 tiles, at 10:07:59,700\n"
        "GET /datastore/image?image={a}&x={seven} '{no}' /labels/{seven}/, A-7, AB-1, a.b, no. 77"
    ).format(seven=pseudonyms.of("7"), **{name: pseudonyms.of(name) for name in images - {"7"}})


def test_the_servers_log_names_no_image(clinic: MSHubApp, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_lines, "_hide", str)
    clinic._hide_images()
    record = logging.LogRecord("lib", logging.INFO, "", 0, "looked at %s", ("mr.nii.gz",), None)
    assert log_lines.TextLines().format(record) == f"looked at {audit.Pseudonyms(clinic.store.home).of('mr')}"


def test_another_server_has_another_key(tmp_path: Path) -> None:
    logs = [audit.AuditLog(tmp_path / name) for name in ("one", "other")]
    assert len({log.hashed("case") for log in logs}) == 2
    assert audit.AuditLog(tmp_path / "one").hashed("case") == logs[0].hashed("case")


@pytest.mark.parametrize(("method", "query"), [("DELETE", "image?id="), ("GET", "label?tag=final&label=")])
def test_the_image_is_told_however_the_route_calls_it(
    api: FastAPI, users: UserFile, home: Path, method: str, query: str
) -> None:
    logged_in(api, "admin").request(method, f"/datastore/{query}mueller_hans_1950")
    assert lines(home)[-1]["image"] == audit.AuditLog(home).hashed("mueller_hans_1950")
    assert "mueller" not in (home / "logs" / "audit.jsonl").read_text()


def test_who_knocks_again_and_again_is_one_line(api: FastAPI, users: UserFile, home: Path) -> None:
    for number in range(10):
        client(api).get(f"/datastore/image?image={number}")
        client(api).request("BREW", f"/{number}")
    client(api, ("127.0.0.2", 1)).get("/datastore/image?image=a")
    found = [(line["from"], line["action"], line["status"]) for line in lines(home)]
    assert found == [
        ("127.0.0.1", "GET /datastore/image", 401),
        ("127.0.0.1", "(other) (none)", 404),
        ("127.0.0.2", "GET /datastore/image", 401),
    ]


def test_every_file_of_the_audit_log_is_its_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "FILE_BYTES", 200)
    log = audit.AuditLog(tmp_path)
    for _ in range(10):
        log.write(action="GET /", note="x" * 100)
    files = list((tmp_path / "logs").iterdir())
    assert len(files) > 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_a_line_that_cannot_be_written_is_told_in_the_servers_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = audit.AuditLog(tmp_path)
    log._handler.stream.close()
    log.write(action="GET /")
    assert "the audit log cannot be written" in caplog.text


@pytest.mark.parametrize("text", ["", "xyz", "abcd"])
def test_a_damaged_key_makes_no_hashes_that_can_be_guessed(tmp_path: Path, text: str) -> None:
    (tmp_path / "audit.key").write_text(text)
    with pytest.raises(ConfigError, match="damaged"):
        audit.AuditLog(tmp_path)


def test_metrics_name_no_methods_and_routes_that_strangers_make_up(home: Path, users: UserFile) -> None:
    told: list[tuple[Any, ...]] = []
    api = FastAPI(middleware=[Middleware(Access, lambda: home, lambda scope: False, (), lambda *all: told.append(all))])
    client(api).request("BREW", "/pot")
    client(api).get("/info/")
    assert [one[:3] for one in told] == [("(other)", "(none)", 404), ("GET", "/info/", 401)]


def test_a_server_that_is_full_says_when_to_come_back() -> None:
    def full() -> None:
        raise Busy("too many", 7.2)

    api = FastAPI(routes=[APIRoute("/infer", full)])
    add_error_answers(api)
    answer = TestClient(api).get("/infer")
    assert (answer.status_code, answer.headers["retry-after"], answer.headers["x-mshub-error"]) == (503, "8", "busy")


LET_IN = """
import asyncio
from lib.server import asgi
from monailabel.endpoints.user.auth import RBAC, User
print(asyncio.run(RBAC("monailabel-admin")(User(username="ada", roles=["admin"]))).username)
"""


def test_monai_labels_own_login_is_not_in_the_way() -> None:
    environment = {**os.environ, "MONAI_LABEL_AUTH_ENABLE": "true", "PYTHONPATH": str(app_folder())}
    done = subprocess.run([sys.executable, "-c", LET_IN], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1:] == ["ada"], done.stderr
