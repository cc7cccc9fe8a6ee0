"""Reviewed cases from two folders, as labs keep them: images here, labels of the same names there."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mshub.cases import ReviewedCase
from mshub.dataset_json import is_v1_style, read_labels
from mshub.errors import CaseError, LabelError
from mshub.image_file import extension_of
from mshub.label_rules import fold, similar_names
from mshub.volume_io import READABLE

PATIENTS = "patients.csv"
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<number>\d{4})")


def read_dataset_json(labels: Path) -> dict[str, Any] | None:
    """Return the ``dataset.json`` in a folder of labels or beside it; None where there is none.

    Raises
    ------
    LabelError
        It cannot be read.
    """
    for path in (labels / "dataset.json", labels.parent / "dataset.json"):
        if path.is_file():
            try:
                content: Any = json.loads(path.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise LabelError(f"{path} is no JSON: {error}. Expected nnU-Net's dataset.json.") from error
            if not isinstance(content, dict):
                raise LabelError(f"{path} holds a {type(content).__name__}. Expected nnU-Net's dataset.json: a table.")
            return content
    return None


def cases_from_folders(images: Path, labels: Path, published: Mapping[str, int] | None) -> list[ReviewedCase]:
    """Pair images and labels by name.

    Parameters
    ----------
    images : Path
        ``case.nii.gz``, or ``case_0000.nii.gz``, ``case_0001.nii.gz``... for several channels; also NRRD and MetaImage.
        A file of the label's very name is its image, even if that name ends in four digits. ``patients.csv`` in it
        (columns ``case,patient``) says which cases are of one patient; without it, each case is a patient.
    labels : Path
        ``case.nii.gz`` per case. A ``dataset.json`` in it or beside it names the integers; without one they are those
        `published` by the model, which is what ``mshub predict`` writes.
    published : mapping of str to int or None
        The model's structures and values; None for a model that is yet to be trained.

    Returns
    -------
    list of ReviewedCase
        Sorted by name. A label file is taken as a complete review of every structure it has a name for.

    Raises
    ------
    CaseError, LabelError
        A folder is missing, nothing pairs up, a label has no image or an unclear one, or the names are not the model's.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise CaseError(f"{folder} is no folder. Expected a folder of images and one of labels of the same names.")
    values = _values(labels, published)
    files, patients = _images_by_case(images), read_patients(images / PATIENTS)
    found: dict[str, ReviewedCase] = {}
    for path in _volumes(labels):
        case = _stem(path)
        if case in found:
            raise CaseError(f"{found[case].label.name} and {path.name} are labels of one case. Keep one of them.")
        channels = tuple(_channels(path, files.get(case, []), images))
        found[case] = ReviewedCase(case, channels, path, values, tuple(values), patients.get(case, case))
    if not found:
        raise CaseError(f"{labels} holds no labels: expected files ending in {', '.join(READABLE)}.")
    return list(found.values())


def _values(labels: Path, published: Mapping[str, int] | None) -> dict[str, int]:
    """Return structure -> integer in the label files, spelled as the model spells it."""
    dataset = read_dataset_json(labels)
    if dataset is None:
        if published is None:
            raise LabelError(
                f"Nothing says what the integers in {labels} mean. Expected: dataset.json there or beside it, with "
                'channel_names ({"0": "CT"}) and labels ({"background": 0, "liver": 1}).'
            )
        return dict(published)
    read = read_labels(dataset)
    declared = read.drawn
    if read.ignore_value is not None:
        raise LabelError(
            f"dataset.json declares 'ignore' = {read.ignore_value}: voxels nobody decided about. Expected labels that "
            "are complete, as they may judge versions. How to fix: if no label file holds that value, remove 'ignore' "
            "from this dataset.json; otherwise complete the labels."
        )
    if published is None:
        _refuse_unplannable(dataset)
        return declared
    spelled = {fold(name): name for name in published}
    unknown = [name for name in declared if fold(name) not in spelled]
    if unknown:
        close = similar_names(unknown[0], published)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise LabelError(
            f"dataset.json names {', '.join(unknown)}, which the model does not have.{hint} Its structures: "
            f"{', '.join(published)}. How to fix: correct the names, or remove these labels."
        )
    return {spelled[fold(name)]: value for name, value in declared.items()}


def _refuse_unplannable(dataset: Mapping[str, Any]) -> None:
    if not isinstance(dataset.get("channel_names"), dict) or is_v1_style(dataset["labels"]):
        raise LabelError(
            f"dataset.json lacks what a new model needs. Found: {', '.join(dataset)}. Expected, as nnU-Net v2 has it: "
            'channel_names ({"0": "CT"}) and labels ({"background": 0, "liver": 1}).'
        )


def _volumes(folder: Path) -> list[Path]:
    """Return the images of a folder by name, without hidden files: macOS leaves a ``._case.nii.gz`` beside each."""
    return sorted(path for path in folder.iterdir() if extension_of(path) in READABLE and path.name[0] != ".")


def _stem(path: Path) -> str:
    return path.name[: -len(extension_of(path))]


def _images_by_case(images: Path) -> dict[str, list[Path]]:
    """Return what may be a case -> its image, or its channels where no image has that very name."""
    named: dict[str, list[Path]] = {}
    numbered: dict[str, list[Path]] = {}
    for path in _volumes(images):
        named.setdefault(_stem(path), []).append(path)
        if match := _CHANNEL.fullmatch(_stem(path)):
            numbered.setdefault(match["case"], []).append(path)
    return {**numbered, **named}


def _channels(label: Path, files: list[Path], images: Path) -> list[Path]:
    """Return the images of a label, in order; refuse none, two of one name and gaps in the numbers."""
    case, extension = _stem(label), extension_of(label)
    if not files:
        raise CaseError(
            f"The label {label.name} has no image: expected {case}{extension} or {case}_0000{extension} in {images}."
        )
    if [_stem(path) for path in files] not in ([case], [f"{case}_{number:04d}" for number in range(len(files))]):
        raise CaseError(
            f"The images of {case} are {', '.join(path.name for path in files)}. Expected one file of that name, or "
            f"one per channel, numbered {case}_0000, {case}_0001... without gaps."
        )
    return files


def read_patients(path: Path) -> dict[str, str]:
    """Read which cases are of one patient, who never both trains and judges.

    Parameters
    ----------
    path : Path
        UTF-8, comma-separated, with the columns ``case`` and ``patient``. A case without a line, or a missing file,
        means that each case is a patient.

    Raises
    ------
    CaseError
        It could be misread: that would put a patient on both sides.
    """
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ["nothing"]]
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise CaseError(f"{path} cannot be read ({error}). Expected a comma-separated file in UTF-8.") from error
    if not {"case", "patient"} <= set(columns):
        raise CaseError(f"{path} has the columns {', '.join(columns)}; expected case,patient in its first line.")
    patients: dict[str, str] = {}
    for case, patient in (((row["case"] or "").strip(), (row["patient"] or "").strip()) for row in rows):
        if case and patient and patients.setdefault(case, patient) != patient:
            raise CaseError(f"{path} says that {case} is of {patients[case]} and of {patient}. Keep one of the lines.")
    return patients
