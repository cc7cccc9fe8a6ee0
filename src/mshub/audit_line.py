"""Lines of the audit log: the server writes one per request; what is done beside it, at its machine, is told here."""

from __future__ import annotations

import getpass
import json
import logging
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mshub.atomic_file import for_the_owner, make_folder

logger = logging.getLogger(__name__)


def audit_file(home: Path) -> Path:
    """Return the newest file of the audit log of the server whose state lies in `home`."""
    return home / "logs" / "audit.jsonl"


def audit_line(**facts: Any) -> str:
    """Return a line, which begins with the time."""
    return json.dumps({"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **facts}, default=str)


def tell(home: Path, action: str, **facts: Any) -> None:
    """Add a line about what somebody did at the machine, who is no user of the server but an `account` of the machine.

    A server that runs goes on writing to the same file. That the line cannot be written is logged, and what was done
    stays done, as with requests.
    """
    path = audit_file(home)
    try:
        make_folder(path.parent)
        with open(path, "a", encoding="utf-8", opener=for_the_owner) as file:
            file.write(audit_line(account=_account(), action=action, **facts) + "\n")
    except OSError as error:
        logger.error("the audit log cannot be written: %s", error)


def _account() -> str:
    """Return who is at work, also behind ``sudo``; a number where the machine has no name for it."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid()) if hasattr(os, "getuid") else ""
