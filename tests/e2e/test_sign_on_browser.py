"""Single sign-on in a real browser, which decides itself which cookies come along from the provider's site."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from factories import make_image
from fake_oidc import CLIENT_ID, SECRET, FakeOidc
from lib.server.access import COOKIE
from live import LiveServer
from ohif_browser import CHROMIUM, OhifBrowser

SHOTS = Path(os.environ["E2E_SCREENSHOTS"]) if os.environ.get("E2E_SCREENSHOTS") else None


@pytest.fixture(scope="module")
def provider() -> Iterator[FakeOidc]:
    if not Path(CHROMIUM).exists():
        reason = "not installed: Chromium (make pacs-tools)"
        pytest.fail(reason) if os.environ.get("E2E_TOOLS") == "required" else pytest.skip(reason)
    with FakeOidc("localhost") as provider:
        provider.asks = True
        provider.discovery = {"end_session_endpoint": f"{provider.issuer}/logout"}
        yield provider


@pytest.fixture(scope="module")
def server(provider: FakeOidc, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("sign-on")
    make_image(folder / "studies" / "a.nii.gz", (21, 25, 18))
    (folder / "secret").write_text(SECRET)
    arguments = ["--studies", str(folder / "studies"), "--oidc-issuer", provider.issuer, "--oidc-client-id", CLIENT_ID]
    arguments += ["--oidc-client-secret-file", str(folder / "secret"), "--oidc-roles", "annotator=mshub-annotators"]
    arguments += ["--conf", "oidc_label=St. Elsewhere"]
    server = LiveServer(folder / "home", arguments, folder, probe="/health/live")
    yield server
    server.stop()


def test_a_person_comes_back_from_the_provider_logged_in(server: LiveServer, provider: FakeOidc) -> None:
    provider.person["groups"] = ["mshub-annotators"]
    with OhifBrowser(server.url, SHOTS) as browser:
        page = browser.page
        page.goto(f"{server.url}/mshub/status")
        browser.screenshot("sign-on-1-page")
        page.get_by_role("link", name="Sign in with St. Elsewhere").click()
        page.get_by_role("link", name="Continue as grace").click()
        page.wait_for_url(f"{server.url}/mshub/status")
        assert '"version"' in page.content()
        (cookie,) = [cookie for cookie in page.context.cookies() if cookie.get("name") == COOKIE]
        assert (cookie.get("sameSite"), cookie.get("httpOnly")) == ("Strict", True)
        page.goto(f"{server.url}/login")
        page.get_by_text("You are logged in as oidc:grace (annotator).").wait_for()
        browser.screenshot("sign-on-2-logged-in")
        page.get_by_role("button", name="Log out").click()
        page.get_by_role("link", name="Log in again").wait_for()
        browser.screenshot("sign-on-4-logged-out")
        page.get_by_role("link", name="Log out of St. Elsewhere").click()
        page.get_by_role("button", name="Yes, log me out").wait_for()
        page.goto(f"{server.url}/viewer/")
        page.get_by_label("User name").wait_for()
        assert browser.problems == []


def test_a_person_without_a_role_is_told_what_to_ask_for(server: LiveServer, provider: FakeOidc) -> None:
    provider.person["groups"] = ["staff"]
    with OhifBrowser(server.url, SHOTS) as browser:
        browser.page.goto(f"{server.url}/login")
        browser.page.get_by_role("link", name="Sign in with St. Elsewhere").click()
        browser.page.get_by_role("link", name="Continue as grace").click()
        browser.page.get_by_role("alert").filter(has_text="but you have no role here").wait_for()
        browser.screenshot("sign-on-3-refused")
