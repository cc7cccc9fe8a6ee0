"""Lines of the audit log: the server writes one per request; what is done beside it, at its machine, is told here."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mshub.accounts import account
from mshub.atomic_file import for_the_owner

logger = logging.getLogger(__name__)


def audit_file(home: Path) -> Path:
    """Return the newest file of the audit log of the server whose state lies in `home`."""
    return home / "logs" / "audit.jsonl"


def audit_line(**facts: Any) -> str:
    """Return a line, which begins with the time."""
    return json.dumps({"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **facts}, default=str)


def tell(home: Path, action: str, **facts: Any) -> None:
    """Add a line about what the machine did by itself: the gate lets a version serve.

    A server that runs goes on writing to the same file. That the line cannot be written is logged, and what was done
    stays done, as with requests.
    """
    path = audit_file(home)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", opener=for_the_owner) as file:
            file.write(audit_line(action=action, **facts) + "\n")
    except OSError as error:
        logger.error("the audit log cannot be written: %s", error)


def tell_of_a_person(home: Path, action: str, **facts: Any) -> None:
    """Add a line about what somebody did at the machine, who is no user of the server but an account of the machine.

    Behind ``sudo`` it says who came by it, too (`sudo_user`).
    """
    person = os.environ.get("SUDO_USER")
    tell(home, action, account=account(), **({"sudo_user": person} if person else {}), **facts)
