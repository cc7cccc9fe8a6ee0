"""``mshub users``, as whoever runs the server types it."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mshub import users as module
from mshub.accounts import account
from mshub.audit_line import audit_file
from mshub.cli import main
from mshub.users import user_file

PASSWORD = "a long password"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> Run:
    """Run ``mshub users ARGUMENTS``; returns exit code, stdout, stderr."""
    salt = module.bcrypt.gensalt
    monkeypatch.setattr(module.bcrypt, "gensalt", lambda: salt(4))

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mshub", "users", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            main()
        return (int(end.value.code or 0), *capsys.readouterr())

    return run


def test_the_first_user_is_admin_and_the_next_an_annotator(run: Run, home: Path) -> None:
    assert "no users" in run("list")[1]
    assert run("add", "ada", "--password-stdin", stdin=PASSWORD + "\n")[0] == 0
    assert run("add", "grace", "--password-stdin", stdin=PASSWORD + "\n")[0] == 0
    assert run("add", "eve", "--role", "viewer", "--password-stdin", stdin=PASSWORD + "\r\n")[0] == 0
    assert {user.name: user.role for user in user_file(home).users()} == {
        "ada": "admin",
        "grace": "annotator",
        "eve": "viewer",
    }
    assert user_file(home).with_password("eve", PASSWORD) is not None
    shown = run("list")[1]
    assert all(name in shown for name in ("ada", "grace", "eve", "annotator"))


def test_a_user_is_changed_and_removed(run: Run, home: Path) -> None:
    run("add", "ada", "--password-stdin", stdin=PASSWORD)
    run("add", "grace", "--password-stdin", stdin=PASSWORD)
    assert run("role", "grace", "viewer")[0] == 0
    assert run("password", "grace", "--password-stdin", stdin="another password")[0] == 0
    found = user_file(home).with_password("grace", "another password")
    assert found is not None
    assert found.role == "viewer"
    assert run("remove", "grace")[0] == 0
    assert user_file(home).user("grace") is None


def test_a_token_is_printed_once_and_alone(run: Run, home: Path) -> None:
    run("add", "ada", "--password-stdin", stdin=PASSWORD)
    code, token, _ = run("token", "ada", "--note", "nightly export", "--days", "7", "--role", "viewer")
    found = user_file(home).with_token(token.strip())
    assert code == 0
    assert found is not None
    assert found.role == "viewer"
    shown = run("tokens")[1]
    assert "nightly export" in shown
    assert token.strip() not in shown
    (known,) = user_file(home).tokens()
    assert run("revoke", known.number)[0] == 0
    assert user_file(home).with_token(token.strip()) is None


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (("add", "ada"), PASSWORD, "--password-stdin"),
        (("add", "ada", "--password-stdin"), "", "0 characters"),
        (("add", "a b", "--password-stdin"), PASSWORD, "'a b' is refused"),
        (("add", "ada", "--role", "root", "--password-stdin"), PASSWORD, "root"),
        (("add", "ada", "--role", "viewer", "--password-stdin"), PASSWORD, "first user has to be admin"),
        (("remove", "eve"), "", "no user 'eve'"),
        (("revoke", "12"), "", "no token '12'"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    run: Run, home: Path, arguments: tuple[str, ...], stdin: str, said: str
) -> None:
    code, _, err = run(*arguments, stdin=stdin)
    assert code == 1
    assert said in err
    assert not user_file(home)


def test_whatever_is_changed_stands_in_the_audit_log_and_what_is_refused_does_not(run: Run, home: Path) -> None:
    run("add", "ada", "--password-stdin", stdin=PASSWORD)
    run("add", "grace", "--password-stdin", stdin=PASSWORD)
    run("add", "grace", "--password-stdin", stdin=PASSWORD)
    run("role", "grace", "viewer")
    run("password", "grace", "--password-stdin", stdin="another password")
    token = run("token", "ada", "--note", "nightly export", "--days", "7", "--role", "viewer")[1].strip()
    (known,) = user_file(home).tokens()
    run("revoke", known.number)
    run("remove", "grace")
    run("list")
    text = audit_file(home).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["account"] for line in lines} == {account()}
    assert [
        {key: told for key, told in line.items() if key not in ("time", "account", "sudo_user")} for line in lines
    ] == [
        {"action": "mshub users add", "whom": "ada", "role": "admin"},
        {"action": "mshub users add", "whom": "grace", "role": "annotator"},
        {"action": "mshub users role", "whom": "grace", "role": "viewer"},
        {"action": "mshub users password", "whom": "grace"},
        {"action": "mshub users token", "whom": "ada", "number": known.number, "days": 7, "role": "viewer"},
        {"action": "mshub users revoke", "number": known.number},
        {"action": "mshub users remove", "whom": "grace"},
    ]
    assert not [secret for secret in (token, PASSWORD, "another password", "nightly export") if secret in text]


@pytest.mark.parametrize(("may", "said"), [(True, "as mshub, whose"), (False, "run this as that account")])
def test_root_goes_on_as_the_account_of_the_server(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, may: bool, said: str
) -> None:
    became: list[tuple[int, int, str]] = []
    monkeypatch.setenv("MSHUB_HOME", str(home.parent / "x" / ".." / "home"))
    monkeypatch.setattr("mshub.cli.owner_to_become", lambda folder: (1234, 1235, "mshub"))
    monkeypatch.setattr("mshub.cli.become", lambda *owner: became.append(owner) or may)
    code, shown, err = run("list")
    assert code == 0
    assert became == [(1234, 1235, "mshub")]
    assert os.environ["MSHUB_HOME"] == str(home)
    assert said in err
    assert said not in shown
