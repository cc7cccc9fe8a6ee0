"""A label somebody submits: checked against its image, and read by the names of its segments.

Clients renumber segments: 3D Slicer counts all segments of its scene, whatever model they belong to. A submitted
integer means nothing without the name that came with it, so nothing here ever looks at a number alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mshub.errors import LabelError
from mshub.geometry import Grid, Volume, check_same_grid
from mshub.label_rules import BACKGROUND, fold, similar_names
from mshub.volume_io import read_grid, read_volume


@dataclass(frozen=True)
class Correction:
    """A submitted label that passed every check.

    Attributes
    ----------
    labels : Volume
        Integers as the client numbered them, axes x, y, z, on the image's grid.
    values : dict of str to int
        Structure name, spelled as the models spell it, to the client's integer; background and absent names left out.
    voxels : dict of str to int
        Structure name to number of voxels, 0 for segments the client sent empty.
    """

    labels: Volume
    values: dict[str, int]
    voxels: dict[str, int]

    def reviewed(self, predicted: Collection[str] = ()) -> tuple[str, ...]:
        """Return the structures a person looked at, in the client's order.

        Slicer sends every label of every model as a segment, most of them empty: an empty segment was reviewed only
        if the label the person started from, with the structures `predicted`, was not empty there.
        """
        return tuple(name for name, count in self.voxels.items() if count or name in predicted)


def read_correction(path: Path, segments: Any, image: Grid, known: Collection[str]) -> Correction:
    """Read and check a submitted label.

    Parameters
    ----------
    path : Path
        NIfTI, NRRD or MetaImage file.
    segments : list of dict
        What the client says of its segments: ``[{"name": "liver", "idx": 2}, ...]`` (MONAI Label's ``label_info``).
    image : Grid
        Grid of the image that was labelled.
    known : collection of str
        Every structure name of the models on this server.

    Raises
    ------
    LabelError
        No names, unknown or repeated names or numbers, voxels that are no integers or have no name.
    GeometryError, CaseError
        The file cannot be read, or lies on another grid than the image.
    """
    numbered = _numbered(segments, known)
    check_same_grid(read_grid(path), image, "the label", "the image")  # first: the voxels may be more than memory holds
    volume = read_volume(path, allow_constant=True)
    _refuse_fractions(volume)
    counts = _counts(volume)
    nameless = sorted(set(counts) - {0} - set(numbered.values()))
    if nameless:
        raise LabelError(
            f"The label holds the value {', '.join(map(str, nameless))}, which no segment has. Found: segments "
            f"{_listed(numbered)}. How to fix: send name and idx of every segment in label_info."
        )
    voxels = {name: counts.get(value, 0) for name, value in numbered.items()}
    return Correction(volume, numbered, voxels)


def _numbered(segments: Any, known: Collection[str]) -> dict[str, int]:
    """Return structure name -> client's integer, without the background."""
    if not isinstance(segments, Sequence) or isinstance(segments, str) or not segments:
        raise LabelError(
            "The label came without the names of its segments (label_info), so nobody can tell what its numbers mean. "
            'Expected: [{"name": "liver", "idx": 1}, ...]. How to fix: submit it from 3D Slicer, or add label_info.'
        )
    numbered: dict[str, int] = {}
    for segment in segments:
        name, value = _segment(segment)
        if fold(name) == BACKGROUND and value == 0:
            continue
        name = _known_name(name, known)
        if name in numbered or value in numbered.values() or value <= 0:
            raise LabelError(
                f"Two segments are called {name} or numbered {value}, or a number is not positive. "
                "Expected: every structure once, with a number of its own from 1. How to fix: merge or rename segments."
            )
        numbered[name] = value
    return numbered


def _segment(segment: Any) -> tuple[str, int]:
    name, value = (segment.get("name"), segment.get("idx")) if isinstance(segment, Mapping) else (None, None)
    if not isinstance(name, str) or type(value) is not int:
        raise LabelError(
            f"label_info holds {segment!r}. Expected a name and a whole number idx, such as "
            '{"name": "liver", "idx": 1}.'
        )
    return name, value


def _known_name(name: str, known: Collection[str]) -> str:
    spelled = {fold(structure): structure for structure in known}
    if fold(name) in spelled:
        return spelled[fold(name)]
    close = similar_names(name, known, limit=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise LabelError(
        f"No model on this server knows a structure called {name!r}.{hint} Known: "
        f"{', '.join(sorted(known)) or 'none'}. How to fix: rename the segment, or remove it before submitting."
    )


def _refuse_fractions(volume: Volume) -> None:
    if volume.array_xyz.dtype.kind not in "iu":
        raise LabelError(
            f"The label holds {volume.array_xyz.dtype} numbers. Expected: whole numbers, one per structure. How to "
            "fix: save it as a label map (uint8), not as a probability or a resampled image."
        )


def _counts(volume: Volume) -> dict[int, int]:
    values, counts = np.unique(volume.array_xyz, return_counts=True)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}


def _listed(numbered: Mapping[str, int]) -> str:
    return ", ".join(f"{value} ({name})" for name, value in numbered.items()) or "none"
