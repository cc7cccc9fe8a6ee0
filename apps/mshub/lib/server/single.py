"""One server per folder of labels: of two, the later to write would lose what the other noted."""

from __future__ import annotations

import logging
from pathlib import Path

from filelock import FileLock, Timeout

from mshub.errors import ConfigError

logger = logging.getLogger(__name__)

NAME = ".mshub-server.lock"


def hold(folder: Path, studies: str) -> FileLock | None:
    """Return a lock, to be kept as long as the server lives; None where it cannot be had on this disk.

    The operating system gives it up with the process, however that ends.

    Parameters
    ----------
    folder : Path
        Where labels and their index are; see `lib.conf.Config.data_folder`.
    studies : str
        What the operator called it.

    Raises
    ------
    ConfigError
        Another server has it.
    """
    if not folder.is_dir():
        return None
    lock = FileLock(folder / NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"Another server works on {studies} already: two would overwrite what the other knows of the labels. Stop "
            "it, or serve another folder; of a PACS, with another MSHUB_HOME."
        ) from error
    except OSError as error:
        logger.warning("%s cannot be written to (%s): nothing keeps a second server away", folder, error.strerror)
        return None
    return lock
