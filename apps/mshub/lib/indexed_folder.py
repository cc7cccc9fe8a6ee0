"""MONAI Label's local datastore with an index that costs no more with many images, and that processes can share.

Memory says what the disk says: a change is made on a copy of an image's entry, stored (`lib.index_journal`), and only
then seen. Whoever is about to change something first takes in what other processes stored, under one lock.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException
from watchdog.events import FileSystemEvent, PatternMatchingEventHandler

from lib.index_file import INDEX, back_up, plain, recover, stamped
from lib.index_journal import IndexJournal
from mshub.atomic_file import replace_by_copy

logger = logging.getLogger(__name__)

WAIT_S = 0.005  # between two attempts at the lock
Entries = Mapping[str, ImageLabelModel | None]
"""What the index says of images from now on; None of one that is gone."""


class IndexedFolder(LocalDatastore):  # type: ignore[misc]
    """The images and labels of a folder, as its index knows them; see MONAI Label's class for the parameters."""

    def __init__(self, path: str, extensions: list[str], auto_reload: bool, read_only: bool) -> None:
        index = Path(path) / INDEX
        index.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(index.parent / ".lock", poll_interval=WAIT_S)
        self._journal, self._read_only = IndexJournal(index), read_only
        self._tidied: date | None = None
        super().__init__(path, extensions=extensions, auto_reload=auto_reload, read_only=read_only)
        if auto_reload and hasattr(self, "_observer"):
            self._watch()

    def tidy_daily(self) -> str:
        """Be tidy when a server starts, and once a day from then on; returns nothing, as a janitor's task."""
        today = datetime.now(timezone.utc).date()
        if self._tidied != today:
            self.tidy()
            self._tidied = today
        return ""

    def tidy(self) -> None:
        """Write the index whole if it has a journal, of which other programs know nothing, and keep today's copy.

        A full disk leaves the journal, and nothing is lost.
        """
        try:
            with self._lock:
                if self._journal.path.exists():
                    self._update_datastore_file()
                back_up(self._journal.index)
        except OSError as error:
            logger.error("the index cannot be written: %s", error)

    def close(self) -> None:
        """Leave an index that says all."""
        if not self._read_only and self._journal.path.exists():
            self.tidy()

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Note what is known of an image."""
        with self._changing(image_id) as entry:
            entry.image.info.update(plain(info))

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Note what is known of a label."""
        with self._changing(label_id) as entry:
            if label_tag not in entry.labels:
                raise LabelNotFoundException(f"Label: {label_id} Tag: {label_tag} not found")
            entry.labels[label_tag].info.update(plain(info))

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Remove a label, if there is one."""
        with self._lock:
            self._catch_up()
            known = self._datastore.objects.get(label_id)
            if known is None or label_tag not in known.labels:
                return
            Path(self.get_label_uri(label_id, label_tag)).unlink(missing_ok=True)
            entry = known.model_copy(deep=True)
            del entry.labels[label_tag]
            self._take_note({label_id: entry})

    @contextmanager
    def _changing(self, image_id: str) -> Iterator[ImageLabelModel]:
        """Give an image's entry to be changed, and store it; an error on the way leaves the old one."""
        with self._lock:
            self._catch_up()
            known = self._datastore.objects.get(image_id)
            if known is None:
                raise ImageNotFoundException(f"Image {image_id} not found")
            entry = known.model_copy(deep=True)
            yield entry
            self._store({image_id: entry})

    def _store(self, entries: Entries) -> None:
        """Bring entries to the disk, then into memory; the caller holds the lock and has caught up."""
        if not entries:
            return
        if self._journal.must_be_whole:
            self._write_whole(entries)
        else:
            self._journal.append((image, _facts(entry)) for image, entry in entries.items())
        self._apply(entries)
        if self._journal.is_long:
            try:
                self._write_whole({})
            except OSError as error:
                logger.error("the index is not written whole, its journal grows: %s", error)

    def _take_note(self, entries: Entries) -> None:
        """Store what is so already; on a full disk only memory knows, and finds it again next time."""
        try:
            self._store(entries)
        except OSError as error:
            logger.error("the index cannot be written: %s", error)
            self._apply(entries)

    def _apply(self, entries: Entries) -> None:
        """Let memory say it; images come and go in a new table, as others may be reading the old one."""
        objects = self._datastore.objects
        if any(entry is None or image not in objects for image, entry in entries.items()):
            objects = dict(objects)
        for image, entry in entries.items():
            if entry is None:
                objects.pop(image, None)
            else:
                objects[image] = entry
        self._datastore.objects = objects

    def _write_whole(self, entries: Entries) -> None:
        """Write the index with other entries for some images."""
        objects = {**self._datastore.objects, **entries}
        self._journal.write_index(
            self._datastore.model_dump(exclude={"base_path", "objects"}),
            ((image, entry.model_dump()) for image, entry in objects.items() if entry is not None),
        )

    def _update_datastore_file(self, lock: bool = True) -> None:
        """Write the index whole, as MONAI Label asks for; what others stored meanwhile is taken in first."""
        said = self._datastore
        with self._lock:
            self._catch_up()
            self._datastore.name, self._datastore.description = said.name, said.description
            self._write_whole({})

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Take in what other processes stored."""
        with self._lock:
            self._catch_up(throw_exception)

    def _catch_up(self, at_start: bool = False) -> None:
        """Take in what other processes stored since; the caller holds the lock."""
        content = self._journal.read_index()
        if content is not None:
            try:
                known = _read(content)
            except ValueError as error:
                if self._read_only or (at_start and not recover(self._journal.index)):
                    raise
                return self._catch_up(at_start) if at_start else self._replace_damaged(error)
            known.base_path = self._datastore_path
            self._datastore = known
        return self._apply({image: _entry(facts) for image, facts in self._journal.read_changes()})

    def _replace_damaged(self, error: ValueError) -> None:
        """Write the index anew from memory, where somebody else damaged it meanwhile."""
        damaged = stamped(self._journal.index, "damaged")
        logger.error("%s is damaged: it is kept as %s, and written anew: %s", INDEX, damaged.name, error)
        with suppress(OSError):
            replace_by_copy(self._journal.index, damaged)
        self._journal.forget()
        self._write_whole({})

    # -- what is in the folder --------------------------------------------------------------------------------------

    def _reconcile_datastore(self) -> None:
        """Take in what is in the folder, and what is no longer."""
        with self._lock:
            self._catch_up()
            self._take_note(self._differences())

    def _differences(self) -> dict[str, ImageLabelModel | None]:
        """Return what the index does not say, but the folder."""
        there, labels = _names(Path(self._datastore.image_path())), self._label_folders()
        known = self._datastore.objects
        entries: dict[str, ImageLabelModel | None] = {}
        for image, entry in known.items():
            if not self._is_there(image, entry, there):
                entries[image] = None
            elif gone := [tag for tag, label in entry.labels.items() if image + label.ext not in labels.get(tag, ())]:
                entries[image] = _with_labels(entry, {tag: entry.labels[tag] for tag in entry.labels.keys() - gone})
        for image, ending in self._volumes(self._datastore.image_path(), there):
            if entries.get(image, known.get(image)) is None:
                entries[image] = ImageLabelModel(image=_found(image, ending))
        for tag, files in labels.items():
            for image, ending in self._volumes(self._datastore.label_path(tag), files):
                labelled = entries.get(image, known.get(image))
                if labelled is not None and tag not in labelled.labels:
                    entries[image] = _with_labels(labelled, {**labelled.labels, tag: _found(image, ending)})
        return entries

    def _entry_of(self, image: str, ending: str, info: Mapping[str, Any]) -> ImageLabelModel:
        """Return what there is to say of an image that was added, its labels among it if they were there before."""
        known = self._datastore.objects.get(image) or ImageLabelModel(image=_found(image, ending))
        endings = [pattern.removeprefix("*") for pattern in self._extensions]
        folders = [path for path in Path(self._datastore.label_path(None)).iterdir() if path.is_dir()]
        there = [(path.name, one) for path in folders for one in endings if (path / (image + one)).is_file()]
        entry = _with_labels(known, {**{tag: _found(image, one) for tag, one in there}, **known.labels})
        return entry.model_copy(
            update={"image": DataModel(ext=known.image.ext, info={**known.image.info, **plain(info)})}
        )

    def _is_there(self, image: str, entry: ImageLabelModel, files: Set[str]) -> bool:
        return image + entry.image.ext in files

    def _label_folders(self) -> dict[str, set[str]]:
        """Return the files in the folders of labels, by tag."""
        folder = Path(self._datastore.label_path(None))
        return {path.name: _names(path) for path in folder.iterdir() if path.is_dir()}

    def _volumes(self, folder: str, there: Set[str]) -> Iterator[tuple[str, str]]:
        """Yield id and ending of the images, or labels, that are in a folder."""
        return (self._to_id(name) for name in self._list_files(folder, self._extensions) if name in there)

    # -- what others do ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Take in what another process, such as a batch, stores."""
        watch = _Watch([str(self._journal.index), str(self._journal.path)], self._take_in)
        self._observer.schedule(watch, path=self._datastore_path, recursive=True)

    def _on_any_event(self, event: FileSystemEvent) -> None:
        """Look at the folder again; whatever goes wrong, the thread that tells of changes goes on."""
        try:
            super()._on_any_event(event)
        except Exception:
            logger.exception("the folder of studies was not looked at again after a change")

    def _take_in(self) -> None:
        if not self._journal.is_current():  # mostly it was this process, which need not wait for the lock
            self._init_from_datastore_file()


