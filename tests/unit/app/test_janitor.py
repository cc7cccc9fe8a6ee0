"""What piles up is swept away, and nothing that anybody still uses."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.utils.sessions import SessionInfo

from lib.app import MSHubApp
from lib.infers import results_folder
from lib.janitor import (
    ABANDONED_S,
    TEMPORARY,
    Janitor,
    folders_below,
    keep,
    own_temporary_folder,
    remove_abandoned,
    trim,
    unfinished,
)
from lib.sessions import UNFINISHED_S, UploadSessions

DAY = 24 * 3600.0
ROOT = Path(__file__).resolve().parents[3]


def aged(path: Path, days: float, nbytes: int = 100) -> Path:
    """Write a file that was changed so many days ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * nbytes)
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


def test_the_oldest_files_go_until_the_others_fit(tmp_path: Path) -> None:
    files = [aged(tmp_path / "kept" / str(days), days) for days in (9, 7, 5, 3)]
    assert trim(tmp_path / "kept", 250) == "2 files of kept"
    assert [path.exists() for path in files] == [False, False, True, True]
    assert trim(tmp_path / "kept", 250) == ""


def test_what_was_changed_today_stays_however_large(tmp_path: Path) -> None:
    aged(tmp_path / "kept" / "new", 0.1, 10_000)
    assert trim(tmp_path / "kept", 1) == ""
    assert trim(tmp_path / "missing", 1) == ""


def test_what_a_killed_server_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    old = aged(tmp_path / "mshub-results-abcd_123" / "label.nii.gz", 3)
    export = aged(tmp_path / "mshub-export-abcdefgh.dcm", 3)
    busy = aged(tmp_path / "mshub-reading-abcdefgh" / "old", 3)
    aged(busy.with_name("new"), 0)
    theirs = [aged(tmp_path / name / "old", 9) for name in ("somebody", "mshub-studies", "mshub-home-12345678")]
    idle = aged(tmp_path / "mshub-results-12345678" / "label.nii.gz", 9)
    for file in (old, busy, idle, *theirs):
        os.utime(file.parent, (time.time() - 3 * DAY,) * 2)
    (tmp_path / "mshub-results-linkedto").symlink_to(theirs[0].parent)
    keep(idle.parent)
    assert remove_abandoned(tmp_path) == "2 temporary files"
    assert not old.parent.exists()
    assert not export.exists()
    assert all(file.exists() for file in (busy, idle, *theirs))


def test_the_names_of_temporary_files_are_those_that_are_swept() -> None:
    assert TEMPORARY.fullmatch(results_folder().name)
    used = [path.read_text() for folder in ("apps/mshub/lib", "src/mshub") for path in (ROOT / folder).rglob("*.py")]
    prefixes = {prefix for text in used for prefix in re.findall(r'prefix="(mshub-[^"]*)"', text)}
    assert prefixes
    assert all(TEMPORARY.fullmatch(f"{prefix}abcdefgh") for prefix in prefixes)


