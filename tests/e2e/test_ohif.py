"""The radiologist's day in a real browser, a real server and a real PACS: what is on the screen is what is stored."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pydicom
import pytest
from dicomweb_client import DICOMwebClient

from dicom_series_factory import AXES, SeriesMaker, oblique
from factories import make_model_folder
from hospital import Hospital, predicted, voxels
from lib.server.viewer import OHIF_VERSION
from live import LiveServer
from mshub.dicom_derived import Algorithm, Facts
from mshub.dicom_seg import read_seg, write_seg
from mshub.dicom_series import read_stack
from mshub.install import add_model
from mshub.store import ModelStore
from ohif_browser import LONG_MS, OhifBrowser
from orthanc import Orthanc

SHOTS = Path(os.environ["E2E_SCREENSHOTS"]) if os.environ.get("E2E_SCREENSHOTS") else None
ORIENTATIONS = {**AXES, "oblique": oblique(), "oblique, other way": oblique(-25, 160, -70)}
MIDDLE, LEFT = (0.5, 0.5), (0.42, 0.5)
SHORT_TRAINING = {"epochs": 3, "iterations": 3, "device": "cpu"}
WARD = 6  # cases that are reviewed before the day begins
PREPARED = 12  # cases a batch finds; enough to be stopped in between


@dataclass
class Clinic(Hospital):
    """A hospital with a browser."""

    browser: OhifBrowser

    def predicted(self, *folders: Path, model: str = "tiny") -> np.ndarray:
        """Return what the library itself says of the files of series, [x, y, slice along the normal]."""
        return read_stack(folders[0]).to_slices(predicted(self, *folders, model=model))

    def kept(self, image: str) -> dict[str, Any]:
        """Return what the server knows of the submitted label of a series."""
        return dict(httpx.get(f"{self.server.url}/mshub/labels/{image}", timeout=60).json()["tags"]["final"])

    def stored(self, image: str, folder: Path) -> tuple[np.ndarray, dict[str, int]]:
        """Return the SEG in the PACS of the submitted label of a series, read by the library, and its names."""
        stored, stack = self.kept(image)["pacs"], read_stack(folder)
        client, study = DICOMwebClient(self.pacs.dicomweb), stack.headers[0].StudyInstanceUID
        seg = client.retrieve_instance(study, stored["SeriesInstanceUID"], stored["SOPInstanceUID"])
        labels = read_seg(seg, stack)
        return labels.array_xyz, labels.names


@pytest.fixture(scope="module")
def clinic(viewer: Path, tmp_path_factory: pytest.TempPathFactory, orthanc: Callable[..., Orthanc]) -> Iterator[Clinic]:
    folder = tmp_path_factory.mktemp("clinic")
    home = folder / "home"
    (home / "viewer").mkdir(parents=True)
    (home / "viewer" / OHIF_VERSION).symlink_to(viewer)
    add_model(ModelStore(home), "tiny", make_model_folder(folder / "models" / "tiny"))
    tumour = {"background": 0, "tumour": 1}
    coarse = {"spacing_zyx_mm": (6.5, 2, 2), "patch": (16, 48, 48)}
    pair = make_model_folder(folder / "models" / "pair", channels=("T1c", "FLAIR"), labels=tumour, **coarse)
    add_model(ModelStore(home), "pair", pair)
    pacs = orthanc(folder / "pacs")
    server = LiveServer(home, ["--studies", pacs.dicomweb], folder)
    try:
        with OhifBrowser(server.url, SHOTS) as browser:
            yield Clinic(pacs, server, home, folder, browser)
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def nothing_goes_wrong_on_the_page(clinic: Clinic) -> Iterator[None]:
    """No error of the page, no answer that is one, nothing asked for elsewhere; tests that mean to fail clear them."""
    clinic.browser.problems.clear()
    yield
    assert clinic.browser.problems == []
    assert clinic.browser.foreign == []
    assert not clinic.browser.page.get_by_text("Something went wrong").count()


def same_structures(one: np.ndarray, names: dict[str, int], other: np.ndarray, others: dict[str, int]) -> bool:
    """Whether two labels hold the same voxels of every structure, whatever their numbers."""
    here = {name: value for name, value in names.items() if (one == value).any()}
    there = {name: value for name, value in others.items() if (other == value).any()}
    return here.keys() == there.keys() and all(np.array_equal(one == here[name], other == there[name]) for name in here)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_what_is_shown_drawn_and_stored_is_the_same_in_every_orientation(clinic: Clinic, name: str) -> None:
    maker = SeriesMaker(f"shown {name}", axes=ORIENTATIONS[name], seed=4)
    folder, browser = clinic.store(maker), clinic.browser
    browser.open_mode(maker.study_uid)
    browser.segment("tiny")
    shown, names = browser.labelmap()
    np.testing.assert_array_equal(shown, clinic.predicted(folder))
    assert names == {"liver": 1, "spleen": 2}

    browser.brush("spleen", 4, LEFT)
    drawn, _ = browser.labelmap()
    changed = np.nonzero(drawn != shown)
    assert set(changed[2]) == {browser.active_slice()}
    assert set(drawn[changed]) == {2}
    browser.submit("Dr. Ohif")
    stored, stored_names = clinic.stored(maker.uid, folder)
    assert same_structures(stored, stored_names, drawn, names)


def test_the_day_from_the_study_list_to_a_new_version(clinic: Clinic) -> None:
    browser = clinic.browser
    for number in range(WARD):
        maker = SeriesMaker(f"ward-{number}", seed=20 + number)
        clinic.store(maker)
        browser.open_mode(maker.study_uid)
        browser.segment("tiny")
        browser.submit()
    case = SeriesMaker("the-case", seed=40)
    folder = clinic.store(case)
    clinic.store(SeriesMaker("the-next-case", seed=41))

    browser.open_list()
    browser.page.get_by_text("THE-CASE", exact=True).wait_for()
    browser.screenshot("01-study-list")
    browser.open_study("THE-CASE")
    browser.screenshot("02-mshub-mode")
    browser.segment("tiny", shot="03-running")
    shown, names = browser.labelmap()
    np.testing.assert_array_equal(shown, clinic.predicted(folder))
    browser.screenshot("04-result")
    browser.brush("liver", 5, MIDDLE)
    browser.erase(3, LEFT)
    drawn, _ = browser.labelmap()
    assert not np.array_equal(drawn, shown)
    browser.screenshot("05-brush")
    assert "in the PACS" in browser.submit("Dr. Ohif")
    browser.screenshot("06-submitted")
    stored, stored_names = clinic.stored(case.uid, folder)
    assert same_structures(stored, stored_names, drawn, names)
    kept = clinic.kept(case.uid)
    assert (kept["client_id"], kept["model"]) == ("Dr. Ohif", "tiny")

    assert "Why this case" in browser.next_case("first")
    browser.screenshot("07-next-case")
    browser.train_with(SHORT_TRAINING)
    verdict = browser.fine_tune(shot="08-fine-tuning")
    newest = ModelStore(clinic.home).versions("tiny")[-1].version
    assert newest != "v1"
    assert newest in verdict
    browser.control("verdict").filter(has_text=newest).wait_for()
    browser.control("verdict").click()
    browser.screenshot("09-new-version")
    for link in (f"report-{newest}", "trained-report"):
        report = httpx.get(clinic.server.url + browser.control(link).first.get_attribute("href"))
        assert newest in report.text
        assert report.headers["content-type"].startswith("text/html")


def test_two_sequences_of_an_oblique_mr_are_found_and_segmented(clinic: Clinic, shared_data: Path) -> None:
    folders = {name: shared_data / "dicom_mr" / name for name in ("T1post", "FLAIR")}
    for folder in folders.values():
        clinic.pacs.upload(sorted(folder.iterdir()))
    header = pydicom.dcmread(next(folders["T1post"].iterdir()), stop_before_pixels=True)
    browser = clinic.browser
    browser.open_mode(header.StudyInstanceUID, header.SeriesInstanceUID)
    browser.control("model-pair").check()
    browser.control("channel-FLAIR").wait_for()
    chosen = [browser.control(f"channel-{name}").locator("option:checked").inner_text() for name in ("T1c", "FLAIR")]
    assert "T1post" in chosen[0]
    assert "FLAIR" in chosen[1]
    browser.segment()
    shown, names = browser.labelmap()
    np.testing.assert_array_equal(shown, clinic.predicted(*folders.values(), model="pair"))
    browser.screenshot("10-two-sequences")
    browser.brush("tumour", 6)
    drawn, _ = browser.labelmap()
    browser.submit()
    stored, stored_names = clinic.stored(header.SeriesInstanceUID, folders["T1post"])
    assert same_structures(stored, stored_names, drawn, names)


def test_changes_that_were_not_submitted_are_kept_when_the_study_is_left(clinic: Clinic) -> None:
    maker = SeriesMaker("left-behind", seed=7)
    clinic.store(maker)
    browser = clinic.browser
    browser.open_mode(maker.study_uid)
    browser.segment("tiny")
    browser.brush("spleen", 5)
    drawn, _ = browser.labelmap()
    assert "changes not submitted" in browser.text("state")
    browser.page.locator('[data-cy="return-to-work-list"]').click()
    browser.open_study("LEFT-BEHIND")
    browser.control("draft-restore").click()
    browser.control("draft").wait_for(state="detached")
    restored, _ = browser.labelmap()
    np.testing.assert_array_equal(restored, drawn)
    browser.submit()


def test_a_result_is_drawn_in_all_three_planes_and_that_is_no_change(clinic: Clinic) -> None:
    maker = SeriesMaker("three-planes", seed=8)
    folder, browser = clinic.store(maker), clinic.browser
    browser.open_mode(maker.study_uid)
    browser.segment("tiny")
    browser.show_planes()
    assert "tiny v1: not submitted" in browser.text("state")
    shown, names = browser.labelmap()
    np.testing.assert_array_equal(shown, clinic.predicted(folder))
    browser.brush("spleen", 4, MIDDLE)
    drawn, _ = browser.labelmap()
    assert not np.array_equal(drawn, shown)
    browser.submit()
    stored, stored_names = clinic.stored(maker.uid, folder)
    assert same_structures(stored, stored_names, drawn, names)


def test_a_refusal_is_shown_in_the_servers_own_words(clinic: Clinic) -> None:
    maker = SeriesMaker("with-a-gap")
    clinic.store(maker, lambda slices: [*slices[:8], *slices[11:]])
    browser = clinic.browser
    browser.open_mode(maker.study_uid)
    browser.control("model-tiny").check()
    browser.control("run").click()
    told = browser.page.locator("[data-sonner-toast]").first.inner_text()
    answer = clinic.server.infer("tiny", f"image={maker.uid}&output=image")
    assert answer.status_code >= 400
    assert answer.json()["detail"] in told
    browser.screenshot("11-refused")
    browser.problems.clear()


def said_of(params: dict[str, Any]) -> str:
    """Return how sure the model was, as the panel should say it of the facts of a prediction."""
    measured, expected = params["uncertainty"], params["expected_dice"]
    assert measured["fold_dice"] is None
    agreements = {name: structure["mirror_dice"] for name, structure in measured["structures"].items()}
    unsure = sorted((name for name, value in agreements.items() if value < 0.8), key=agreements.__getitem__)
    sure = f"Agreement {measured['agreement']:.2f}"
    if expected:
        sure = f"Expected Dice {expected['dice']:.2f} ({expected['low']:.2f} to {expected['high']:.2f})"
    return f"{sure}, least sure of {', '.join(unsure[:3])}."


def figure(dice: float) -> str:
    return "above 0.99" if 0.995 <= dice < 1 else f"{dice:.2f}"


def toast(browser: OhifBrowser) -> str:
    """Return what OHIF's last message says."""
    return str(browser.page.locator("[data-sonner-toast]").first.inner_text())


