"""Images somebody uploaded for a while: MONAI Label's sessions, with ids nobody can guess, and an end."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from fastapi import HTTPException
from monailabel.utils.sessions import SessionInfo, Sessions

from mshub.atomic_file import replace_text

logger = logging.getLogger(__name__)

LONGEST_S = 24 * 3600
UNFINISHED_S = 3600
"""A folder without a session's description is one that is being uploaded, or the rest of one."""
_ID = re.compile(r"[0-9a-f-]{32,36}")


def refuse_archive(uncompress: bool) -> None:
    """Refuse an upload that is to be unpacked: that can write anywhere."""
    if uncompress:
        raise HTTPException(400, "Archives are not unpacked here: send the image itself, or the files of its series.")


class UploadSessions(Sessions):  # type: ignore[misc]
    """Sessions under one folder.

    Parameters
    ----------
    store_path : str
    expiry : int
        Seconds after its last use that a session ends, at most `LONGEST_S`.
    """

    def __bool__(self) -> bool:
        """Return that there are sessions: MONAI Label sweeps none where it knows of none, as after a restart."""
        return True

    def add_session(
        self, data_file: str, expiry: int = 0, uncompress: bool = False, session_id: str | None = None
    ) -> tuple[str, SessionInfo]:
        """Keep a file, or a folder of files, as a new session; archives are refused.

        What is given is taken over: if it cannot be kept, nothing of it is left.
        """
        session_id, expiry = session_id or str(uuid4()), min(expiry if expiry > 0 else self.expiry, LONGEST_S)
        try:
            refuse_archive(uncompress)
            added: tuple[str, SessionInfo] = super().add_session(data_file, expiry, False, session_id)
        except BaseException:
            self.remove_session(session_id)
            _remove_upload(Path(data_file))
            raise
        return added

    def get_session(self, session_id: str, update_ts: bool = True, fetch_cache: bool = True) -> SessionInfo | None:
        """Return a session; None if it does not exist, has ended or is damaged."""
        if not _ID.fullmatch(session_id):
            return None
        try:
            found: SessionInfo | None = super().get_session(session_id, update_ts=False, fetch_cache=fetch_cache)
        except (OSError, ValueError, AttributeError) as error:
            logger.warning("a session is damaged (%s) and ends", type(error).__name__)
            self.remove_session(session_id)
            return None
        if found is not None and 0 < found.expiry < time.time() - found.last_access_ts:
            self.remove_session(session_id)
            return None
        if found is not None and update_ts:
            found.last_access_ts = int(time.time())
            self._note_use(session_id, found)
            if not Path(found.image).exists():  # it was removed meanwhile
                self.remove_session(session_id)
                return None
        return found

    def remove_session(self, session_id: str) -> None:
        """Remove a session, also one that somebody else removes at this moment."""
        self.pop(session_id, None)
        shutil.rmtree(Path(self.store_path) / session_id, ignore_errors=True)

    def _note_use(self, session_id: str, found: SessionInfo) -> None:
        """Note when a session was used last; what cannot be noted, as on a full disk, is no reason to refuse it."""
        try:
            self._write_meta_info(session_id, found)
        except OSError as error:
            logger.warning("the use of a session is not noted: %s", error)

    def _write_meta_info(self, session_id: str, session_info: SessionInfo) -> None:
        """Write a session's description whole or not at all: without it the session is lost."""
        replace_text(Path(self.store_path) / session_id / "meta.info", session_info.to_str())

    def remove_expired(self) -> int:
        """Remove what has ended, and what is left of uploads that broke off; returns how many.

        One that cannot be looked at, as somebody else removes it, keeps no other from being removed.
        """
        folder, count = Path(self.store_path), 0
        for path in [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else ():
            try:
                count += self._remove_ended(path)
            except (OSError, KeyError) as error:
                logger.warning("a session is passed over (%s)", type(error).__name__)
        return count

    def _remove_ended(self, path: Path) -> bool:
        """Remove the folder of a session that has ended; returns whether it has."""
        is_described = (path / "meta.info").exists()
        if not is_described and time.time() - path.stat().st_mtime < UNFINISHED_S:
            return False
        if is_described and self.get_session(path.name, update_ts=False, fetch_cache=False) is not None:
            return False
        shutil.rmtree(path, ignore_errors=True)
        return True


def _remove_upload(path: Path) -> None:
    """Remove an upload, and the temporary folder that MONAI Label's own route made for it and forgets when it fails."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)
        if path.parent.parent == Path(tempfile.gettempdir()):
            path.parent.rmdir()
