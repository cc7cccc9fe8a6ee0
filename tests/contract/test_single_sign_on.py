"""Single sign-on against a provider on loopback: the whole way, and whatever must not get anybody in."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.middleware import Middleware
from starlette.requests import Request

from factories import make_image, make_model_folder
from fake_oidc import CLIENT_ID, SECRET, FakeOidc, new_key
from lib.oidc_settings import OidcSettings
from lib.server import access, oidc
from lib.server.access import COOKIE, USER, Access
from lib.server.login import SIGN_ON_COOKIE, Login
from lib.server.oidc import AGAIN_S, PENDING_S, SignOn
from live import LiveServer
from mshub import users as users_module
from mshub.install import add_model
from mshub.store import ModelStore
from mshub.users import UserFile, user_file

ADMINS, DRAWERS, READERS = "mshub-admins", "mshub-annotators", "mshub-viewers"
ROLES = (("admin", ADMINS), ("annotator", DRAWERS), ("viewer", READERS))
HOST = "http://127.0.0.1:8000"
Change = Callable[[FakeOidc], None]


@pytest.fixture(scope="module")
def _running() -> Iterator[FakeOidc]:
    with FakeOidc() as provider:
        yield provider


@pytest.fixture
def provider(_running: FakeOidc) -> FakeOidc:
    """The provider, as it should be; it knows Grace, who draws."""
    fresh = {"sub": "1", "preferred_username": "grace", "groups": ["staff", DRAWERS]}
    _running.person, _running.changes, _running.discovery, _running.broken = fresh, {}, {}, {}
    _running.sign, _running.keys, _running.slow_s = _running.signed, _running.keys[:1], 0.0
    _running.is_public = False
    for told in (_running.asked, _running.codes, _running.tokens):
        told.clear()
    return _running


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    salt = users_module.bcrypt.gensalt
    monkeypatch.setattr(users_module.bcrypt, "gensalt", lambda: salt(4))
    yield tmp_path
    access._guards.pop(tmp_path, None)


@pytest.fixture
def users(home: Path) -> UserFile:
    """One user of this server: Ada."""
    file = user_file(home)
    file.add("ada", "a password for tests", "admin")
    return file


@pytest.fixture
def secret_file(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    return str(path)


@pytest.fixture
def settings(provider: FakeOidc, secret_file: str) -> dict[str, Any]:
    """Of a server where groups say who may what; a test changes them before it asks for a `browser`."""
    return {"issuer": provider.issuer, "client_id": CLIENT_ID, "client_secret_file": secret_file, "roles": ROLES}


@pytest.fixture
def api(home: Path, settings: dict[str, Any]) -> FastAPI:
    """A server that answers everything with who asked."""
    found: list[SignOn] = []

    def sign_on() -> SignOn:
        if not found:
            found.append(SignOn(OidcSettings(**settings)))
        return found[0]

    layer = Middleware(Access, lambda: home, lambda scope: False, (), None, lambda: True)
    api = FastAPI(openapi_url=None, middleware=[layer])
    api.router.routes[:0] = Login(lambda: home, sign_on).routes()

    async def whoever(request: Request) -> dict[str, Any]:
        user = request.scope[USER]
        return {"user": user.name, "role": user.role}

    api.add_api_route("/{path:path}", whoever, methods=["GET", "POST"])
    return api


def in_browser(api: FastAPI, base_url: str = HOST) -> TestClient:
    return TestClient(api, base_url, follow_redirects=False, headers={"Accept": "text/html"}, client=("10.1.2.3", 1))


@pytest.fixture
def browser(api: FastAPI) -> TestClient:
    return in_browser(api)


def begin(browser: TestClient, next: str = "/viewer/") -> str:
    """Press the button, sign in at the provider, and return the address it leads back to."""
    led = browser.get("/login/oidc", params={"next": next})
    assert led.status_code == 303, led.text
    back = httpx.get(led.headers["location"])
    assert back.status_code == 302, back.text
    return back.headers["location"]


def sign_in(browser: TestClient, next: str = "/viewer/") -> httpx.Response:
    return browser.get(begin(browser, next))


def changed(address: str, **query: str) -> str:
    """Return an address with other values in its query; an empty one is left out."""
    found = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
    return str(httpx.URL(address.partition("?")[0], params={k: v for k, v in {**found, **query}.items() if v}))


def assert_refused(browser: TestClient, answer: httpx.Response, status: int, words: str) -> None:
    """Check that nobody was let in, and that the page says why and still offers both ways."""
    assert answer.status_code == status, answer.text
    assert words in answer.text
    assert "Log in</button>" in answer.text
    assert "Sign in with" in answer.text
    assert "refresh" not in answer.headers
    assert COOKIE not in browser.cookies
    assert browser.get("/info/", headers={"Accept": "*/*"}).status_code == 401


def lines(home: Path) -> list[dict[str, Any]]:
    """Return what the audit log tells of requests."""
    told = [json.loads(line) for line in (home / "logs" / "audit.jsonl").read_text().splitlines()]
    return [line for line in told if "status" in line]


# -- the way in -------------------------------------------------------------------------------------------------------


def test_somebody_signs_in_and_gets_to_where_they_wanted(browser: TestClient, provider: FakeOidc, home: Path) -> None:
    led = browser.get("/viewer/view?StudyInstanceUIDs=1.2")
    page = browser.get(led.headers["location"])
    assert 'href="/login/oidc?next=%2Fviewer%2Fview%3FStudyInstanceUIDs%3D1.2"' in page.text
    assert "Sign in with 127.0.0.1" in page.text
    answer = sign_in(browser, "/viewer/view?StudyInstanceUIDs=1.2")
    assert (answer.status_code, answer.headers["refresh"]) == (200, "0; url=/viewer/view?StudyInstanceUIDs=1.2")
    assert browser.get("/info/").json() == {"user": "oidc:grace", "role": "annotator"}
    assert "oidc:grace" in browser.get("/login").text
    assert browser.post("/train/", headers={"Origin": HOST}).status_code == 403
    assert [(line["user"], line["role"], line["action"], line["status"]) for line in lines(home)][:1] == [
        ("oidc:grace", "annotator", "GET /login/oidc/callback", 200)
    ]
    assert browser.post("/logout", headers={"Origin": HOST}).status_code == 303
    assert browser.get("/info/", headers={"Accept": "*/*"}).status_code == 401


def test_whoever_logs_out_is_told_how_to_log_out_of_the_provider(browser: TestClient, provider: FakeOidc) -> None:
    provider.discovery = {"end_session_endpoint": f"{provider.issuer}/logout"}
    sign_in(browser)
    answer = browser.post("/logout", headers={"Origin": HOST})
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    assert browser.get("/info/", headers={"Accept": "*/*"}).status_code == 401
    (address,) = re.findall(r'class="sign-on" href="([^"]+)"', answer.text)
    assert "Yes, log me out" in httpx.get(unescape(address)).text


@pytest.fixture
def terse(provider: FakeOidc) -> FakeOidc:
    """A provider whose id tokens say nothing of people, as the standard has it: they are told of elsewhere."""
    provider.discovery = {"userinfo_endpoint": f"{provider.issuer}/userinfo"}
    provider.person, provider.user_info = {"sub": "1"}, {"sub": "1", **provider.person}
    return provider


def test_whoever_the_id_token_does_not_name_is_asked_for(browser: TestClient, terse: FakeOidc) -> None:
    assert sign_in(browser).status_code == 200
    assert browser.get("/info/").json() == {"user": "oidc:grace", "role": "annotator"}
    assert terse.asked[-1] == "userinfo"


def test_groups_may_be_told_elsewhere_than_the_name(browser: TestClient, terse: FakeOidc) -> None:
    terse.person = {"sub": "1", "preferred_username": "grace"}
    terse.user_info["preferred_username"] = "ada"
    assert sign_in(browser).status_code == 200
    assert browser.get("/info/").json() == {"user": "oidc:grace", "role": "annotator"}, "what is signed goes first"


def test_user_info_says_nothing_of_whom_the_token_is_for_and_when(browser: TestClient, terse: FakeOidc) -> None:
    terse.changes = {"aud": "another"}
    terse.user_info |= {"aud": CLIENT_ID}
    assert_refused(browser, sign_in(browser), 401, "was refused")
    assert "userinfo" not in terse.asked


@pytest.mark.parametrize("sub", ["2", None, 1])
def test_user_info_of_another_person_lets_nobody_in(browser: TestClient, terse: FakeOidc, sub: object) -> None:
    terse.user_info["sub"] = sub
    assert_refused(browser, sign_in(browser), 401, "was refused")


@pytest.mark.parametrize(
    "answer",
    [(500, {}, b""), (401, {}, b"{}"), (200, {}, b"no JSON"), (200, {}, b"7"), (302, {"Location": "/"}, b"")],
)
def test_user_info_that_cannot_be_had_lets_nobody_in(browser: TestClient, terse: FakeOidc, answer: Any) -> None:
    terse.broken = {"userinfo": answer}
    assert_refused(browser, sign_in(browser), 503, "cannot be reached or is not set up")


def test_an_unsafe_address_of_user_info_is_not_asked(browser: TestClient, terse: FakeOidc) -> None:
    terse.discovery = {"userinfo_endpoint": "http://elsewhere.example/userinfo"}
    assert_refused(browser, sign_in(browser), 403, "does not say who you are")


@pytest.mark.parametrize(
    "discovery",
    [
        {"end_session_endpoint": "http://elsewhere.example/logout"},
        {"end_session_endpoint": None},
        {"issuer": "another"},
    ],
)
def test_logging_out_needs_no_provider(browser: TestClient, provider: FakeOidc, discovery: dict[str, Any]) -> None:
    provider.discovery = discovery
    answer = browser.post("/logout", headers={"Origin": HOST})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")


def test_a_stranger_who_begins_on_and_on_pushes_out_nobody_elsewhere(
    api: FastAPI, provider: FakeOidc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "MOST_PENDING_OF_ONE", 3)
    monkeypatch.setattr(oidc, "MOST_PENDING", 5)
    grace, neighbours = in_browser(api), [in_browser(api) for _ in range(3)]
    back = begin(grace)
    stranger = TestClient(api, HOST, follow_redirects=False, client=("10.6.6.6", 1))
    for _ in range(12):
        assert stranger.get("/login/oidc").status_code == 303
    assert grace.get(back).status_code == 200
    backs = [begin(neighbour) for neighbour in neighbours]
    led = [neighbour.get(back).status_code for neighbour, back in zip(neighbours, backs, strict=True)]
    assert led == [200, 200, 200], "as many as one address may have"
    backs = [begin(neighbour) for neighbour in (grace, *neighbours)]
    assert [one.get(back).status_code for one, back in zip((grace, *neighbours), backs, strict=True)] == [401, *led]


def test_a_provider_that_is_down_is_not_asked_by_everybody(
    browser: TestClient, provider: FakeOidc, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider.broken = {"openid_configuration": (500, {}, b"")}
    for _ in range(3):
        assert_refused(browser, browser.get("/login/oidc"), 503, "cannot be reached")
        assert browser.post("/logout", headers={"Origin": HOST}).status_code == 303
    assert provider.asked == ["openid_configuration"]
    provider.broken = {}
    assert browser.get("/login/oidc").status_code == 503
    monkeypatch.setattr(oidc.time, "monotonic", lambda now=time.monotonic: now() + AGAIN_S)
    assert sign_in(browser).status_code == 200


def test_people_who_wait_for_a_slow_provider_wait_for_one_answer(
    api: FastAPI, provider: FakeOidc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "TIMEOUT_S", 0.5)
    provider.slow_s = 2.0

    async def ask_all() -> list[int]:
        transport = httpx.ASGITransport(api, client=("10.1.2.3", 1))
        async with httpx.AsyncClient(transport=transport, base_url=HOST) as people:
            answers = await asyncio.gather(*(people.get("/login/oidc") for _ in range(20)))
        return [answer.status_code for answer in answers]

    began = time.monotonic()
    assert asyncio.run(ask_all()) == [503] * 20
    assert time.monotonic() - began < 2
    assert len(provider.asked) <= 1


def test_the_cookies_are_for_this_site_and_for_no_script(api: FastAPI, provider: FakeOidc) -> None:
    browser = in_browser(api, "https://127.0.0.1:8443")
    state = browser.get("/login/oidc").headers["set-cookie"].lower()
    assert state.startswith(SIGN_ON_COOKIE)
    assert {"httponly", "samesite=lax", "secure", "path=/login/oidc", f"max-age={PENDING_S}"} <= set(state.split("; "))
    kept = {one.partition("=")[0]: one.lower() for one in sign_in(browser).headers.get_list("set-cookie")}
    assert {"httponly", "samesite=strict", "secure"} <= set(kept[COOKIE].split("; "))
    assert "max-age=0" in kept[SIGN_ON_COOKIE]


def test_no_code_is_kept_or_told_to_the_next_page(browser: TestClient, provider: FakeOidc) -> None:
    answer = sign_in(browser)
    assert (answer.headers["cache-control"], answer.headers["referrer-policy"]) == ("no-store", "strict-origin")
    assert provider.codes[0] not in answer.text


@pytest.mark.parametrize("next", ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)"])
def test_one_is_led_to_this_server_only(browser: TestClient, provider: FakeOidc, next: str) -> None:
    assert sign_in(browser, next).headers["refresh"] == "0; url=/viewer/"


def test_an_address_is_no_markup(browser: TestClient, provider: FakeOidc) -> None:
    answer = sign_in(browser, '/"><script>ü')
    assert "<script>" not in answer.text
    assert answer.headers["refresh"] == "0; url=/%22%3E%3Cscript%3E%C3%BC"


def test_the_operators_address_is_where_the_provider_sends_people(
    settings: dict[str, Any], api: FastAPI, provider: FakeOidc
) -> None:
    settings |= {"public_url": "https://mshub.clinic/", "label": "Clinic <1>"}
    browser = in_browser(api, "https://mshub.clinic")
    page = browser.get("/login").text
    assert 'href="https://mshub.clinic/login/oidc?next=%2Fviewer%2F"' in page
    assert "Sign in with Clinic &lt;1&gt;" in page
    assert begin(browser).startswith("https://mshub.clinic/login/oidc/callback?")


def test_without_it_an_address_that_is_not_this_machine_is_none(api: FastAPI, provider: FakeOidc) -> None:
    answer = in_browser(api, "http://evil.example").get("/login/oidc")
    assert (answer.status_code, "oidc_public_url" in answer.text) == (503, True)


def test_a_client_without_a_secret_has_its_verifier_only(
    settings: dict[str, Any], browser: TestClient, provider: FakeOidc
) -> None:
    provider.is_public = True
    settings["client_secret_file"] = ""
    assert sign_in(browser).status_code == 200


def test_people_have_to_log_in_though_there_are_no_users(browser: TestClient, home: Path) -> None:
    assert browser.get("/info/", headers={"Accept": "*/*"}).status_code == 401
    assert browser.get("/auth/").json()["enabled"] is True


def test_a_server_without_single_sign_on_offers_none(home: Path, users: UserFile) -> None:
    api = FastAPI(openapi_url=None, middleware=[Middleware(Access, lambda: home, lambda scope: False)])
    api.router.routes[:0] = Login(lambda: home).routes()
    browser = in_browser(api)
    assert "Sign in with" not in browser.get("/login").text
    assert browser.get("/login/oidc").status_code == 404
    assert browser.get("/login/oidc/callback?state=a&code=b").status_code == 404


# -- who may what -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "role"),
    [
        ([ADMINS], "admin"),
        ([READERS, ADMINS, DRAWERS], "admin"),
        ([READERS, "staff"], "viewer"),
        ([READERS, DRAWERS], "annotator"),
    ],
)
def test_the_highest_of_several_roles_wins(
    browser: TestClient, provider: FakeOidc, groups: list[str], role: str
) -> None:
    provider.person["groups"] = groups
    sign_in(browser)
    assert browser.get("/info/").json()["role"] == role


@pytest.mark.parametrize("groups", [[], ["staff"], None, ADMINS, f"{READERS},{ADMINS}", {ADMINS: True}, [[ADMINS]], 1])
def test_somebody_without_a_role_is_told_what_to_ask_for(
    browser: TestClient, provider: FakeOidc, home: Path, groups: Any
) -> None:
    provider.person["groups"] = groups
    assert_refused(browser, sign_in(browser), 403, "Ask the admin of this server for a group that oidc_roles names")
    assert (lines(home)[0]["user"], lines(home)[0]["status"]) == (None, 403)


def test_another_claim_may_name_the_groups(settings: dict[str, Any], browser: TestClient, provider: FakeOidc) -> None:
    settings["role_claim"] = "roles"
    provider.person |= {"groups": [ADMINS], "roles": [READERS]}
    sign_in(browser)
    assert browser.get("/info/").json()["role"] == "viewer"


def test_a_guest_is_not_the_user_of_that_name(browser: TestClient, provider: FakeOidc, users: UserFile) -> None:
    provider.person |= {"preferred_username": "ada", "groups": [READERS]}
    sign_in(browser)
    assert browser.get("/info/").json() == {"user": "oidc:ada", "role": "viewer"}


def test_a_guest_is_out_after_a_restart(browser: TestClient, provider: FakeOidc, home: Path) -> None:
    sign_in(browser)
    assert browser.get("/info/").status_code == 200
    access._guards.pop(home)
    assert browser.get("/info/", headers={"Accept": "*/*"}).status_code == 401


@pytest.fixture
def users_only(settings: dict[str, Any], users: UserFile, provider: FakeOidc) -> UserFile:
    """A server that lets its own users in; Ada comes."""
    settings["roles"] = ()
    provider.person = {"sub": "2", "preferred_username": "ada", "groups": []}
    return users


def test_without_roles_a_user_of_this_server_enters_as_that_user_and_is_out_at_once(
    users_only: UserFile, browser: TestClient
) -> None:
    sign_in(browser)
    assert browser.get("/info/").json() == {"user": "ada", "role": "admin"}
    users_only.add("other", "a password for tests", "admin")
    users_only.set_role("ada", "viewer")
    assert browser.get("/info/").json() == {"user": "ada", "role": "viewer"}
    users_only.remove("ada")
    assert browser.get("/info/", headers={"Accept": "*/*"}).status_code == 401


@pytest.mark.parametrize("name", ["grace", "Ada", "ada "])
def test_without_roles_nobody_else_does(
    users_only: UserFile, browser: TestClient, provider: FakeOidc, name: str
) -> None:
    provider.person |= {"preferred_username": name, "groups": [ADMINS]}
    assert_refused(browser, sign_in(browser), 403, "mshub users add NAME")


@pytest.mark.parametrize("name", [None, "", 1, ["ada"], "a" * 65, "a\nb"])
def test_somebody_without_a_name_is_nobody(browser: TestClient, provider: FakeOidc, name: Any) -> None:
    provider.person["preferred_username"] = name
    assert_refused(browser, sign_in(browser), 403, "the claim preferred_username")


@pytest.mark.parametrize(("verified", "status"), [(True, 200), (False, 403), (None, 403), ("true", 403)])
def test_an_address_counts_when_it_was_verified(
    users_only: UserFile, settings: dict[str, Any], browser: TestClient, provider: FakeOidc, verified: Any, status: int
) -> None:
    settings["name_claim"] = "email"
    users_only.add("ada@clinic.example", "a password for tests", "viewer")
    provider.person |= {"email": "ada@clinic.example", "email_verified": verified}
    assert sign_in(browser).status_code == status


# -- attacks on the way back ------------------------------------------------------------------------------------------

NOT_BEGUN = "was not begun in this browser"


@pytest.mark.parametrize("state", ["", "another", "ü"])
def test_another_state_is_refused_and_spoils_the_sign_in(browser: TestClient, provider: FakeOidc, state: str) -> None:
    address = begin(browser)
    kept = browser.cookies[SIGN_ON_COOKIE]
    assert_refused(browser, browser.get(changed(address, state=state)), 401, NOT_BEGUN)
    browser.cookies.set(SIGN_ON_COOKIE, kept)
    assert_refused(browser, browser.get(address), 401, NOT_BEGUN)
    assert "token" not in provider.asked


def test_another_browser_cannot_end_what_was_begun_in_this_one(api: FastAPI, provider: FakeOidc) -> None:
    """Nobody is logged in as somebody else by following a link."""
    one, other = in_browser(api), in_browser(api)
    address = begin(one)
    assert_refused(other, other.get(address), 401, NOT_BEGUN)
    begin(other)
    assert_refused(other, other.get(address), 401, NOT_BEGUN)
    assert one.get(address).status_code == 200


def test_the_way_back_is_good_once(browser: TestClient, provider: FakeOidc) -> None:
    address = begin(browser)
    kept = browser.cookies[SIGN_ON_COOKIE]
    assert browser.get(address).status_code == 200
    browser.cookies.clear()
    browser.cookies.set(SIGN_ON_COOKIE, kept)
    assert_refused(browser, browser.get(address), 401, NOT_BEGUN)


def test_a_code_is_good_once(browser: TestClient, provider: FakeOidc) -> None:
    used = sign_in(browser)
    assert used.status_code == 200
    browser.cookies.clear()
    assert_refused(browser, browser.get(changed(begin(browser), code=provider.codes[0])), 401, "was refused")


def test_a_code_of_another_browser_is_refused(api: FastAPI, provider: FakeOidc) -> None:
    """Whoever saw a code, or brings their own, has not the verifier it was made for."""
    one, other = in_browser(api), in_browser(api)
    begin(one)
    address = changed(begin(other), code=provider.codes[0])
    assert_refused(other, other.get(address), 401, "was refused")


def test_the_provider_gives_nothing_for_a_code_without_its_verifier(browser: TestClient, provider: FakeOidc) -> None:
    address = begin(browser)
    form = {"code": provider.codes[0], "redirect_uri": address.partition("?")[0], "grant_type": "authorization_code"}
    answer = httpx.post(f"{provider.issuer}/token", data=form, auth=(CLIENT_ID, SECRET))
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")


def test_a_sign_in_has_to_end_in_time(browser: TestClient, provider: FakeOidc, monkeypatch: pytest.MonkeyPatch) -> None:
    address, now = begin(browser), oidc.time.monotonic()
    monkeypatch.setattr(oidc.time, "monotonic", lambda: now + PENDING_S + 1)
    assert_refused(browser, browser.get(address), 401, NOT_BEGUN)


def test_of_too_many_sign_ins_the_oldest_gives_way(
    api: FastAPI, provider: FakeOidc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "MOST_PENDING", 2)
    first, second, third = (in_browser(api) for _ in range(3))
    addresses = [begin(one) for one in (first, second, third)]
    assert [one.get(address).status_code for one, address in zip((first, second, third), addresses, strict=True)] == [
        *(401, 200, 200)
    ]


def test_who_declines_at_the_provider_is_back_at_the_page(browser: TestClient, provider: FakeOidc) -> None:
    address = changed(begin(browser), code="", error="access_denied", error_description="<b>call 555</b>")
    answer = browser.get(address)
    assert_refused(browser, answer, 401, "did not let you in")
    assert "555" not in answer.text


# -- id tokens that are none ------------------------------------------------------------------------------------------


def claims(**changes: Any) -> Change:
    return lambda provider: provider.changes.update(changes)


def token(make: Callable[[FakeOidc, dict[str, Any]], str]) -> Change:
    def change(provider: FakeOidc) -> None:
        provider.sign = lambda claims: make(provider, claims)

    return change


def says_it_uses_secrets(provider: FakeOidc) -> None:
    provider.discovery["id_token_signing_alg_values_supported"] = ["HS256", "none"]


def by_its_secret(provider: FakeOidc) -> None:
    says_it_uses_secrets(provider)
    provider.sign = lambda claims: provider.signed_by_secret(claims, SECRET.encode())


def not_signed(provider: FakeOidc) -> None:
    says_it_uses_secrets(provider)
    provider.sign = provider.not_signed


BAD_TOKENS: dict[str, Change] = {
    "another nonce": claims(nonce="another"),
    "no nonce": claims(nonce=None),
    "for another client": claims(aud="another"),
    "for another client, though asked for by this one": claims(aud="another", azp=CLIENT_ID),
    "for nobody": claims(aud=None),
    "for others too, and not said by whom it was asked for": claims(aud=[CLIENT_ID, "another"]),
    "asked for by another client": claims(azp="another"),
    "of another provider": claims(iss="https://evil.example"),
    "of nobody": claims(iss=None),
    "expired": claims(exp=1_000_000_000),
    "good for ever": claims(exp=None),
    "of the future": claims(iat=4_000_000_000),
    "of no time": claims(iat=None),
    "not good yet": claims(nbf=4_000_000_000),
    "of nobody's account": claims(sub=None),
    "with a hash of another access token": claims(at_hash="AAAAAAAAAAAAAAAAAAAAAA"),
    "not signed": not_signed,
    "signed with the secret": by_its_secret,
    "signed with the public key as secret": token(
        lambda fake, claims: fake.signed_by_secret(claims, fake.keys[0].as_pem(private=False))
    ),
    "signed with a key nobody published": token(lambda fake, claims: fake.signed(claims, new_key("unknown"))),
    "signed with another key under a known name": token(lambda fake, claims: fake.signed(claims, new_key("one"))),
    "signed with a key it brings along": token(
        lambda fake, claims: fake.signed(claims, other := new_key("one"), jwk=other.as_dict(private=False))  # type: ignore[arg-type]
    ),
    "with a signature cut off": token(lambda fake, claims: fake.signed(claims).rpartition(".")[0] + "."),
    "no token": token(lambda fake, claims: "nonsense"),
    "nothing": token(lambda fake, claims: ""),
    "left out": lambda fake: fake.broken.update(token=(200, {}, b'{"access_token": "a", "token_type": "Bearer"}')),
}


@pytest.mark.parametrize("change", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_an_id_token_that_is_not_for_this_sign_in_lets_nobody_in(
    browser: TestClient, provider: FakeOidc, home: Path, caplog: pytest.LogCaptureFixture, change: Change
) -> None:
    provider.person["groups"] = [ADMINS]
    change(provider)
    assert_refused(browser, sign_in(browser), 401, "The answer of 127.0.0.1 was refused")
    assert (lines(home)[0]["user"], lines(home)[0]["status"]) == (None, 401)
    assert "refused an answer of the provider" in caplog.text


def test_an_id_token_for_several_clients_is_good_if_this_one_asked(browser: TestClient, provider: FakeOidc) -> None:
    provider.changes = {"aud": [CLIENT_ID, "another"], "azp": CLIENT_ID}
    assert sign_in(browser).status_code == 200


def test_clocks_may_differ_a_little(browser: TestClient, provider: FakeOidc) -> None:
    now = int(oidc.time.time())
    provider.changes = {"iat": now + 30, "exp": now - 30}
    assert sign_in(browser).status_code == 200


def test_keys_are_read_again_once_when_there_is_a_new_one(browser: TestClient, provider: FakeOidc) -> None:
    assert sign_in(browser).status_code == 200
    provider.keys = [new_key("two"), *provider.keys]
    assert sign_in(browser).status_code == 200
    assert provider.asked.count("jwks") == 2
    provider.sign = lambda claims: provider.signed(claims, new_key("three"))
    assert sign_in(browser).status_code == 401
    assert provider.asked.count("jwks") == 3
    assert provider.asked.count("openid_configuration") == 1


def test_a_key_that_was_taken_back_is_good_for_an_hour_at_most(
    browser: TestClient, provider: FakeOidc, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sign_in(browser).status_code == 200
    taken_back, provider.keys = provider.keys[0], [new_key("two")]
    provider.sign = lambda claims: provider.signed(claims, taken_back)
    now = oidc.time.monotonic()
    monkeypatch.setattr(oidc.time, "monotonic", lambda: now + 3601)
    assert sign_in(browser).status_code == 401


# -- a provider that does not work ------------------------------------------------------------------------------------

NO_PROVIDER: dict[str, Change] = {
    "is down": lambda fake: fake.broken.update(openid_configuration=(503, {}, b"")),
    "says nonsense": lambda fake: fake.broken.update(openid_configuration=(200, {}, b"<html>")),
    "says a list": lambda fake: fake.broken.update(openid_configuration=(200, {}, b"[]")),
    "leads elsewhere": lambda fake: fake.broken.update(openid_configuration=(302, {"Location": "/elsewhere"}, b"")),
    "is another one": lambda fake: fake.discovery.update(issuer="https://evil.example"),
    "lacks an address": lambda fake: fake.discovery.update(token_endpoint=None),
    "asks without encryption": lambda fake: fake.discovery.update(token_endpoint="http://login.example/token"),
    "is slow": lambda fake: setattr(fake, "slow_s", 2.0),
}


@pytest.mark.parametrize("change", NO_PROVIDER.values(), ids=NO_PROVIDER.keys())
def test_a_provider_that_does_not_work_leaves_the_password(
    browser: TestClient,
    provider: FakeOidc,
    users: UserFile,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Change,
) -> None:
    change(provider)
    with monkeypatch.context() as impatient:
        impatient.setattr(oidc, "TIMEOUT_S", 1.0)
        assert_refused(browser, browser.get("/login/oidc"), 503, "Use a password, or try again later")
    assert "the provider is of no use" in caplog.text
    form = {"username": "ada", "password": "a password for tests"}
    assert browser.post("/login", data=form, headers={"Origin": HOST}).status_code == 303
    provider.slow_s, provider.broken, provider.discovery = 0.0, {}, {}
    monkeypatch.setattr(oidc.time, "monotonic", lambda now=time.monotonic: now() + AGAIN_S)
    assert browser.get("/login/oidc").status_code == 303


@pytest.mark.parametrize("path", ["token", "jwks"])
@pytest.mark.parametrize(
    "answer",
    [(500, {}, b""), (200, {}, b"<html>"), (200, {}, b"[]"), (200, {}, b"null"), (302, {"Location": "/x"}, b"")],
)
def test_a_provider_that_breaks_halfway_lets_nobody_in(
    browser: TestClient, provider: FakeOidc, path: str, answer: Any
) -> None:
    address = begin(browser)
    provider.broken[path] = answer
    assert_refused(browser, browser.get(address), 503, "Use a password, or try again later")


def test_a_wrong_secret_is_told_in_the_log(
    settings: dict[str, Any], browser: TestClient, provider: FakeOidc, caplog: pytest.LogCaptureFixture
) -> None:
    Path(settings["client_secret_file"]).write_text("another secret")
    assert_refused(browser, sign_in(browser), 401, "was refused")
    assert "invalid_client" in caplog.text
    assert "another secret" not in caplog.text


# -- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [lambda fake: None, claims(groups=["the-secret-group"]), claims(aud="another"), claims(nonce="x")]
)
def test_no_log_and_no_page_holds_a_code_a_token_or_a_claim(
    browser: TestClient, provider: FakeOidc, home: Path, caplog: pytest.LogCaptureFixture, change: Change
) -> None:
    caplog.set_level(logging.INFO)
    provider.person |= {"email": "grace@clinic.example", "name": "Grace Hopper"}
    change(provider)
    page = sign_in(browser)
    browser.get(changed(begin(browser), code=provider.codes[0]))
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("httpx")]
    told = "".join(ours) + (home / "logs" / "audit.jsonl").read_text() + page.text
    private = ["grace@clinic", "Hopper", "the-secret-group", DRAWERS, SECRET, *provider.codes, *provider.tokens]
    assert [text for text in private if text in told] == []


def test_a_real_server_is_started_with_it(tmp_path: Path, provider: FakeOidc, secret_file: str) -> None:
    studies, home = tmp_path / "studies", tmp_path / "home"
    make_image(studies / "a.nii.gz", (21, 25, 18))
    add_model(ModelStore(home), "tiny", make_model_folder(tmp_path / "models" / "tiny"))
    arguments = ["--studies", str(studies), "--host", "0.0.0.0", "--oidc-issuer", provider.issuer]
    arguments += ["--oidc-client-id", CLIENT_ID, "--oidc-client-secret-file", secret_file]
    arguments += ["--oidc-roles", f"admin={ADMINS},annotator={DRAWERS}"]
    server = LiveServer(home, arguments, tmp_path, probe="/health/live")
    try:
        with httpx.Client(base_url=server.url, headers={"Accept": "text/html"}) as browser:
            led = browser.get("/login/oidc", params={"next": "/mshub/status"})
            back = httpx.get(led.headers["location"])
            answer = browser.get(back.headers["location"])
            assert answer.headers["refresh"] == "0; url=/mshub/status"
            assert browser.get("/mshub/status").json()["models"] == {"tiny": "v1"}
            assert httpx.get(f"{server.url}/mshub/status").status_code == 401
    finally:
        server.stop()
    told = "".join(path.read_text() for path in (server.log, *(home / "logs").iterdir()))
    assert [text for text in (SECRET, *provider.codes, *provider.tokens) if text in told] == []
    assert [line["user"] for line in lines(home) if line["action"] == "GET /login/oidc/callback"] == ["oidc:grace"]
