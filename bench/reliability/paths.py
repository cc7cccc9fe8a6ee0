"""Texts that would be paths, in the place of every parameter of every route: no file outside is read or written.

    python bench/reliability/paths.py              # all texts, all parameters; some minutes
    python bench/reliability/paths.py --quick      # every 25th text
    python bench/reliability/paths.py --count 240  # so many texts at most, of all kinds

Routes and parameters are those of the app itself. Around a real server lie canaries: beside its studies folder and
its `MSHUB_HOME`, above them, in its working directory and in its user's home. None of them is opened (the kernel tells
of each opening), changed, or in an answer, and no new one appears. Figures: bench/out/reliability/paths.json.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from arena import CASES, MODEL, Arena, keep, table
from bad_nifti import image, zipped
from traversals import traversals
from watch import Watch, snapshot

SECRET = "canary-4f1d7c09b2"
LEAKS = (SECRET.encode(), b"root:x:0:0")
VALID = {
    "image": CASES[0], "label": CASES[0], "id": "nobody", "tag": "final", "model": MODEL, "strategy": "random",
    "session_id": "00000000-0000-0000-0000-000000000000", "path": "studies", "name": "v1", "batch": "1",
    "method": "dice", "format": "nrrd", "params": "{}", "info": "{}", "username": "me", "password": "x",
}  # fmt: skip
KEYS = (
    *("image", "model", "session", "session_id", "label_tag", "tag", "strategy", "client_id", "device", "profile"),
    *("folds", "result_extension", "series", "name", "path", "bundle_path", "pretrained_path", "images", "label_info"),
)
"""What is tried as a name in JSON, each with every text."""
JSON_EVERY = 8
"""Of so many texts one is tried there: there are hundreds of such places."""
SLOW = ("/batch/infer/{model}", "/scoring/{method}", "/scoring/")
SLOW_TEXTS = 4
"""So many texts only for routes that start a process."""


@dataclass(frozen=True)
class Place:
    """Where in a request a text goes.

    Attributes
    ----------
    method, route : str
        The route as the app has it, with ``{parameters}``.
    kind : str
        ``path``, ``query``, ``form``, ``json`` or ``file`` (the name of an uploaded file).
    name : str
        Of the parameter.
    query, form, files : tuple of str
        The route's other parameters.
    """

    method: str
    route: str
    kind: str
    name: str
    query: tuple[str, ...] = ()
    form: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


# -- where ------------------------------------------------------------------------------------------------------------


def places() -> Iterator[Place]:
    """Yield every place of every route of the app."""
    from fastapi.routing import APIRoute

    from lib.server.asgi import app

    for route in app.routes:
        for method in sorted((getattr(route, "methods", None) or {"GET"}) - {"OPTIONS"}):
            if isinstance(route, APIRoute):
                yield from _places_of(method, route)
            else:
                path = getattr(route, "path", "")
                path = path if "{" in path else f"{path.rstrip('/')}/{{path:path}}"
                yield Place(method, path, "path", "path")


def _places_of(method: str, route: Any) -> Iterator[Place]:
    found = route.dependant
    query, body = tuple(one.alias for one in found.query_params), list(found.body_params)
    files = tuple(one.alias for one in body if type(one.field_info).__name__ == "File")
    form = tuple(one.alias for one in body if type(one.field_info).__name__ == "Form")
    others = {"query": query, "form": form, "files": files}
    for one in found.path_params:
        yield Place(method, route.path, "path", one.alias, **others)
    for name in query:
        yield Place(method, route.path, "query", name, **others)
    for name in form:
        yield Place(method, route.path, "form", name, **others)
    for name in files:
        yield Place(method, route.path, "file", name, **others)
    if len(form + files) < len(body) or {"params", "info"} & set(form):
        yield from (Place(method, route.path, "json", key, **others) for key in KEYS)


# -- asking -----------------------------------------------------------------------------------------------------------


class Asker:
    """Sends requests as they are: other clients would tidy their paths."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url).netloc
        self._connection = http.client.HTTPConnection(self._address, timeout=120)
        self._image = zipped(image((5, 6, 7)))

    def ways(self, place: Place, text: str) -> tuple[bool, ...]:
        """Return the ways to send a text there, percent-encoded and raw; once where both are the same request."""
        return (False,) if self._request(place, text, False) == self._request(place, text, True) else (False, True)

    def ask(self, place: Place, text: str, *, raw: bool) -> tuple[int, bytes]:
        """Send one request; returns status and answer with its headers."""
        path, body, kind = self._request(place, text, raw)
        for attempt in range(2):
            try:
                self._connection.request(place.method, path, body, {"Content-Type": kind} if body else {})
                answer = self._connection.getresponse()
                headers = "".join(f"{name}: {value}\n" for name, value in answer.getheaders()).encode("latin-1")
                return answer.status, headers + answer.read()
            except (http.client.HTTPException, ConnectionError):
                self._connection.close()
                if attempt:
                    raise
        raise AssertionError

    def _request(self, place: Place, text: str, raw: bool) -> tuple[str, bytes | None, str]:
        values = {**VALID, **({place.name: text} if place.kind in ("query", "form") else {})}
        path = re.sub(r"{(\w+)(:\w+)?}", lambda m: self._in_path(place, m[1], text, raw), place.route)
        query = {name: values[name] for name in place.query if name in values}
        if place.kind == "file":
            query.pop("image", None) if place.route.startswith("/datastore/image") else None
        pairs = urlencode(query)
        if raw and place.kind == "query":
            others = {name: value for name, value in query.items() if name != place.name}
            pairs = "&".join([*filter(None, [urlencode(others)]), f"{place.name}={_sendable(text, safe='/%:')}"])
        body, kind = self._body(place, values, text, raw)
        return path + (f"?{pairs}" if pairs else ""), body, kind

    def _in_path(self, place: Place, name: str, text: str, raw: bool) -> str:
        if place.kind != "path" or name != place.name:
            return quote(VALID.get(name, "x"), safe="")
        return _sendable(text, safe="/%:;=@!$&'()*+,~") if raw else quote(text, safe="")

    def _body(self, place: Place, values: dict[str, str], text: str, raw: bool) -> tuple[bytes | None, str]:
        as_json = json.dumps({place.name: [text] if raw else text, "profile": "fast"} | {place.name: text})
        if place.kind == "json" and not place.form + place.files:
            return as_json.encode(), "application/json"
        if not place.form + place.files:
            return None, ""
        fields = {name: values.get(name, "x") for name in place.form}
        if place.kind == "json":
            extra = {"save_label": True} if place.name == "label_tag" else {}
            fields |= {name: json.dumps({place.name: text, **extra}) for name in ("params", "info") if name in fields}
        if not place.files:
            return urlencode(fields).encode(), "application/x-www-form-urlencoded"
        wanted = place.files if place.kind == "file" or place.route != "/infer/{model}" else ()
        named = text if raw or place.kind != "file" else f"{text}.nii.gz"
        return _multipart(
            fields, {name: (named if name == place.name else "scan.nii.gz", self._image) for name in wanted}
        )


