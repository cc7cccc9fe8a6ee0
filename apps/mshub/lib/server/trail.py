"""Which requests the audit log tells of, and what: the route and not the address, which can name a patient."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Any

from starlette.requests import Request

from lib.audit import AuditLog
from lib.server.permissions import SAFE, Permission
from mshub.users import User

SAME_STUDY_S = 600.0
"""A study that is read in hundreds of requests is one line per person and so many seconds."""
SAME_STRANGER_S = 60.0
"""And one line is told of whoever knocks again and again, who could otherwise make the log forget what was before."""
IMAGE_NAMES = {
    ("DELETE", "/datastore/"): "id",
    ("DELETE", "/datastore/image"): "id",
    ("DELETE", "/datastore/label"): "id",
    ("GET", "/datastore/label"): "label",
    ("GET", "/datastore/label/info"): "label",
    ("PUT", "/datastore/label/info"): "label",
    ("PUT", "/datastore/updatelabelinfo"): "label",
}
"""Parameter by which a route of MONAI Label's names an image, if not ``image``: no other may be told in its place."""
INFER = ("POST", "/infer/{model}")
"""Takes the image of a session, where one is named, and not that of ``image``; no other route takes one by a query."""
HASHED = ("image", "session", "tried")
"""What is noted in clear while a request is answered, and told as a hash: an image, a session, a name nobody has."""
LONGEST = 64


class Trail:
    """The lines of one server's audit log.

    Parameters
    ----------
    log : AuditLog
    """

    def __init__(self, log: AuditLog) -> None:
        self._log = log
        self._told: dict[tuple[str, ...], float] = {}

    def tell(
        self,
        request: Request,
        permission: Permission | None,
        parameters: dict[str, Any],
        user: User | None,
        status: int,
        facts: dict[str, Any],
    ) -> None:
        """Write the line of an answered request, if it gets one.

        Parameters
        ----------
        request, status
            What was asked, and how it was answered.
        permission, parameters
            What it needed, and what its path says.
        user : User, optional
            None for a stranger.
        facts : dict
            What else is known.
        """
        action = f"{request.method if permission else '(other)'} {permission.path if permission else '(none)'}"
        address, study = request.client.host if request.client else "", _study(parameters.get("path", ""))
        is_refused = status in (401, 403, 429) or (permission is None and status >= 400)
        if not is_refused and not (permission and permission.is_audited):
            return
        facts = {name: self._log.hashed(str(told)) if name in HASHED else told for name, told in facts.items()}
        tried = facts.get("tried", "") if status == HTTPStatus.UNAUTHORIZED else ""
        if user is None and is_refused and self._is_known(SAME_STRANGER_S, address, action, str(status), tried):
            return
        if user and study and request.method in SAFE and self._is_known(SAME_STUDY_S, user.name, study, str(status)):
            return
        who = {"user": user.name if user else None, "role": user.role if user else None, "from": address or None}
        what = self._what(request, permission, parameters)
        studied = {"study": self._log.hashed(study)} if study else {}
        self._log.write(**{**who, "action": action, **what, **studied, **facts}, status=status)

    def _what(self, request: Request, permission: Permission | None, parameters: dict[str, Any]) -> dict[str, str]:
        """Return image and session, as hashes, and what is nobody's name: models, strategies, batches, tags."""
        query = request.query_params
        route = request.method, permission.path if permission else ""
        session = parameters.get("session_id") or (query.get("session_id") if route == INFER else None)
        image = None if session else parameters.get("image") or query.get(IMAGE_NAMES.get(route, "image"))
        told = {name: parameters.get(name) for name in ("model", "strategy", "batch")} | {"tag": query.get("tag")}
        hashed = {kind: self._log.hashed(one) for kind, one in (("image", image), ("session", session)) if one}
        return hashed | {name: str(value)[:LONGEST] for name, value in told.items() if value}

    def _is_known(self, seconds: float, *key: str) -> bool:
        """Return whether the same was told so short a time ago; if not, it counts as told now."""
        now = time.monotonic()
        if self._told.get(key, 0.0) > now:
            return True
        self._told = {other: until for other, until in self._told.items() if until > now} | {key: now + seconds}
        return False


def _study(path: str) -> str:
    """Return the UID of the study that a path of DICOMweb reads from."""
    parts = path.split("/")
    return parts[parts.index("studies") + 1] if "studies" in parts[:-1] else ""
