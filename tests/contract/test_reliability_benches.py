"""bench/reliability in small: bad files, texts that would be paths and a PACS that misbehaves, for a real server."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import pytest

import bad_files
import pacs_faults
import paths
from arena import Arena
from traversals import traversals
from wrong_series import cases

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


def test_a_series_comes_whole_from_a_pacs_that_misbehaves_or_is_refused() -> None:
    every = list(cases("axial, 5"))
    chosen = [*islice(every, 3, None, 43), next(case for case in every if case.stalls)]
    with pacs_faults.hospital() as place:
        found = pacs_faults.try_all(place, chosen)
    assert [problem for outcome in found.values() for problem in outcome.wrong] == []
    assert sum(outcome.cases for outcome in found.values()) > 8
    assert sum(outcome.refused for outcome in found.values()) > 4
    assert pacs_faults.holds(found), pacs_faults.report(found)


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
