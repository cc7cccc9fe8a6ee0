"""What every download has in common, over HTTP or from Google Drive: progress, attempts, and some of the messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mshub.errors import ChecksumMismatch, DownloadError

Progress = Callable[[int, "int | None"], None]
"""Called with the bytes so far and the bytes expected, None where nobody said."""

ATTEMPTS = 4


@contextmanager
def local_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the local disk into a `DownloadError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"The download cannot be written to {folder} ({error}). Check the disk and permissions."
        ) from error


def mismatch(what: str, found: str, expected: str) -> ChecksumMismatch:
    """Return the error for a download of another sha256, which the caller has removed."""
    return ChecksumMismatch(
        f"{what} has sha256 {found}, expected {expected.lower()}. The download was removed: run the command again; if "
        "it happens again, the published file is not the one in the model's card. Do not use it."
    )


def by_hand(model_id: str) -> str:
    """Return the advice that ends a message where no other try will help."""
    return f"download by hand and run `mshub add {model_id} PATH`"
