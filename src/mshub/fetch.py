"""Download weights: over HTTP(S) with httpx, from Google Drive with gdown.

A download in progress is a ``.part`` file (HTTP) or an ``ID.partial`` folder (Drive) beside its final name and gets
that name by one rename, so whatever carries the final name is complete. A later try goes on where the last one stopped:
over HTTP only if the server can prove that the file is still the same. gdown can compare no more than the size, so a
Drive file that was replaced by one of equal size in between is noticed only by a sha256 in the card. Two processes must
not fetch the same target at once: the caller holds a lock.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx

from mshub.archive import CHUNK, MAX_BYTES, file_sha256
from mshub.errors import ChecksumMismatch, DownloadError, MSHubError

logger = logging.getLogger(__name__)

Progress = Callable[[int, "int | None"], None]
"""Called with the bytes so far and the bytes expected, None where nobody said."""

ATTEMPTS = 4
WAIT_S = 1.0  # before the second attempt; doubles with every further one
MAX_DRIVE_FILES = 1_000
_NOT_NEEDED = re.compile(
    r"(?:^|/)(?:validation\w*|__MACOSX|\.[^/]*)(?:/|$)|(?:^|/)\w+_latest\.[\w.]+$|\.(?:nii|nii\.gz|npz|png)$"
)
_HTTP_TIMEOUT = httpx.Timeout(30.0, read=60.0)
_DRIVE_TIMEOUT_S = (30.0, 60.0)


def fetch_weights(
    *, model_id: str, kind: str, locator: str, sha256: str | None, folder: Path, progress: Progress | None = None
) -> Path:
    """Download a model's weights as its card says.

    Parameters
    ----------
    model_id : str
        For messages, and for the file name where the address has none.
    kind : str
        ``gdrive-folder``, ``gdrive-file`` or ``https``.
    locator : str
        Google Drive id, or URL.
    sha256 : str or None
        Hex digest of the one file to download, where known.
    folder : Path
        Where to put it, and where partial downloads wait for the next try; created if missing.
    progress : callable, optional
        See `Progress`.

    Returns
    -------
    Path
        The file, or the folder for ``gdrive-folder``.

    Raises
    ------
    DownloadError
        The weights cannot be had; the message says what to do.
    ChecksumMismatch
        They are not the expected ones; they were removed.
    """
    if kind == "gdrive-folder":
        return fetch_drive_folder(locator, folder, model_id=model_id, sha256=sha256, progress=progress)
    if kind == "gdrive-file":
        return fetch_drive_file(locator, folder, model_id=model_id, sha256=sha256, progress=progress)
    if kind == "https":
        target = folder / _file_name(locator, model_id)
        return fetch_file(locator, target, sha256=sha256, progress=progress, model_id=model_id)
    if kind == "bundled":
        raise DownloadError(f"The weights of {model_id} come with MSHub: there is nothing to download.")
    raise DownloadError(f"{model_id} has weights of kind {kind!r}. Expected gdrive-folder, gdrive-file or https.")


def _file_name(url: str, model_id: str) -> str:
    name = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or f"{model_id}.zip"


def _by_hand(model_id: str) -> str:
    return f"download by hand and run `mshub add {model_id} PATH`"


# -- HTTP -------------------------------------------------------------------------------------------------------------


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
    with _local_errors(target.parent), _client(client) as http:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = _persistently(lambda: transfer.attempt(http), transfer, attempts, wait_s)
        if sha256 and found != sha256.lower():
            part.discard()
            raise _mismatch(shown, found, sha256)
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
    return nullcontext(client) if client else httpx.Client(timeout=_HTTP_TIMEOUT)


@contextmanager
def _local_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"The download cannot be written to {folder} ({error}). Check the disk and permissions."
        ) from error


def _persistently(attempt: Callable[[], str], transfer: _Transfer, attempts: int, wait_s: float) -> str:
    for number in range(1, attempts + 1):
        try:
            return attempt()
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
            f"browser to find the file's own address, or {_by_hand(self.model_id)}."
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
        digest, done = _sha256_so_far(self.part.path), start
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


def _sha256_so_far(path: Path) -> hashlib._Hash:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest


def _looks_like_html(chunk: bytes) -> bool:
    return chunk[:64].lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _advice(code: int, model_id: str) -> str:
    by_hand = _by_hand(model_id)
    if code in (401, 403):
        return f"Access is restricted: open the address in a browser, ask for access if needed, {by_hand}."
    if code in (404, 410):
        return f"The file is not there (any more): check the url in the model's card, or {by_hand}."
    return f"Expected 200 OK: open the address in a browser, {by_hand}."


def _mismatch(what: str, found: str, expected: str) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"{what} has sha256 {found}, expected {expected.lower()}. The download was removed: run the command again; if "
        "it happens again, the published file is not the one in the model's card. Do not use it."
    )


# -- Google Drive -----------------------------------------------------------------------------------------------------


def fetch_drive_file(
    file_id: str,
    folder: Path,
    *,
    model_id: str,
    sha256: str | None = None,
    progress: Progress | None = None,
    max_bytes: int = MAX_BYTES,
    retries: int = ATTEMPTS - 1,
) -> Path:
    """Download one file from Google Drive into ``folder/<file_id>/``, under its own name.

    Parameters
    ----------
    file_id : str
        The ID in ``https://drive.google.com/file/d/ID``.
    folder : Path
        Created if missing. A complete earlier download in it is used again; delete ``folder/<file_id>`` to avoid it.
    model_id : str
        For messages.
    sha256 : str, optional
        Expected hex digest.
    progress : callable, optional
        See `Progress`.
    max_bytes : int
        Refuse a larger file.
    retries : int
        Further attempts when the connection fails.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    DownloadError
        Drive refused or could not be reached, or the file is too large.
    ChecksumMismatch
        The file has another sha256; it was removed.
    """
    page = f"https://drive.google.com/file/d/{_checked_id(file_id)}/view"
    drive = _Drive(page, model_id, progress, max_bytes, retries)

    def fill(staging: Path) -> None:
        drive.download(file_id, staging)

    return _only_file(_completed(folder, file_id, fill, page, sha256))


def fetch_drive_folder(
    folder_id: str,
    folder: Path,
    *,
    model_id: str,
    sha256: str | None = None,
    progress: Progress | None = None,
    max_bytes: int = MAX_BYTES,
    retries: int = ATTEMPTS - 1,
) -> Path:
    """Download a shared Google Drive folder to ``folder/<folder_id>``.

    Left out is what a trained-model folder holds but nobody predicts with: validation results, images, and
    ``checkpoint_latest.pth``.

    Parameters
    ----------
    folder_id : str
        The ID in ``https://drive.google.com/drive/folders/ID``.
    folder : Path
        Created if missing. A complete earlier download in it is used again: delete ``folder/<folder_id>`` to avoid it.
    model_id : str
        For messages.
    sha256 : str, optional
        Expected hex digest of the only file in the folder; refused if there are several.
    progress : callable, optional
        See `Progress`; the total is not known beforehand.
    max_bytes : int
        Refuse a larger folder.
    retries : int
        Further attempts per file when the connection fails.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    DownloadError
        Drive refused or could not be reached, or the folder is empty, too large, or cannot be stored as it is.
    ChecksumMismatch
        The file in it has another sha256; it was removed.
    """
    page = f"https://drive.google.com/drive/folders/{_checked_id(folder_id)}"
    drive = _Drive(page, model_id, progress, max_bytes, retries, one_file=False)

    def fill(staging: Path) -> None:
        listing = drive.listing(folder_id)
        if sha256 and len(listing) != 1:
            raise DownloadError(
                f"{page} holds {len(listing)} files and the card has one sha256. Remove it from the card."
            )
        for path, file_id in listing.items():
            drive.download(file_id, staging / path)
        _prune(staging, set(listing))

    return _completed(folder, folder_id, fill, page, sha256)


def _checked_id(drive_id: str) -> str:
    if not re.fullmatch(r"[\w-]{10,}", drive_id, re.ASCII):
        raise DownloadError(
            f"{drive_id!r} is no Google Drive id. Expected what follows /folders/ or /file/d/ in its link."
        )
    return drive_id


def _completed(folder: Path, name: str, fill: Callable[[Path], None], page: str, sha256: str | None) -> Path:
    """Return ``folder/name``; if it is not there, `fill` its ``.partial`` twin, check that and rename it."""
    done, staging = folder / name, folder / f"{name}.partial"
    with _local_errors(folder):
        current = done if done.is_dir() else staging
        if current is staging:
            staging.mkdir(parents=True, exist_ok=True)
            fill(staging)
        if sha256 and (found := file_sha256(_only_file(current))) != sha256.lower():
            shutil.rmtree(current)
            raise _mismatch(page, found, sha256)
        return done if current is done else current.replace(done)


def _only_file(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    if len(files) != 1:
        raise DownloadError(f"{folder} holds {len(files)} files, expected one. Delete that folder and fetch again.")
    return files[0]


def _prune(folder: Path, keep: set[str]) -> None:
    """Remove files of an earlier try that the remote folder no longer has: they would mix two models."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in keep:
            path.unlink()


