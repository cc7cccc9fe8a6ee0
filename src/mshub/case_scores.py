"""What is known of images: what a version measured, how its labels were corrected, how labels agree with it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mshub.case_database import CaseDatabase
from mshub.uncertainty import Uncertainty

logger = logging.getLogger(__name__)

FLOAT32 = np.dtype("<f4")
TABLES = ("scores", "agreements", "label_dice", "leases")
"""Where an image is forgotten; the logs of choices and batches say what happened, and keep it."""


@dataclass(frozen=True)
class AgreementRow:
    """How a label somebody submitted agrees with the one a version had predicted.

    Attributes
    ----------
    image, model, version : str
    dice : dict of str to float
        Structure -> Dice of the two, 0 to 1.
    edited_voxels : int
        Voxels that differ.
    score : float or None
        What the version had been expected to reach when the image was offered, if anything was.
    at : float
        Seconds since the epoch.
    trained : bool
        The version was trained on the image: the row says nothing about images it has not seen.
    """

    image: str
    model: str
    version: str
    dice: dict[str, float]
    edited_voxels: int
    score: float | None
    at: float
    trained: bool = False


class CaseScores(CaseDatabase):
    """What is known of each image, per model and version."""

    # -- what a version measured --------------------------------------------------------------------------------

    def keep_score(
        self, image: str, model: str, version: str, uncertainty: Uncertainty, *, state: str = "", profile: str = ""
    ) -> None:
        """Keep what was measured; what was known before of the image and version, a failure too, is replaced.

        Parameters
        ----------
        image, model, version : str
        uncertainty : Uncertainty
            Kept rounded, as `Uncertainty.as_dict` does; the embedding as float32.
        state : str
            What identifies the image's files: another state is another image.
        profile : str
            How it was predicted.
        """
        measured = json.dumps(uncertainty.as_dict(embedding=False), default=float)
        embedding = np.asarray(uncertainty.embedding, FLOAT32).tobytes()
        self._keep_looked_at((image, model, version, state, profile), measured, embedding, None)

    def keep_failure(self, image: str, model: str, version: str, reason: str, state: str = "") -> None:
        """Keep that an image cannot be scored, in place of what was known, so that nobody tries in vain again."""
        self._keep_looked_at((image, model, version, state, ""), None, None, reason)

    def _keep_looked_at(
        self, what: tuple[str, ...], measured: str | None, embedding: bytes | None, failure: str | None
    ) -> None:
        with self._writing() as connection:
            connection.execute(
                "REPLACE INTO scores (image, model, version, state, profile, at, measured, embedding, failure)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*what, self._clock(), measured, embedding, failure),
            )

    def score(self, image: str, model: str, version: str, state: str | None = None) -> Uncertainty | None:
        """Return what was measured of an image; None where nothing was, or of another `state` of its files."""
        found = self._looked_at(image, model, version, state)
        return _uncertainty(image, found[0], found[1]) if found and found[0] is not None else None

    def failure(self, image: str, model: str, version: str, state: str | None = None) -> str | None:
        """Return why an image cannot be scored; None where it was scored, never tried, or in another `state`."""
        found = self._looked_at(image, model, version, state)
        return str(found[2]) if found and found[2] is not None else None

    def _looked_at(self, image: str, model: str, version: str, state: str | None) -> tuple[Any, ...] | None:
        with self._reading() as connection:
            found: tuple[Any, ...] | None = connection.execute(
                "SELECT measured, embedding, failure FROM scores"
                " WHERE model = ? AND version = ? AND image = ? AND state = COALESCE(?, state)",
                (model, version, image, state),
            ).fetchone()
        return found

    def scores(self, model: str, version: str) -> dict[str, Uncertainty]:
        """Return image -> what was measured, for all images; one that cannot be read is left out, with a warning."""
        rows = self._of_version("image, measured, embedding", "scores", model, version, "AND measured IS NOT NULL")
        read = {image: _uncertainty(image, measured, embedding) for image, measured, embedding in rows}
        return {image: uncertainty for image, uncertainty in read.items() if uncertainty is not None}

    def failures(self, model: str, version: str) -> dict[str, str]:
        """Return image -> why it cannot be scored."""
        return dict(self._of_version("image, failure", "scores", model, version, "AND failure IS NOT NULL"))

    def states(self, model: str, version: str) -> dict[str, str]:
        """Return image -> the state it was in when it was scored or failed: what need not be tried again."""
        return dict(self._of_version("image, state", "scores", model, version))

    def forget_image(self, image: str) -> None:
        """Forget all that is known of an image, for every model and version, and its lease; the logs stay."""
        with self._writing() as connection:
            for table in TABLES:
                connection.execute(f"DELETE FROM {table} WHERE image = ?", (image,))

    # -- how labels of people agree with those of a version --------------------------------------------------------

    def keep_agreement(
        self,
        image: str,
        model: str,
        version: str,
        dice: Mapping[str, float],
        edited_voxels: int,
        *,
        score: float | None,
        trained: bool = False,
    ) -> None:
        """Keep how a submitted label agrees with the predicted one; what was known of the three is replaced.

        Parameters
        ----------
        image, model, version, dice, edited_voxels, score, trained
            As in `AgreementRow`.
        """
        # Plain numbers: of numpy's, SQLite would store the bytes.
        numbers = (int(edited_voxels), None if score is None else float(score), bool(trained))
        with self._writing() as connection:
            connection.execute(
                "REPLACE INTO agreements (image, model, version, dice, edited_voxels, score, trained, at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (image, model, version, _json(dice), *numbers, self._clock()),
            )

    def agreements(self, model: str, version: str | None = None) -> list[AgreementRow]:
        """Return the agreements with one version of a model or with all of them, oldest first."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT image, model, version, dice, edited_voxels, score, at, trained FROM agreements"
                " WHERE model = ? AND version = COALESCE(?, version) ORDER BY at, rowid",
                (model, version),
            ).fetchall()
        found = (AgreementRow(*row) for row in rows)
        return [replace(row, dice=json.loads(str(row.dice)), trained=bool(row.trained)) for row in found]

    # -- how stored labels agree with a version ---------------------------------------------------------------------

    def keep_label_dice(
        self, image: str, model: str, version: str, dice: Mapping[str, float], *, label_state: str
    ) -> None:
        """Keep how the label of an image agrees with what a version sees.

        Parameters
        ----------
        image, model, version : str
        dice : mapping of str to float
            Structure -> Dice of the two, 0 to 1.
        label_state : str
            What identifies the label's file: a label that was changed is compared again.
        """
        with self._writing() as connection:
            connection.execute(
                "REPLACE INTO label_dice (image, model, version, label_state, dice) VALUES (?, ?, ?, ?, ?)",
                (image, model, version, label_state, _json(dice)),
            )

    def label_dice(self, model: str, version: str) -> dict[str, tuple[str, dict[str, float]]]:
        """Return image -> (the state its label was in, structure -> Dice)."""
        rows = self._of_version("image, label_state, dice", "label_dice", model, version)
        return {image: (state, json.loads(dice)) for image, state, dice in rows}

    def _of_version(
        self, columns: str, table: str, model: str, version: str, condition: str = ""
    ) -> list[tuple[Any, ...]]:
        with self._reading() as connection:
            return connection.execute(
                f"SELECT {columns} FROM {table} WHERE model = ? AND version = ? {condition} ORDER BY rowid",
                (model, version),
            ).fetchall()


def _json(dice: Mapping[str, float]) -> str:
    return json.dumps(dict(dice), default=float)


def _uncertainty(image: str, measured: str, embedding: bytes) -> Uncertainty | None:
    try:
        values = np.frombuffer(embedding, FLOAT32).tolist()
        return replace(Uncertainty.from_dict(json.loads(measured)), embedding=tuple(values))
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("what is known of %s cannot be read (%s: %s)", image, type(error).__name__, error)
        return None
