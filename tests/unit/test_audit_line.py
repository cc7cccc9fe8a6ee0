"""Lines of the audit log that no request is behind."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from lib.audit import AuditLog
from mshub.accounts import account
from mshub.audit_line import audit_file, tell, tell_of_a_person


def test_a_running_server_and_the_command_line_write_to_one_file_that_is_their_owners(tmp_path: Path) -> None:
    tell(tmp_path, "gate", model="tiny")
    log = AuditLog(tmp_path)
    log.write(action="GET /info/")
    tell_of_a_person(tmp_path, "mshub users add", whom="grace")
    log.write(action="GET /datastore/")
    lines = [json.loads(line) for line in audit_file(tmp_path).read_text().splitlines()]
    assert [line["action"] for line in lines] == ["gate", "GET /info/", "mshub users add", "GET /datastore/"]
    assert all(next(iter(line)) == "time" for line in lines)
    assert stat.S_IMODE(audit_file(tmp_path).stat().st_mode) == 0o600


def test_a_person_is_told_by_the_account_and_by_whoever_came_by_sudo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUDO_USER", raising=False)
    tell_of_a_person(tmp_path, "mshub promote")
    monkeypatch.setenv("SUDO_USER", "grace")
    monkeypatch.setenv("LOGNAME", "eve")
    tell_of_a_person(tmp_path, "mshub promote")
    tell(tmp_path, "gate")
    lines = [json.loads(line) for line in audit_file(tmp_path).read_text().splitlines()]
    assert [(line.get("account"), line.get("sudo_user")) for line in lines] == [
        (account(), None),
        (account(), "grace"),
        (None, None),
    ]


def test_what_was_done_stays_done_where_the_line_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audit_file(tmp_path).mkdir(parents=True)
    tell(tmp_path, "gate")
    assert "the audit log cannot be written" in caplog.text
