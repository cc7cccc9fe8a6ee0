"""``mshub users``: who may use the server."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mshub.audit_line import tell_of_a_person
from mshub.console import out
from mshub.errors import AccessError
from mshub.store import ModelStore
from mshub.users import ROLES, UserFile, number_of, user_file

users_app = typer.Typer(help="Who may use the server: people with passwords and roles, tokens for scripts.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The user's name.", show_default=False)]
Role = Annotated[str, typer.Option(help=f"{', '.join(ROLES)}: each may what those before it may.")]
FromStdin = Annotated[bool, typer.Option("--password-stdin", help="Read the password from the first line of stdin.")]


def _file() -> UserFile:
    return user_file(ModelStore().home)


def _tell(command: str, **facts: Any) -> None:
    """Add a line about what was done to the audit log."""
    tell_of_a_person(ModelStore().home, f"mshub users {command}", **facts)


@users_app.command("list")
def list_users() -> None:
    """Show all users."""
    users = _file().users()
    if not users:
        out.print(
            "There are no users: without a single sign-on, the server answers this machine only. Add one with "
            "`mshub users add NAME`."
        )
        return
    table = Table("name", "role", "password since")
    for user in users:
        table.add_row(escape(user.name), user.role, user.since.strftime("%Y-%m-%d"))
    out.print(table)


@users_app.command()
def add(name: Name, role: Role = "", password_stdin: FromStdin = False) -> None:
    """Add a user. The first one becomes admin; others are annotators if nothing is said."""
    file = _file()
    role = role or ("annotator" if file else "admin")
    file.add(name, _password(password_stdin), role)
    _tell("add", whom=name, role=role)
    out.print(f"{escape(name)} may log in as [bold]{escape(role)}[/].")


@users_app.command()
def password(name: Name, password_stdin: FromStdin = False) -> None:
    """Give a user another password; the user is logged out everywhere."""
    _file().set_password(name, _password(password_stdin))
    _tell("password", whom=name)
    out.print(f"The password of {escape(name)} was changed.")


@users_app.command()
def role(name: Name, role: Annotated[str, typer.Argument(help=", ".join(ROLES), show_default=False)]) -> None:
    """Give a user another role."""
    _file().set_role(name, role)
    _tell("role", whom=name, role=role)
    out.print(f"{escape(name)} is [bold]{escape(role)}[/] now.")


@users_app.command()
def remove(name: Name) -> None:
    """Remove a user with all tokens; labels the user submitted stay."""
    _file().remove(name)
    _tell("remove", whom=name)
    out.print(f"{escape(name)} cannot log in any more.")


@users_app.command()
def token(
    name: Name,
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
    days: Annotated[int, typer.Option(help="How long it is good.")] = 90,
    role: Role = "",
) -> None:
    """Make an API token for scripts and print it, this once: ``Authorization: Bearer TOKEN``."""
    made = _file().create_token(name, note, days, role or None)
    _tell("token", whom=name, number=number_of(made), days=days, **({"role": role} if role else {}))
    sys.stdout.write(f"{made}\n")


@users_app.command()
def tokens() -> None:
    """Show all API tokens, without the tokens themselves."""
    table, now = Table("number", "user", "role", "for", "good until"), datetime.now(timezone.utc)
    for known in _file().tokens():
        ends = known.expires.strftime("%Y-%m-%d") + (" (expired)" if known.expires <= now else "")
        table.add_row(known.number, escape(known.user), known.role, escape(known.note), ends)
    out.print(table)


@users_app.command()
def revoke(number: Annotated[str, typer.Argument(help="Its number; see `mshub users tokens`.")]) -> None:
    """Take an API token back."""
    _file().revoke_token(number)
    _tell("revoke", number=number)
    out.print(f"The token {escape(number)} is good for nothing any more.")


def _password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise AccessError("There is no terminal to ask for the password at; give it on stdin with --password-stdin.")
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
