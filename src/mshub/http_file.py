"""Download one file over HTTP or HTTPS, and go on where the last try stopped if the file is provably the same."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from mshub.archive import MAX_BYTES
from mshub.checksums import file_sha256, running_sha256
from mshub.downloads import ATTEMPTS, Progress, by_hand, local_errors, mismatch
from mshub.errors import DownloadError

logger = logging.getLogger(__name__)

WAIT_S = 1.0  # before the second attempt; doubles with every further one
_TIMEOUT = httpx.Timeout(30.0, read=60.0)


class _TransientError(Exception):
    """An attempt failed in a way that may pass."""


def fetch_file(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
    client: httpx.Client | None = None,
    model_id: str = "MODEL_ID",
    max_bytes: int = MAX_BYTES,
    attempts: int = ATTEMPTS,
    wait_s: float = WAIT_S,
) -> Path:
    """Download one file over HTTP or HTTPS.

    Bytes arrive in ``<target>.part``; ``<target>.part.json`` remembers the ETag or Last-Modified date they belong to,
    so that a later try can ask for the rest only if the file is unchanged.

    Parameters
    ----------
    url : str
    target : Path
        Final name of the file. Its folder is created. An existing file is kept if it has the given `sha256` and
        replaced otherwise.
    sha256 : str, optional
        Expected hex digest.
    progress : callable, optional
        See `Progress`.
    client : httpx.Client, optional
        Default: a new one with timeouts, honouring the proxy variables of the environment.
    model_id : str
        For messages.
    max_bytes : int
        Refuse a larger file.
    attempts : int
        How often to try when the connection or the server fails.
    wait_s : float
        Pause before the second attempt, in seconds; doubles with each.

    Returns
    -------
    Path
        `target`.

    Raises
    ------
    DownloadError
        The address is no http(s), the server refused, or the transfer did not complete; the bytes that arrived are
        kept for the next try.
    ChecksumMismatch
        The file has another sha256; it was removed.
    """
    shown = _checked_url(url)
    if sha256 and target.is_file() and file_sha256(target) == sha256.lower():
        return target
    part = _Part(target, url)
    transfer = _Transfer(url, shown, part, model_id, max_bytes, progress)
    with local_errors(target.parent), _client(client) as http:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = _persistently(transfer, http, attempts, wait_s)
        if sha256 and found != sha256.lower():
            part.discard()
            raise mismatch(shown, found, sha256)
        part.publish()
    return target


def _checked_url(url: str) -> str:
    """Return the URL as messages show it: without the query and the user, which may hold secrets."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        parts, port = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DownloadError(f"{url!r} cannot be downloaded. Expected an address that starts with https:// or http://.")
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"


def _client(client: httpx.Client | None) -> AbstractContextManager[httpx.Client]:
    return nullcontext(client) if client else httpx.Client(timeout=_TIMEOUT)


def _persistently(transfer: _Transfer, http: httpx.Client, attempts: int, wait_s: float) -> str:
    for number in range(1, attempts + 1):
        try:
            return transfer.attempt(http)
        except _TransientError as error:
            reason = str(error)
            logger.warning("%s: attempt %d of %d failed: %s", transfer.shown, number, attempts, reason)
        if number < attempts:
            time.sleep(wait_s * 2 ** (number - 1))
    kept = transfer.part.size()
    again = f"{kept:,} bytes are kept: run the command again to go on from there" if kept else "Try again later"
    raise DownloadError(f"{transfer.shown} could not be downloaded in {attempts} attempts: {reason}. {again}.")


