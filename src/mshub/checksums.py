"""sha256 of files and trees: the identity of what was downloaded and of what is installed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mshub.errors import StoreError

CHUNK = 1024 * 1024


def tree_sha256(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below `folder`.

    Returns
    -------
    dict of str to str
        Relative posix path to hex digest, sorted by path.

    Raises
    ------
    StoreError
        There is no such folder, or it holds a link or an unreadable file.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder} is no folder. Expected a folder whose files can be hashed.")
    digests = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise StoreError(f"{path} is a link. Expected plain files only: replace it by the file it points to.")
        if path.is_file():
            digests[path.relative_to(folder).as_posix()] = file_sha256(path)
    return dict(sorted(digests.items()))


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, read in chunks.

    Raises
    ------
    StoreError
        The file cannot be read.
    """
    try:
        return running_sha256(path).hexdigest()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}). Check its permissions and the disk.") from error


def running_sha256(path: Path) -> hashlib._Hash:
    """Return the sha256 of a file, ready for the bytes that will follow it.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest
