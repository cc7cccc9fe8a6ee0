"""One SQLite file and the one connection to it: opened, locked, checked, and started anew where it is damaged.

Concurrency, from the inside out:

- Threads of a process share one connection behind one lock. Servers end and start threads all the time: a connection
  for each would stay open until somebody noticed. What is slow, decoding, happens outside the lock; a transaction takes
  milliseconds.
- Processes share the file. Its journal is a write-ahead log, so that readers never wait. Writers take turns:
  everything that writes begins with ``BEGIN IMMEDIATE``, so that what it reads still holds when it writes, and waits
  for up to `BUSY_TIMEOUT_S`.
- Opening, checking, migrating and moving a damaged file aside happen under a lock file, one process at a time.

The order of the locks is: the thread lock, then the lock file or SQLite's own. None is taken while another one's work
calls back, so none can be taken twice. The connection is not to be carried over a fork; processes that are spawned open
their own. The write-ahead log needs shared memory: one machine at a time, also where the folder is on a network drive.

A power cut may take the last transactions (``synchronous = NORMAL``); it does not damage the file.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from sqlite3 import Connection
from types import TracebackType
from typing import TypeVar

from filelock import FileLock, Timeout

from mshub.case_schema import APPLICATION_ID, MIGRATIONS, SCHEMA_VERSION
from mshub.errors import StoreError

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="CaseDatabase")  # of typing from Python 3.11 on

BUSY_TIMEOUT_S = 30.0
FILES = ("", "-wal", "-shm")
"""Endings of the files that make up a database: itself, its write-ahead log and what indexes that."""


class CaseDatabase:
    """The file and its transactions; the tables are the business of the classes that inherit.

    Parameters
    ----------
    path : Path
        The SQLite file; it and its folder are created if needed.
    clock : callable
        Seconds since the epoch, for whoever cannot wait.

    Raises
    ------
    StoreError
        The file cannot be opened or written, is of a newer MSHub, or of another program.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = Path(path), clock
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._file: tuple[int, int] | None = None
        self._is_closed = False
        with self._reading():
            pass

    def close(self) -> None:
        """Close the file; it cannot be used afterwards."""
        with self._lock:
            self._is_closed = True
            self._disconnect()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- transactions -------------------------------------------------------------------------------------------

    def _reading(self) -> AbstractContextManager[Connection]:
        """Return a block that sees one state of the file, whoever writes meanwhile."""
        return self._transaction("BEGIN")

    def _writing(self) -> AbstractContextManager[Connection]:
        """Return a block that nobody else writes during; what it did counts if it ends without an error."""
        return self._transaction("BEGIN IMMEDIATE")

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Connection]:
        with self._lock, self._explained():
            connection = self._connected()
            with _transaction(connection, begin):
                yield connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise self._refusal(error) from error
        except UnicodeEncodeError as error:
            raise StoreError(f"{error.object!r} cannot be noted: it is no text. Rename the image.") from error
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self._disconnect()  # the next transaction looks at the file, and moves it aside if it is damaged
            raise StoreError(
                f"The case index {self.path} is damaged. Found: {error}. Expected: what MSHub wrote. How to fix: try "
                "again; a new one is started, and the damaged file is kept beside it."
            ) from error

    def _refusal(self, error: Exception) -> StoreError:
        if "locked" in str(error):
            return StoreError(
                f"Another process has been writing the case index {self.path} for {BUSY_TIMEOUT_S:g} s. Expected: "
                "milliseconds. How to fix: try again; if it stays so, end the process that has the file open."
            )
        return StoreError(
            f"The case index {self.path} cannot be used. Found: {error}. Expected: a file in a folder that MSHub can "
            f"write. How to fix: check the permissions and the free space of {self.path.parent}."
        )

    # -- the connection; all of it under the lock -----------------------------------------------------------------

    def _connected(self) -> Connection:
        if self._is_closed:
            raise StoreError(f"The case index {self.path} is closed. Open it again with CaseIndex(path).")
        if self._connection is not None and _identity(self.path) == self._file:
            return self._connection
        if self._connection is not None:
            logger.warning("%s was removed or replaced while in use: it is opened anew", self.path)
            self._disconnect()
        self._connection = self._opened()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _opened(self) -> Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._turn():
            try:
                connection = _opened(self.path)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self._move_aside(error)
                connection = _opened(self.path)
            self._file = _identity(self.path)
        return connection

    @contextmanager
    def _turn(self) -> Iterator[None]:
        try:
            held = FileLock(self.path.with_name(f".{self.path.name}.lock")).acquire(timeout=BUSY_TIMEOUT_S)
        except Timeout as error:
            raise self._refusal(sqlite3.OperationalError("locked")) from error
        with held:
            yield

    def _move_aside(self, error: Exception) -> None:
        stamp = f"{datetime.fromtimestamp(self._clock(), timezone.utc):%Y%m%dT%H%M%SZ}"
        name = f"{self.path.name}.damaged-{stamp}"
        names = (name if number == 1 else f"{name}-{number}" for number in count(1))
        kept = next(path for path in map(self.path.with_name, names) if not path.exists())
        for ending in FILES:
            if (part := Path(f"{self.path}{ending}")).exists():
                part.rename(f"{kept}{ending}")
        logger.warning(
            "The case index %s is damaged (%s): kept as %s, and a new one is started. Scores are computed again; "
            "batches and the log of choices begin anew.",
            *(self.path, error, kept.name),
        )


@contextmanager
def _transaction(connection: Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.commit()
    except BaseException:
        connection.rollback()
        raise


def _opened(path: Path) -> Connection:
    """Return a connection to a file that was looked at and has all tables."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        _refuse_strangers(connection, path)
        _look_for_damage(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        _migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _refuse_strangers(connection: Connection, path: Path) -> None:
    """Raise for a file that is sound and not ours to write; nothing has been changed in it."""
    found = _pragma(connection, "user_version")
    if _pragma(connection, "application_id") != APPLICATION_ID and _has_tables(connection):
        raise StoreError(
            f"{path} is an SQLite file of another program. Expected: a case index that MSHub wrote, or no file. "
            "How to fix: move it elsewhere."
        )
    if found > SCHEMA_VERSION:
        raise StoreError(
            f"The case index {path} has schema version {found}. Expected: {SCHEMA_VERSION} or less; a newer MSHub "
            "wrote it. How to fix: update MSHub, or move the file away: scores are computed again."
        )


def _look_for_damage(connection: Connection) -> None:
    found = [row[0] for row in connection.execute("PRAGMA integrity_check(1)")]
    if found != ["ok"]:
        raise sqlite3.DatabaseError(found[0])


def _migrate(connection: Connection) -> None:
    """Bring the tables up to date, all or nothing."""
    found = _pragma(connection, "user_version")
    if found == SCHEMA_VERSION:
        return
    with _transaction(connection, "BEGIN IMMEDIATE"):
        for statement in (statement for step in MIGRATIONS[found:] for statement in step):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _pragma(connection: Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _has_tables(connection: Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master").fetchone() is not None


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Return whether SQLite found the file malformed: all its other complaints have classes of their own."""
    return type(error) is sqlite3.DatabaseError


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  # once per transaction
    except OSError:
        return None
    return found.st_dev, found.st_ino
