"""What each role may ask the server for. What is not listed here is refused, whoever asks.

A route that appears with a new version of MONAI Label is thus closed until somebody thought about it; a test names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from starlette.routing import compile_path

PUBLIC = "public"
"""Asked for by those who have not logged in yet."""
SAFE = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing."""

_PERMITTED = """
GET    public    /login                               quiet
POST   public    /login
GET    public    /login/oidc                          quiet
GET    public    /login/oidc/callback
POST   public    /logout
GET    public    /auth/                               quiet
POST   public    /auth/token
GET    viewer    /auth/token/valid                    quiet
GET    public    /health/live                         quiet
GET    public    /health/ready                        quiet
GET    viewer    /metrics                             quiet
GET    public    /favicon.ico                         quiet
GET    public    /static/{path:path}                  quiet
GET    viewer    /                                    quiet
GET    viewer    /docs                                quiet
GET    viewer    /openapi.json                        quiet
GET    viewer    /app-config.js                       quiet
GET    viewer    /viewer                              quiet
GET    viewer    /viewer/{path:path}                  quiet
GET    viewer    /ohif/{path:path}                    quiet

GET    viewer    /info/                               quiet
POST   annotator /infer/{model}
POST   annotator /activelearning/{strategy}
GET    viewer    /train/                              quiet
POST   admin     /train/
POST   admin     /train/{model}
DELETE admin     /train/
GET    viewer    /batch/infer                         quiet
POST   admin     /batch/infer/{model}
DELETE admin     /batch/infer
GET    viewer    /scoring/                            quiet
POST   admin     /scoring/
POST   admin     /scoring/{method}
DELETE admin     /scoring/
GET    admin     /logs/
GET    admin     /logs/gpu

GET    viewer    /datastore/                          quiet
PUT    annotator /datastore/
DELETE admin     /datastore/
GET    viewer    /datastore/image
PUT    annotator /datastore/image
DELETE admin     /datastore/image
GET    viewer    /datastore/image/info                quiet
PUT    admin     /datastore/image/info
GET    viewer    /datastore/label
PUT    annotator /datastore/label
DELETE admin     /datastore/label
GET    viewer    /datastore/label/info                quiet
PUT    admin     /datastore/label/info
PUT    admin     /datastore/updatelabelinfo
GET    admin     /datastore/dataset
GET    annotator /session/{session_id}
PUT    annotator /session/
DELETE annotator /session/{session_id}
GET    viewer    /proxy/dicom/{path:path}
POST   annotator /proxy/dicom/{path:path}

GET    viewer    /mshub/status                        quiet
GET    viewer    /mshub/reports/{model}/{name}
GET    viewer    /mshub/labels/{image}                quiet
GET    viewer    /mshub/export/{image}
GET    viewer    /mshub/channels/{model}              quiet
GET    viewer    /mshub/prelabels                     quiet
GET    viewer    /mshub/prelabels/{batch}             quiet
POST   annotator /mshub/prelabels/{model}
PUT    annotator /mshub/prelabels/{batch}
DELETE annotator /mshub/prelabels/{batch}
"""
"""Method, role, path, and ``quiet`` where the audit log need not know: programs ask every few seconds."""


@dataclass(frozen=True)
class Permission:
    """One line of the table.

    Attributes
    ----------
    method : str
        GET stands for HEAD as well.
    role : str
        Who may, at least; `PUBLIC` for everybody.
    path : str
        As FastAPI writes it, with ``{parameters}``.
    is_audited : bool
    """

    method: str
    role: str
    path: str
    is_audited: bool


def _read(table: str) -> Iterator[Permission]:
    for line in table.splitlines():
        if line:
            method, role, path, *more = line.split()
            yield Permission(method, role, path, not more)


PERMITTED = tuple(_read(_PERMITTED))
_PATTERNS = tuple((permission, compile_path(permission.path)[0]) for permission in PERMITTED)


def permission_for(method: str, path: str) -> tuple[Permission | None, dict[str, Any]]:
    """Return what a request needs, None if it is not permitted at all, and the parameters in its path.

    A missing slash at the end, which the server answers with where to go, is forgiven.
    """
    wanted = "GET" if method == "HEAD" else method
    for permission, parameters in _permissions_at(path):
        if permission.method == wanted:
            return permission, parameters
    return None, {}


def methods_at(path: str) -> list[str]:
    """Return the methods that anybody may use at a path."""
    return sorted({permission.method for permission, _ in _permissions_at(path)})


def _permissions_at(path: str) -> Iterator[tuple[Permission, dict[str, Any]]]:
    for permission, pattern in _PATTERNS:
        if found := pattern.fullmatch(path) or pattern.fullmatch(f"{path}/"):
            yield permission, found.groupdict()
