"""Files that are gone for a moment, or for good: what is known of a label comes back with its file."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fastapi import HTTPException
from monailabel.datastore.local import LocalDatastore

from factories import make_image
from lib.datastore import StudiesFolder
from lib.index_file import INDEX
from lib.label_note import LabelNote
from mshub.checksums import file_sha256

SHAPE = (5, 4, 3)
pytestmark = pytest.mark.usefixtures("monailabel_here")


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a", "b", "mr_0000", "mr_0001")):
        make_image(tmp_path / "studies" / f"{name}.nii.gz", SHAPE, seed=seed)
    return tmp_path / "studies"


def opened(studies: Path, **options: Any) -> StudiesFolder:
    return StudiesFolder(str(studies), lambda: ("liver", "spleen"), studies.parent / "refused", **options)


@pytest.fixture
def store(studies: Path) -> StudiesFolder:
    return opened(studies)


def submit(store: StudiesFolder, image: str, structure: str = "liver", value: int = 1) -> None:
    path = Path(store._datastore_path).parent / "submitted.nii.gz"
    array = np.zeros(SHAPE, np.uint8)
    array[1:3, 1:3, 1] = value
    nib.save(nib.Nifti1Image(array, nib.load(store.get_image_uri(image)).affine), path)
    store.save_label(image, str(path), "final", {"label_info": [{"name": structure, "idx": value}]})


def looked_at_by_the_watcher(store: StudiesFolder) -> StudiesFolder:
    store.refresh()
    return store


def stopped_and_started(store: StudiesFolder) -> StudiesFolder:
    store.close()
    again = opened(Path(store._datastore_path))
    again.tidy_daily()
    return again


def killed_and_started(store: StudiesFolder) -> StudiesFolder:
    return opened(Path(store._datastore_path))


LOOKS = [looked_at_by_the_watcher, stopped_and_started, killed_and_started]
Look = Callable[[StudiesFolder], StudiesFolder]


def moved_away(path: Path) -> Path:
    aside = path.parents[1] / f"aside-{path.parent.name}-{path.name}"
    return Path(shutil.move(path, aside))


@pytest.mark.parametrize("look", LOOKS)
def test_an_image_that_is_copied_anew_keeps_all_that_is_known_of_its_labels(
    store: StudiesFolder, studies: Path, look: Look
) -> None:
    submit(store, "a")
    submit(store, "a", "spleen", 2)
    store.update_image_info("a", {"from": "scanner"})
    known = store.json()["objects"]["a"]["labels"]
    assert known["final"]["info"]["reviewed"] == ["spleen"]
    aside = moved_away(studies / "a.nii.gz")
    store = look(store)
    shutil.move(aside, studies / "a.nii.gz")
    store = look(store)
    for one in (store, opened(studies)):
        assert one.json()["objects"]["a"]["labels"] == known
        assert one.get_image_info("a")["from"] == "scanner"
        assert [case.case_id for case in one.reviewed_cases()] == ["a"]


def test_an_image_that_is_gone_is_nowhere_to_be_seen(store: StudiesFolder, studies: Path) -> None:
    submit(store, "a")
    submit(store, "b")
    (studies / "a.nii.gz").unlink()
    store.refresh()
    for one in (store, opened(studies)):
        assert sorted(one.list_images()) == ["b", "mr"]
        assert one.get_labeled_images() == ["b"]
        assert one.get_unlabeled_images() == ["mr"]
        assert [Path(pair["image"]).name for pair in one.datalist()] == ["b.nii.gz"]
        assert one.status() == {"total": 2, "completed": 1, "label_tags": {"final": 1}}
        assert one.json().keys() == {"name", "description", "images_dir", "labels_dir", "objects"}
        assert one.json()["objects"].keys() == {"b", "mr"}
        for ask in (one.get_image_uri, one.get_image_info, one.channels, one.remove_image):
            with pytest.raises(HTTPException) as caught:
                ask("a")
            assert caught.value.status_code == 404
        with pytest.raises(HTTPException) as caught:
            one.save_label("a", "label.nii.gz", "final", {})
        assert caught.value.status_code == 404


def test_the_log_says_that_labels_are_kept_once(
    store: StudiesFolder, studies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    submit(store, "a")
    (studies / "a.nii.gz").unlink()
    with caplog.at_level(logging.WARNING):
        store.refresh()
        store.refresh()
    assert [line for line in caplog.messages if "labels is kept" in line] == [
        "a: no image in the folder any more; what is known of the labels is kept"
    ]
    assert store.image_of("a") == store.image_of("a.nii.gz") == "a", "the log shows a hash for it, now as before"


@pytest.mark.parametrize("look", LOOKS)
def test_a_label_that_is_copied_anew_keeps_all_that_is_known_of_it(
    store: StudiesFolder, studies: Path, look: Look
) -> None:
    submit(store, "a")
    known = store.get_label_info("a", "final")
    aside = moved_away(studies / "labels" / "final" / "a.nii.gz")
    store = look(store)
    assert store.get_labels_by_image_id("a") == {}
    assert "a" in store.get_unlabeled_images()
    store.update_image_info("a", {"meanwhile": 1})
    shutil.move(aside, studies / "labels" / "final" / "a.nii.gz")
    store = look(store)
    for one in (store, opened(studies)):
        assert one.get_label_info("a", "final") == known
        assert one.get_image_info("a")["meanwhile"] == 1


@pytest.mark.parametrize("image_first", [True, False])
def test_image_and_label_come_back_in_any_order(store: StudiesFolder, studies: Path, image_first: bool) -> None:
    submit(store, "a")
    known = store.get_label_info("a", "final")
    files = [studies / "a.nii.gz", studies / "labels" / "final" / "a.nii.gz"]
    back = []
    for path in files if image_first else files[::-1]:
        back.append((moved_away(path), path))
        store.refresh()
    for aside, path in back:
        shutil.move(aside, path)
        store.refresh()
    assert store.get_label_info("a", "final") == known
    assert opened(studies).get_label_info("a", "final") == known


def test_both_gone_at_once_come_back_within_the_day(store: StudiesFolder, studies: Path) -> None:
    submit(store, "a")
    known = store.get_label_info("a", "final")
    files = [studies / "a.nii.gz", studies / "labels" / "final" / "a.nii.gz"]
    asides = [moved_away(path) for path in files]
    store = stopped_and_started(looked_at_by_the_watcher(store))
    for aside, path in zip(asides, files, strict=True):
        shutil.move(aside, path)
    store.refresh()
    assert store.get_label_info("a", "final") == known


def test_an_image_is_forgotten_after_the_day_its_labels_are_gone_as_well(store: StudiesFolder, studies: Path) -> None:
    for image in ("a", "b"):
        submit(store, image)
        moved_away(studies / f"{image}.nii.gz")
    store.tidy_daily()
    aside = moved_away(studies / "labels" / "final" / "a.nii.gz")
    store.refresh()
    store._tidied = date(2026, 1, 1)
    store.tidy_daily()
    store.close()
    index = json.loads((studies / INDEX).read_text())
    assert index["absent"].keys() == {"b"}
    make_image(studies / "a.nii.gz", SHAPE, seed=9)
    shutil.move(aside, studies / "labels" / "final" / "a.nii.gz")
    assert "label_info" not in opened(studies).get_label_info("a", "final")


@pytest.mark.parametrize("label", [None, "labels/other/a.nii.gz"])
def test_another_image_of_that_name_gets_nothing_that_was_known_of_the_old_one(
    store: StudiesFolder, studies: Path, label: str | None
) -> None:
    submit(store, "a")
    store.update_image_info("a", {"patient": "old"})
    for path in (studies / "a.nii.gz", studies / "labels" / "final" / "a.nii.gz"):
        path.unlink()
    store.refresh()
    for name in filter(None, ("a.nii.gz", label)):
        make_image(studies / name, SHAPE, seed=9)
    store.refresh()
    assert "patient" not in store.get_image_info("a")
    assert store.get_labels_by_image_id("a").keys() == ({"other"} if label else set())


def test_an_upload_in_the_place_of_an_image_that_is_gone_gets_its_labels(
    store: StudiesFolder, studies: Path, tmp_path: Path
) -> None:
    submit(store, "a")
    known = store.get_label_info("a", "final")
    shutil.move(studies / "a.nii.gz", tmp_path / "again.nii.gz")
    store.refresh()
    assert store.add_image("a", str(tmp_path / "again.nii.gz"), {"from": "upload"}) == "a"
    for one in (store, opened(studies)):
        assert one.get_label_info("a", "final") == known
        assert one.get_image_info("a")["from"] == "upload"


def test_an_image_that_comes_back_in_another_format_keeps_its_labels(store: StudiesFolder, studies: Path) -> None:
    submit(store, "a")
    known = store.get_label_info("a", "final")
    nib.save(nib.load(studies / "a.nii.gz"), studies / "a.nii")
    (studies / "a.nii.gz").unlink()
    store.refresh()
    assert store.get_label_info("a", "final") == known
    assert Path(store.get_image_uri("a")).name == "a.nii"
    assert store.get_image_info("a")["name"] == "a.nii"


def test_a_label_in_another_format_gets_no_names_of_another_file(store: StudiesFolder, studies: Path) -> None:
    submit(store, "a")
    known = store.get_label_info("a", "final")
    label = studies / "labels" / "final" / "a.nii.gz"
    other = label.with_name("a.nii")
    nib.save(nib.load(label), other)
    aside = moved_away(label)
    store.refresh()
    assert "label_info" not in store.get_label_info("a", "final")
    other.unlink()
    shutil.move(aside, label)
    store.refresh()
    assert store.get_label_info("a", "final") == known


def test_a_label_submitted_in_the_place_of_one_that_is_gone_has_its_own_names(
    store: StudiesFolder, studies: Path
) -> None:
    submit(store, "a")
    (studies / "labels" / "final" / "a.nii.gz").unlink()
    store.refresh()
    submit(store, "a", "spleen", 2)
    aside = moved_away(studies / "labels" / "final" / "a.nii.gz")
    store.refresh()
    shutil.move(aside, studies / "labels" / "final" / "a.nii.gz")
    store.refresh()
    assert [segment["name"] for segment in store.get_label_info("a", "final")["label_info"]] == ["spleen"]


def test_a_version_that_is_gone_keeps_its_number(store: StudiesFolder, studies: Path) -> None:
    submit(store, "a")
    submit(store, "a", "spleen", 2)
    aside = moved_away(studies / "labels" / "version_1" / "a.nii.gz")
    store.refresh()
    submit(store, "a", "liver", 3)
    assert set(store.get_labels_by_image_id("a")) == {"final", "version_2"}
    shutil.move(aside, studies / "labels" / "version_1" / "a.nii.gz")
    store.refresh()
    assert [segment["name"] for segment in store.get_label_info("a", "version_1")["label_info"]] == ["liver"]


def test_what_is_removed_on_purpose_is_removed_for_good(store: StudiesFolder, studies: Path) -> None:
    for image in ("a", "b"):
        submit(store, image)
        aside = moved_away(studies / "labels" / "final" / f"{image}.nii.gz")
        store.refresh()
        shutil.move(aside, studies / "labels" / "final" / f"{image}.nii.gz")
    store.remove_label("a", "final")
    store.remove_image("b")
    assert not list((studies / "labels" / "final").iterdir())
    shutil.copyfile(studies / "a.nii.gz", studies / "b.nii.gz")
    for image in ("a", "b"):
        shutil.copyfile(studies / "a.nii.gz", studies / "labels" / "final" / f"{image}.nii.gz")
    for one in (looked_at_by_the_watcher(store), stopped_and_started(store)):
        for image in ("a", "b"):
            assert one.get_label_info(image, "final").keys() == {"ts", "name"}
    assert "absent" not in json.loads((studies / INDEX).read_text())


def test_channels_of_a_case_whose_first_was_gone_are_one_image_again(store: StudiesFolder, studies: Path) -> None:
    submit(store, "mr")
    known = store.get_label_info("mr", "final")
    aside = moved_away(studies / "mr_0000.nii.gz")
    store.refresh()
    assert store.list_images() == ["a", "b", "mr_0001"]
    shutil.move(aside, studies / "mr_0000.nii.gz")
    store.refresh()
    assert sorted(store.list_images()) == ["a", "b", "mr"]
    assert store.get_label_info("mr", "final") == known


def test_an_image_somebody_labelled_stays_one_beside_a_new_channel_zero(store: StudiesFolder, studies: Path) -> None:
    make_image(studies / "week_0003.nii.gz", SHAPE)
    store.refresh()
    submit(store, "week_0003")
    make_image(studies / "week_0000.nii.gz", SHAPE)
    store.refresh()
    assert {"week", "week_0003"} <= set(store.list_images())
    assert store.get_label_info("week_0003", "final")["reviewed"] == ["liver"]


def test_what_is_known_of_an_image_with_labels_by_another_program_comes_back(
    store: StudiesFolder, studies: Path
) -> None:
    make_image(studies / "labels" / "final" / "a.nii.gz", SHAPE)
    store.refresh()
    store.update_image_info("a", {"patient": "one"})
    aside = moved_away(studies / "a.nii.gz")
    store.refresh()
    shutil.move(aside, studies / "a.nii.gz")
    store.refresh()
    assert store.get_image_info("a")["patient"] == "one"


def test_a_server_that_watches_loses_no_names_while_an_image_is_copied_anew(
    store: StudiesFolder, studies: Path
) -> None:
    submit(store, "a")
    known = store.get_label_info("a", "final")
    server = opened(studies, auto_reload=True)
    try:
        aside = moved_away(studies / "a.nii.gz")
        assert within(5, lambda: "a" not in server.list_images())
        shutil.copyfile(aside, studies / "a.nii.gz")
        assert within(5, lambda: "a" in server.list_images())
        assert within(5, lambda: server.get_label_info("a", "final") == known)
    finally:
        server._observer.stop()
        server._observer.join()


@pytest.mark.parametrize("on_mount", [True, False], ids=["polling", "inotify"])
def test_a_folder_that_was_away_for_a_moment_is_watched_again(
    studies: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, on_mount: bool
) -> None:
    monkeypatch.setattr(StudiesFolder, "_is_on_mount", lambda *_: on_mount)
    server = opened(studies, auto_reload=True)
    try:
        ended = next(iter(server._observer.emitters))
        assert server.keep_watching() == ""
        assert ended in server._observer.emitters, "what is well is left alone"
        away = studies.rename(studies.with_name("away"))
        if not on_mount:
            ended.stop()
        assert within(10, lambda: not ended.is_alive())
        make_image(away / "new.nii.gz", SHAPE)
        with caplog.at_level(logging.WARNING, logger="lib.indexed_folder"):
            server.keep_watching()
            server.keep_watching()
            assert [record.levelname for record in caplog.records] == ["ERROR"]
            away.rename(studies)
            server.keep_watching()
            server.keep_watching()
        assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
        assert "new" in server.list_images()
        make_image(studies / "newer.nii.gz", SHAPE)
        opened(studies).update_image_info("a", {"patient": "one"})
        assert within(10, lambda: "newer" in server.list_images())
        assert within(10, lambda: server.get_image_info("a").get("patient") == "one")
    finally:
        server._observer.stop()
        server._observer.join()
    assert server.keep_watching() == ""
    assert not server._observer.emitters


def test_a_folder_that_is_watched_again_is_looked_at_once_that_can_be_done(
    studies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = opened(studies, auto_reload=True)
    try:
        ended = next(iter(server._observer.emitters))
        ended.stop()
        make_image(studies / "new.nii.gz", SHAPE)
        assert within(10, lambda: not ended.is_alive())
        with monkeypatch.context() as patch:
            patch.setattr("lib.indexed_folder._names", _not_there)
            server.keep_watching()
        assert "new" not in server.list_images()
        server.keep_watching()
        assert "new" in server.list_images()
    finally:
        server._observer.stop()
        server._observer.join()


def _not_there(folder: Path) -> set[str]:
    raise OSError(errno.ESTALE, "Stale file handle")


def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.02)
    return is_so()


def test_processes_agree_on_what_is_gone(store: StudiesFolder, studies: Path) -> None:
    submit(store, "a")
    known = store.get_label_info("a", "final")
    other = opened(studies)
    aside = moved_away(studies / "a.nii.gz")
    store.refresh()
    other.update_image_info("b", {"noted": 1})  # takes in what the first one saw
    assert "a" not in other.list_images()
    shutil.move(aside, studies / "a.nii.gz")
    other.refresh()
    store.update_image_info("b", {"noted": 2})
    for one in (store, other):
        assert one.get_label_info("a", "final") == known


def test_the_index_written_whole_says_it_too_and_stock_monai_label_reads_it(
    store: StudiesFolder, studies: Path, tmp_path: Path
) -> None:
    submit(store, "a")
    known = store.get_label_info("a", "final")
    aside = moved_away(studies / "a.nii.gz")
    store.refresh()
    store.close()
    assert not (studies / "datastore_v2.journal").exists()
    copy = shutil.copytree(studies, tmp_path / "copy")
    stock = LocalDatastore(str(copy), extensions=["*.nii.gz"])
    assert {"b", "mr"} <= stock.json()["objects"].keys()
    assert "a" not in stock.list_images()
    shutil.move(aside, studies / "a.nii.gz")
    assert opened(studies).get_label_info("a", "final") == known


def test_a_label_being_stored_when_the_server_was_killed_gets_its_names_though_the_image_is_gone_for_a_moment(
    store: StudiesFolder, studies: Path
) -> None:
    submit(store, "a")
    label = studies / "labels" / "final" / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.full(SHAPE, 2, np.uint8), np.eye(4)), label)  # it is in place, the index not written
    info = {"label_info": [{"name": "spleen", "idx": 2}]}
    labels = {"final": {"ext": ".nii.gz", "info": info}}
    LabelNote("a", "final/a.nii.gz", file_sha256(label), labels).write(studies / "labels")
    aside = moved_away(studies / "a.nii.gz")
    again = opened(studies)
    shutil.move(aside, studies / "a.nii.gz")
    again.refresh()
    assert again.get_label_info("a", "final") == info
