"""What schemathesis is told beside the server's own description: hidden operations, names of files, known values.

Loaded by schemathesis itself, through schema.toml. The folder ``BENCH_KNOWN`` names holds what `schema.py` put there.
"""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import strategies as st

from lib.server.permissions import PERMITTED

FOLDER = Path(os.environ["BENCH_KNOWN"])
KNOWN: dict[str, list[Any]] = json.loads((FOLDER / "known.json").read_text())
"""Values that name something on the server, by parameter; ``METHOD /path parameter`` goes before ``parameter``."""
FILES = {name: (FOLDER / f"{name}.nii.gz").read_bytes() for name in ("image", "label")}
OBJECTS: list[dict[str, Any]] = [{}, {"client_id": "me"}, {"limit": 1}, {"epochs": 1, "iterations": 1}]
ALIKE = {("delete", "/datastore/"): "/datastore/image", ("post", "/scoring/"): "/scoring/{method}"}
"""Hidden operations and which one takes the same parameters."""
KNOWN_OF_4 = 3
"""In so many of four places a known value stands."""


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Add the operations that the server answers and does not describe, and what the files of forms are called."""
    paths = raw_schema["paths"]
    for permission in PERMITTED:
        path, method = permission.path.replace(":path}", "}"), permission.method.lower()
        found = paths.setdefault(path, {})
        found.setdefault(method, _hidden(paths, path, method))
        if method == "get":
            found.setdefault("head", {**copy.deepcopy(found["get"]), "operationId": f"head {path}"})
    for operation in (one for path in paths.values() for one in path.values()):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            content["encoding"] = {name: _called("scan.nii.gz") for name in ("file", "files", "label")}


def _hidden(paths: dict[str, Any], path: str, method: str) -> dict[str, Any]:
    like = copy.deepcopy(paths[ALIKE[method, path]][method]) if (method, path) in ALIKE else {}
    others = [one for one in like.get("parameters", []) if one["in"] != "path"]
    inside = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    named = {"operationId": f"{method} {path}", "responses": {"200": {"description": "what it says"}}}
    return {**like, **named, "parameters": inside + others}


def _called(filename: str) -> dict[str, Any]:
    shown = {"schema": {"type": "string", "example": f'attachment; filename="{filename}"'}}
    return {"headers": {"Content-Disposition": shown}}


@schemathesis.hook
def flatmap_case(context: Any, case: Any) -> st.SearchStrategy[Any]:
    """Put known values in many of the places of a case."""
    return _with_known(case)


@st.composite
def _with_known(draw: st.DrawFn, case: Any) -> Any:
    def is_known() -> bool:
        return draw(st.integers(1, 4)) <= KNOWN_OF_4

    operation = case.operation
    for declared, values in ((operation.path_parameters, case.path_parameters), (operation.query, case.query)):
        for name in (one.name for one in declared):
            known = KNOWN.get(f"{operation.label} {name}") or KNOWN.get(name)
            if known and isinstance(values, dict) and is_known():
                values[name] = draw(st.sampled_from(known))
    if case.media_type == "application/json" and is_known():
        case.body = draw(st.sampled_from(OBJECTS))
    elif isinstance(case.body, dict):
        case.body = {
            name: _field(draw, operation.label, name) if is_known() else one for name, one in case.body.items()
        }
    return case


def _field(draw: st.DrawFn, operation: str, name: str) -> Any:
    """Return a known value of a form's field."""
    if name in ("file", "files", "label"):
        content = FILES["label" if name == "label" else "image"]
        return [content] if name == "files" else content
    return draw(st.sampled_from(KNOWN.get(f"{operation} {name}") or KNOWN.get(name) or ["{}"]))
