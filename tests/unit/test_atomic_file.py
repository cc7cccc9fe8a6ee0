"""Files that are the old one or the whole new one, whenever anybody looks and whatever goes wrong."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest

from mshub.atomic_file import remove_unfinished, replace_by_copy, replace_json, replace_text, replacing

FOLDER = -1
OLD = "old\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with something in it, alone in its folder."""
    path = tmp_path / "folder" / "file.json"
    path.parent.mkdir()
    path.write_text(OLD)
    return path


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def write_half_and(fail: Callable[[], None], path: Path) -> None:
    with replacing(path) as stream:
        stream.write(b"half of the new")
        stream.flush()
        fail()


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [ValueError("broken"), OSError("disk full"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_half_and(raising(error), path)
    assert path.read_text() == OLD
    assert names(path.parent) == ["file.json"]


def test_an_error_in_the_middle_of_a_new_file_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"):
        write_half_and(raising(ValueError("broken")), tmp_path / "new.bin")
    assert names(tmp_path) == []


def test_a_rename_that_fails_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="power cut"):
            replace_text(path, "new")
    assert path.read_text() == OLD
    assert names(path.parent) == ["file.json"]


def test_the_old_file_is_there_until_the_last_byte_is_on_disk_and_then_the_new_name_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    fsync = os.fsync

    def look_and_sync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        is_folder = stat.S_ISDIR(found.st_mode) and found.st_ino == path.parent.stat().st_ino
        synced.append((path.read_text(), FOLDER if is_folder else found.st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look_and_sync)
    with replacing(path) as stream:
        stream.write(b"new, of 20 bytes.....")
        assert path.read_text() == OLD
    assert synced == [(OLD, 21), ("new, of 20 bytes.....", FOLDER)]
    assert path.read_text() == "new, of 20 bytes....."
    assert names(path.parent) == ["file.json"]


def test_a_reader_at_any_moment_sees_one_whole_file(path: Path) -> None:
    contents = [letter * 300_000 for letter in "ab"]
    path.write_text(contents[0])
    over, seen = threading.Event(), set()

    def read() -> None:
        while not over.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        replace_text(path, contents[number % 2])
    over.set()
    reader.join()
    assert seen
    assert seen <= set(contents)


def test_writers_at_once_do_not_meet_in_one_temporary_file(path: Path) -> None:
    with replacing(path) as one, replacing(path) as other:
        one.write(b"one")
        other.write(b"the other")
    assert path.read_text() == "one"  # closed last
    assert names(path.parent) == ["file.json"]


def test_the_file_is_one_that_others_may_read(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        replace_text(tmp_path / "shared.txt", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "shared.txt").stat().st_mode & 0o777 == 0o644


def test_the_folder_is_made_for_text_for_json_and_for_a_copy(tmp_path: Path) -> None:
    replace_text(tmp_path / "a" / "b" / "file", "text")
    replace_json(tmp_path / "c" / "d" / "file", [1])
    replace_by_copy(tmp_path / "a" / "b" / "file", tmp_path / "e" / "f" / "file")
    assert (tmp_path / "e" / "f" / "file").read_text() == "text"
    assert json.loads((tmp_path / "c" / "d" / "file").read_text()) == [1]


def test_text_is_utf_8_whatever_the_locale_and_keeps_its_line_ends(tmp_path: Path) -> None:
    replace_text(tmp_path / "file", "Läsion, 肝臓\r\n")
    assert (tmp_path / "file").read_bytes() == "Läsion, 肝臓\r\n".encode()


def test_text_that_cannot_be_written_leaves_the_old_file(path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "a name with half a character: \udcff")
    assert path.read_text() == OLD
    assert names(path.parent) == ["file.json"]


def test_json_is_readable_for_people_and_machines(path: Path) -> None:
    content = {"name": "Läsion, 肝臓", "values": [1, 2.5, None, True], "from": Path("x/y"), "on": date(2026, 2, 3)}
    replace_json(path, content)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {**content, "from": "x/y", "on": "2026-02-03"}
    assert "Läsion, 肝臓" in text
    assert text.endswith("}\n")
    assert '\n  "name"' in text


def test_json_that_cannot_be_written_leaves_the_old_file(path: Path) -> None:
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises(ValueError, match="Circular"):
        replace_json(path, circle)
    assert path.read_text() == OLD


def test_a_copy_has_every_byte_and_takes_no_second_look_at_its_source(path: Path, tmp_path: Path) -> None:
    source = tmp_path / "label.nii.gz"
    content = bytes(range(256)) * 5000
    source.write_bytes(content)
    replace_by_copy(source, path)
    source.write_bytes(b"painted over")
    assert path.read_bytes() == content
    source.unlink()
    assert path.read_bytes() == content


def test_a_copy_of_nothing_leaves_the_old_file(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_by_copy(tmp_path / "missing", path)
    assert path.read_text() == OLD
    assert names(path.parent) == ["file.json"]


def test_what_killed_writers_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    left, writing, other = tmp_path / f".{'a' * 32}.part", tmp_path / f".{'b' * 32}.part", tmp_path / ".mine.part"
    for path in (left, writing, other):
        path.write_text("x")
    for path in (left, other):
        os.utime(path, (time.time() - 100,) * 2)
    assert remove_unfinished([tmp_path, tmp_path / "nowhere"], 60) == 1
    assert names(tmp_path) == sorted([writing.name, other.name])
