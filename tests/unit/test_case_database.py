"""The file of the case index: opened, migrated, refused, and started anew where it is damaged."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from mshub import case_database, case_schema
from mshub.case_index import CaseIndex
from mshub.case_schema import APPLICATION_ID, SCHEMA_VERSION
from mshub.errors import StoreError
from mshub.uncertainty import StructureUncertainty, Uncertainty

NOW = 1_700_000_000.0
DAMAGED = "cases.sqlite.damaged-20231114T221320Z"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "studies" / "cases.sqlite"


def opened(path: Path) -> CaseIndex:
    return CaseIndex(path, lambda: NOW)


def run(path: Path, *statements: str) -> list[tuple[object, ...]]:
    """Run statements on a file as another program would; return the rows of the last."""
    connection = sqlite3.connect(path)
    with connection:
        found = [connection.execute(statement).fetchall() for statement in statements]
    connection.close()
    return found[-1]


def fill(index: CaseIndex, number: int = 200) -> None:
    """Keep enough for a file of many pages."""
    uncertainty = Uncertainty({"liver": StructureUncertainty(1.0)}, embedding=(0.5,) * 640)
    for i in range(number):
        index.keep_score(f"image-{i}", "liver", "v1", uncertainty)


def scribble(path: Path, start: int = 4096) -> None:
    """Overwrite a file from `start` on."""
    with path.open("r+b") as stream:
        length = stream.seek(0, os.SEEK_END)
        stream.seek(start)
        stream.write(b"\xa5" * (length - start))


# -- opening ------------------------------------------------------------------------------------------------------


def test_a_new_file_and_its_folder_are_made(path: Path) -> None:
    with opened(path) as index:
        assert index.path == path
    assert run(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
    assert run(path, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert run(path, "PRAGMA journal_mode") == [("wal",)]


def test_what_was_kept_is_there_after_a_restart(path: Path) -> None:
    with opened(path) as index:
        index.note_interest("liver", "ann")
        index.keep_choice("a", "liver", "ann", "random", True, "drawn")
    with opened(path) as index:
        assert index.last_model("ann") == "liver"
        assert [row.image for row in index.choices("liver")] == ["a"]


def test_what_was_kept_is_there_after_the_process_was_killed(path: Path) -> None:
    program = (
        "import os, pathlib, sys; from mshub.case_index import CaseIndex\n"
        "index = CaseIndex(pathlib.Path(sys.argv[1])); index.note_interest('liver', 'ann'); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (9, b"")
    assert path.with_name("cases.sqlite-wal").stat().st_size > 0
    with opened(path) as index:
        assert index.last_model("ann") == "liver"


def test_a_closed_index_leaves_only_its_file_and_the_lock_file(path: Path) -> None:
    with opened(path) as index:
        fill(index)
    assert sorted(file.name for file in path.parent.iterdir()) == [".cases.sqlite.lock", "cases.sqlite"]


def test_a_closed_index_says_so(path: Path) -> None:
    index = opened(path)
    index.close()
    index.close()
    with pytest.raises(StoreError, match=r"cases\.sqlite is closed"):
        index.leases()


def test_an_empty_file_is_a_new_one(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with opened(path) as index:
        assert index.leases() == {}


def test_two_indexes_of_one_process_share_the_file(path: Path) -> None:
    with opened(path) as one, opened(path) as other:
        one.note_interest("liver", "ann")
        assert other.last_model("ann") == "liver"


def test_threads_leave_no_connection_behind(path: Path) -> None:
    with opened(path) as index:
        index.note_interest("liver", "ann")
        before = open_files(path)
        for _ in range(20):
            thread = threading.Thread(target=index.note_interest, args=("liver", "ann"))
            thread.start()
            thread.join()
        assert open_files(path) == before
    assert open_files(path) == []


def open_files(path: Path) -> list[str]:
    """Return which files of the index this process has open, where the system tells."""
    links = Path("/proc/self/fd").glob("*")
    targets = [os.readlink(link) for link in links if link.is_symlink()]  # noqa: PTH115  # of those still there
    return sorted(target for target in targets if str(path.parent) in target)


# -- a transaction ------------------------------------------------------------------------------------------------


def test_a_transaction_that_breaks_off_changes_nothing_and_blocks_nobody(path: Path) -> None:
    with opened(path) as index:
        number = index.new_batch("liver", ["a"], "ann", {})
        with pytest.raises(StoreError, match="has no image"):
            index.finish_item(number, "b", "done")
        with pytest.raises(TypeError):
            index.lease(["a"], "ann", "sixty", model="liver")  # type: ignore[arg-type]
        assert index.leases() == {}
        assert index.next_item(number) == "a"


def test_a_name_that_is_no_text_becomes_a_sentence(path: Path) -> None:
    with opened(path) as index:
        with pytest.raises(StoreError, match=r"cannot be noted: it is no text. Rename the image"):
            index.lease(["M\udcfcller"], "ann", 60, model="liver")
        assert index.lease(["Müller"], "ann", 60, model="liver") == "Müller"


def test_mistakes_in_the_program_are_not_taken_for_damage(path: Path) -> None:
    with opened(path) as index:
        with pytest.raises(sqlite3.IntegrityError):
            index.note_interest(None, "ann")  # type: ignore[arg-type]
        index.note_interest("liver", "ann")
    assert not list(path.parent.glob("*damaged*"))


def test_a_writer_that_does_not_end_becomes_a_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_database, "BUSY_TIMEOUT_S", 0.05)
    with opened(path) as index:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"Another process has been writing .* for 0.05 s"):
            index.note_interest("liver", "ann")
        assert index.interests(0) == []  # reading waits for nobody
        other.execute("ROLLBACK")
        other.close()
        index.note_interest("liver", "ann")


def test_an_opening_that_does_not_end_becomes_a_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(path).close()
    monkeypatch.setattr(case_database, "BUSY_TIMEOUT_S", 0.05)
    with FileLock(path.with_name(".cases.sqlite.lock")), pytest.raises(StoreError, match="Another process"):
        opened(path)


# -- places that cannot be written --------------------------------------------------------------------------------


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("no folder")
    return folder / "file" / "cases.sqlite"


def a_folder(folder: Path) -> Path:
    (folder / "cases.sqlite").mkdir()
    return folder / "cases.sqlite"


@pytest.mark.parametrize("place", [below_a_file, a_folder])
def test_a_place_that_cannot_be_written_becomes_a_sentence(tmp_path: Path, place: Callable[[Path], Path]) -> None:
    with pytest.raises(StoreError, match=r"cannot be used\. Found: .*Expected: .*How to fix: check the permissions"):
        opened(place(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_becomes_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="How to fix: check the permissions"):
            opened(tmp_path / "cases.sqlite")
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_becomes_a_sentence_and_loses_nothing(path: Path) -> None:
    with opened(path) as index:
        index.note_interest("liver", "ann")
        with index._writing() as connection:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
        with index._reading() as connection:
            connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match=r"cannot be used\. Found: database or disk is full"):
            fill(index)
        assert index.last_model("ann") == "liver"


# -- other versions and other programs ----------------------------------------------------------------------------


def test_a_file_of_a_newer_mshub_is_refused_and_left_alone(path: Path) -> None:
    with opened(path) as index:
        index.note_interest("liver", "ann")
    run(path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(
        StoreError, match=rf"has schema version {SCHEMA_VERSION + 1}\. Expected: {SCHEMA_VERSION} or less.*update MSHub"
    ):
        opened(path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == [".cases.sqlite.lock", "cases.sqlite"]


def test_a_file_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    run(path, "CREATE TABLE theirs (a)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"is an SQLite file of another program"):
        opened(path)
    assert path.read_bytes() == before


def test_an_older_file_is_migrated_and_keeps_what_it_has(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as index:
        index.note_interest("liver", "ann")
    newer = (*case_schema.MIGRATIONS, ("ALTER TABLE interests ADD COLUMN why TEXT NOT NULL DEFAULT 'asked'",))
    use_schema(monkeypatch, newer)
    with opened(path) as index:
        assert index.last_model("ann") == "liver"
    assert run(path, "SELECT model, why FROM interests") == [("liver", "asked")]
    assert run(path, "PRAGMA user_version") == [(SCHEMA_VERSION + 1,)]


def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(path).close()
    with monkeypatch.context() as patch:
        use_schema(patch, (*case_schema.MIGRATIONS, ("CREATE TABLE half (a)", "NO SUCH STATEMENT")))
        with pytest.raises(StoreError, match="syntax error"):
            opened(path)
    assert run(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
    assert run(path, "SELECT name FROM sqlite_master WHERE name = 'half'") == []
    opened(path).close()


def use_schema(monkeypatch: pytest.MonkeyPatch, migrations: tuple[tuple[str, ...], ...]) -> None:
    monkeypatch.setattr(case_database, "MIGRATIONS", migrations)
    monkeypatch.setattr(case_database, "SCHEMA_VERSION", len(migrations))


# -- damage -------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_moved_aside_with_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database " * 1000)
    with caplog.at_level(logging.WARNING, "mshub.case_database"), opened(path) as index:
        index.note_interest("liver", "ann")
        assert index.last_model("ann") == "liver"
    assert path.with_name(DAMAGED).read_bytes() == b"no database " * 1000
    assert f"is damaged (file is not a database): kept as {DAMAGED}" in caplog.text


@pytest.mark.parametrize("start", [0, 20, 4096, 200_000])
def test_a_file_damaged_anywhere_is_noticed_when_it_is_opened(path: Path, start: int) -> None:
    with opened(path) as index:
        fill(index)
    scribble(path, start)
    damaged = path.read_bytes()
    with opened(path) as index:
        assert index.scores("liver", "v1") == {}
        fill(index, 3)
    assert path.with_name(DAMAGED).read_bytes() == damaged
    with opened(path) as index:
        assert len(index.scores("liver", "v1")) == 3


def test_a_file_cut_short_is_noticed(path: Path) -> None:
    with opened(path) as index:
        fill(index)
    with path.open("r+b") as stream:
        stream.truncate(100_000)
    with opened(path) as index:
        assert index.scores("liver", "v1") == {}
    assert path.with_name(DAMAGED).stat().st_size == 100_000


def test_no_damaged_file_replaces_another(path: Path) -> None:
    path.parent.mkdir()
    for number in range(3):
        path.write_bytes(b"no database %d " % number * 1000)
        opened(path).close()
    kept = [path.with_name(DAMAGED + ending) for ending in ("", "-2", "-3")]
    assert [file.read_bytes()[:13] for file in kept] == [b"no database 0", b"no database 1", b"no database 2"]


def test_the_write_ahead_log_of_a_damaged_file_is_kept_with_it(path: Path) -> None:
    with opened(path) as index:
        fill(index)
    with opened(path) as server:
        server.keep_choice("a", "liver", "ann", "random", True, "drawn")
        log = path.with_name("cases.sqlite-wal").read_bytes()
        scribble(path)
        with opened(path) as batch:
            batch.note_interest("spleen", "ann")
        assert path.with_name(f"{DAMAGED}-wal").read_bytes() == log
        assert server.last_model("ann") == "spleen"
        assert server.choices("liver") == []
        server.note_interest("lung", "ann")
    with opened(path) as index:
        assert index.last_model("ann") == "lung"


def test_a_file_damaged_while_in_use_is_refused_once_and_started_anew(path: Path) -> None:
    with opened(path) as index:
        fill(index)
        run(path, "INSERT INTO interests VALUES ('ann', 'liver', 0)", "PRAGMA user_version")
        run(path, "PRAGMA wal_checkpoint(TRUNCATE)")
        scribble(path)
        with pytest.raises(StoreError, match=r"is damaged\. Found: database disk image is malformed.*try again"):
            index.scores("liver", "v1")
        assert index.scores("liver", "v1") == {}
        fill(index, 2)
        assert len(index.scores("liver", "v1")) == 2
    assert path.with_name(DAMAGED).exists()


def test_who_has_a_file_open_that_somebody_moved_aside_goes_on_with_the_new_one(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as server:
        server.note_interest("liver", "ann")
        path.rename(path.with_name("moved"))
        with opened(path) as batch:
            batch.note_interest("spleen", "ann")
        assert server.last_model("ann") == "spleen"
        server.note_interest("lung", "ann")
    assert "was removed or replaced while in use" in caplog.text
    with opened(path) as index:
        assert index.interests(0) == ["lung", "spleen"]


def test_a_file_that_was_removed_is_made_again(path: Path) -> None:
    with opened(path) as index:
        index.note_interest("liver", "ann")
        path.unlink()
        assert index.last_model("ann") is None
        index.note_interest("spleen", "ann")
        assert index.last_model("ann") == "spleen"
