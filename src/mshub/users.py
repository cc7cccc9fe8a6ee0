"""Who may use the server, and as what: one file of names, roles, hashed passwords and hashed API tokens.

The file is read again whenever it changed, so a server knows at once what `mshub users` did. Only its owner can read
it, and nothing in it lets anybody log in: passwords are kept as bcrypt has them, tokens (random, 256 bits) as SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from typing import Any

import bcrypt
from filelock import FileLock

from mshub.atomic_file import replace_json
from mshub.errors import AccessError

ROLES = ("viewer", "annotator", "admin")
"""Each may do what those before it may: look; predict, draw and submit; train, promote and delete."""
SHORTEST, LONGEST = 10, 72
"""Of a password: characters, and bytes, as bcrypt looks at no more of them."""
TOKEN_PREFIX = "mshub_"  # what scanners of secrets look for
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class User:
    """Somebody who may use the server.

    Attributes
    ----------
    name : str
    role : str
        One of `ROLES`.
    since : datetime
        When the password was set; logins from before are over.
    """

    name: str
    role: str
    since: datetime

    def may(self, role: str) -> bool:
        """Return whether this user may do what `role` may."""
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True)
class Token:
    """What is known of an API token; not the token, which was shown once.

    Attributes
    ----------
    number : str
        What it is called, as in ``mshub users revoke``.
    user, note : str
        Whose it is, and what for.
    role : str
        At most the user's own, as that is today.
    expires : datetime
    """

    number: str
    user: str
    note: str
    role: str
    expires: datetime


class UserFile:
    """The users of a server.

    Parameters
    ----------
    path : Path
        ``users.json``; made when the first user is added.

    Methods that change something raise `AccessError` where it cannot be done; the message says why.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: tuple[tuple[int, int, int] | None, dict[str, Any]] = (None, {})

    # -- reading ------------------------------------------------------------------------------------------------

    def __bool__(self) -> bool:
        """Whether there is a user."""
        return bool(self._content())

    def users(self) -> list[User]:
        """Return all users by name."""
        return [self._user(name, facts) for name, facts in sorted(self._content().items())]

    def user(self, name: str) -> User | None:
        """Return a user; None if there is none of this name."""
        facts = self._content().get(name)
        return None if facts is None else self._user(name, facts)

    def tokens(self) -> list[Token]:
        """Return all API tokens, expired ones too."""
        return [
            self._token(name, facts, number)
            for name, facts in sorted(self._content().items())
            for number in facts["tokens"]
        ]

    def with_password(self, name: str, password: str) -> User | None:
        """Return the user with this name and password; None if one of them is wrong.

        Takes as long where the name is unknown, a fifth of a second.
        """
        facts = self._content().get(name)
        is_right = _is_password(password, facts["password"] if facts else _hash_of_nothing())
        return self._user(name, facts) if facts is not None and is_right else None

    def with_token(self, token: str, now: datetime | None = None) -> User | None:
        """Return the user of an API token, with its role; None if it is unknown or expired."""
        digest, now = digest_of(token), now or datetime.now(timezone.utc)
        for name, facts in self._content().items():
            for number, known in facts["tokens"].items():
                if secrets.compare_digest(known["sha256"], digest):
                    found = self._token(name, facts, number)
                    user = self._user(name, facts)
                    return User(name, found.role, user.since) if found.expires > now else None
        return None

    def _user(self, name: str, facts: dict[str, Any]) -> User:
        return User(name, facts["role"], datetime.fromisoformat(facts["since"]))

    def _token(self, name: str, facts: dict[str, Any], number: str) -> Token:
        known = facts["tokens"][number]
        role = min(known["role"], facts["role"], key=ROLES.index)
        return Token(number, name, known["note"], role, datetime.fromisoformat(known["expires"]))

    def _content(self) -> dict[str, Any]:
        """Return name -> facts, read again if the file is another one.

        A file that was there and is gone means a disk that went away, not a server without users.
        """
        try:
            found = self._path.stat()
        except FileNotFoundError:
            if self._read[1]:
                raise AccessError(
                    f"{self._path.name} is gone from {self._path.parent.name}/. Nobody can log in. Put it back, or "
                    "restart the server to have one without users."
                ) from None
            return {}
        except OSError as error:
            raise self._unreadable(error) from error
        state = (found.st_ino, found.st_mtime_ns, found.st_size)
        if self._read[0] != state:
            try:
                self._read = state, self._parsed()
            except OSError as error:
                raise self._unreadable(error) from error
        return self._read[1]

    def _unreadable(self, error: OSError) -> AccessError:
        return AccessError(
            f"{self._path.name} in {self._path.parent.name}/ cannot be read ({error.strerror}). Nobody can log in. "
            "Expected a file that belongs to the account the server runs as."
        )

    def _parsed(self) -> dict[str, Any]:
        try:
            users: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))["users"]
            for name, facts in users.items():
                self._user(name, facts), ROLES.index(facts["role"]), facts["password"].encode()
                [self._token(name, facts, number) for number in facts["tokens"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AccessError(
                f"{self._path.name} in {self._path.parent.name}/ is damaged ({type(error).__name__}: {error}). Nobody "
                "can log in. Put a backup in its place, or remove it and add the users again."
            ) from error
        return users

    # -- changing -----------------------------------------------------------------------------------------------

    def add(self, name: str, password: str, role: str) -> None:
        """Add a user; the first one has to be admin."""
        if not _NAME.fullmatch(name):
            raise AccessError(
                f"The name {name[:80]!r} is refused: expected at most 64 letters, digits, '.', '_', '@' and '-', "
                "beginning with a letter or digit."
            )
        with self._changed() as users:
            if name in users:
                raise AccessError(f"There is a user {name} already; see `mshub users password` and `mshub users role`.")
            if not users and _checked_role(role) != ROLES[-1]:
                raise AccessError("The first user has to be admin: somebody must be able to train and to promote.")
            users[name] = {"role": _checked_role(role), **_password_facts(password), "tokens": {}}

    def remove(self, name: str) -> None:
        """Remove a user with all tokens; what the user submitted stays."""
        with self._changed() as users:
            self._known(users, name)
            if len(users) > 1:
                self._refuse_last_admin(users, name)
            del users[name]

    def set_password(self, name: str, password: str) -> None:
        """Give a user another password; logins end, tokens stay."""
        with self._changed() as users:
            self._known(users, name).update(_password_facts(password))

    def set_role(self, name: str, role: str) -> None:
        """Give a user another role; tokens may at most what their user may."""
        with self._changed() as users:
            facts = self._known(users, name)
            if _checked_role(role) != ROLES[-1]:
                self._refuse_last_admin(users, name)
            facts["role"] = role

    def create_token(self, name: str, note: str, days: int, role: str | None = None) -> str:
        """Return a new API token of a user, for scripts; it is shown this once.

        Parameters
        ----------
        name, note : str
            Whose it is, and what for.
        days : int
            How long it is good.
        role : str, optional
            Less than the user's own, if it is to do less.
        """
        if not 1 <= days <= 3660:
            raise AccessError(f"A token for {days} days is refused: expected 1 to 3660.")
        token, now = TOKEN_PREFIX + secrets.token_urlsafe(32), datetime.now(timezone.utc)
        with self._changed() as users:
            facts = self._known(users, name)
            wanted = _checked_role(role or facts["role"])
            if ROLES.index(wanted) > ROLES.index(facts["role"]):
                raise AccessError(f"{name} is {facts['role']}; a token of theirs cannot be {wanted}.")
            facts["tokens"][number_of(token)] = {
                "sha256": digest_of(token),
                "note": note[:200],
                "role": wanted,
                "created": now.isoformat(timespec="seconds"),
                "expires": (now + timedelta(days=days)).isoformat(timespec="seconds"),
            }
        return token

    def revoke_token(self, number: str) -> None:
        """Take an API token back."""
        with self._changed() as users:
            for facts in users.values():
                if facts["tokens"].pop(number, None) is not None:
                    return
            raise AccessError(f"There is no token {number[:80]!r}; see `mshub users tokens`.")

    @contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        """Yield name -> facts to be changed, and write them if the block succeeds; one process at a time."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._path.with_name(f".{self._path.name}.lock")):
            users = json.loads(json.dumps(self._content()))
            yield users
            replace_json(self._path, {"users": users}, private=True)

    def _known(self, users: dict[str, Any], name: str) -> dict[str, Any]:
        if name not in users:
            raise AccessError(f"There is no user {name[:80]!r}. Known: {', '.join(sorted(users)) or 'none'}.")
        facts: dict[str, Any] = users[name]
        return facts

    def _refuse_last_admin(self, users: dict[str, Any], name: str) -> None:
        admins = [other for other, facts in users.items() if facts["role"] == ROLES[-1]]
        if admins == [name]:
            raise AccessError(f"{name} is the last admin; make another user admin first.")


def user_file(home: Path) -> UserFile:
    """Return the users of the server whose state lies in `home`."""
    return UserFile(home / "users.json")


def digest_of(token: str) -> str:
    """Return what is kept of a token."""
    return hashlib.sha256(_bytes(token)).hexdigest()


def number_of(token: str) -> str:
    """Return what a token is called where nobody may learn it."""
    return digest_of(token)[:8]


def _checked_role(role: str) -> str:
    if role not in ROLES:
        raise AccessError(f"The role {role[:80]!r} is unknown; expected {', '.join(ROLES)}.")
    return role


def _password_facts(password: str) -> dict[str, str]:
    if len(password) < SHORTEST or not _fits(password):
        raise AccessError(
            f"This password has {len(password)} characters; expected at least {SHORTEST}, and at most {LONGEST} bytes. "
            "A few words are easier to remember than signs."
        )
    now = datetime.now(timezone.utc)
    return {"password": bcrypt.hashpw(_bytes(password), bcrypt.gensalt()).decode(), "since": now.isoformat()}


def _is_password(password: str, kept: str) -> bool:
    return bcrypt.checkpw(_bytes(password) if _fits(password) else b"", kept.encode())


def _fits(password: str) -> bool:
    """Return whether bcrypt looks at all of a password."""
    return len(_bytes(password)) <= LONGEST and "\0" not in password


def _bytes(password: str) -> bytes:
    return password.encode("utf-8", "surrogatepass")


@cache
def _hash_of_nothing() -> str:
    """Return a hash no password has."""
    return bcrypt.hashpw(secrets.token_bytes(32).hex().encode(), bcrypt.gensalt()).decode()