class _Part:
    """The bytes of `target` that arrived so far, and which state of the remote file they belong to."""

    def __init__(self, target: Path, url: str) -> None:
        self._target = target
        self.path = target.with_name(f"{target.name}.part")
        self._state_path = target.with_name(f"{target.name}.part.json")
        self._url_sha256 = hashlib.sha256(url.encode()).hexdigest()

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def validator(self) -> str | None:
        """Return what If-Range needs; None where the bytes cannot be proven to belong to the same file."""
        try:
            state = json.loads(self._state_path.read_text(encoding="utf-8"))
            return str(state["validator"]) if state["url_sha256"] == self._url_sha256 else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def resume_headers(self) -> dict[str, str]:
        size, validator = self.size(), self.validator()
        return {"Range": f"bytes={size}-", "If-Range": validator} if size and validator else {}

    def begin(self, validator: str | None) -> None:
        self.discard()
        self.path.touch()
        if validator:
            state = {"url_sha256": self._url_sha256, "validator": validator}
            self._state_path.write_text(json.dumps(state), encoding="utf-8")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._state_path.unlink(missing_ok=True)

    def publish(self) -> None:
        self.path.replace(self._target)
        self._state_path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Transfer:
    url: str
    shown: str
    part: _Part
    model_id: str
    max_bytes: int
    progress: Progress | None

    def attempt(self, http: httpx.Client) -> str:
        """Receive the file, or the rest of it, into the part, and return the sha256 of the whole."""
        # A compressed transfer would make byte offsets meaningless.
        headers = {"Accept-Encoding": "identity", **self.part.resume_headers()}
        try:
            with http.stream("GET", self.url, headers=headers, follow_redirects=True) as response:
                self._check_status(response)
                self._check_content(response)
                return self._receive(response, self._start(response))
        except httpx.UnsupportedProtocol as error:
            raise DownloadError(f"{self.shown} redirects to something else than http(s). Check the address.") from error
        except httpx.TransportError as error:
            raise _TransientError(str(error) or type(error).__name__) from error
        except httpx.HTTPError as error:
            raise DownloadError(f"{self.shown} could not be downloaded ({error}). Check the address.") from error

    def _check_status(self, response: httpx.Response) -> None:
        code = response.status_code
        if code in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
            return
        found = f"{code} {response.reason_phrase}".strip()
        if code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            self.part.discard()
        if code in (httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE, httpx.codes.TOO_MANY_REQUESTS) or code >= 500:
            raise _TransientError(f"the server answered {found}")
        raise DownloadError(f"{self.shown}: the server answered {found}. {_advice(code, self.model_id)}")

    def _check_content(self, response: httpx.Response) -> None:
        if self.url.startswith("https:") and response.url.scheme != "https":
            raise DownloadError(f"{self.shown} redirects from https to http. Expected https all the way.")
        if response.headers.get("Content-Type", "").lower().startswith("text/html"):
            raise self._is_web_page()
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise DownloadError(f"{self.shown} was sent {encoding}-compressed although plain bytes were asked for.")

    def _is_web_page(self) -> DownloadError:
        return DownloadError(
            f"{self.shown} is a web page (HTML), not a file: perhaps a sign-in or a page about the file. Open it in a "
            f"browser to find the file's own address, or {by_hand(self.model_id)}."
        )

    def _start(self, response: httpx.Response) -> int:
        """Return the offset of the first byte of this response; 0 starts again."""
        validator = _validator(response)
        if response.status_code == httpx.codes.OK:
            self.part.begin(validator)
            return 0
        size = self.part.size()
        first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if not first or int(first[1]) != size or validator not in (None, self.part.validator()):
            self.part.discard()
            raise _TransientError("the server resumed another file or position than asked for")
        return size

    def _receive(self, response: httpx.Response, start: int) -> str:
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        self._check_size(total or 0)
        self._check_disk((total or 0) - start)
        digest, done = running_sha256(self.part.path), start
        with self.part.path.open("ab") as out:
            for chunk in response.iter_raw():
                if done == 0 and _looks_like_html(chunk):
                    raise self._is_web_page()
                done += len(chunk)
                self._check_size(done)
                out.write(chunk)
                digest.update(chunk)
                if self.progress:
                    self.progress(done, total)
        if total is not None and done != total:
            raise _TransientError(f"{done:,} of {total:,} bytes arrived")
        return digest.hexdigest()

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            self.part.discard()
            raise DownloadError(
                f"{self.shown} has {size:,} bytes or more; at most {self.max_bytes:,} are accepted. Check the address."
            )

    def _check_disk(self, missing: int) -> None:
        folder = self.part.path.parent
        free = shutil.disk_usage(folder).free
        if missing > free:
            raise DownloadError(f"{self.shown} needs {missing:,} more bytes; {folder} has {free:,} free. Make room.")


def _validator(response: httpx.Response) -> str | None:
    """Return the ETag, or the date where there is none; a weak ETag does not promise equal bytes."""
    etag = response.headers.get("ETag")
    date = response.headers.get("Last-Modified")
    return str(etag) if etag and not etag.startswith("W/") else date


def _looks_like_html(chunk: bytes) -> bool:
    return chunk[:64].lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _advice(code: int, model_id: str) -> str:
    if code in (401, 403):
        return f"Access is restricted: open the address in a browser, ask for access if needed, {by_hand(model_id)}."
    if code in (404, 410):
        return f"The file is not there (any more): check the url in the model's card, or {by_hand(model_id)}."
    return f"Expected 200 OK: open the address in a browser, {by_hand(model_id)}."
