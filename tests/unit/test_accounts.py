"""Root at the command line, at work for a server that runs as another account."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from mshub.accounts import account, become, owner_to_become

SERVER = (1234, 1235)


@pytest.fixture
def owned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int, int], None]:
    """Let root be at work, and files belong to whom they are said to; all others are root's."""
    owners: dict[Path, tuple[int, int]] = {}
    stat = Path.stat

    def told(path: Path, **how: bool) -> os.stat_result:
        found = list(stat(path, **how))
        found[4:6] = owners.get(path, (0, 0))
        return os.stat_result(found)

    def own(path: Path, user: int, group: int) -> None:
        owners[path] = (user, group)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(Path, "stat", told)
    return own


def test_root_works_for_whom_the_home_is(owned: Callable[..., None], tmp_path: Path) -> None:
    assert owner_to_become(tmp_path) is None
    owned(tmp_path, *SERVER)
    assert owner_to_become(tmp_path) == (*SERVER, "1234")
    assert owner_to_become(tmp_path / "not" / "yet") == (*SERVER, "1234")


def test_the_account_that_a_server_ran_as_counts_and_not_whose_the_volume_is(
    owned: Callable[..., None], tmp_path: Path
) -> None:
    owned(tmp_path, *SERVER)
    (tmp_path / "audit.key").touch()
    assert owner_to_become(tmp_path) is None, "a container whose server is root"
    owned(tmp_path / "audit.key", 4321, 4321)
    assert owner_to_become(tmp_path) == (4321, 4321, "4321")


def test_nobody_but_root_becomes_another(
    owned: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned(tmp_path, *SERVER)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert owner_to_become(tmp_path) is None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for name in ("initgroups", "setgid", "setuid"):
        monkeypatch.setattr(os, name, lambda *given, name=name: found.append((name, *given)))
    return found


def test_rights_go_in_the_order_in_which_one_still_may(
    calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry = pwd.struct_passwd(("mshub", "x", *SERVER, "", str(tmp_path), "/bin/false"))
    monkeypatch.setattr(pwd, "getpwuid", lambda user: entry)
    monkeypatch.setenv("HOME", "/root")
    assert become(*SERVER, "mshub")
    assert calls == [("initgroups", "mshub", 1235), ("setgid", 1235), ("setuid", 1234)]
    assert os.environ["HOME"] == str(tmp_path), "root's is closed to it"


def test_a_root_of_few_rights_stays_what_it_is(
    calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "initgroups", refuse)
    assert not become(*SERVER, "1234")
    assert calls == []


def test_an_account_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert account() == "54321"
