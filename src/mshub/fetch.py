"""Download weights: over HTTP(S) with httpx, from Google Drive with gdown.

A download in progress is a ``.part`` file (HTTP) or an ``ID.partial`` folder (Drive) beside its final name and gets
that name by one rename, so whatever carries the final name is complete. Two processes must not fetch the same target at
once: the caller holds a lock.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mshub.downloads import Progress
from mshub.drive import fetch_drive_file, fetch_drive_folder
from mshub.errors import DownloadError
from mshub.http_file import fetch_file

__all__ = ["Progress", "fetch_drive_file", "fetch_drive_folder", "fetch_file", "fetch_weights"]


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