def test_how_sure_the_model_is_and_what_was_changed_is_said(clinic: Clinic) -> None:
    maker = SeriesMaker("how-sure", seed=50)
    clinic.store(maker)
    browser = clinic.browser
    browser.open_mode(maker.study_uid)
    browser.segment("tiny")
    params = clinic.get(f"/mshub/labels/{maker.uid}").json()["tags"]["original"]["params"]
    assert browser.text("sureness") == said_of(params)
    assert "mirrored copies" in browser.control("sureness").get_attribute("title")
    browser.screenshot("14-how-sure")

    shown, _ = browser.labelmap()
    browser.brush("spleen", 4, MIDDLE)
    drawn, _ = browser.labelmap()
    browser.submit("Dr. Ohif")
    told = toast(browser)
    kept = clinic.kept(maker.uid)
    edited, dice = kept["agreement"]["edited_voxels"], kept["agreement"]["dice"]
    assert edited == np.count_nonzero(drawn != shown) > 0
    mean = figure(float(np.mean(list(dice.values()))))
    assert browser.text("changes") == f"Changed {edited:,} voxels; mean Dice with the pre-label {mean}."
    worst = sorted(dice, key=dice.__getitem__)[0]
    title = browser.control("changes").get_attribute("title")
    assert title.startswith(f"Dice with the pre-label: {worst} {figure(dice[worst])}")
    assert browser.control("hints").locator("li").all_inner_texts() == kept["hints"] != []
    assert "Hints about it are in the panel." in told
    browser.control("hints").scroll_into_view_if_needed()
    browser.screenshot("15-what-was-changed")


