"""Lines of the audit log that no request is behind."""

from __future__ import annotations

import getpass
import json
import stat
from pathlib import Path

import pytest

from lib.audit import AuditLog
from mshub.audit_line import audit_file, tell


def test_a_running_server_and_the_command_line_write_to_one_file_that_is_their_owners(tmp_path: Path) -> None:
    tell(tmp_path, "mshub users add", whom="ada")
    log = AuditLog(tmp_path)
    log.write(action="GET /info/")
    tell(tmp_path, "mshub users add", whom="grace")
    log.write(action="GET /datastore/")
    lines = [json.loads(line) for line in audit_file(tmp_path).read_text().splitlines()]
    assert [line["action"] for line in lines] == ["mshub users add", "GET /info/", "mshub users add", "GET /datastore/"]
    assert all(next(iter(line)) == "time" for line in lines)
    assert stat.S_IMODE(audit_file(tmp_path).stat().st_mode) == 0o600


def test_whoever_became_root_is_told_by_their_own_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "grace")
    tell(tmp_path, "mshub promote")
    assert json.loads(audit_file(tmp_path).read_text())["account"] == "grace"


def test_an_account_without_a_name_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 10001")

    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setattr(getpass, "getuser", nameless)
    monkeypatch.setattr("os.getuid", lambda: 10001)
    tell(tmp_path, "mshub promote")
    assert json.loads(audit_file(tmp_path).read_text())["account"] == "10001"


def test_what_was_done_stays_done_where_the_line_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audit_file(tmp_path).mkdir(parents=True)
    tell(tmp_path, "mshub promote")
    assert "the audit log cannot be written" in caplog.text