def _sendable(text: str, safe: str) -> str:
    """Return a text as raw as a request can carry it."""
    return quote(text, safe=safe + '\\|^`{}[]<>"-._')


def _multipart(fields: dict[str, str], files: dict[str, tuple[str, bytes]]) -> tuple[bytes, str]:
    """Return a form with files, their names as they are."""
    boundary, parts = "frontier4f1d", list[bytes]()
    for name, value in fields.items():
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for name, (filename, content) in files.items():
        shown = filename.replace("\r", "%0D").replace("\n", "%0A").replace('"', "%22")
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{shown}"\r\n\r\n'
        parts.append(head.encode() + content + b"\r\n")
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


# -- canaries ---------------------------------------------------------------------------------------------------------


@contextmanager
def guarded_site(root: Path) -> Iterator[Arena]:
    """Yield a server in the middle of canaries."""
    site, user = root / "site", root / "user"
    site.mkdir()
    user.mkdir()
    before = os.environ.get("HOME", "")
    os.environ["HOME"] = str(user)
    try:
        arena = Arena(site)
    finally:
        os.environ["HOME"] = before
    try:
        for folder in (root, root / "canary", root / "canary" / "canary", site, site / "canary", user):
            folder.mkdir(exist_ok=True)
            for name in ("canary.txt", "canary.json", "canary.html", "canary.nii.gz", "canary"):
                _write_canary(folder / name)
        (arena.studies / "link-to-canary").symlink_to(root / "canary")
        (arena.home / "reports" / MODEL).mkdir(parents=True)
        (arena.home / "reports" / MODEL / "link-to-canary").symlink_to(root / "canary")
        yield arena
    finally:
        arena.server.stop()


