"""What is about to be stored of a label, noted first: its file and the index cannot change at one moment.

Without the note, a server that is killed between the two leaves a new label under the names of the old one, and numbers
would be read as other structures.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mshub.atomic_file import replace_json
from mshub.checksums import file_sha256

NAME = ".label-being-stored.json"


@dataclass(frozen=True)
class LabelNote:
    """One change of an image's labels.

    Attributes
    ----------
    image : str
    file : str
        Where the label goes, relative to the folder of labels.
    sha256 : str
        Of the label that goes there.
    labels : dict
        Tag to what the index is to say of it: ``{"ext": ..., "info": {...}}``.
    copy : str
        Where the label it replaces is put aside, likewise; empty if there is none.
    """

    image: str
    file: str
    sha256: str
    labels: dict[str, dict[str, Any]]
    copy: str = ""

    @classmethod
    def read(cls, folder: Path) -> LabelNote | None:
        """Return the note in a folder of labels; None if there is none that can be read."""
        try:
            return cls(**json.loads((folder / NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Put the note into a folder of labels."""
        replace_json(folder / NAME, asdict(self))

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove the note: file and index agree."""
        (folder / NAME).unlink(missing_ok=True)

    def is_done(self, folder: Path) -> bool:
        """Return whether the label is where it was to go."""
        target = folder / self.file
        return target.is_file() and file_sha256(target) == self.sha256
