"""The hold-out: patients whose cases judge versions and never train one.

Whoever trained or judged once does so for good. The decision falls once per patient, from a hash of the patient's name
and nothing in the images, and is kept in a ledger. MONAI Label's own split is drawn anew for every training, which
trains on the cases that judge (Project-MONAI/MONAILabel #1752).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from mshub.atomic_file import replace_json
from mshub.cases import ReviewedCase
from mshub.errors import ConfigError, StoreError
from mshub.store import LOCK_TIMEOUT_S, writable_folder

logger = logging.getLogger(__name__)

Side = Literal["training", "hold-out"]
TRAINING: Side = "training"
HOLD_OUT: Side = "hold-out"

#: Never to be changed: another salt is another hold-out.
SALT = "mshub hold-out 1\n"
FORMAT = 1

_KEY = re.compile(r"[0-9a-f]{64}")
_DIGITS = 13  # hexadecimal: 52 bits, which a float holds exactly


def patient_key(patient: str) -> str:
    """Return what the ledger calls a patient: a salted sha256, which says no name."""
    return hashlib.sha256((SALT + patient).encode("utf-8", "surrogatepass")).hexdigest()


def patient_number(patient: str) -> float:
    """Return the patient's number, spread evenly over [0, 1); always the same for the same patient."""
    return _number(patient_key(patient))