def test_cases_are_prepared_and_a_pre_label_is_corrected_like_any_result(clinic: Clinic) -> None:
    makers = [SeriesMaker(f"prepared-{number}", seed=60 + number) for number in range(PREPARED)]
    folder, *_ = [clinic.store(maker) for maker in makers]
    clinic.store(SeriesMaker("prepared with a gap"), lambda slices: [*slices[:8], *slices[11:]])
    browser = clinic.browser
    browser.open_mode(makers[0].study_uid)
    browser.control("model-tiny").check()
    browser.control("strategy").select_option("relabel")
    browser.control("prepare").click(force=True)
    assert "labelled cases" in toast(browser)
    assert not browser.control("prepared").count()

    browser.control("strategy").select_option("first")
    browser.control("prepare-limit").fill("500")
    browser.control("prepare").click()
    browser.control("prepare-stop").click()
    browser.control("prepare-go-on").wait_for()
    browser.screenshot("16-preparation-stopped")
    [batch] = clinic.get("/mshub/prelabels").json()
    assert batch["state"] == "stopped"
    assert batch["options"]["strategy"] == "first"
    assert batch["total"] > PREPARED
    browser.open_mode(makers[0].study_uid)
    browser.control("prepared").filter(has_text="Stopped at").wait_for()
    browser.control("prepare-go-on").click()
    browser.control("prepared-bar").wait_for()
    browser.screenshot("17-preparing")
    browser.control("prepare").wait_for(timeout=LONG_MS)
    batch = clinic.get(f"/mshub/prelabels/{batch['id']}").json()
    assert batch["state"] == "done"
    assert f"{batch['counts']['done']} of {batch['total']} prepared, {len(batch['failures'])} failed" in browser.text(
        "prepared"
    )
    browser.control("prepare-failures").locator("summary").click()
    told = browser.control("prepare-failures").locator("li").all_inner_texts()
    assert told == [failure["message"] for failure in batch["failures"]]
    assert any("gap" in message for message in told)

    browser.control("prelabel").wait_for()
    assert "version v1" in browser.control("prelabel").get_attribute("title")
    browser.screenshot("18-prepared")
    browser.control("prelabel").click()
    browser.control("result").filter(has_text="Pre-label of version v1").wait_for()
    assert not browser.control("prelabel").count()
    params = clinic.get(f"/mshub/labels/{makers[0].uid}").json()["tags"]["original"]["params"]
    assert browser.text("sureness") == said_of(params)
    shown, names = browser.labelmap()
    np.testing.assert_array_equal(shown, clinic.predicted(folder))
    assert "tiny v1: not submitted" in browser.text("state")
    browser.screenshot("19-pre-label")
    browser.brush("spleen", 4, MIDDLE)
    drawn, _ = browser.labelmap()
    browser.submit("Dr. Ohif")
    stored, stored_names = clinic.stored(makers[0].uid, folder)
    assert same_structures(stored, stored_names, drawn, names)
    kept = clinic.kept(makers[0].uid)
    assert kept["started_from"] == {"model": "tiny", "version": "v1"}
    assert kept["agreement"]["edited_voxels"] == np.count_nonzero(drawn != shown)


