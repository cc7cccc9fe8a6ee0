"""Labels as files for others: pixel by pixel for viewers, DICOM SEG and RTSTRUCT for a PACS or a planning system."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from lib.datastore import StudiesFolder
from lib.faults import as_http_errors, not_found
from lib.pacs import PacsStudies
from lib.pacs_labels import PRELABEL, label_facts
from mshub.atomic_file import removed_on_failure
from mshub.corrections import read_correction
from mshub.dicom_derived import Facts
from mshub.geometry import Array
from mshub.label_export import FORMATS, export_labels
from mshub.structures import StructureOverride
from mshub.volume_io import read_grid, read_volume, write_volume

NRRD = "nrrd"


def export_label(datastore: StudiesFolder, image: str, tag: str, format: str) -> tuple[Path, dict[str, int]]:
    """Write a stored label to a temporary file, which the caller removes.

    Parameters
    ----------
    datastore : StudiesFolder
    image, tag : str
    format : str
        ``nrrd``, uncompressed, with the pixels of the series' slices; ``seg`` or ``rtstruct`` for a series of a PACS.

    Returns
    -------
    path : Path
    names : dict of str to int
        Structure name to its value in the file (``nrrd``).

    Raises
    ------
    HTTPException
        400 for another format, 404 without such a label, 422 for one that cannot be written so.
    """
    check_format(format, (NRRD, *FORMATS))
    with as_http_errors(), tempfile.TemporaryDirectory(prefix="mshub-export-") as folder:
        path, info = _copied(datastore, image, tag, Path(folder))
        array = read_volume(path, allow_constant=True).array_xyz
        names = _names(path, info, tag, datastore)
    with as_http_errors():
        if format != NRRD:
            facts = label_facts(info, tag, _overrides(datastore))
            return _written(
                ".dcm", lambda file: write_dicom(datastore, image, array, names, format, facts, file)
            ), names
        slices, grid = datastore.pixelwise(image, array)
        small = slices.astype("uint8" if max(names.values(), default=0) < 256 else "uint16", copy=False)
        return _written(".nrrd", lambda file: write_volume(file, small, grid, compress=False)), names


def copy_of_label(datastore: StudiesFolder, image: str, tag: str) -> tuple[Path, str]:
    """Copy a stored label to a temporary file, which the caller removes; returns it and the label's own file name.

    Raises
    ------
    HTTPException
        404 without such a label.
    """
    with tempfile.TemporaryDirectory(prefix="mshub-export-") as folder:
        copy, _ = _copied(datastore, image, tag, Path(folder))
        return _written("", copy.replace), copy.name


def _copied(datastore: StudiesFolder, image: str, tag: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Copy a label into a folder; returns the copy and what is known of it, 404 without such a label."""
    path, info = datastore.copy_label(image, tag, folder)
    if path is None:
        raise not_found(f"label of {image} tagged", tag, sorted(datastore.get_labels_by_image_id(image)))
    return path, info


def export_prediction(datastore: Any, image: str, label: Path, params: Mapping[str, Any], format: str) -> Path:
    """Write a prediction as DICOM to a temporary file, which the caller removes; errors as `export_label`."""
    check_format(format, tuple(FORMATS))
    facts = label_facts({"params": params}, PRELABEL, _overrides(datastore))
    with as_http_errors():
        array = read_volume(label, allow_constant=True).array_xyz
        names = dict(params["label_names"])
        return _written(".dcm", lambda file: write_dicom(datastore, image, array, names, format, facts, file))


def check_format(format: str, known: tuple[str, ...]) -> None:
    """Refuse a format nobody writes here."""
    if format not in known:
        raise HTTPException(400, f"The format {format[:40]!r} is unknown: expected one of {', '.join(known)}.")


def write_dicom(
    datastore: Any, image: str, array_xyz: Array, names: Mapping[str, int], format: str, facts: Facts, file: Path
) -> None:
    """Write a label on the grid of a series of a PACS as DICOM; 422 for an image that came as another kind of file."""
    if not isinstance(datastore, PacsStudies):
        raise HTTPException(
            422,
            f"{image} is no DICOM series: a {format} refers to the slices it was made from. Expected: a server started "
            "with the address of a PACS, or `mshub predict --format` with the folder of a series.",
        )
    export_labels(file, format, array_xyz, names, datastore.stack(image), facts)


def _overrides(datastore: Any) -> Mapping[str, StructureOverride]:
    return datastore.overrides() if isinstance(datastore, PacsStudies) else {}


def _names(path: Path, info: Mapping[str, Any], tag: str, datastore: StudiesFolder) -> dict[str, int]:
    if tag == PRELABEL:
        return dict(info.get("params", {}).get("label_names", {}))
    return read_correction(path, info.get("label_info"), read_grid(path), datastore.structures()).values


def _written(ending: str, write: Callable[[Path], Any]) -> Path:
    with tempfile.NamedTemporaryFile(prefix="mshub-export-", suffix=ending, delete=False) as file:
        path = Path(file.name)
    with removed_on_failure(path):
        write(path)
    return path