def _write_canary(path: Path) -> None:
    if path.is_dir() or path.suffix == "":
        return
    content = image((5, 6, 7))
    described = content[:148] + SECRET.encode().ljust(80, b"\0") + content[228:]  # descrip
    path.write_bytes(zipped(described) if path.name.endswith(".gz") else SECRET.encode() * 3)


def ask_all(root: Path, arena: Arena, texts: list[str]) -> dict[str, Any]:
    """Put every text in every place; returns the figures."""
    asker, statuses, leaks, errors, slow = Asker(arena.server.url), Counter[str](), list[str](), set[str](), 0.0
    everywhere = list({(one.method, one.route, one.kind, one.name): one for one in reversed([*places()])}.values())[
        ::-1
    ]
    own = (arena.studies, arena.home, arena.temporary, arena.server.log)
    before = snapshot(root, own)
    watch = Watch(
        [root, *(path for path in root.rglob("canary") if path.is_dir()), root / "site", root / "user"], "canary"
    )
    started, requests = time.monotonic(), 0
    for place in everywhere:
        for text in texts[:: _every(place, len(texts))]:
            for raw in asker.ways(place, text):
                began = time.monotonic()
                status, answer = asker.ask(place, text, raw=raw)
                requests, slow = requests + 1, max(slow, time.monotonic() - began)
                statuses[f"{status // 100}xx"] += 1
                where = f"{place.method} {place.route} {place.kind} {place.name}={text[:80]!r}"
                if any(secret in answer for secret in LEAKS):
                    leaks.append(where)
                if status >= 500:
                    errors.add(f"{place.method} {place.route} {place.kind} {place.name}: {status}")
    touched = watch.happened()
    watch.close()
    after = snapshot(root, own)
    return {
        "texts": len(texts),
        "routes": len({(place.method, place.route) for place in everywhere}),
        "places": len(everywhere),
        "requests": requests,
        "seconds": round(time.monotonic() - started),
        "slowest_s": round(slow, 2),
        "statuses": dict(statuses),
        "canaries": len([name for name in before if "canary" in Path(name).name]),
        "touched": touched,
        "changed": sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)),
        "in_answers": leaks,
        "server_errors": sorted(errors),
        "alive": arena.process.is_running(),
    }


def _every(place: Place, count: int) -> int:
    """Return of how many texts one is tried in a place."""
    if place.route in SLOW:
        return max(1, count // SLOW_TEXTS)
    return JSON_EVERY if place.kind == "json" and count > JSON_EVERY**2 else 1


def holds(figures: dict[str, Any]) -> bool:
    """Return whether nothing outside was read or written."""
    return not (figures["touched"] or figures["changed"] or figures["in_answers"]) and figures["alive"]


def report(figures: dict[str, Any]) -> str:
    """Return the figures as a table."""
    rows = [
        ("texts", figures["texts"]),
        ("routes, parameters", f"{figures['routes']}, {figures['places']}"),
        ("requests", figures["requests"]),
        ("canaries opened, read or written", len(figures["touched"])),
        ("files outside changed or new", len(figures["changed"])),
        ("canaries in answers", len(figures["in_answers"])),
        ("answers", ", ".join(f"{count} x {kind}" for kind, count in sorted(figures["statuses"].items()))),
        ("routes that answered 5xx", len(figures["server_errors"])),
    ]
    return table(("what", "found"), rows)


def main() -> None:
    """Ask for everything, and end with 1 if anything outside was touched."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\n", str(__doc__))[0])
    parser.add_argument("--count", type=int, default=10_000, help="texts at most")
    parser.add_argument("--quick", action="store_true", help="every 25th text")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="mshub-bench-"))
    try:
        texts = traversals(root)
        with guarded_site(root) as arena:
            figures = ask_all(root, arena, texts[:: 25 if options.quick else ceil(len(texts) / options.count)])
    finally:
        shutil.rmtree(root, ignore_errors=True)
    path = keep("paths_quick" if options.quick else "paths", figures)
    print(report(figures))
    for kind in ("touched", "changed", "in_answers", "server_errors"):
        for one in figures[kind][:40]:
            print(f"{kind.upper()} {one}")
    print(f"figures: {path}")
    sys.exit(0 if holds(figures) else 1)


if __name__ == "__main__":
    main()
