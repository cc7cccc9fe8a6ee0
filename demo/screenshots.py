"""Take the pictures of docs/dicom.md: the day of a radiologist on phantoms, in a real browser.

make viewer pacs-tools && PYTHONPATH=tests .venv/bin/python demo/screenshots.py     # into docs/images
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from dicom_series_factory import SeriesMaker, oblique
from factories import make_model_folder
from lib.server.viewer import OHIF_VERSION, viewer_folder
from live import LiveServer
from mshub.install import add_model, fetch_model
from mshub.store import ModelStore, default_home
from ohif_browser import WINDOW, OhifBrowser
from orthanc import Orthanc

CHECKOUT = Path(__file__).resolve().parents[1]
MIDDLE_SLICE = 22
PANEL_ONLY = ("two-sequences",)  # the image is noise
SHORT_TRAINING = {"epochs": 3, "iterations": 3, "device": "cpu"}


def main() -> None:
    """Start a PACS and a server, go through the day, write the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=CHECKOUT / "docs" / "images")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = prepare(folder)
        with Orthanc(folder / "pacs") as pacs:
            pacs.upload(sorted((folder / "series").rglob("*.dcm")))
            server = LiveServer(home, ["--studies", pacs.dicomweb], folder)
            try:
                with OhifBrowser(server.url, folder / "shots") as browser:
                    go_through_the_day(browser)
            finally:
                server.stop()
        for shot in sorted((folder / "shots").glob("*.png")):
            target = out / f"ohif-{shot.name}"
            picture = Image.open(shot).convert("RGB")
            if shot.stem in PANEL_ONLY:
                picture = picture.crop((WINDOW["width"] - 285, 50, WINDOW["width"], 700))
            picture.quantize(192).save(target, optimize=True)
            print(target)


def prepare(folder: Path) -> Path:
    """Make the series, and a home with the models and the viewer; return the home."""
    home, viewer = folder / "home", viewer_folder(default_home())
    if viewer is None:
        sys.exit("OHIF is not installed: run make viewer")
    (home / "viewer").mkdir(parents=True)
    (home / "viewer" / OHIF_VERSION).symlink_to(viewer)
    store = ModelStore(home)
    fetch_model(store, "starter")
    two = {"labels": {"background": 0, "tumour": 1}, "channels": ("T1c", "FLAIR")}
    add_model(store, "untrained-two-channels-mr", make_model_folder(folder / "two", **two))
    generate = CHECKOUT / "sample-data" / "generate.py"
    subprocess.run([sys.executable, str(generate), "--dicom", str(folder / "series")], check=True, env=os.environ)
    for number, text in enumerate(("T1 post gd", "T2 FLAIR")):
        options = {"study": "oblique mr", "modality": "MR", "axes": oblique(), "seed": number, "shape": (96, 80, 24)}
        SeriesMaker(text, attributes={"SeriesDescription": text}, **options).write(folder / "series" / f"mr{number}")
    return home


def go_through_the_day(browser: OhifBrowser) -> None:
    """Take a picture of every step."""
    browser.open_list()
    browser.page.wait_for_timeout(1500)
    browser.screenshot("study-list")
    browser.open_study("PHANTOM_03")
    to_slice(browser, MIDDLE_SLICE)
    browser.segment("starter", shot="running")
    browser.page.wait_for_timeout(1000)
    browser.screenshot("result")
    browser.brush("spleen", 9, (0.72, 0.5))
    browser.page.wait_for_timeout(800)
    browser.screenshot("corrected")
    browser.submit("Dr. Lee")
    browser.page.wait_for_timeout(800)
    browser.screenshot("submitted")
    browser.next_case("first")
    to_slice(browser, MIDDLE_SLICE)
    browser.screenshot("next-case")
    browser.train_with(SHORT_TRAINING)
    browser.fine_tune(shot="fine-tuning")
    browser.control("verdict").click()
    browser.page.wait_for_timeout(800)
    browser.screenshot("new-version")
    browser.open_list()
    browser.open_study("OBLIQUE MR")
    browser.page.wait_for_timeout(3000)
    browser.screenshot("two-sequences")


def to_slice(browser: OhifBrowser, number: int) -> None:
    """Scroll down from the first slice."""
    browser.page.locator(".cornerstone-canvas").first.hover()
    for _ in range(number):
        browser.page.mouse.wheel(0, 100)
        browser.page.wait_for_timeout(80)
    browser.page.wait_for_timeout(800)


if __name__ == "__main__":
    main()