def test_after_ten_reviewed_cases_the_expected_dice_and_a_hint_are_shown(clinic: Clinic) -> None:
    browser, case = clinic.browser, SeriesMaker("the-eleventh", spacing=(3.0, 3.4, 5.0), seed=90)
    for number in range(10):
        maker = SeriesMaker(f"reviewed-{number}", seed=80 + number)
        clinic.store(maker)
        label = clinic.infer(maker.uid, save_label=True)
        assert clinic.submit(maker.uid, label.content).status_code == 200
    for maker in (case, SeriesMaker("the-twelfth", seed=91)):
        clinic.store(maker)
    browser.open_mode(case.study_uid)
    browser.segment("tiny")
    params = clinic.get(f"/mshub/labels/{case.uid}").json()["tags"]["original"]["params"]
    assert browser.text("sureness") == said_of(params)
    assert browser.text("sureness").startswith("Expected Dice")
    assert f"from {params['expected_dice']['cases']} reviewed cases" in browser.control("sureness").get_attribute(
        "title"
    )
    assert "(median) of" in params["flags"][0]  # eight times the volume of the others
    assert browser.text("flags").lower() == " ".join(f"{flag}." for flag in params["flags"]).lower()
    browser.screenshot("20-expected-dice")

    assert browser.next_case("random").startswith("Why this case: drawn at random")
    assert "hold-out" in browser.text("audit")
    hint = browser.text("hint")
    assert "nearly as the model made them" in hint
    assert "strategy “Likely failures first”" in hint
    browser.screenshot("21-random-case-and-hint")
    with browser.page.expect_response("**/activelearning/first") as answered:
        browser.next_case("first")
    offer = answered.value.json()
    browser.control("why").filter(has_text=offer["why"]).wait_for()
    assert bool(browser.control("audit").count()) == offer["audit"]