def test_one_task_that_fails_does_not_keep_the_others_from_theirs(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> str:
        raise OSError("disk on fire")

    with caplog.at_level(logging.INFO):
        Janitor([fail, lambda: "", lambda: "3 things"]).sweep()
    assert "disk on fire" in caplog.text
    assert "swept: 3 things" in caplog.text


def test_the_janitor_comes_as_often_as_is_said() -> None:
    came, often = list[int](), threading.Event()

    def come() -> str:
        came.append(1)
        if len(came) == 3:
            often.set()
            threading.Event().wait()  # the thread ends with the process
        return ""

    Janitor([come], every_s=0.01).start()
    assert often.wait(20)


def test_a_server_looks_after_the_watch_over_its_folder(clinic: MSHubApp, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()
    monkeypatch.setattr(clinic.datastore(), "keep_watching", lambda: looked.set() or "")
    clinic.on_init_complete()
    assert looked.wait(20)


# -- sessions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sessions(tmp_path: Path) -> UploadSessions:
    return UploadSessions(str(tmp_path / "sessions"), 3600)


def upload(tmp_path: Path) -> str:
    path = tmp_path / "image.nii.gz"
    path.write_bytes(b"image")
    return str(path)


def test_a_session_is_found_after_a_restart_by_its_id_only(sessions: UploadSessions, tmp_path: Path) -> None:
    number, _ = sessions.add_session(upload(tmp_path))
    again = UploadSessions(sessions.store_path, 3600)
    found = again.get_session(number)
    assert found is not None
    assert Path(found.image).read_bytes() == b"image"
    for other in ("", ".", "..", "../sessions", number[:-1], number + "x", "0" * 36, number.upper() + "/"):
        assert again.get_session(other) is None
    assert len({UploadSessions(sessions.store_path, 60).add_session(upload(tmp_path))[0][:8] for _ in range(20)}) == 20


@pytest.mark.parametrize("many", [False, True], ids=["one file", "a folder"])
@pytest.mark.parametrize("fault", ["the disk is full", "the description cannot be written", "an archive"])
def test_nothing_is_left_of_a_session_that_could_not_be_made(
    sessions: UploadSessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: bool, fault: str
) -> None:
    """As MONAI Label's own route calls it, which forgets its temporary folder when this fails."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    received = tmp_path / "tmp" / "tmpabc"
    received.mkdir(parents=True)
    (received / "scan.nii.gz").write_bytes(b"a scan")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if fault == "the disk is full":
        monkeypatch.setattr("monailabel.utils.sessions.shutil.move", full)
    elif fault != "an archive":
        monkeypatch.setattr("lib.sessions.replace_text", full)
    with pytest.raises((OSError, HTTPException)):
        sessions.add_session(str(received if many else received / "scan.nii.gz"), uncompress=fault == "an archive")
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not list(Path(sessions.store_path).glob("*"))
    assert not sessions.keys()


def test_a_session_ends(sessions: UploadSessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number, info = sessions.add_session(upload(tmp_path), expiry=100)
    now = time.time()
    monkeypatch.setattr("lib.sessions.time.time", lambda: now + 90)
    assert sessions.get_session(number) is not None
    monkeypatch.setattr("lib.sessions.time.time", lambda: now + 180)
    assert sessions.get_session(number) is not None, "it was used meanwhile"
    monkeypatch.setattr("lib.sessions.time.time", lambda: now + 300)
    assert sessions.get_session(number) is None
    assert not Path(info.path).exists()


def test_sessions_of_servers_that_ended_are_swept(
    sessions: UploadSessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = sessions.add_session(upload(tmp_path))
    ended, info = sessions.add_session(upload(tmp_path), expiry=60)
    damaged, other = sessions.add_session(upload(tmp_path))
    (Path(other.path) / "meta.info").write_text("{")
    unfinished = Path(sessions.store_path) / "unfinished"
    unfinished.mkdir()
    again, now = UploadSessions(sessions.store_path, 3600), time.time()
    monkeypatch.setattr("lib.sessions.time.time", lambda: now + 120)
    assert again.remove_expired() == 2
    assert [Path(sessions.store_path, name).exists() for name in (kept, ended, damaged)] == [True, False, False]
    assert unfinished.exists()
    assert not Path(info.path).exists()
    monkeypatch.setattr("lib.sessions.time.time", lambda: now + UNFINISHED_S + 60)
    again.remove_expired()
    assert not unfinished.exists()


def test_monai_label_sweeps_the_sessions_of_before_a_restart(sessions: UploadSessions, tmp_path: Path) -> None:
    _, info = sessions.add_session(upload(tmp_path), expiry=60)
    aged_info = json.loads((Path(info.path) / "meta.info").read_text()) | {"last_access_ts": int(time.time()) - 100}
    (Path(info.path) / "meta.info").write_text(json.dumps(aged_info))
    MONAILabelApp.cleanup_sessions(SimpleNamespace(_sessions=UploadSessions(sessions.store_path, 3600)))
    assert not Path(info.path).exists()


@pytest.mark.parametrize("trouble", [FileNotFoundError, PermissionError, KeyError])
def test_a_session_that_cannot_be_looked_at_keeps_no_other_from_being_swept(
    sessions: UploadSessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: type[Exception]
) -> None:
    for _ in range(3):
        sessions.add_session(upload(tmp_path), expiry=60)
    asked, get_session = list[str](), sessions.get_session

    def get(session_id: str, **options: bool) -> object:
        asked.append(session_id)
        if len(asked) == 2:
            raise trouble(session_id)
        return get_session(session_id, **options)

    monkeypatch.setattr(sessions, "get_session", get)
    now = time.time()
    monkeypatch.setattr("lib.sessions.time.time", lambda: now + 120)
    assert sessions.remove_expired() == 2
    assert [path.name for path in Path(sessions.store_path).iterdir()] == [asked[1]]


def test_two_may_remove_a_session_at_once(
    sessions: UploadSessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MONAI Label asks whether it knows a session, and then removes it."""
    number, info = sessions.add_session(upload(tmp_path))
    sessions.remove_session(number)
    monkeypatch.setattr(sessions, "get", lambda *_: info)
    sessions.remove_session(number)
    assert sessions.get_session(number) is None


def test_a_session_that_goes_while_it_is_asked_for_is_gone(
    sessions: UploadSessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, info = sessions.add_session(upload(tmp_path))
    note = sessions._write_meta_info

    def removed_and_noted(session_id: str, found: SessionInfo) -> None:
        shutil.rmtree(info.path)
        note(session_id, found)

    monkeypatch.setattr(sessions, "_write_meta_info", removed_and_noted)
    assert sessions.get_session(number) is None
    assert not Path(info.path).exists()


def test_a_session_survives_a_disk_that_is_full_when_its_use_is_noted(
    sessions: UploadSessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, _ = sessions.add_session(upload(tmp_path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mshub.atomic_file.os.fsync", full)
        assert sessions.get_session(number) is not None
    assert UploadSessions(sessions.store_path, 3600).get_session(number) is not None


# -- temporary files --------------------------------------------------------------------------------------------------


def test_a_server_has_a_temporary_folder_of_its_own_that_goes_with_it(tmp_path: Path) -> None:
    before = tempfile.gettempdir()
    with own_temporary_folder() as folder:
        with tempfile.NamedTemporaryFile(delete=False) as file:
            assert Path(file.name).parent == folder
        os.utime(folder, (0, 0))
        remove_abandoned(folder.parent, unused_s=10**9)
        keep(folder)
        remove_abandoned(unused_s=60)
        assert folder.is_dir(), "it is in use"
    assert not folder.exists()
    assert tempfile.gettempdir() == before


def test_folders_of_servers_that_were_killed_are_swept_from_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "mshub-server-left1234"
    left.mkdir()
    (left / "tmp.nii.gz").write_text("x")
    for path in (left / "tmp.nii.gz", left):
        os.utime(path, (time.time() - 2 * ABANDONED_S,) * 2)
    with own_temporary_folder():
        assert remove_abandoned() == "1 temporary files"
    assert not left.exists()


def test_unfinished_files_are_swept_wherever_they_are(tmp_path: Path) -> None:
    deep = tmp_path / "models" / "tiny"
    deep.mkdir(parents=True)
    old, young = deep / f".{'a' * 32}.part", deep / f".{'b' * 32}.part"
    for path in (old, young):
        path.write_text("x")
    os.utime(old, (time.time() - 2 * UNFINISHED_S,) * 2)
    assert unfinished(lambda: folders_below(tmp_path)) == "1 unfinished files"
    assert [path.name for path in deep.iterdir()] == [young.name]
    assert unfinished(lambda: folders_below(tmp_path / "nowhere")) == ""
