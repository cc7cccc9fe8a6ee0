"""Download files and shared folders from Google Drive with gdown, on our terms: no cookies, our limits, our messages.

A download in progress is an ``ID.partial`` folder, and a later try goes on with what has arrived. gdown can compare no
more than the size, so a file that was replaced by one of equal size in between is noticed only by a sha256 in the card.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mshub.archive import MAX_BYTES
from mshub.checksums import file_sha256
from mshub.downloads import ATTEMPTS, Progress, by_hand, local_errors, mismatch
from mshub.errors import DownloadError, MSHubError

logger = logging.getLogger(__name__)

MAX_DRIVE_FILES = 1_000
_NOT_NEEDED = re.compile(
    r"(?:^|/)(?:validation\w*|__MACOSX|\.[^/]*)(?:/|$)|(?:^|/)\w+_latest\.[\w.]+$|\.(?:nii|nii\.gz|npz|png)$"
)
_TIMEOUT_S = (30.0, 60.0)


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
    with local_errors(folder):
        current = done if done.is_dir() else staging
        if current is staging:
            staging.mkdir(parents=True, exist_ok=True)
            fill(staging)
        if sha256 and (found := file_sha256(_only_file(current))) != sha256.lower():
            shutil.rmtree(current)
            raise mismatch(page, found, sha256)
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
                id=folder_id, output=".", skip_download=True, quiet=True, use_cookies=False, timeout=_TIMEOUT_S
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
            timeout=_TIMEOUT_S,
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
        return f"Open {self.page} in a browser, ask for access if needed, {by_hand(self.model_id)}."


def _reason(error: Exception) -> str:
    """Return gdown's own words without its advice for gdown users."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.removeprefix("Failed to retrieve file url: ")
    return re.split(r" You may (?:still|need)| Check FAQ| The received bytes", text)[0].rstrip(".")[:300]
