"""The index and its journal: what was stored is read again, by this process, by others and by other programs."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monailabel.datastore.local import LocalDatastore

from factories import make_image
from lib import index_journal
from lib.datastore import StudiesFolder
from lib.index_file import INDEX
from lib.index_journal import IndexJournal
from mshub import atomic_file

SHAPE = (5, 4, 3)
CASES = ("a", "b", "c")
JOURNAL = "datastore_v2.journal"
pytestmark = pytest.mark.usefixtures("monailabel_here")


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    for seed, case in enumerate(CASES):
        make_image(tmp_path / "studies" / f"{case}.nii.gz", SHAPE, seed=seed)
    return tmp_path / "studies"


def opened(studies: Path, **options: Any) -> StudiesFolder:
    return StudiesFolder(str(studies), lambda: ("liver",), studies.parent / "refused", **options)


def started(studies: Path) -> StudiesFolder:
    """Open a folder as a server does: its janitor is the first to come by."""
    store = opened(studies)
    store.tidy_daily()
    return store


def submit(store: StudiesFolder, case: str, voxels: int = 3) -> None:
    path = Path(store._datastore_path).parent / "submitted.nii.gz"
    array = np.zeros(SHAPE, np.uint8)
    array.reshape(-1)[:voxels] = 1
    nib.save(nib.Nifti1Image(array, nib.load(store.get_image_uri(case)).affine), path)
    store.save_label(case, str(path), "final", {"label_info": [{"name": "liver", "idx": 1}]})


def note(store: StudiesFolder, case: str, value: int) -> None:
    store.update_image_info(case, {"noted": value})


def noted(store: StudiesFolder) -> list[int | None]:
    return [store.get_image_info(case).get("noted") for case in CASES]


def kept(studies: Path, why: str) -> list[str]:
    return [path.name.partition(".")[2] for path in studies.glob(f"*.{why}")]


# -- what is written --------------------------------------------------------------------------------------------------


def test_a_change_is_a_line_and_the_index_stays_as_it_is(studies: Path) -> None:
    store = opened(studies)
    index = (studies / INDEX).read_bytes()
    submit(store, "a")
    note(store, "b", 1)
    assert (studies / INDEX).read_bytes() == index
    assert (studies / JOURNAL).read_bytes().count(b"\n") == 2


def test_what_was_stored_is_there_after_a_kill(studies: Path) -> None:
    store = opened(studies)
    submit(store, "a")
    note(store, "b", 1)
    store.remove_image("c")
    assert opened(studies).json() == store.json()
    assert (studies / JOURNAL).exists(), "others go on with it"
    assert started(studies).json() == store.json()
    assert not (studies / JOURNAL).exists(), "a server's start writes the index whole"


def test_an_upload_says_what_was_known_of_it_and_of_labels_that_were_there_before(
    studies: Path, tmp_path: Path
) -> None:
    store = opened(studies)
    shutil.copy(make_image(tmp_path / "new.nii.gz", SHAPE), studies / "labels" / "final" / "new.nii.gz")
    assert store.add_image("new", str(tmp_path / "new.nii.gz"), {"from": "scanner"}) == "new"
    for one in (store, opened(studies)):
        assert one.get_image_info("new")["from"] == "scanner"
        assert set(one.get_labels_by_image_id("new")) == {"final"}


def test_an_upload_that_cannot_be_noted_is_taken_back(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, upload = opened(studies), make_image(tmp_path / "new.nii.gz", SHAPE)

    def full(*_: Any) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(IndexJournal, "append", full)
    with pytest.raises(OSError, match="no space"):
        store.add_image("new", str(upload), {})
    monkeypatch.undo()
    assert "new" not in opened(studies).list_images()
    assert store.add_image("new", str(upload), {}) == "new"


def test_a_note_that_cannot_be_stored_is_not_seen(studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(studies)
    note(store, "a", 1)
    before = (studies / JOURNAL).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("lib.index_journal.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        note(store, "a", 2)
    monkeypatch.undo()
    assert noted(store) == [1, None, None]
    assert (studies / JOURNAL).read_bytes() == before
    note(store, "b", 3)
    assert noted(opened(studies)) == [1, 3, None]


def test_a_name_that_is_no_text_spoils_nothing(studies: Path) -> None:
    store = opened(studies)
    with pytest.raises(UnicodeEncodeError):
        store.update_image_info("a", {"odd": "\ud800"})
    note(store, "b", 2)
    assert noted(opened(studies)) == [None, 2, None]


def test_the_index_is_written_whole_once_the_journal_is_as_long(studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_journal, "LEAST_BYTES", 100)
    store, sizes, indexes = opened(studies), list[int](), set[bytes]()
    for number in range(60):
        note(store, CASES[number % 3], number)
        sizes.append((studies / JOURNAL).stat().st_size if (studies / JOURNAL).exists() else 0)
        indexes.add((studies / INDEX).read_bytes())
    assert 60 / 12 < len(indexes) < 60 / 2
    assert max(sizes) <= (studies / INDEX).stat().st_size
    assert noted(opened(studies)) == [57, 58, 59]


@pytest.mark.parametrize("where", ["mshub.atomic_file.Path.replace", "lib.index_journal.back_up_last"])
def test_a_kill_while_the_index_is_written_whole_leaves_all_that_was_stored(
    studies: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    store = opened(studies)
    for value, case in enumerate(CASES):
        note(store, case, value)

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(where, die)
    with pytest.raises(Killed):
        store.close()
    monkeypatch.undo()
    assert (studies / JOURNAL).read_bytes().count(b"\n") == 4
    again = opened(studies)
    assert noted(again) == [0, 1, 2]
    note(again, "a", 7)
    assert noted(opened(studies)) == [7, 1, 2]
    assert kept(studies, "other") == []


# -- what is damaged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_line_that_was_cut_is_dropped_and_overwritten(studies: Path, cut: int) -> None:
    store = opened(studies)
    for value, case in enumerate(CASES):
        note(store, case, value)
    journal = studies / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-cut])
    other = opened(studies)
    assert noted(other) == [0, 1, None]
    note(other, "a", 5)
    assert all(index_journal._entry(line) for line in journal.read_bytes().split(b"\n")[:-1])
    assert noted(opened(studies)) == [5, 1, None]
    assert kept(studies, "damaged") == []


def test_a_damaged_line_spoils_no_other_and_the_journal_is_kept(
    studies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(studies)
    for value, case in enumerate(CASES):
        note(store, case, value)
    content = (studies / JOURNAL).read_bytes()
    damaged = content.replace(b'"noted": 1', b'"noted": 8')
    (studies / JOURNAL).write_bytes(damaged)
    assert noted(started(studies)) == [0, None, 2]
    (copy,) = studies.glob("*.damaged")
    assert copy.read_bytes() == damaged
    assert "1 lines of datastore_v2.journal are damaged" in caplog.text
    assert noted(opened(studies)) == [0, None, 2]


def test_a_journal_of_another_index_is_never_applied_and_kept(studies: Path, caplog: pytest.LogCaptureFixture) -> None:
    note(opened(studies), "a", 1)
    stock = LocalDatastore(str(studies))  # after a kill, it knows nothing of the journal
    stock.update_image_info("a", {"noted": 2})
    journal = (studies / JOURNAL).read_bytes()
    again = started(studies)
    assert noted(again) == [2, None, None]
    (copy,) = studies.glob("*.other")
    assert copy.read_bytes() == journal
    assert "another index" in caplog.text
    note(again, "b", 3)
    assert noted(opened(studies)) == [2, 3, None]


def test_an_index_replaced_while_the_server_runs_is_taken_for_what_it_is(studies: Path) -> None:
    store = opened(studies)
    note(store, "a", 1)
    LocalDatastore(str(studies)).update_image_info("a", {"noted": 2})
    note(store, "b", 3)
    assert noted(store) == [2, 3, None]
    assert noted(opened(studies)) == [2, 3, None]
    assert len(kept(studies, "other")) == 1


def test_a_backup_and_the_journal_together_are_all_that_was_stored(studies: Path) -> None:
    store = opened(studies)
    note(store, "a", 1)
    store.close()
    submit(store, "b")
    note(store, "c", 2)
    (studies / INDEX).write_bytes((studies / INDEX).read_bytes()[:50])
    assert opened(studies).json() == store.json()


def test_a_journal_is_not_applied_to_an_older_backup(studies: Path) -> None:
    store = started(studies)
    note(store, "a", 1)
    store.close()
    note(store, "b", 2)
    (studies / "datastore_v2.last.bak").unlink()  # today's, from before, is left
    (studies / INDEX).write_text("{")
    assert noted(started(studies)) == [None, None, None]
    assert len(kept(studies, "other")) == 1


def test_an_index_damaged_while_the_server_runs_is_written_anew(studies: Path) -> None:
    store = opened(studies)
    note(store, "a", 1)
    (studies / INDEX).write_text('{"name"')
    note(store, "b", 2)
    assert noted(opened(studies)) == [1, 2, None]
    assert len(kept(studies, "damaged")) == 1


def test_an_index_that_was_only_touched_is_not_taken_for_another(studies: Path) -> None:
    store = opened(studies)
    note(store, "a", 1)
    (studies / INDEX).touch()
    known = store._datastore
    note(store, "b", 2)
    assert store._datastore is known
    assert noted(opened(studies)) == [1, 2, None]


@pytest.mark.parametrize("name", [INDEX, JOURNAL])
def test_a_file_removed_while_the_server_runs_is_written_anew(studies: Path, name: str) -> None:
    store = opened(studies)
    note(store, "a", 1)
    (studies / name).unlink()
    note(store, "b", 2)
    assert noted(opened(studies)) == [1, 2, None]


# -- who else is there ------------------------------------------------------------------------------------------------


def test_two_processes_see_each_others_changes_and_lose_none(studies: Path) -> None:
    one = opened(studies)
    other = opened(studies)
    for turn in range(6):
        for store, case in ((one, "a"), (other, "b")):
            note(store, case, turn)
            if turn == 3:
                store.tidy()
    submit(other, "c")
    note(one, "a", 9)
    other.refresh()
    assert one.json() == other.json() == opened(studies).json()
    assert noted(one) == [9, 5, None]
    assert set(one.get_labels_by_image_id("c")) == {"final"}


def work(studies: Path, case: str) -> None:
    store = opened(studies)
    for number in range(40):
        store.update_image_info(case, {f"n{number}": number})


def test_processes_that_write_at_once_lose_nothing(studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_journal, "LEAST_BYTES", 1000)
    store, processes = opened(studies), multiprocessing.get_context("fork")
    children = [processes.Process(target=work, args=(studies, case)) for case in "ab"]
    for child in children:
        child.start()
    for number in range(60):
        note(store, "c", number)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    note(store, "c", 200)
    for one in (store, opened(studies)):
        assert noted(one) == [None, None, 200]
        for case in "ab":
            assert {f"n{number}" for number in range(40)} <= one.get_image_info(case).keys()


def test_threads_that_write_at_once_lose_nothing(studies: Path) -> None:
    store = opened(studies)

    def add(case: str) -> None:
        for number in range(30):
            store.update_image_info(case, {f"n{number}": number})

    threads = [threading.Thread(target=add, args=(case,)) for case in "aabc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened(studies).json() == store.json()
    assert all({f"n{number}" for number in range(30)} <= store.get_image_info(case).keys() for case in CASES)


def test_a_server_that_watches_sees_what_a_batch_stores(studies: Path) -> None:
    server = opened(studies, auto_reload=True)
    try:
        other = opened(studies)
        for value in (1, 2):
            note(other, "a", value)
            assert within(5, lambda value=value: noted(server)[0] == value)
        other.tidy()
        note(other, "b", 3)
        assert within(5, lambda: noted(server) == [2, 3, None])
    finally:
        server._observer.stop()
        server._observer.join()


def test_final_labels_of_other_processes_count_as_changes(studies: Path) -> None:
    server, other = opened(studies), opened(studies)
    for write in (lambda: submit(other, "a"), lambda: submit(other, "b"), other.tidy):
        counted = server.changes_of_final
        note(other, "c", 1)
        server._init_from_datastore_file()
        assert server.changes_of_final == counted, "what is noted of an image is none"
        write()
        server._init_from_datastore_file()
        assert server.changes_of_final > counted


def test_folders_that_come_and_go_do_not_end_the_watch(studies: Path) -> None:
    """A thread of watchdog 7.1 ends by such a `KeyError`, or by a warning that is an error."""
    server = opened(studies, auto_reload=True)
    try:
        for number in range(200):
            folder = studies / f"a{number % 3}" / f"b{number % 2}"
            (folder / "c").mkdir(parents=True, exist_ok=True)
            if number % 3 == 1:
                folder.rename(folder.with_name(f"m{number}"))
            if number % 5 == 4:
                shutil.rmtree(folder.parent)
        note(opened(studies), "a", 1)
        assert within(10, lambda: noted(server)[0] == 1)
    finally:
        server._observer.stop()
        server._observer.join()


def within(seconds: float, is_so: Any) -> bool:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(is_so())


def test_the_index_is_written_whole_at_a_start_and_once_a_day(studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = started(studies)
    note(store, "a", 1)
    store.tidy_daily()
    assert (studies / JOURNAL).exists()
    monkeypatch.setattr(store, "_tidied", date(2026, 1, 1))
    store.tidy_daily()
    assert not (studies / JOURNAL).exists()


def test_stock_monai_label_reads_all_after_a_clean_stop(studies: Path) -> None:
    store = opened(studies)
    submit(store, "a")
    submit(store, "a", voxels=5)
    note(store, "b", 1)
    store.close()
    assert not (studies / JOURNAL).exists()
    stock = LocalDatastore(str(studies), extensions=["*.nii.gz"])
    assert stock.json() == store.json()
    assert stock.get_label_info("a", "version_1")["voxels"] == {"liver": 3}


def test_a_folder_that_may_only_be_read_is_left_as_it_is(studies: Path) -> None:
    store = opened(studies)
    note(store, "a", 1)
    before = {path.name: path.read_bytes() for path in studies.iterdir() if path.is_file()}
    reader = opened(studies, read_only=True)
    assert noted(reader) == [1, None, None]
    reader.close()
    assert {path.name: path.read_bytes() for path in studies.iterdir() if path.is_file()} == before


def test_the_index_has_an_image_a_line(studies: Path) -> None:
    store = opened(studies)
    note(store, "a", 1)
    store.close()
    lines = (studies / INDEX).read_text().splitlines()
    assert [line.partition(":")[0] for line in lines[1:-1]] == [f'"{case}"' for case in store.list_images()]
    assert json.loads((studies / INDEX).read_text())["objects"]["a"]["image"]["info"]["noted"] == 1


# -- errors that come late --------------------------------------------------------------------------------------------


def late_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the disk fail once, right after a file got a name: the folder is not synced."""
    synced, failed = atomic_file.sync_folder, list[Path]()
    replace = Path.replace

    def noted_replace(self: Path, target: Path) -> Path:
        noted_replace.last = Path(target)  # type: ignore[attr-defined]
        return replace(self, target)

    def sync(folder: Path) -> None:
        if not failed and noted_replace.last.name == name:  # type: ignore[attr-defined]
            failed.append(folder)
            raise OSError(errno.EIO, "input/output error")
        synced(folder)

    monkeypatch.setattr(Path, "replace", noted_replace)
    monkeypatch.setattr(atomic_file, "sync_folder", sync)


