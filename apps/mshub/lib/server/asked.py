"""What a route is told of a request besides its own parameters: who asks, and the options in a body."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, HTTPException
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User

AnyUser = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))]
Annotator = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))]
Admin = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))]


def by(user: User, options: dict[str, Any]) -> dict[str, Any]:
    """Return a client's options with who it is: whoever logged in, whatever the client says."""
    return {**options, "client_id": user.username} if user.username else options


def signed(user: User, info: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be stored of an image or a label with who logged in to store it."""
    return {**info, "user": user.username} if user.username else info


def options_in(body: Any, example: str) -> dict[str, Any]:
    """Return the options in a request's body; nothing stands for none.

    Raises
    ------
    HTTPException
        400: it is no JSON object; the message shows an `example`.
    """
    if body is not None and not isinstance(body, dict):
        raise HTTPException(400, f"The request's body is no JSON object: expected options such as {example}.")
    return dict(body or {})
