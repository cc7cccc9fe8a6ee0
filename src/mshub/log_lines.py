"""Lines of the server's log, for people or for programs; what must not be read there is replaced first."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime, timezone

FORMATS = ("text", "json")

_hide: Callable[[str], str] = str


def hide_with(hide: Callable[[str], str]) -> None:
    """Let `hide` see every text before it is written, traces too, and return what may be read of it."""
    global _hide
    _hide = hide


class TextLines(logging.Formatter):
    """Lines as people read them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the trace below it."""
        return _hide(super().format(record))


class JsonLines(logging.Formatter):
    """A JSON object per record: ``time``, ``level``, ``logger``, ``thread``, ``message``, and ``trace`` of an error."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object, in one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "thread": record.threadName,
            "message": _hide(record.getMessage()),
        }
        if record.exc_info:
            line["trace"] = _hide(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)
