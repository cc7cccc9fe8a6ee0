"""Who asks for cases, who has which one in work, and why it was offered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mshub.case_database import CaseDatabase


@dataclass(frozen=True)
class Lease:
    """An image somebody has in work; nobody else is offered it meanwhile.

    Attributes
    ----------
    image, client, model : str
    until : float
        Seconds since the epoch.
    """

    image: str
    client: str
    model: str
    until: float


@dataclass(frozen=True)
class ChoiceRow:
    """A case that was offered.

    Attributes
    ----------
    image, model, client, strategy : str
    audit : bool
        Drawn at random, so that it may judge versions.
    why : str
        What the client was told.
    at : float
        Seconds since the epoch.
    """

    image: str
    model: str
    client: str
    strategy: str
    audit: bool
    why: str
    at: float


class CaseOffers(CaseDatabase):
    """Interest in models, leases of images, and the log of choices."""

    # -- interest -----------------------------------------------------------------------------------------------

    def note_interest(self, model: str, client: str) -> None:
        """Note that a client works with a model."""
        with self._writing() as connection:
            connection.execute(
                "REPLACE INTO interests (client, model, at) VALUES (?, ?, ?)", (client, model, self._clock())
            )

    def interests(self, since: float) -> list[str]:
        """Return the models somebody asked for at or after a time, the most recent first."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT model FROM interests WHERE at >= ? GROUP BY model ORDER BY MAX(at) DESC, MAX(rowid) DESC",
                (since,),
            ).fetchall()
        return [model for (model,) in rows]

    def last_model(self, client: str) -> str | None:
        """Return the model a client asked for last."""
        with self._reading() as connection:
            found = connection.execute(
                "SELECT model FROM interests WHERE client = ? ORDER BY at DESC, rowid DESC LIMIT 1", (client,)
            ).fetchone()
        return str(found[0]) if found else None

    # -- leases -------------------------------------------------------------------------------------------------

    def lease(self, images: Sequence[str], client: str, seconds: float, *, model: str) -> str | None:
        """Take the first image that nobody has in work, this client included; no two calls get the same.

        Parameters
        ----------
        images : sequence of str
            The best first.
        client : str
        seconds : float
            How long the lease lasts if it is not renewed.
        model : str

        Returns
        -------
        str or None
            The image; None where somebody is at work on each of them.
        """
        with self._writing() as connection:
            now = self._clock()
            connection.execute("DELETE FROM leases WHERE until <= ?", (now,))
            held = {image for (image,) in connection.execute("SELECT image FROM leases")}
            free = next((image for image in images if image not in held), None)
            if free is not None:
                row = (free, client, model, now + seconds)
                connection.execute("INSERT INTO leases (image, client, model, until) VALUES (?, ?, ?, ?)", row)
        return free

    def renew(self, image: str, client: str, seconds: float, *, model: str = "") -> bool:
        """Let a client's lease last so many seconds from now; an image that nobody has in work becomes the client's.

        Parameters
        ----------
        image, client : str
        seconds : float
        model : str
            Default: that of the lease, if there is one.

        Returns
        -------
        bool
            Whether the client has the image in work now; nothing changes where somebody else has.
        """
        with self._writing() as connection:
            now = self._clock()
            connection.execute("DELETE FROM leases WHERE until <= ?", (now,))
            found = connection.execute("SELECT client, model FROM leases WHERE image = ?", (image,)).fetchone()
            holder, known = found or (client, "")
            if holder == client:
                row = (image, client, model or known, now + seconds)
                connection.execute("REPLACE INTO leases (image, client, model, until) VALUES (?, ?, ?, ?)", row)
        return bool(holder == client)

    def release(self, image: str) -> None:
        """End the lease of an image, whoever holds it."""
        with self._writing() as connection:
            connection.execute("DELETE FROM leases WHERE image = ?", (image,))

    def leases(self) -> dict[str, Lease]:
        """Return image -> its lease, for all that have not expired, in the order they were taken or renewed."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT image, client, model, until FROM leases WHERE until > ? ORDER BY rowid", (self._clock(),)
            ).fetchall()
        return {row[0]: Lease(*row) for row in rows}

    # -- choices ------------------------------------------------------------------------------------------------

    def keep_choice(self, image: str, model: str, client: str, strategy: str, audit: bool, why: str) -> None:
        """Add a line to the log of choices, as `ChoiceRow` says."""
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO choices (image, model, client, strategy, audit, why, at) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (image, model, client, strategy, bool(audit), why, self._clock()),
            )

    def choices(self, model: str) -> list[ChoiceRow]:
        """Return the log of a model, oldest first."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT image, model, client, strategy, audit, why, at FROM choices WHERE model = ? ORDER BY id",
                (model,),
            ).fetchall()
        return [replace(row, audit=bool(row.audit)) for row in (ChoiceRow(*row) for row in rows)]

    def choices_since_audit(self, model: str) -> int:
        """Return how many choices of a model followed its last audit; all of them if there was none."""
        with self._reading() as connection:
            (found,) = connection.execute(
                "SELECT COUNT(*) FROM choices WHERE model = ? AND audit = 0"
                " AND id > COALESCE((SELECT MAX(id) FROM choices WHERE model = ? AND audit = 1), 0)",
                (model, model),
            ).fetchone()
        return int(found)

    def audit_is_due(self, model: str, every: int) -> bool:
        """Count a choice of a model; return whether it is to be an audit: each `every`-th is, whoever asks.

        Parameters
        ----------
        model : str
        every : int
            5: the 5th call, the 10th, ...; 1: every call. Below 1: none, and nothing is counted.
        """
        if every < 1:
            return False
        with self._writing() as connection:
            found = connection.execute("SELECT calls FROM audits WHERE model = ?", (model,)).fetchone()
            calls = (found[0] if found else 0) + 1
            is_due = bool(calls >= every)
            connection.execute("REPLACE INTO audits (model, calls) VALUES (?, ?)", (model, 0 if is_due else calls))
        return is_due
