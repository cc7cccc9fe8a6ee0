"""bench/reliability in small: bad files and texts that would be paths, sent to a real server; what storing costs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import bad_files
import index_cost
import paths
from arena import Arena
from traversals import traversals

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is looked at is in /proc and told by inotify")
EVERY = 13


def test_bad_files_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    place = Arena(tmp_path)
    try:
        found = bad_files.send_all(place, EVERY, 30)
    finally:
        place.server.stop()
    assert found["not_refused"] == []
    assert found["temporary_files_left"] == []
    assert found["requests"] > 40
    assert bad_files.holds(found), bad_files.report(found)


def test_no_text_reads_or_writes_a_file_outside(tmp_path: Path) -> None:
    texts = traversals(tmp_path)
    assert len(texts) >= 200
    with paths.guarded_site(tmp_path) as place:
        found = paths.ask_all(tmp_path, place, texts[:: len(texts) // 5])
    assert (found["touched"], found["changed"], found["in_answers"]) == ([], [], [])
    assert found["server_errors"] == []
    assert found["canaries"] > 10
    assert found["requests"] > 1000
    assert paths.holds(found)


def test_what_is_written_to_store_something_does_not_grow_with_the_images(tmp_path: Path) -> None:
    few, many = (index_cost.measured("MSHub", images, tmp_path / str(images)) for images in (25, 250))
    before = index_cost.measured("MSHub, whole each time", 250, tmp_path / "before")
    for what in index_cost.WHAT:
        assert many[f"{what}_bytes"] < 1.1 * few[f"{what}_bytes"]
        assert many[f"{what}_bytes"] < before["index_bytes"] / 50
    assert many["index_bytes"] > 8 * few["index_bytes"]
    assert index_cost.report([few, many, before]).count("\n") == 4


def test_the_watch_sees_what_is_opened_and_made(tmp_path: Path) -> None:
    from watch import Watch, snapshot

    (tmp_path / "canary.txt").write_text("x")
    (tmp_path / "other.txt").write_text("x")
    before, watch = snapshot(tmp_path), Watch([tmp_path], "canary")
    assert watch.happened() == []
    (tmp_path / "other.txt").read_text()
    assert watch.happened() == []
    (tmp_path / "canary.txt").read_text()
    (tmp_path / "canary-new").write_text("y")
    assert {line.split()[0] for line in watch.happened()} >= {"opened", "read", "made", "written"}
    watch.close()
    assert snapshot(tmp_path).keys() - before.keys() == {str(tmp_path / "canary-new")}