class _Watch(PatternMatchingEventHandler):
    """Tells of files that are written to or put in place."""

    def __init__(self, files: list[str], tell: Callable[[], None]) -> None:
        super().__init__(patterns=files)
        self._tell = tell

    def on_modified(self, event: FileSystemEvent) -> None:
        self._tell()

    def on_moved(self, event: FileSystemEvent) -> None:
        self._tell()


def _read(content: bytes) -> LocalDatastoreModel:
    known = LocalDatastoreModel.model_validate_json(content)
    if "objects" not in known.model_fields_set:
        raise ValueError("it has no objects")
    return known


def _entry(facts: dict[str, Any] | None) -> ImageLabelModel | None:
    return None if facts is None else ImageLabelModel.model_validate(facts)


def _facts(entry: ImageLabelModel | None) -> dict[str, Any] | None:
    return None if entry is None else entry.model_dump()


def _names(folder: Path) -> set[str]:
    """Return the names of the files of a folder, without links to what is gone."""
    with os.scandir(folder) as found:
        return {entry.name for entry in found if entry.is_file()}


def _with_labels(entry: ImageLabelModel, labels: dict[str, DataModel]) -> ImageLabelModel:
    return ImageLabelModel(image=entry.image, labels=labels)


def _found(image: str, ending: str) -> DataModel:
    """Return what is known of a file that was found."""
    return DataModel(ext=ending, info={"ts": int(time.time()), "name": image + ending})
