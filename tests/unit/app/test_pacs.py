"""Series of a PACS: complete or refused, also when two requests ask for one at the same time."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import pytest
from fastapi import HTTPException

from lib import pacs as pacs_module
from lib.pacs import PacsSeries
from mshub.bundled import sample_data

SERIES = "1.2.840.99.1"
SLICES = sorted((sample_data() / "dicom" / "phantom_01").glob("*.dcm"))
pytestmark = pytest.mark.usefixtures("monailabel_here")


class FakePacs:
    """Hands out a series slowly, slice by slice; `missing` slices are lost on the way."""

    def __init__(self) -> None:
        self.downloads = 0
        self.missing: set[int] = set()

    def download(self, _: Any, series: str, folder: str, *__: Any) -> None:
        if series != SERIES:
            raise IndexError
        self.downloads += 1
        Path(folder).mkdir(parents=True)
        for number, path in enumerate(SLICES):
            if number not in self.missing:
                shutil.copy(path, folder)
                time.sleep(0.005)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> FakePacs:
    remote = FakePacs()
    monkeypatch.setattr(pacs_module, "dicom_web_download_series", remote.download)
    monkeypatch.setattr(PacsSeries, "_dicom_info", lambda self, series: {"PatientID": "x"})
    return remote


@pytest.fixture
def pacs(remote: FakePacs, tmp_path: Path) -> PacsSeries:
    client = SimpleNamespace(base_url="http://127.0.0.1:1/dicom-web")
    return PacsSeries(client=client, search_filter={}, cache_path=str(tmp_path / "cache"))


def test_requests_at_the_same_time_get_one_whole_series(pacs: PacsSeries, remote: FakePacs) -> None:
    paths: list[str] = []
    threads = [threading.Thread(target=lambda: paths.append(pacs.get_image_uri(SERIES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert len(set(paths)) == 1
    assert remote.downloads == 1
    assert nib.load(paths[0]).shape[2] == len(SLICES)


def test_a_download_that_broke_off_is_started_again(pacs: PacsSeries, remote: FakePacs) -> None:
    leftover = Path(pacs._datastore.image_path()) / f".{SERIES}.part"
    leftover.mkdir(parents=True)
    shutil.copy(SLICES[0], leftover)
    assert nib.load(pacs.get_image_uri(SERIES)).shape[2] == len(SLICES)


def test_a_series_with_a_gap_is_refused_and_not_kept(pacs: PacsSeries, remote: FakePacs) -> None:
    remote.missing = {20, 21}
    with pytest.raises(HTTPException) as caught:
        pacs.get_image_uri(SERIES)
    assert caught.value.status_code == 422
    remote.missing = set()
    assert nib.load(pacs.get_image_uri(SERIES)).shape[2] == len(SLICES)


@pytest.mark.parametrize("series", ["1.2.3", "../x", "1.2/../../x", "", "a", "1" * 65, "1..2"])
def test_what_the_pacs_does_not_have_is_a_404(pacs: PacsSeries, series: str) -> None:
    with pytest.raises(HTTPException) as caught:
        pacs.get_image_uri(series)
    assert caught.value.status_code == 404


def test_uploads_and_tags_that_climb_are_refused(pacs: PacsSeries, tmp_path: Path) -> None:
    with pytest.raises(HTTPException, match="store the image there"):
        pacs.add_image("../../x", str(SLICES[0]), {})
    with pytest.raises(HTTPException, match=r"label tag.*refused"):
        pacs.save_label(SERIES, str(SLICES[0]), "../../x", {})
    assert not list(tmp_path.rglob("x"))
