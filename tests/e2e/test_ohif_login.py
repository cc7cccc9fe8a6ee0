"""OHIF behind a login, in a real browser: who looks, who works, and who is let in to neither."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dicom_series_factory import SeriesMaker
from factories import make_model_folder
from hospital import Hospital, predicted
from lib.server.access import COOKIE
from lib.server.viewer import OHIF_VERSION
from live import LiveServer
from mshub.dicom_series import read_stack
from mshub.install import add_model
from mshub.store import ModelStore
from mshub.users import user_file
from ohif_browser import OhifBrowser
from orthanc import Orthanc

SHOTS = Path(os.environ["E2E_SCREENSHOTS"]) if os.environ.get("E2E_SCREENSHOTS") else None
PASSWORD = "a password for tests"


@pytest.fixture(scope="module")
def ward(viewer: Path, tmp_path_factory: pytest.TempPathFactory, orthanc: Callable[..., Orthanc]) -> Iterator[Hospital]:
    folder = tmp_path_factory.mktemp("ward")
    home = folder / "home"
    (home / "viewer").mkdir(parents=True)
    (home / "viewer" / OHIF_VERSION).symlink_to(viewer)
    add_model(ModelStore(home), "tiny", make_model_folder(folder / "models" / "tiny"))
    for name, role in (("ada", "admin"), ("grace", "annotator"), ("guest", "viewer")):
        user_file(home).add(name, PASSWORD, role)
    pacs = orthanc(folder / "pacs")
    server = LiveServer(home, ["--studies", pacs.dicomweb], folder, probe="/health/live")
    yield Hospital(pacs, server, home, folder)
    server.stop()


@pytest.fixture
def browser(ward: Hospital) -> Iterator[OhifBrowser]:
    """Somebody's browser, who has not been here before."""
    with OhifBrowser(ward.server.url, SHOTS) as browser:
        yield browser
        assert browser.foreign == []


def log_in(browser: OhifBrowser, name: str, password: str = PASSWORD) -> None:
    browser.page.get_by_label("User name").fill(name)
    browser.page.get_by_label("Password").fill(password)
    browser.page.get_by_role("button", name="Log in").click()


def test_who_annotates_logs_in_works_and_logs_out(ward: Hospital, browser: OhifBrowser) -> None:
    maker = SeriesMaker("behind a login", seed=30)
    folder, page = ward.store(maker), browser.page
    page.goto(f"{ward.server.url}/viewer/mshub?StudyInstanceUIDs={maker.study_uid}")
    browser.screenshot("login-1")
    log_in(browser, "grace", "not her password")
    page.get_by_role("alert").filter(has_text="The user name or the password is wrong.").wait_for()
    assert page.get_by_label("User name").input_value() == "grace"
    browser.screenshot("login-2-wrong")
    assert browser.problems == [f"401 POST {ward.server.url}/login"]
    browser.problems.clear()

    log_in(browser, "grace")
    browser.wait_for_image()  # of the study that was asked for at first
    browser.segment("tiny")
    shown, _ = browser.labelmap()
    np.testing.assert_array_equal(shown, read_stack(folder).to_slices(predicted(ward, folder)))
    browser.brush("spleen", 4)
    browser.submit("Dr. Hopper")
    browser.screenshot("login-3-submitted")
    assert browser.problems == []
    told = [json.loads(line) for line in (ward.home / "logs" / "audit.jsonl").read_text().splitlines()]
    (infer,) = [line for line in told if line["action"] == "POST /infer/{model}"]
    (label,) = [line for line in told if line["action"] == "PUT /datastore/label"]
    assert (infer["user"], infer["model"], infer["version"]) == ("grace", "tiny", "v1")
    assert (label["user"], label["started_from"]) == ("grace", {"model": "tiny", "version": "v1"})
    assert infer["image"] == label["image"]

    page.goto(f"{ward.server.url}/login")
    page.get_by_text("You are logged in as grace (annotator).").wait_for()
    browser.screenshot("login-4-logged-in")
    page.get_by_role("link", name="Open the viewer").click()
    assert browser.text("account") == "grace"
    browser.screenshot("login-7-study-list")
    browser.control("log-out").click()
    page.get_by_label("User name").wait_for()
    assert COOKIE not in {cookie.get("name") for cookie in page.context.cookies()}
    page.goto(f"{ward.server.url}/viewer/")
    page.get_by_label("User name").wait_for()


def test_who_may_only_look_is_told_so(ward: Hospital, browser: OhifBrowser) -> None:
    maker = SeriesMaker("only looked at", seed=31)
    ward.store(maker)
    browser.page.goto(f"{ward.server.url}/viewer/")
    log_in(browser, "guest")
    browser.open_mode(maker.study_uid)
    assert (browser.text("account"), browser.control("log-out").count()) == ("guest", 1)
    assert browser.problems == []
    browser.control("run").click()
    browser.page.get_by_text("guest is viewer here; this needs annotator").first.wait_for()
    browser.screenshot("login-5-viewer")
    answers = [problem for problem in browser.problems if problem.startswith(("4", "5"))]
    assert [answer.split("?")[0] for answer in answers] == [f"403 POST {ward.server.url}/infer/tiny"]
    assert not ward.segs(maker)


def test_the_way_out_of_a_study_asks_about_what_was_not_submitted_and_stays_when_told(
    ward: Hospital, browser: OhifBrowser
) -> None:
    maker = SeriesMaker("left open", seed=33)
    ward.store(maker)
    page = browser.page
    page.goto(f"{ward.server.url}/viewer/")
    log_in(browser, "grace")
    browser.open_mode(maker.study_uid)
    browser.segment("tiny")
    browser.brush("spleen", 4)
    asked = []
    page.once("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    browser.control("log-out").click()
    until = time.monotonic() + 60
    while not asked and time.monotonic() < until:
        page.wait_for_timeout(50)
    assert asked == ["beforeunload"]
    assert browser.labelmap()[0].any()
    page.once("dialog", lambda dialog: dialog.accept())
    browser.control("log-out").click()
    page.get_by_label("User name").wait_for()


def test_whose_login_ended_is_told_how_to_go_on(ward: Hospital, browser: OhifBrowser) -> None:
    maker = SeriesMaker("over night", seed=32)
    ward.store(maker)
    page = browser.page
    page.goto(f"{ward.server.url}/viewer/")
    log_in(browser, "grace")
    browser.open_mode(maker.study_uid)
    user_file(ward.home).set_password("grace", PASSWORD)  # ends her logins
    browser.control("run").click()
    page.get_by_text("You are not logged in any more.").first.wait_for()
    browser.screenshot("login-6-ended")
    tab = page.context.new_page()
    tab.goto(f"{ward.server.url}/login")
    tab.get_by_label("User name").fill("grace")
    tab.get_by_label("Password").fill(PASSWORD)
    tab.get_by_role("button", name="Log in").click()
    tab.wait_for_url("**/viewer/**")
    tab.close()
    browser.segment("tiny")
    assert browser.labelmap()[0].any()
