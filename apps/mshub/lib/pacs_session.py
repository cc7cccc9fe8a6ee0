"""How a PACS is asked over HTTP: with time limits, and again where it had no time just now."""

from __future__ import annotations

import time
from typing import Any

import requests
from dicomweb_client.session_utils import create_session_from_user_pass
from monailabel.config import settings
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ProtocolError

CONNECT_S, READ_S = 3.0, 30.0
"""How long a connection may take to open, and how long it may be silent while pixels come."""
SHARE_OF_ANSWER = 1 / 3
"""A PACS may think about a question that is not for pixels for this share of the time."""
BUSY = frozenset({429, 500, 502, 503, 504})
"""Statuses a PACS may answer that has no time just now: what was asked is asked again after each of `PAUSES_S`."""
PAUSES_S = (0.3, 1.0)
LONGEST_PAUSE_S = 3.0
"""The most of what the PACS asks for by ``Retry-After``."""
SLOW_S, SHARE_OF_ASKING = 0.5, 0.1
"""A PACS that takes longer to answer what is asked again and again is asked less often: for this share of the time."""


def pacs_session(silence_s: float) -> requests.Session:
    """Return a session that waits `silence_s` at most for pixels to go on, and less for other answers."""
    known = credentials()
    session = create_session_from_user_pass(*known) if known else requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Patience(silence_s))
    return session


def credentials() -> tuple[str, str] | None:
    """Return user name and password for the PACS, if this server has been given them."""
    user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
    return (user, password) if user and password else None


class _Patience(HTTPAdapter):
    """Requests that name no time limit get ours; searches and retrievals are asked again of a busy PACS.

    A question sent on a connection that the PACS was just closing, because nothing was said on it for a while, is asked
    again at once.
    """

    def __init__(self, silence_s: float) -> None:
        super().__init__(pool_maxsize=16)
        self._silence_s = silence_s

    def send(self, request: Any, **options: Any) -> requests.Response:  # type: ignore[override]
        told = "json" in (request.headers.get("Accept") or "")
        silence_s = self._silence_s * SHARE_OF_ANSWER if told else self._silence_s
        options["timeout"] = options.get("timeout") or (CONNECT_S, silence_s)
        if request.method != "GET":
            return super().send(request, **options)
        for pause in PAUSES_S:
            answer = self._get(request, **options)
            if answer.status_code not in BUSY:
                return answer
            answer.close()
            time.sleep(_pause(answer, pause))
        return self._get(request, **options)

    def _get(self, request: Any, **options: Any) -> requests.Response:
        try:
            return super().send(request, **options)
        except requests.ConnectionError as error:
            if not isinstance(next(iter(error.args), None), ProtocolError):
                raise
            return super().send(request, **options)


def _pause(answer: requests.Response, least_s: float) -> float:
    asked = answer.headers.get("Retry-After", "")
    return min(max(least_s, float(asked)), LONGEST_PAUSE_S) if asked.isdecimal() else least_s


def pause_after(took_s: float, least_s: float) -> float:
    """Return how long not to ask the same again after an answer that took so long."""
    return max(least_s, took_s / SHARE_OF_ASKING) if took_s > SLOW_S else least_s
