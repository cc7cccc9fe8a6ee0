"""Accounts of the machine: whose the server is, and who is at its command line."""

from __future__ import annotations

import os
from pathlib import Path

if os.name == "posix":
    import pwd


def account() -> str:
    """Return the name of the account this process runs as; its number where it has no name, "" on Windows."""
    if os.name != "posix":
        return ""
    return _name(os.geteuid())


def owner_to_become(home: Path) -> tuple[int, int, str] | None:
    """Return user, group and name of the account whose server's state `home` is, where root is at work for it.

    It is the account that a server there ran as, by the key that only a server makes; before the first start the one
    that the folder belongs to, or where it is to be made. None where that is root itself, and for all but root.
    """
    if os.name != "posix" or os.geteuid() != 0:
        return None
    marks = (home / "audit.key", home, *home.absolute().parents)
    found = next(mark for mark in marks if mark.exists()).stat()
    return (found.st_uid, found.st_gid, _name(found.st_uid)) if found.st_uid != 0 else None


def become(user: int, group: int, name: str) -> bool:
    """Go on as another account, for good, with its rights and no others; False where this root may not."""
    try:
        os.initgroups(name, group)
        os.setgid(group)
        os.setuid(user)
    except PermissionError:
        return False
    known = _known(user)
    if known is not None:
        os.environ["HOME"] = known.pw_dir
    return True


def _name(user: int) -> str:
    known = _known(user)
    return str(user) if known is None else known.pw_name


def _known(user: int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(user)
    except KeyError:
        return None
