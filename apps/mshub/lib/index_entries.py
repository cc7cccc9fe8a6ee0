"""What a folder's index says of its images: entries of MONAI Label's own kind, and others made from them.

An entry is never changed once it is in the index: others may be reading it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastoreModel
from pydantic import Field

Entries = Mapping[str, ImageLabelModel | None]
"""What the index says of images from now on; None of one that is gone."""


class Index(LocalDatastoreModel):  # type: ignore[misc]
    """The index as it is read: MONAI Label's, and what it keeps of files that are gone."""

    absent: dict[str, ImageLabelModel] = Field(default_factory=dict, exclude=True)


def read_index(content: bytes) -> Index:
    """Return an index that was stored; `ValueError` for what is none."""
    known: Index = Index.model_validate_json(content)
    if "objects" not in known.model_fields_set:
        raise ValueError("it has no objects")
    return known


def entry_of(facts: dict[str, Any] | None) -> ImageLabelModel | None:
    """Return an entry that was stored."""
    return None if facts is None else ImageLabelModel.model_validate(facts)


def facts_of(entry: ImageLabelModel | None) -> dict[str, Any] | None:
    """Return what is stored of an entry."""
    return None if entry is None else entry.model_dump()


def changed(table: MutableMapping[str, ImageLabelModel], entries: Entries) -> MutableMapping[str, ImageLabelModel]:
    """Return a table that says it; where images come or go a new one, as others may be reading the old one."""
    if any((entry is None) == (image in table) for image, entry in entries.items()):
        table = dict(table)
    for image, entry in entries.items():
        if entry is not None:
            table[image] = entry
        elif image in table:
            del table[image]
    return table


def with_labels(entry: ImageLabelModel, labels: dict[str, DataModel]) -> ImageLabelModel:
    """Return the entry of the same image with other labels."""
    return ImageLabelModel(image=entry.image, labels=labels)


def without_label(entry: ImageLabelModel | None, tag: str) -> ImageLabelModel | None:
    """Return an entry without the label of a tag."""
    return entry and with_labels(entry, {name: label for name, label in entry.labels.items() if name != tag})


def with_found(
    image: str, entry: ImageLabelModel, there: Sequence[tuple[str, str]], kept: ImageLabelModel | None
) -> ImageLabelModel:
    """Return an entry with labels that were found, by tag and ending; all that is kept of one is known again."""
    found = {tag: found_file(image, ending) for tag, ending in reversed(there)}
    back = {tag: label for tag, label in (kept.labels if kept else {}).items() if (tag, label.ext) in there}
    if kept is None or not back:  # perhaps another image of that name
        return with_labels(entry, {**found, **entry.labels})
    known = DataModel(ext=entry.image.ext, info={**kept.image.info, **entry.image.info})
    return ImageLabelModel(image=known, labels={**found, **back, **entry.labels})


def worth_keeping(labels: Mapping[str, DataModel]) -> dict[str, DataModel]:
    """Return the labels of which more is known than that their file was found."""
    return {tag: label for tag, label in labels.items() if label.info.keys() - {"ts", "name"}}


def not_here(absent: ImageLabelModel | None, here: ImageLabelModel | None) -> ImageLabelModel | None:
    """Return what is to be kept of files that are gone, where an image is here: labels whose files are not."""
    if absent is None or here is None:
        return absent
    files = {(tag, label.ext) for tag, label in here.labels.items()}
    labels = {tag: label for tag, label in absent.labels.items() if (tag, label.ext) not in files}
    return with_labels(absent, labels) if labels else None


def found_file(image: str, ending: str) -> DataModel:
    """Return what is known of a file that was found."""
    return DataModel(ext=ending, info={"ts": int(time.time()), "name": image + ending})
