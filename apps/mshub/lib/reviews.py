"""From what a studies folder knows about a final label to a case a model can learn from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mshub.cases import ReviewedCase
from mshub.errors import LabelError
from mshub.geometry import check_same_grid
from mshub.label_rules import BACKGROUND, fold, is_integer
from mshub.volume_io import read_grid, read_volume

AUDIT_STRATEGY = "random"
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def reviewed_case(
    image_id: str,
    images: Sequence[Path],
    label: Path,
    *,
    label_info: Mapping[str, Any],
    image_info: Mapping[str, Any],
    patients: Mapping[str, str],
    structures: Collection[str],
) -> ReviewedCase:
    """Return the reviewed case of one image.

    Parameters
    ----------
    image_id : str
    images : sequence of Path
        The image's channels, in order.
    label : Path
        Its final label.
    label_info, image_info : mapping
        What the datastore's index says of the two.
    patients : mapping of str to str
        Image id -> patient: see `mshub.case_folders.read_patients`.
    structures : collection of str
        The structures of all models, spelled as they spell them; other names are kept as they came.

    Raises
    ------
    LabelError
        A file is gone, or the label came without the names of its segments, or they cannot be told apart.
    CaseError
        What was reviewed has to be read from the label itself, and that cannot be read or lies on another grid.
    """
    gone = [path.name for path in (*images, label) if not path.is_file()]
    if gone:
        raise LabelError(f"there is no file {', '.join(gone)}; expected the image's channels and its label")
    spelled = {fold(name): name for name in structures}
    values = _values(label_info.get("label_info"), spelled)
    reviewed = label_info.get("reviewed")
    if reviewed is None:  # by another tool, or older than this list: what is in it was drawn or kept by somebody
        found = _values_found(label, _state(label), images[0])
        reviewed = [name for name, value in values.items() if value in found]
    return ReviewedCase(
        case_id=case_id_of(image_id),
        images=tuple(images),
        label=label,
        values=values,
        reviewed=tuple(spelled.get(fold(name), name) for name in reviewed),
        patient=patient_of(image_id, image_info, patients),
        audit=_offered_by(image_info) <= {AUDIT_STRATEGY},
        facts={key: label_info.get(key) for key in ("client_id", "submitted", "started_from", "doubts")},
    )


def _values(segments: Any, spelled: Mapping[str, str]) -> dict[str, int]:
    """Return structure name -> integer in the label, without the background."""
    if not isinstance(segments, Sequence) or isinstance(segments, str) or not segments:
        raise LabelError("it came without the names of its segments (label_info); submit it again, with names")
    values: dict[str, int] = {}
    for segment in segments:
        name, value = (segment.get("name"), segment.get("idx")) if isinstance(segment, Mapping) else (None, None)
        if not isinstance(name, str) or not fold(name) or not is_integer(value):
            raise LabelError(f"its label_info holds {segment!r}; expected a name and a whole number idx")
        if fold(name) == BACKGROUND and value == 0:
            continue
        name = spelled.get(fold(name), name)
        if name in values or value in values.values() or value <= 0:
            raise LabelError(f"two of its segments are called {name} or numbered {value}, or a number is not positive")
        values[name] = value
    return values


@lru_cache(maxsize=4096)
def _values_found(label: Path, state: tuple[int, int], image: Path) -> frozenset[int]:
    """Return the integers in a label nobody has checked yet; `state` makes a replaced file be read again."""
    check_same_grid(read_grid(label), read_grid(image), "the label", "the image")
    values = np.unique(read_volume(label, allow_constant=True).array_xyz)
    if not np.array_equal(values, np.floor(values)):
        raise LabelError("it holds fractions; expected whole numbers, one per structure")
    return frozenset(int(value) for value in values)


def _state(path: Path) -> tuple[int, int]:
    """Return what changes when a file is replaced: its size and time of change."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def case_id_of(image_id: str) -> str:
    """Return the image's id, or one made of it where it holds what a training's file names may not."""
    if _SAFE.fullmatch(image_id):
        return image_id
    cleaned = re.sub(r"[^A-Za-z0-9_.-]+", "_", image_id)
    return f"case-{cleaned}-{hashlib.sha256(image_id.encode()).hexdigest()[:8]}"


def patient_of(image_id: str, image_info: Mapping[str, Any], patients: Mapping[str, str]) -> str:
    """Return whose image it is: as DICOM or a client said, as the table of patients says, or nobody else's."""
    known = [image_info.get("PatientID"), image_info.get("patient"), patients.get(image_id)]
    return next((text for text in (str(name or "").strip() for name in known) if text), image_id)


def _offered_by(image_info: Mapping[str, Any]) -> set[str]:
    """Return the strategies that ever offered an image: MONAI Label notes each, with the time."""
    strategies = image_info.get("strategy")
    return set(strategies) if isinstance(strategies, Mapping) else set()
