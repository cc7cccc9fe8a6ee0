"""People who are logged in: random tokens, kept as hashes, good for a working day.

Guests are people without an entry in the file of users, who bring their role along, from a single sign-on. Their logins
end with the server, too: what the operator changed about the sign-on holds for everybody after a restart.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

from mshub.atomic_file import replace_json
from mshub.users import User, UserFile, digest_of

logger = logging.getLogger(__name__)

HOURS = 12.0
MOST_PER_USER = 20
"""So many places somebody is logged in at; the oldest login gives way."""


def _now() -> datetime:
    return datetime.now(timezone.utc)


class _Login(NamedTuple):
    name: str
    opened: datetime
    role: str | None = None
    """Of a guest; a user's stands in the file of users."""


class Logins:
    """Who is logged in; survives a restart of the server.

    Parameters
    ----------
    path : Path
        Where they are kept; only its owner can read it.
    users : UserFile
        Who there is: a login ends with its user, and when the password is set anew.
    hours : float
        How long a login is good.
    now : callable, optional
        Returns the time.

    May be used by any number of threads of one process.
    """

    def __init__(self, path: Path, users: UserFile, hours: float = HOURS, now: Callable[[], datetime] = _now) -> None:
        self._path, self._users, self._good_for, self._now = path, users, timedelta(hours=hours), now
        self._lock = threading.Lock()
        self._known = self._load()

    def open(self, user: User, *, is_guest: bool = False) -> str:
        """Return the token of a new login; a guest keeps the role for as long as it is good."""
        token, now = secrets.token_urlsafe(32), self._now()
        with self._lock:
            self._drop_expired(now)
            own = sorted((known.opened, digest) for digest, known in self._known.items() if known.name == user.name)
            for _, digest in own[: max(0, len(own) + 1 - MOST_PER_USER)]:
                del self._known[digest]
            self._known[digest_of(token)] = _Login(user.name, now, user.role if is_guest else None)
            self._save()
        return token

    def user_of(self, token: str) -> User | None:
        """Return who logged in with this token; None if nobody did, or not any more."""
        known = self._known.get(digest_of(token))
        if known is None:
            return None
        user = User(known.name, known.role, known.opened) if known.role else self._users.user(known.name)
        if user is None or known.opened < user.since or self._now() - known.opened > self._good_for:
            return None
        return user

    def close(self, token: str) -> None:
        """End a login."""
        with self._lock:
            if self._known.pop(digest_of(token), None) is not None:
                self._save()

    def _drop_expired(self, now: datetime) -> None:
        self._known = {digest: known for digest, known in self._known.items() if now - known.opened <= self._good_for}

    def _load(self) -> dict[str, _Login]:
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            return {
                digest: _Login(str(name), datetime.fromisoformat(opened)) for digest, (name, opened) in kept.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("%s is damaged (%s); everybody has to log in again", self._path.name, error)
            return {}

    def _save(self) -> None:
        known = {
            digest: [known.name, known.opened.isoformat()] for digest, known in self._known.items() if not known.role
        }
        replace_json(self._path, known, private=True)
