"""bench/reliability/kill.py in small: killed children and full disks, by the server's own code."""

from __future__ import annotations

from pathlib import Path

import pytest

import kill

pytestmark = pytest.mark.usefixtures("monailabel_here")


def test_nothing_that_was_told_is_lost_when_processes_are_killed(tmp_path: Path) -> None:
    found = kill.kills(tmp_path, 10)
    assert found["problems"] == []
    assert found["told"] > 10
    assert (found["kills"], found["unreadable"], found["lost"], found["left"]) == (10, 0, 0, 0)


def test_nothing_that_was_told_is_lost_when_the_disk_gets_full(tmp_path: Path) -> None:
    found = kill.full_disks(tmp_path, (0, 48))
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["problems"] == []
    assert found["refused"] > 0
    assert (found["levels"], found["unreadable"], found["lost"], found["left"]) == (2, 0, 0, 0)
