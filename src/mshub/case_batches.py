"""Batches: images a model is to pre-label one after the other, and how far that is.

The state of an item leads from ``waiting`` over ``running`` to ``done``, ``failed`` or ``skipped``. A batch is
``running`` until its last item has ended, unless somebody stopped it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Any, Literal, get_args

from mshub.case_database import CaseDatabase
from mshub.errors import StoreError

BatchState = Literal["running", "stopped", "done"]
Ending = Literal["done", "failed", "skipped"]
ITEM_STATES = ("waiting", "running", *get_args(Ending))


@dataclass(frozen=True)
class Batch:
    """How far a batch is.

    Attributes
    ----------
    id : int
    model, client : str
    options : dict
        What it was started with.
    created : float
        Seconds since the epoch.
    state : str
        ``running``, ``stopped`` or ``done``.
    counts : dict of str to int
        State of an item, each of `ITEM_STATES` -> number of images in it.
    failures : tuple of (str, str)
        Images that failed, in the order of the batch, and why.
    """

    id: int
    model: str
    client: str
    options: dict[str, Any]
    created: float
    state: BatchState
    counts: dict[str, int]
    failures: tuple[tuple[str, str], ...]


class CaseBatches(CaseDatabase):
    """The batches and their items."""

    def new_batch(self, model: str, images: Sequence[str], client: str, options: Mapping[str, Any]) -> int:
        """Start a batch; returns its number.

        Parameters
        ----------
        model : str
        images : sequence of str
            In the order they are to be taken; one that is named twice is taken once. A batch of none is done.
        client : str
        options : mapping
            Kept as JSON.
        """
        items = list(dict.fromkeys(images))
        row = (model, client, json.dumps(dict(options)), self._clock(), "running" if items else "done")
        with self._writing() as connection:
            batch = connection.execute(
                "INSERT INTO batches (model, client, options, created, state) VALUES (?, ?, ?, ?, ?)", row
            ).lastrowid
            connection.executemany(
                "INSERT INTO batch_items (batch, position, image, state) VALUES (?, ?, ?, 'waiting')",
                ((batch, position, image) for position, image in enumerate(items)),
            )
        return int(batch or 0)

    def next_item(self, batch: int) -> str | None:
        """Mark the first waiting image as running and return it; None where none waits or the batch does not run."""
        with self._writing() as connection:
            found = connection.execute(
                "SELECT image FROM batch_items JOIN batches ON batches.id = batch"
                " WHERE batch = ? AND batches.state = 'running' AND batch_items.state = 'waiting'"
                " ORDER BY position LIMIT 1",
                (batch,),
            ).fetchone()
            if found:
                _set_item(connection, batch, found[0], "running")
        return str(found[0]) if found else None

    def finish_item(self, batch: int, image: str, state: Ending, message: str = "") -> None:
        """Note how an image ended; the batch is done with the last one.

        Raises
        ------
        StoreError
            It is no image of the batch, or no way to end.
        """
        if state not in get_args(Ending):
            raise StoreError(f"An item cannot end as {state!r}. Expected: {', '.join(get_args(Ending))}.")
        with self._writing() as connection:
            if not _set_item(connection, batch, image, state, message):
                raise StoreError(f"Batch {batch} has no image {image}. Expected: one that next_item returned.")
            if not _is_open(connection, batch):
                _set_state(connection, batch, "done")

    def stop_batch(self, batch: int) -> None:
        """Let a batch hand out no more images; those that run may end. One that is done stays so.

        Raises
        ------
        StoreError
            There is no such batch.
        """
        self._change(batch, "stopped")

    def resume_batch(self, batch: int) -> None:
        """Let a stopped batch go on with the images that wait. One that is done stays so.

        Raises
        ------
        StoreError
            There is no such batch.
        """
        self._change(batch, "running")

    def _change(self, batch: int, state: BatchState) -> None:
        with self._writing() as connection:
            if connection.execute("SELECT 1 FROM batches WHERE id = ?", (batch,)).fetchone() is None:
                raise StoreError(f"There is no batch {batch}. Expected: the number of one of this index.")
            if _is_open(connection, batch):
                _set_state(connection, batch, state)

    def recover(self) -> int:
        """Let the images wait again whose prediction ended with its process; returns how many.

        For the start of the server: an image that another process works on is predicted twice then, nothing worse.
        """
        with self._writing() as connection:
            return connection.execute("UPDATE batch_items SET state = 'waiting' WHERE state = 'running'").rowcount

    # -- looking ------------------------------------------------------------------------------------------------

    def batch(self, batch: int) -> Batch | None:
        """Return how far a batch is; None where there is no such batch."""
        return next(iter(self._found("WHERE id = ?", batch)), None)

    def batches(self) -> list[Batch]:
        """Return all batches, newest first."""
        return self._found("ORDER BY id DESC")

    def open_batches(self) -> list[Batch]:
        """Return the batches that run, in the order they were asked for."""
        return self._found("WHERE state = 'running' ORDER BY id")

    def _found(self, condition: str, *values: int) -> list[Batch]:
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT id, model, client, options, created, state FROM batches {condition}", values
            ).fetchall()
            return [_batch(connection, *row) for row in rows]


def _batch(
    connection: Connection, batch: int, model: str, client: str, options: str, created: float, state: BatchState
) -> Batch:
    counts = connection.execute("SELECT state, COUNT(*) FROM batch_items WHERE batch = ? GROUP BY state", (batch,))
    known = {**dict.fromkeys(ITEM_STATES, 0), **dict(counts.fetchall())}
    failures = connection.execute(
        "SELECT image, message FROM batch_items WHERE batch = ? AND state = 'failed' ORDER BY position", (batch,)
    )
    return Batch(batch, model, client, json.loads(options), created, state, known, tuple(failures.fetchall()))


def _set_item(connection: Connection, batch: int, image: str, state: str, message: str = "") -> bool:
    """Change one item; return whether there is one."""
    change = "UPDATE batch_items SET state = ?, message = ? WHERE batch = ? AND image = ?"
    return connection.execute(change, (state, message, batch, image)).rowcount == 1


def _set_state(connection: Connection, batch: int, state: BatchState) -> None:
    connection.execute("UPDATE batches SET state = ? WHERE id = ?", (state, batch))


def _is_open(connection: Connection, batch: int) -> bool:
    """Return whether an item of the batch waits or runs."""
    found = connection.execute(
        "SELECT 1 FROM batch_items WHERE batch = ? AND state IN ('waiting', 'running') LIMIT 1", (batch,)
    )
    return found.fetchone() is not None
