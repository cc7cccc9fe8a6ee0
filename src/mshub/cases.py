"""Reviewed cases: images, the label a person stands behind, and what of it they looked at.

A training, wherever it was started, gets its cases as a list of these, by names and never by numbers. The list is
written to a file when the training is started, so that the training sees one state of the labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mshub.checksums import file_sha256


@dataclass(frozen=True)
class ReviewedCase:
    """One reviewed case.

    Attributes
    ----------
    case_id : str
        Unique among the cases of a training; letters, digits, ``.``, ``_``, ``-``.
    images : tuple of Path
        One file or DICOM folder per channel, in the model's order.
    label : Path
        Label file on the images' grid.
    values : dict of str to int
        Structure name -> integer in the label file; absent structures may be left out.
    reviewed : tuple of str
        Structures a person looked at, those found empty included. All others are unknown, not absent.
    patient : str
        Whose images these are: all cases of a patient train, or none does.
    audit : bool
        The case was picked at random, not because a model finds it hard: only such cases may judge versions.
    facts : dict
        Who, when, which version the label started from: kept for the record.
    """

    case_id: str
    images: tuple[Path, ...]
    label: Path
    values: dict[str, int]
    reviewed: tuple[str, ...]
    patient: str
    audit: bool = True
    facts: dict[str, Any] = field(default_factory=dict)

    def structures(self, known: Sequence[str]) -> tuple[str, ...]:
        """Return which of the structures `known` to a model were reviewed, in the model's order."""
        return tuple(name for name in known if name in self.reviewed)

    @property
    def patient_key(self) -> str:
        """Stands for the patient where a name should not be written down."""
        return hashlib.sha256(self.patient.encode()).hexdigest()[:16]

    @cached_property
    def digest(self) -> str:
        """sha256 over the images, the label, its names and what was reviewed: changes when any of them does.

        Raises
        ------
        StoreError
            A file is gone or cannot be read.
        """
        content = {
            "images": [_sha256(path) for path in self.images],
            "label": file_sha256(self.label),
            "values": self.values,
            "reviewed": sorted(self.reviewed),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the case ready for JSON; `from_dict` reads it back."""
        return {
            "case": self.case_id,
            "images": [str(path) for path in self.images],
            "label": str(self.label),
            "values": self.values,
            "reviewed": list(self.reviewed),
            "patient": self.patient,
            "audit": self.audit,
            "facts": self.facts,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ReviewedCase:
        """Read what `as_dict` wrote."""
        return cls(
            case_id=stored["case"],
            images=tuple(Path(path) for path in stored["images"]),
            label=Path(stored["label"]),
            values=dict(stored["values"]),
            reviewed=tuple(stored["reviewed"]),
            patient=stored["patient"],
            audit=stored["audit"],
            facts=dict(stored["facts"]),
        )


def _sha256(path: Path) -> str:
    """Return the sha256 of a file, or of the names and contents of a DICOM folder's files."""
    if not path.is_dir():
        return file_sha256(path)
    files = [f"{file.name}:{file_sha256(file)}" for file in sorted(path.iterdir()) if file.is_file()]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()