def let_nothing_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the journal be neither cut nor removed; a new one is."""
    unlink = Path.unlink

    def broken_truncate(*_: Any) -> None:
        raise OSError(errno.EIO, "input/output error")

    def broken_unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == JOURNAL and self.exists():
            raise OSError(errno.EIO, "input/output error")
        unlink(self, missing_ok)

    monkeypatch.setattr("lib.index_journal.os.truncate", broken_truncate)
    monkeypatch.setattr(Path, "unlink", broken_unlink)


FSYNC = os.fsync


def no_fsync(descriptor: int) -> None:
    """Fail for the journal alone."""
    if Path(f"/proc/self/fd/{descriptor}").readlink().name == JOURNAL:
        raise OSError(errno.EIO, "input/output error")
    FSYNC(descriptor)


def final_label(store: StudiesFolder, case: str) -> tuple[int, dict[str, int]]:
    """Return how many voxels the file of a label has, and what the index says."""
    array = np.asarray(nib.load(store.get_label_uri(case, "final")).dataobj)
    return int(array.sum()), store.get_label_info(case, "final")["voxels"]


def test_a_label_answered_with_an_error_is_not_in_the_journal_later(
    studies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(studies)
    submit(store, "a", voxels=3)
    store.tidy()
    late_error(monkeypatch, JOURNAL)
    with pytest.raises(OSError, match="input/output"):
        submit(store, "a", voxels=5)
    for one in (store, opened(studies)):
        note(one, "a", 1)
        assert final_label(one, "a") == (3, {"liver": 3})
        assert set(one.get_labels_by_image_id("a")) == {"final"}


@pytest.mark.parametrize("journal", ["new", "appended to"])
def test_a_label_whose_line_cannot_be_taken_back_is_stored(
    studies: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, journal: str
) -> None:
    store = opened(studies)
    submit(store, "a", voxels=3)
    if journal == "new":
        store.tidy()

    with monkeypatch.context() as patch:
        let_nothing_be_taken_back(patch)
        late_error(patch, JOURNAL) if journal == "new" else patch.setattr("lib.index_journal.os.fsync", no_fsync)
        submit(store, "a", voxels=5)
    assert "input/output error" in caplog.text
    for one in (store, opened(studies)):
        note(one, "b", 1)
        assert final_label(one, "a") == (5, {"liver": 5})
        assert set(one.get_labels_by_image_id("a")) == {"final", "version_1"}


@pytest.mark.parametrize("where", ["sync", "retire"])
def test_an_index_that_was_written_is_written_whatever_fails_after_it(
    studies: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    store = opened(studies)
    submit(store, "a", voxels=3)
    (studies / JOURNAL).unlink()  # the next change is written whole
    if where == "sync":
        late_error(monkeypatch, INDEX)
    else:
        retire = IndexJournal._retire
        failures = iter([OSError(errno.EIO, "input/output error")])

        def failing(self: IndexJournal) -> None:
            for error in failures:
                raise error
            retire(self)

        monkeypatch.setattr(IndexJournal, "_retire", failing)
    submit(store, "a", voxels=5)
    for one in (store, opened(studies)):
        note(one, "b", 1)
        assert final_label(one, "a") == (5, {"liver": 5})
        assert noted(one)[1] == 1


def test_a_journal_whose_changes_are_in_the_index_and_that_cannot_be_removed_harms_nothing(
    studies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(studies)
    note(store, "a", 1)
    let_nothing_be_taken_back(monkeypatch)
    store.tidy()
    with pytest.raises(OSError, match="input/output"):
        note(store, "a", 2)
    assert noted(store) == noted(opened(studies)) == [1, None, None]
    monkeypatch.undo()
    note(store, "a", 3)
    assert noted(store) == noted(opened(studies)) == [3, None, None]
    assert kept(studies, "other") == []
