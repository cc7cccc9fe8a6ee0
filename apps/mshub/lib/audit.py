"""Who did what, with which image and version of a model: one line of JSON per request, for those who must account.

Images and studies stand there as keyed hashes: whoever has the key (``audit.key``) can tell whether a line is about an
image they know; nobody else learns an id. Names of patients and what was typed never get here.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Callable
from contextvars import ContextVar
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, cast

from mshub.atomic_file import for_the_owner, replace_text
from mshub.audit_line import audit_file, audit_line
from mshub.errors import ConfigError

logger = logging.getLogger(__name__)

FILE_BYTES, FILES = 50 * 2**20, 20
HASH_DIGITS, KEY_BYTES = 16, 32
_WORD = re.compile(r"\w[\w.-]+\w|(?<![\w.-])\w{1,2}(?![\w-])")
"""An id, or a file name without its folder."""
_QUOTED, _SAID = re.compile(r"['\"=/]$"), re.compile(r"['\"&/]|:\s")
"""What stands before or after a short id where it is one: ids such as ``a`` or ``7`` are words, too."""
_UID = re.compile(r"(?<![\d.])(?!1\.2\.840\.10008\.)(?:\d+(?:\.\d+){3,}|2\.25\.\d+)")
"""What DICOM calls a series, a study or an object; those under 1.2.840.10008 are the standard's own words."""
SHORTEST_UID = 20

_facts: ContextVar[dict[str, Any] | None] = ContextVar("audited", default=None)


def note(**facts: Any) -> None:
    """Add to the line of the request that is being answered, such as ``version="v3"``; without one, do nothing."""
    known = _facts.get()
    if known is not None:
        known.update(facts)


def begin() -> dict[str, Any]:
    """Return what `note` adds to from now on, in this request and the threads that work for it."""
    facts: dict[str, Any] = {}
    _facts.set(facts)
    return facts


class Pseudonyms:
    """What stands for images and studies in logs: keyed hashes.

    Parameters
    ----------
    home : Path
        `MSHUB_HOME`, where the key is, or will be.
    """

    def __init__(self, home: Path) -> None:
        self._key = _key(home / "audit.key")

    def of(self, name: str) -> str:
        """Return what stands for an image or a study."""
        return hmac.new(self._key, name.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:HASH_DIGITS]

    def hide(self, text: str, image_of: Callable[[str], str | None]) -> str:
        """Return a text with what stands for the images named in it, and for all that looks like a UID of DICOM.

        Parameters
        ----------
        text : str
        image_of : callable
            Returns the id of the image that a word means, also one that is its file name; None if it is no image.
        """

        def hidden(found: re.Match[str]) -> str:
            image = image_of(found[0]) if _may_be_an_id(found) else None
            return _UID.sub(self._hidden_uid, found[0]) if image is None else self.of(image)

        return _WORD.sub(hidden, text)

    def _hidden_uid(self, found: re.Match[str]) -> str:
        return self.of(found[0]) if len(found[0]) >= SHORTEST_UID else found[0]


def _may_be_an_id(found: re.Match[str]) -> bool:
    """Return whether a word is long enough, such as ``P1`` or ``AB``, or at a place where no other word is meant."""
    word = found[0]
    if len(word) > 2 or (len(word) == 2 and (word.isupper() or not (word.isalpha() or word.isdigit()))):
        return True
    return bool(_QUOTED.search(found.string[: found.start()][-1:]) or _SAID.match(found.string, found.end()))


class AuditLog:
    """The lines of one server.

    Parameters
    ----------
    home : Path
        `MSHUB_HOME`: lines go to ``logs/audit.jsonl``, the key to ``audit.key``; both are their owner's.
    """

    def __init__(self, home: Path) -> None:
        self.hashed = Pseudonyms(home).of
        path = audit_file(home)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = _OwnersFile(path, maxBytes=FILE_BYTES, backupCount=FILES, encoding="utf-8")

    def write(self, **facts: Any) -> None:
        """Write one line; that it cannot be written is an error in the server's log, and the request goes on."""
        record = logging.LogRecord("audit", logging.INFO, "", 0, audit_line(**facts), None, None)
        self._handler.handle(record)


class _OwnersFile(RotatingFileHandler):
    """Log files that only their owner can read, from their first byte on."""

    def _open(self) -> TextIOWrapper:
        stream = open(self.baseFilename, self.mode, encoding=self.encoding, opener=for_the_owner)  # noqa: SIM115
        return cast(TextIOWrapper, stream)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        logger.exception("the audit log cannot be written")


def _key(path: Path) -> bytes:
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        key = secrets.token_bytes(KEY_BYTES)
        replace_text(path, key.hex(), private=True)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{path.name} is damaged; expected {KEY_BYTES} bytes in hex. Put a backup in its place.")
    return key