def test_while_nobody_knows_which_cases_are_new_the_panel_tells_how_many_there_are(clinic: Clinic) -> None:
    """The server reads many new cases for minutes, and leaves ``new_cases`` out meanwhile."""

    def leave_out(route: Any) -> None:
        answer = route.fetch()
        info = answer.json()
        for trainer in info["trainers"].values():
            del trainer["mshub"]["new_cases"]
        route.fulfill(response=answer, json=info)

    maker = SeriesMaker("one of many", seed=94)
    clinic.store(maker)
    assert clinic.submit(maker.uid, clinic.infer(maker.uid, save_label=True).content).status_code == 200
    browser, page = clinic.browser, clinic.browser.page
    page.route("**/info/", leave_out)
    try:
        browser.open_mode(maker.study_uid)
        browser.control("model-tiny").check()
        reviewed = clinic.get("/info/").json()["trainers"]["tiny"]["mshub"]["reviewed_cases"]
        assert browser.text("cases") == f"{reviewed} reviewed cases"
        assert browser.control("train").get_attribute("aria-disabled") is None
        browser.control("cases").scroll_into_view_if_needed()
        browser.screenshot("22-new-cases-unknown")
    finally:
        page.unroute("**/info/")


def test_the_ways_to_choose_have_names_and_a_case_that_is_not_there_is_explained(clinic: Clinic) -> None:
    maker, other = SeriesMaker("no-next-case", seed=95), SeriesMaker("doubted", seed=96)
    clinic.store(maker)
    clinic.store(other)
    clinic.submit(other.uid, clinic.infer(other.uid, save_label=True).content)
    browser = clinic.browser
    browser.open_mode(maker.study_uid)
    browser.control("strategy").wait_for()
    strategies = clinic.get("/info/").json()["strategies"]
    options = browser.control("strategy").locator("option")
    told = [(option.get_attribute("value"), option.get_attribute("title")) for option in options.all()]
    assert told == [(name, facts["description"]) for name, facts in strategies.items()]
    assert not [name for name in options.all_inner_texts() if name.lower() == name]

    browser.segment("tiny")
    why = "all 3 cases that wait are with other people; the first is free again at 14:05"
    answer_next_case_with(browser, {"why": why, "waiting": 3})
    browser.control("next").click()
    browser.page.get_by_text("No next case").wait_for()
    assert f"A{why[1:]}." in toast(browser)
    browser.page.wait_for_timeout(1000)
    browser.screenshot("22-no-next-case")

    here = clinic.get("/datastore/image/info", image=maker.uid).json()
    answer_next_case_with(browser, {**here, "id": maker.uid, "why": "you have it already"})
    browser.control("next").click()
    browser.page.get_by_text("No other case").wait_for()
    assert browser.labelmap()[0].any()  # what was not submitted is still there

    doubted = clinic.get("/datastore/image/info", image=other.uid).json()
    over = {"passed_over": {"1.2.3": "found a gap of 10 mm"}}
    answer_next_case_with(browser, {**doubted, "id": other.uid, "why": "its label looks wrong: liver", **over})
    assert "its label looks wrong" in browser.next_case("relabel")
    browser.page.get_by_text("A case was passed over").wait_for()
    assert "Found a gap of 10 mm." in toast(browser)
    browser.control("load").click()
    browser.control("state").filter(has_text="Submitted label: not submitted").wait_for()
    browser.screenshot("23-doubtful-label")
    browser.page.unroute("**/activelearning/*")


def answer_next_case_with(browser: OhifBrowser, answer: dict[str, Any]) -> None:
    """Let the server seem to answer so when it is asked for the next case."""
    browser.page.unroute("**/activelearning/*")
    browser.page.route("**/activelearning/*", lambda route: route.fulfill(json=answer))