@dataclass
class _Drive:
    """One download from Drive: gdown with our progress, limits and messages.

    gdown runs without cookies: it would otherwise read and write a cookie file in the user's home.
    """

    page: str
    model_id: str
    progress: Progress | None
    max_bytes: int
    retries: int
    one_file: bool = True
    _before: int = field(default=0, init=False)
    _moved: bool = field(default=False, init=False)

    def listing(self, folder_id: str) -> dict[str, str]:
        """Return relative posix path -> file id of the files worth having."""
        import gdown

        with self._explained():
            found = gdown.download_folder(
                id=folder_id, output=".", skip_download=True, quiet=True, use_cookies=False, timeout=_DRIVE_TIMEOUT_S
            )
        items = [(Path(item.path).as_posix(), str(item.id)) for item in found]
        wanted = [(path, file_id) for path, file_id in items if not _NOT_NEEDED.search(path)]
        self._check_listing([path for path, _ in wanted])
        return dict(wanted)

    def download(self, file_id: str, output: Path) -> Path:
        """Download one file to `output`, or under its own name into `output` if that is a folder."""
        import gdown

        self._moved = False
        output.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            try:
                path = self._gdown(file_id, output)
            except gdown.DownloadError as error:
                if self._moved or error.__cause__ or not self._dropped_parts(error, output):
                    raise
                path = self._gdown(file_id, output)
        self._before += path.stat().st_size
        return path

    def _gdown(self, file_id: str, output: Path) -> Path:
        import gdown

        path = gdown.download(
            id=file_id,
            output=str(output),
            quiet=True,
            use_cookies=False,
            resume=True,
            retries=self.retries,
            timeout=_DRIVE_TIMEOUT_S,
            progress=self._step,
        )
        return Path(path)

    def _step(self, done: int, total: int | None) -> None:
        self._moved = True
        if self._before + max(done, total or 0) > self.max_bytes:
            raise DownloadError(f"{self.page} has more than the {self.max_bytes:,} bytes that are accepted.")
        if self.progress:
            self.progress(self._before + done, total if self.one_file else None)

    def _dropped_parts(self, error: Exception, output: Path) -> bool:
        """Remove partial files that gdown cannot go on from, such as one of a file that changed; False if none."""
        import gdown

        parts = list((output if output.is_dir() else output.parent).glob("*.part"))
        if isinstance(error, gdown.FileURLRetrievalError) or not parts:
            return False
        logger.warning("%s: starting again, as the partial download cannot be resumed: %s", self.page, _reason(error))
        for part in parts:
            part.unlink()
        return True

    def _check_listing(self, paths: list[str]) -> None:
        if not paths:
            raise self._refused("it lists no model files, which is also what it answers for a private folder")
        if len(paths) > MAX_DRIVE_FILES:
            raise self._refused(f"too many files, {len(paths):,}; a model has at most {MAX_DRIVE_FILES:,}")
        twice = sorted({path for path in paths if paths.count(path) > 1})
        unsafe = [path for path in paths if Path(path).is_absolute() or ".." in Path(path).parts]
        if twice or unsafe:
            kind = "several files of one name" if twice else "a file that leaves the folder"
            raise DownloadError(f"{self.page} holds {kind}: {', '.join(twice or unsafe)}. {self._advice()}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn everything gdown raises into a `DownloadError` that says what the user can do."""
        import gdown
        import requests

        try:
            yield
        except MSHubError:
            raise
        except gdown.DownloadCancelled as error:
            raise self._interrupted(error) from error
        except gdown.DownloadError as error:
            broken = isinstance(error.__cause__, requests.RequestException) or "incomplete" in str(error)
            raise (self._interrupted(error) if broken else self._refused(_reason(error))) from error
        except requests.HTTPError as error:
            raise self._refused(_reason(error)) from error
        except requests.RequestException as error:
            raise self._interrupted(error) from error
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise self._refused(f"it sent a page that gdown does not understand, {error!r}") from error

    def _refused(self, reason: str) -> DownloadError:
        return DownloadError(f"Google Drive refused the download of {self.model_id}: {reason}. {self._advice()}")

    def _interrupted(self, error: Exception) -> DownloadError:
        return DownloadError(
            f"The download of {self.model_id} from Google Drive broke off or could not begin: {_reason(error)}. Check "
            "the network and run the command again: it goes on from what has arrived. If it keeps failing: "
            f"{self._advice()}"
        )

    def _advice(self) -> str:
        return f"Open {self.page} in a browser, ask for access if needed, {_by_hand(self.model_id)}."


def _reason(error: Exception) -> str:
    """Return gdown's own words without its advice for gdown users."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.removeprefix("Failed to retrieve file url: ")
    return re.split(r" You may (?:still|need)| Check FAQ| The received bytes", text)[0].rstrip(".")[:300]