class HoldOut:
    """Which patients judge versions and never train. Decided once per patient, kept in a file.

    A new patient is held out if its number is below `fraction` or, while fewer than `enough` patients are held out,
    below `early_fraction`, so that there is something to judge by soon. Other values later do not change what has been
    decided.

    Parameters
    ----------
    path : Path
        The ledger, a JSON file; it and its folder are created when a patient is first decided.
    fraction, early_fraction : float
        Expected fractions of new patients to hold out, 0 to 1.
    enough : int
        Number of held-out patients from which `fraction` alone counts.

    Raises
    ------
    ConfigError
        A value that cannot be.
    """

    def __init__(self, path: Path, fraction: float = 0.2, early_fraction: float = 1 / 3, enough: int = 8) -> None:
        for name, value in {"fraction": fraction, "early_fraction": early_fraction}.items():
            if not 0 <= value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a number from 0 to below 1, such as 0.2.")
        if enough < 0:
            raise ConfigError(f"enough is {enough!r}; expected a number of patients, such as 8.")
        self.path = Path(path)
        self._fraction, self._early_fraction, self._enough = fraction, early_fraction, enough

    def split(self, cases: Sequence[ReviewedCase]) -> tuple[list[ReviewedCase], list[ReviewedCase]]:
        """Return the cases that train and those that judge, each in the order given; decide new patients first.

        A new patient with a case that was not picked at random (`ReviewedCase.audit`) trains; such a case of a
        held-out patient is in neither list. Pass all reviewed cases at once: where nobody of a list would train, the
        new patient with the largest number does.

        Raises
        ------
        StoreError
            The ledger is damaged, locked by another process for long, or cannot be written.
        """
        with self._locked():
            sides = self._read()
            new = self._decided(cases, sides)
            self._add(new, sides)
        sides |= new
        training = [case for case in cases if sides[patient_key(case.patient)] == TRAINING]
        held_out = [case for case in cases if sides[patient_key(case.patient)] == HOLD_OUT]
        _log_left_out([case.case_id for case in held_out if not case.audit])
        return training, [case for case in held_out if case.audit]

    def mark_training(self, patients: Iterable[str]) -> None:
        """Let patients train for good, such as those a version built elsewhere was trained on.

        Patients who are held out already stay so; a warning says how many.

        Raises
        ------
        StoreError
            As `split`.
        """
        keys = {patient_key(patient) for patient in patients}
        with self._locked():
            sides = self._read()
            self._add(dict.fromkeys(sorted(keys - sides.keys()), TRAINING), sides)
        if judging := sum(sides.get(key) == HOLD_OUT for key in keys):
            logger.warning("%d patients to be marked as training are held out already, and stay so", judging)

    def judging(self, patients: Iterable[str]) -> set[str]:
        """Return which of the patients judge versions, or would if they were decided about now; decides nothing.

        Raises
        ------
        StoreError
            The ledger is damaged.
        """
        sides = self._read()
        held_out = sum(side == HOLD_OUT for side in sides.values())
        keys = {patient: patient_key(patient) for patient in patients}
        return {name for name, key in keys.items() if (sides.get(key) or self._side(key, held_out)) == HOLD_OUT}

    def patients(self) -> dict[str, str]:
        """Return patient -> ``training`` or ``hold-out``, patients named by their `patient_key`.

        Raises
        ------
        StoreError
            The ledger is damaged.
        """
        return dict(self._read())

    # -- private ------------------------------------------------------------------------------------------------

    def _decided(self, cases: Sequence[ReviewedCase], sides: Mapping[str, Side]) -> dict[str, Side]:
        """Return the side of every patient who has none."""
        keys = list(dict.fromkeys(patient_key(case.patient) for case in cases))
        chosen = {patient_key(case.patient) for case in cases if not case.audit}
        held_out = sum(side == HOLD_OUT for side in sides.values())
        new: dict[str, Side] = {}
        for key in keys:
            if key not in sides:
                new[key] = TRAINING if key in chosen else self._side(key, held_out)
                held_out += new[key] == HOLD_OUT
        if new and all(new.get(key, sides.get(key)) == HOLD_OUT for key in keys):
            new[max(new, key=_number)] = TRAINING
        return new

    def _side(self, key: str, held_out: int) -> Side:
        limit = self._fraction if held_out >= self._enough else max(self._fraction, self._early_fraction)
        return HOLD_OUT if _number(key) < limit else TRAINING

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = writable_folder(self.path.parent) / f".{self.path.name}.lock"
        try:
            held = FileLock(lock).acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout as error:
            raise StoreError(
                f"Another process has been deciding the hold-out {self.path} for {LOCK_TIMEOUT_S:g} s. Wait until it "
                "is done and try again."
            ) from error
        with held:
            yield

    def _read(self) -> dict[str, Side]:
        try:
            return _sides(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise StoreError(
                f"The hold-out ledger {self.path} is damaged. Found: {error}. Expected: what MSHub wrote. How to fix: "
                "restore it from a backup. Nothing is decided again without it: patients who train would judge. Remove "
                "it only if no version has been trained with it yet."
            ) from error

    def _add(self, new: Mapping[str, Side], decided: Mapping[str, Side]) -> None:
        """Write the ledger with `new` patients behind those `decided`."""
        if not new:
            return
        try:
            replace_json(self.path, {"format": FORMAT, "patients": {**decided, **new}})
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written ({error}). Free some space or check permissions."
            ) from error
        held_out = sum(side == HOLD_OUT for side in new.values())
        logger.info("hold-out: %d new patients train, %d judge", len(new) - held_out, held_out)


def _number(key: str) -> float:
    return float(int(key[:_DIGITS], 16) / 16**_DIGITS)


def _sides(ledger: Any) -> dict[str, Side]:
    """Return the patients of a ledger; ValueError unless every entry is one we could have written."""
    if not isinstance(ledger, dict) or ledger.get("format") != FORMAT or not isinstance(ledger.get("patients"), dict):
        raise ValueError(f"no ledger of format {FORMAT}")
    patients: dict[str, Side] = ledger["patients"]
    wrong = [key for key, side in patients.items() if not _KEY.fullmatch(key) or side not in (TRAINING, HOLD_OUT)]
    if wrong:
        raise ValueError(f"the entry {wrong[0]!r}: {patients[wrong[0]]!r}")
    return patients


def _log_left_out(case_ids: Sequence[str]) -> None:
    if case_ids:
        logger.info(
            "left out, as their patients judge versions and they were not picked at random: %s", ", ".join(case_ids)
        )