# OHIF's own "Export, DICOM SEG" without its dialog for a description.
STORE_AS_OHIF = """async () => {
  const { segmentationService, viewportGridService } = window.services;
  const active = segmentationService.getActiveSegmentation(viewportGridService.getActiveViewportId());
  const { segmentationId } = active;
  const { dataset } = await window.commandsManager.run('generateSegmentation', { segmentationId });
  const [pacs] = window.extensionManager.getActiveDataSource();
  await pacs.store.dicom(dataset);
}"""


def test_a_seg_that_ohif_itself_stores_in_the_pacs_is_a_correction(clinic: Clinic) -> None:
    maker = SeriesMaker("stored by ohif", study="STORED-BY-OHIF", axes=oblique(), seed=8)
    clinic.store(maker)
    browser = clinic.browser
    browser.open_mode(maker.study_uid)
    browser.segment("tiny")
    browser.brush("spleen", 5)
    drawn, names = browser.labelmap()
    browser.page.evaluate(STORE_AS_OHIF)
    tags = httpx.get(f"{clinic.server.url}/mshub/labels/{maker.uid}", timeout=60).json()["tags"]
    assert tags["final"]["pacs"]["message"] == "found in the PACS"
    kept = httpx.get(f"{clinic.server.url}/mshub/export/{maker.uid}", timeout=60)
    assert json.loads(kept.headers["X-MSHub-Segments"]) == names
    np.testing.assert_array_equal(voxels(kept.content, maker.shape), drawn)


def test_a_seg_in_the_pacs_that_is_no_label_is_named_with_the_reason(clinic: Clinic) -> None:
    maker = SeriesMaker("outlined by a program", study="PROGRAM", seed=10)
    stack = read_stack(clinic.store(maker))
    label = np.zeros(maker.shape, np.uint8)
    label[4:8, 4:8, 3:7] = 1
    path = clinic.folder / "program.dcm"
    write_seg(path, label, {"liver": 1}, stack, Facts(Algorithm("other", "v1"), "by a program"))
    clinic.pacs.upload([path])
    browser = clinic.browser
    browser.open_mode(maker.study_uid, maker.uid)
    left_out = browser.control("left-out")
    left_out.wait_for()
    left_out.locator("summary").click()
    browser.screenshot("13-left-out")
    assert "made by a program, confirmed by nobody" in left_out.inner_text()


# Voxels per label of the stock panel's labelmap.
STOCK_COUNTS = """() => {
  const counts = {};
  const { voxelManager } = window.services.segmentationService.getLabelmapVolume('1');
  for (const value of voxelManager.getCompleteScalarDataArray()) {
    counts[value] = (counts[value] ?? 0) + 1;
  }
  return counts;
}"""


def test_the_stock_panel_of_monai_labels_own_build_still_works(clinic: Clinic) -> None:
    maker = SeriesMaker("stock", seed=9)
    folder = clinic.store(maker)
    browser, page = clinic.browser, clinic.browser.page
    address = quote(clinic.server.url, safe="")
    page.context.add_cookies([{"name": "MONAILABEL_SERVER_URL", "value": address, "url": clinic.server.url}])
    page.goto(f"{clinic.server.url}/ohif/monai-label?StudyInstanceUIDs={maker.study_uid}")
    page.get_by_text("Confirm and Hide").click()
    page.locator("input[value^='http://127']").locator("xpath=following::button[1]").click()
    page.get_by_text("Auto-Segmentation").first.click()
    page.locator("select:has(option[value='tiny'])").first.select_option("tiny")
    with page.expect_response(lambda answer: "/infer/" in answer.url, timeout=LONG_MS) as answered:
        page.get_by_role("button", name="Run").first.click()
    assert answered.value.status == 200
    page.wait_for_function("() => window.services.segmentationService.getLabelmapVolume('1')")
    expected = sorted(np.unique(clinic.predicted(folder), return_counts=True)[1].tolist())
    until = time.monotonic() + 60
    while sorted(page.evaluate(STOCK_COUNTS).values()) != expected and time.monotonic() < until:
        page.wait_for_timeout(500)
    browser.screenshot("12-stock-panel")
    assert sorted(page.evaluate(STOCK_COUNTS).values()) == expected
    browser.problems.clear()
    browser.foreign.clear()  # that build asks for fonts elsewhere
