"""The index of a studies folder survives what happens to files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from factories import make_image
from lib.app import MSHubApp
from lib.datastore import StudiesFolder
from lib.index_file import DAYS, INDEX, back_up, plain, recover
from mshub.errors import MSHubError

DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no object": lambda text: "[]",
    "without objects": lambda text: '{"name": "x"}',
    "no text": lambda text: "\0" * 100,
}


def write(path: Path, objects: int) -> None:
    path.write_text(json.dumps({"name": "x", "objects": {str(number): {} for number in range(objects)}}))


@pytest.mark.parametrize("how", list(DAMAGE))
def test_a_damaged_index_is_taken_from_the_backup_and_kept(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    index = tmp_path / INDEX
    write(index, 3)
    back_up(index)
    damaged = DAMAGE[how](index.read_text())
    index.write_text(damaged)
    recover(index)
    assert len(json.loads(index.read_text())["objects"]) == 3
    (kept,) = tmp_path.glob("*.damaged")
    assert kept.read_text() == damaged
    assert "takes its place" in caplog.text


def test_without_a_backup_a_new_one_is_made_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = tmp_path / INDEX
    index.write_text("{")
    recover(index)
    assert not index.exists()
    assert len(list(tmp_path.glob("*.damaged"))) == 1
    assert "no backup" in caplog.text


def test_a_damaged_backup_is_passed_over(tmp_path: Path) -> None:
    index = tmp_path / INDEX
    write(index, 2)
    index.rename(tmp_path / f"{index.stem}.20260101.bak")
    (tmp_path / f"{index.stem}.20260102.bak").write_text("{")
    index.write_text("")
    recover(index)
    assert len(json.loads(index.read_text())["objects"]) == 2


def test_what_is_whole_is_left_alone(tmp_path: Path) -> None:
    index = tmp_path / INDEX
    recover(index)
    write(index, 1)
    before = index.read_text(), index.stat().st_mtime_ns
    recover(index)
    assert (index.read_text(), index.stat().st_mtime_ns) == before
    assert [path.name for path in tmp_path.iterdir()] == [INDEX]


def test_the_backups_of_some_days_are_kept_and_none_of_a_damaged_index(tmp_path: Path) -> None:
    index = tmp_path / INDEX
    write(index, 1)
    for day in range(10, 30):
        (tmp_path / f"{index.stem}.202601{day}.bak").write_text(index.read_text())
    back_up(index)
    back_up(index)
    assert len(list(tmp_path.glob("*.bak"))) == DAYS
    assert not (tmp_path / f"{index.stem}.20260110.bak").exists()
    index.write_text("{")
    for copy in tmp_path.glob("*.bak"):
        copy.unlink()
    back_up(index)
    assert list(tmp_path.glob("*.bak")) == []


def test_numbers_that_are_none_do_not_get_into_the_index() -> None:
    odd = {"a": float("nan"), "b": [float("inf"), {"c": -float("inf")}], 3: (1, 2.5), "d": "nan", "e": None, "f": True}
    assert plain(odd) == {"a": None, "b": [None, {"c": None}], "3": [1, 2.5], "d": "nan", "e": None, "f": True}
    json.dumps(plain(odd), allow_nan=False)


def folder(path: Path) -> StudiesFolder:
    return StudiesFolder(str(path), lambda: {"liver"}, path.parent / "refused")


def test_a_folder_opens_with_a_damaged_index_and_knows_its_labels(tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    make_image(studies / "case.nii.gz")
    label = make_image(tmp_path / "label.nii.gz")
    folder(studies).save_prediction("case", label, "original", {"model": "tiny", "odd": float("nan")})
    before = folder(studies).get_label_info("case", "original")
    (studies / INDEX).write_bytes((studies / INDEX).read_bytes()[:100])
    assert folder(studies).get_label_info("case", "original") == before
    assert before["odd"] is None


def test_a_name_that_is_no_text_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    studies = tmp_path / "studies"
    make_image(studies / "good.nii.gz")
    odd = os.fsencode(studies) + b"/bad\xff.nii.gz"
    try:
        Path(os.fsdecode(odd)).write_bytes((studies / "good.nii.gz").read_bytes())
    except OSError:
        pytest.skip("this file system has no such names")
    with caplog.at_level(logging.WARNING):
        store = folder(studies)
    assert store.list_images() == ["good"]
    assert "not UTF-8" in caplog.text
    json.loads((studies / INDEX).read_text(encoding="utf-8"))


def test_a_full_disk_is_an_answer_and_nothing_is_stored(
    clinic: MSHubApp, review: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    review("a", "liver")
    before = clinic.datastore().get_label_info("a", "final")
    monkeypatch.setattr("lib.free_space.free_bytes", lambda _: 10**6)
    with pytest.raises(Exception) as refused:  # noqa: PT011
        review("a", "liver", voxels=7)
    assert getattr(refused.value, "status_code", 0) == 507
    assert "Nothing was stored" in str(getattr(refused.value, "detail", ""))
    assert clinic.datastore().get_label_info("a", "final") == before
    assert not isinstance(refused.value, MSHubError)
