"""The files of a series from a PACS: exactly what it lists, or nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicom_series_factory import SeriesMaker
from fake_pacs import FakePacs
from lib.pacs_download import download
from lib.pacs_errors import PacsError

pytestmark = pytest.mark.usefixtures("monailabel_here")
MAKER = SeriesMaker("downloaded", shape=(4, 5, 6))


class Sender(FakePacs):
    """A PACS that lists a series and sends something else."""

    def __init__(self, sent: Sequence[Dataset], listed: Sequence[Dataset] | None = None) -> None:
        super().__init__(MAKER.slices() if listed is None else listed)
        self.sent = list(sent)

    def files(self, study: str, series: str) -> Any:
        return iter(self.sent)


def fetched(client: FakePacs, folder: Path, expected: int = 0) -> set[str]:
    download(client, MAKER.study_uid, MAKER.uid, folder / "series", expected)  # type: ignore[arg-type]
    return {path.name for path in (folder / "series").iterdir()}


def other(slice_: Dataset, **attributes: Any) -> Dataset:
    changed = deepcopy(slice_)
    for keyword, value in attributes.items():
        setattr(changed, keyword, value)
    return changed


def test_images_are_written_under_the_numbers_people_know(tmp_path: Path) -> None:
    slices = MAKER.slices()
    slices[1].InstanceNumber = slices[0].InstanceNumber
    told: list[tuple[int, int]] = []
    download(
        Sender(slices),  # type: ignore[arg-type]
        MAKER.study_uid,
        MAKER.uid,
        tmp_path / "series",
        6,
        lambda *done: told.append(done),
    )
    names = {path.name for path in (tmp_path / "series").iterdir()}
    assert names == {"image 6", "file 2", "image 4", "image 3", "image 2", "image 1"}
    assert told == [(number, 6) for number in range(1, 7)]


@pytest.mark.parametrize("expected", [0, 6])
@pytest.mark.parametrize("lost", [0, 3, 5])
def test_a_slice_that_is_listed_and_not_sent_is_missed_even_if_the_series_says_no_number(
    tmp_path: Path, lost: int, expected: int
) -> None:
    slices = MAKER.slices()
    with pytest.raises(PacsError, match=r"lists 6 instances .* sent 5"):
        fetched(Sender(slices[:lost] + slices[lost + 1 :]), tmp_path, expected)


def test_the_number_of_the_series_counts_where_the_list_is_short(tmp_path: Path) -> None:
    with pytest.raises(PacsError, match=r"lists 6 instances .* sent 5"):
        fetched(Sender(MAKER.slices()[:5], MAKER.slices()[:5]), tmp_path, 6)


def test_slices_that_arrive_while_the_others_are_sent_are_not_overlooked(tmp_path: Path) -> None:
    with pytest.raises(PacsError, match=r"lists 6 instances .* sent 4.*once all of the series has arrived"):
        fetched(Sender(MAKER.slices()[:4]), tmp_path, 4)


def test_a_list_of_nothing_makes_no_series(tmp_path: Path) -> None:
    with pytest.raises(PacsError, match="lists 0 instances"):
        fetched(Sender(MAKER.slices(), []), tmp_path)


def test_an_instance_sent_twice_is_one_and_two_of_one_uid_are_none(tmp_path: Path) -> None:
    slices = MAKER.slices()
    assert len(fetched(Sender([*slices, slices[2]]), tmp_path / "same", 6)) == 6
    with pytest.raises(PacsError, match="two different instances"):
        fetched(Sender([*slices, other(slices[2], PixelData=slices[3].PixelData)]), tmp_path / "other", 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: other(one, SeriesInstanceUID="1.2.3", SOPInstanceUID="1.2.4"), "instance of the series 1.2.3"),
        (lambda one: other(one, SOPInstanceUID=None), "sent an instance of"),
        (lambda one: other(one, SOPInstanceUID="1.2.4"), "sent 5"),
        (lambda one: other(one, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11"), "and sent 1.2.840.10008.5.1.4.1.1.88.11"),
    ],
    ids=["another series", "no UID", "another instance", "another class"],
)
def test_another_object_in_place_of_the_last_slice_is_no_series(
    tmp_path: Path, change: Callable[[Dataset], Dataset], message: str
) -> None:
    slices = MAKER.slices()
    with pytest.raises(PacsError, match=message):
        fetched(Sender([*slices[:-1], change(slices[-1])]), tmp_path, 6)


def test_a_full_disk_is_not_the_pacs_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    slices = MAKER.slices()
    monkeypatch.setattr(slices[2], "save_as", full)
    with pytest.raises(OSError, match="No space left"):
        fetched(Sender(slices), tmp_path)


def test_more_than_is_listed_is_no_series_either(tmp_path: Path) -> None:
    slices = MAKER.slices()
    with pytest.raises(PacsError, match=r"lists 6 instances .* sent 7"):
        fetched(Sender([*slices, other(slices[0], SOPInstanceUID="1.2.4")]), tmp_path, 6)
