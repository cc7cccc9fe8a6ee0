"""One server per studies folder: two would each write the index they know, and the later loses what the other noted."""

from __future__ import annotations

import logging
from pathlib import Path

from filelock import FileLock, Timeout

from mshub.errors import ConfigError

logger = logging.getLogger(__name__)

NAME = ".mshub-server.lock"


def hold(studies: str) -> FileLock | None:
    """Return a lock on a studies folder, to be kept as long as the server lives; None for a PACS.

    The operating system gives it up with the process, however that ends.

    Raises
    ------
    ConfigError
        Another server has it.
    """
    folder = Path(studies)
    if "://" in studies or not folder.is_dir():
        return None
    lock = FileLock(folder / NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"Another server works on {studies} already: two would overwrite what the other knows of the labels. Stop "
            "it, or serve another folder."
        ) from error
    except OSError as error:
        logger.warning("%s cannot be written to (%s): nothing keeps a second server away", studies, error.strerror)
        return None
    return lock
