"""Who may ask the server for what: every route and role, and what a stranger, a script and another site's page get."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.middleware import Middleware
from starlette.requests import Request

from lib import audit
from lib.server import access, asgi
from lib.server.access import COOKIE, USER, Access
from lib.server.login import Login, _within
from lib.server.permissions import PERMITTED, PUBLIC, permission_for
from mshub import users as users_module
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
def home(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mshub-home"
    path.mkdir()
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


def test_every_route_is_permitted_to_somebody_or_closed_on_purpose() -> None:
    routes = {(method, "/static/{path:path}" if path == "/static" else path) for method, path in routes_of(asgi.app)}
    listed = {(permission.method, permission.path) for permission in PERMITTED}
    services = {route for route in routes if route[1].startswith("/proxy/dicom/") and route[1].count("/") == 4}
    extension = {("GET", "/viewer/extension/{path:path}")}
    assert routes - services - extension - listed == CLOSED
    assert listed - routes == set()
    for method, path in sorted(services | extension):
        assert permission_for(method, example(path)) is not None


@pytest.mark.parametrize(("method", "path"), sorted(CLOSED))
def test_what_is_closed_is_closed_to_everybody(api: FastAPI, users: UserFile, method: str, path: str) -> None:
    for role in ROLES:
        answer = logged_in(api, role).request(method, example(path))
        assert answer.status_code == 404
        assert "nothing this server offers" in answer.json()["detail"]


@pytest.mark.parametrize("permission", PERMITTED, ids=lambda one: f"{one.method} {one.path}")
def test_every_route_is_open_to_its_roles_and_to_no_other(
    api: FastAPI, users: UserFile, home: Path, permission: Any
) -> None:
    if permission.path in ("/login", "/logout", "/auth/token", "/auth/", "/auth/token/valid"):
        pytest.skip("answers by itself; see below")
    address = example(permission.path)
    answers = {role: logged_in(api, role).request(permission.method, address).status_code for role in ROLES}
    stranger = client(api, ("10.1.2.3", 1), base_url="http://mshub.clinic").request(permission.method, address)
    if permission.role == PUBLIC:
        assert {*answers.values(), stranger.status_code} == {200}
        return
    allowed = ROLES[ROLES.index(permission.role) :]
    assert answers == {role: 200 if role in allowed else 403 for role in ROLES}
    assert stranger.status_code == 401
    assert stranger.headers["www-authenticate"] == "Bearer"
    assert {line["status"] for line in lines(home) if line["user"] is None} == {401}


@pytest.mark.parametrize(
    "path",
    ["/elsewhere", "/infer", "/infer/a/b", "/datastore/image/../../x", "//infer/x", "/INFO/", "info/", "/info/\n"],
)
def test_what_nobody_thought_of_is_closed(path: str) -> None:
    assert permission_for("GET", path) is None
    assert permission_for("PATCH", "/info/") is None


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


def test_guessing_has_to_wait_and_others_do_not(api: FastAPI, users: UserFile) -> None:
    for _ in range(FREE):
        assert client(api).post("/auth/token", data={"username": "viewer", "password": "x"}).status_code == 401
    right = {"username": "viewer", "password": PASSWORDS["viewer"]}
    answer = client(api).post("/auth/token", data=right)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert client(api).post("/login", data=right).status_code == 429
    assert client(api, ("127.0.0.2", 1)).post("/auth/token", data=right).status_code == 200


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


def test_a_study_read_in_many_requests_is_one_line(api: FastAPI, users: UserFile, home: Path) -> None:
    for role in ("viewer", "annotator"):
        reader = logged_in(api, role)
        for number in range(5):
            reader.get(f"/proxy/dicom/studies/1.2.3/series/4/instances/{number}/frames/1")
    read = [line for line in lines(home) if line["action"].startswith("GET /proxy")]
    assert [line["user"] for line in read] == ["viewer", "annotator"]
    assert len({line["study"] for line in read}) == 1
    assert "1.2.3" not in json.dumps([{**line, "from": ""} for line in read])


def test_another_server_has_another_key(tmp_path: Path) -> None:
    logs = [audit.AuditLog(tmp_path / name) for name in ("one", "other")]
    assert len({log.hashed("case") for log in logs}) == 2
    assert audit.AuditLog(tmp_path / "one").hashed("case") == logs[0].hashed("case")
