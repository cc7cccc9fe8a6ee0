"""MONAI Label's local datastore with an index that costs no more with many images, and that processes can share.

Memory says what the disk says: a change is made on a copy of an image's entry, stored (`lib.index_journal`), and only
then seen. Whoever is about to change something first takes in what other processes stored, under one lock.

A file that is gone may be back in a moment, as when it is copied anew; what is known of a label stands nowhere else. So
the index keeps apart (``absent``) what it knew of images and labels whose files are gone, until somebody removes them,
or neither an image nor a label of it was there at the end of a day. It shows them to nobody.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Set
from contextlib import contextmanager, suppress
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException
from watchdog.events import FileSystemEvent, PatternMatchingEventHandler

from lib.index_entries import (
    Entries,
    Index,
    changed,
    entry_of,
    facts_of,
    found_file,
    not_here,
    read_index,
    with_found,
    with_labels,
    without_label,
    worth_keeping,
)
from lib.index_file import INDEX, back_up, plain, recover, stamped
from lib.index_journal import IndexJournal
from mshub.atomic_file import replace_by_copy

logger = logging.getLogger(__name__)

WAIT_S = 0.005  # between two attempts at the lock


class IndexedFolder(LocalDatastore):  # type: ignore[misc]
    """The images and labels of a folder, as its index knows them; see MONAI Label's class for the parameters."""

    def __init__(self, path: str, extensions: list[str], auto_reload: bool, read_only: bool) -> None:
        index = Path(path) / INDEX
        index.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(index.parent / ".lock", poll_interval=WAIT_S)
        self._journal, self._read_only = IndexJournal(index), read_only
        self._absent: MutableMapping[str, ImageLabelModel] = {}  # who uses it holds the lock
        self._tidied: date | None = None
        self._is_blind = False
        super().__init__(path, extensions=extensions, auto_reload=auto_reload, read_only=read_only)
        if auto_reload and hasattr(self, "_observer"):
            self._watch()

    def tidy_daily(self) -> str:
        """Be tidy when a server starts, and once a day from then on; returns nothing, as a janitor's task."""
        today = datetime.now(timezone.utc).date()
        if self._tidied != today:
            self.tidy()
            if self._tidied is not None:  # at a start a share may not be back yet
                self._forget_gone()
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
            known = [table.get(label_id) for table in (self._datastore.objects, self._absent)]
            for path in self._files_of_labels(label_id, label_tag):
                path.unlink(missing_ok=True)
            here, absent = (without_label(entry, label_tag) for entry in known)
            if [here, absent] != known:
                self._take_note({label_id: here}, {label_id: absent if absent and absent.labels else None})

    def _files_of_labels(self, image: str, tag: str | None = None) -> list[Path]:
        """Return where labels of an image lie, or are to lie again; all, or that of one tag."""
        known = [table[image].labels for table in (self._datastore.objects, self._absent) if image in table]
        labels = [(name, label) for some in known for name, label in some.items() if tag in (None, name)]
        return [Path(self._datastore.label_path(name)) / (image + label.ext) for name, label in labels]

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

    def _store(self, entries: Entries, absent: Entries | None = None) -> None:
        """Bring entries to the disk, then into memory; the caller holds the lock and has caught up.

        What the index keeps of an image's files that are gone stays as it is, but for labels that are here again and
        for what is said in `absent`.
        """
        entries = {**{image: self._datastore.objects.get(image) for image in absent or {}}, **entries}
        if not entries:
            return
        known = {**{image: self._absent.get(image) for image in entries}, **(absent or {})}
        absent = {image: not_here(known[image], entry) for image, entry in entries.items()}
        if self._journal.must_be_whole:
            self._write_whole(entries, absent)
        else:
            self._journal.append((image, facts_of(entry), facts_of(absent[image])) for image, entry in entries.items())
        self._apply(entries, absent)
        if self._journal.is_long:
            try:
                self._write_whole({}, {})
            except OSError as error:
                logger.error("the index is not written whole, its journal grows: %s", error)

    def _store_labels(self, image: str, labels: dict[str, DataModel]) -> None:
        """Bring the labels of an image to the disk, also of one that is gone for a moment."""
        if image in self._datastore.objects:
            self._store({image: with_labels(self._datastore.objects[image], labels)})
        else:
            self._store({}, {image: with_labels(self._absent[image], labels)})

    def _take_note(self, entries: Entries, absent: Entries | None = None) -> None:
        """Store what is so already; on a full disk only memory knows, and finds it again next time."""
        try:
            self._store(entries, absent)
        except OSError as error:
            logger.error("the index cannot be written: %s", error)
            self._apply(entries, absent or {})

    def _take_over(self, index: Index) -> None:
        """Let memory say what the index says."""
        self._datastore, self._absent = index, index.absent

    def _apply(self, entries: Entries, absent: Entries) -> None:
        """Let memory say it."""
        self._datastore.objects = changed(self._datastore.objects, entries)
        self._absent = changed(self._absent, absent)

    def _write_whole(self, entries: Entries, absent: Entries) -> None:
        """Write the index with other entries for some images."""
        objects = {**self._datastore.objects, **entries}
        gone = {image: entry.model_dump() for image, entry in {**self._absent, **absent}.items() if entry is not None}
        self._journal.write_index(
            {**self._datastore.model_dump(exclude={"base_path", "objects"}), **({"absent": gone} if gone else {})},
            ((image, entry.model_dump()) for image, entry in objects.items() if entry is not None),
        )

    def _update_datastore_file(self, lock: bool = True) -> None:
        """Write the index whole, as MONAI Label asks for; what others stored meanwhile is taken in first."""
        said = self._datastore
        with self._lock:
            self._catch_up()
            self._datastore.name, self._datastore.description = said.name, said.description
            self._write_whole({}, {})

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Take in what other processes stored."""
        with self._lock:
            self._catch_up(throw_exception)

    def _catch_up(self, at_start: bool = False) -> None:
        """Take in what other processes stored since; the caller holds the lock."""
        content = self._journal.read_index()
        if content is not None:
            try:
                known = read_index(content)
            except ValueError as error:
                if self._read_only or (at_start and not recover(self._journal.index)):
                    raise
                return self._catch_up(at_start) if at_start else self._replace_damaged(error)
            known.base_path = self._datastore_path
            self._take_over(known)
        changes = self._journal.read_changes()
        entries = {image: entry_of(facts) for image, facts, _ in changes}
        return self._apply(entries, {image: entry_of(gone) for image, _, gone in changes})

    def _replace_damaged(self, error: ValueError) -> None:
        """Write the index anew from memory, where somebody else damaged it meanwhile."""
        damaged = stamped(self._journal.index, "damaged")
        logger.error("%s is damaged: it is kept as %s, and written anew: %s", INDEX, damaged.name, error)
        with suppress(OSError):
            replace_by_copy(self._journal.index, damaged)
        self._journal.forget()
        self._write_whole({}, {})

    # -- what is in the folder --------------------------------------------------------------------------------------

    def _reconcile_datastore(self) -> None:
        """Take in what is in the folder, and what is no longer."""
        with self._lock:
            self._catch_up()
            entries, absent = self._differences()
            self._take_note(entries, absent)
        gone = [image for image in absent if entries.get(image) is None]
        if gone:
            some = ", ".join(gone[:10]) + (f" and {len(gone) - 10} more" if len(gone) > 10 else "")
            logger.warning("%s: no image in the folder any more; what is known of the labels is kept", some)

    def _differences(self) -> tuple[dict[str, ImageLabelModel | None], dict[str, ImageLabelModel | None]]:
        """Return what the index does not say, but the folder: of what is here, and of what is gone."""
        there, labels = _names(Path(self._datastore.image_path())), self._label_folders()
        found = [
            (image, tag, ending)
            for tag, files in labels.items()
            for image, ending in self._volumes(self._datastore.label_path(tag), files)
        ]
        entries, absent = self._gone(there, labels, {image for image, *_ in found})
        known = self._datastore.objects
        for image, ending in self._volumes(self._datastore.image_path(), there):
            if entries.get(image, known.get(image)) is None:
                entries[image] = ImageLabelModel(image=found_file(image, ending))
        new = defaultdict[str, list[tuple[str, str]]](list)
        for image, tag, ending in found:
            labelled = entries.get(image, known.get(image))
            if labelled is not None and tag not in labelled.labels:
                new[image].append((tag, ending))
        for image, files_found in new.items():
            kept = absent.get(image, self._absent.get(image))
            entries[image] = with_found(image, entries.get(image, known.get(image)), files_found, kept)
        return entries, absent

    def _gone(
        self, there: Set[str], labels: Mapping[str, Set[str]], labelled: Set[str]
    ) -> tuple[dict[str, ImageLabelModel | None], dict[str, ImageLabelModel | None]]:
        """Return what the index is to say of images with files that are gone: of what is here, and of what is gone."""
        entries, absent = dict[str, ImageLabelModel | None](), dict[str, ImageLabelModel | None]()
        for image, entry in self._datastore.objects.items():
            kept = self._absent.get(image)
            before = kept.labels if kept else {}
            if not self._is_there(image, entry, there):
                entries[image] = None
                if entry.labels or before or image in labelled:
                    absent[image] = with_labels(entry, {**entry.labels, **before, **worth_keeping(entry.labels)})
            elif gone := [tag for tag, label in entry.labels.items() if image + label.ext not in labels.get(tag, ())]:
                entries[image] = with_labels(entry, {tag: entry.labels[tag] for tag in entry.labels.keys() - gone})
                known = worth_keeping({tag: entry.labels[tag] for tag in gone})
                absent[image] = with_labels(entry, {**before, **known})
        return entries, absent

    def _forget_gone(self) -> None:
        """Forget images of which no file is left, nor one of a label."""
        with self._lock:
            self._catch_up()
            gone = [image for image in self._absent if image not in self._datastore.objects]
            no_labels = [image for image in gone if not any(map(Path.is_file, self._files_of_labels(image)))]
            self._take_note({}, dict.fromkeys(no_labels))

    def _entry_of(self, image: str, ending: str, info: Mapping[str, Any]) -> ImageLabelModel:
        """Return what there is to say of an image that was added, its labels among it if they were there before."""
        known = self._datastore.objects.get(image) or ImageLabelModel(image=found_file(image, ending))
        endings = [pattern.removeprefix("*") for pattern in self._extensions]
        folders = [path for path in Path(self._datastore.label_path(None)).iterdir() if path.is_dir()]
        there = [(path.name, one) for path in folders for one in endings if (path / (image + one)).is_file()]
        entry = with_found(image, known, there, self._absent.get(image))
        return entry.model_copy(
            update={"image": DataModel(ext=known.image.ext, info={**entry.image.info, **plain(info)})}
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
        self._handler.on_moved = self._on_moved
        self._handlers = (self._handler, _Watch([str(self._journal.index), str(self._journal.path)], self._take_in))
        self._observer.schedule(self._handlers[1], path=self._datastore_path, recursive=True)

    def keep_watching(self) -> str:
        """Watch the folder again, and look at all of it, where watchdog's thread ended; returns nothing, as a task.

        It ends for good, and says nothing, where it cannot read the folder once: a share that is away for a moment.
        """
        observer = getattr(self, "_observer", None)
        if observer is None or not observer.is_alive():  # nobody asked for it, or it was told in the log at the start
            return ""
        is_watched = bool(observer.emitters) and all(emitter.is_alive() for emitter in observer.emitters)
        if is_watched and not self._is_blind:
            return ""
        if not self._is_blind:
            logger.error("the folder of studies is not watched any more; it is again once it can be read")
            self._is_blind = True
        with suppress(OSError):  # it is tried again
            if not is_watched:
                observer.unschedule_all()
                for handler in self._handlers:
                    observer.schedule(handler, path=self._datastore_path, recursive=True)
            self.refresh()
            self._is_blind = False
            logger.warning("the folder of studies is watched again")
        return ""

    def _on_any_event(self, event: FileSystemEvent) -> None:
        """Look at the folder again; whatever goes wrong, the thread that tells of changes goes on."""
        with _going_on("the folder of studies was not looked at again after a change"):
            super()._on_any_event(event)

    def _on_moved(self, event: FileSystemEvent) -> None:
        """Look at the folder again where a file got its name, or another one: rsync names files when they are whole."""
        if not os.fsdecode(event.src_path).endswith(".part"):  # this server's own
            self._on_any_event(event)

    def _on_modify_event(self, event: FileSystemEvent) -> None:
        with _going_on("what changed in the folder of studies was not taken in"):
            super()._on_modify_event(event)

    def _take_in(self) -> None:
        with _going_on("what another process stored was not taken in"):
            if not self._journal.is_current():  # mostly it was this process, which need not wait for the lock
                self._init_from_datastore_file()


class _Watch(PatternMatchingEventHandler):
    """Tells of files that are written to or put in place."""

    def __init__(self, files: list[str], tell: Callable[[], None]) -> None:
        super().__init__(patterns=files)
        self._tell = tell

    def on_created(self, event: FileSystemEvent) -> None:
        self._tell()

    def on_modified(self, event: FileSystemEvent) -> None:
        self._tell()

    def on_moved(self, event: FileSystemEvent) -> None:
        self._tell()


@contextmanager
def _going_on(trouble: str) -> Iterator[None]:
    """Log what goes wrong, such as a share that is away: the thread that tells of changes would end by it."""
    try:
        yield
    except Exception:
        logger.exception(trouble)


def _names(folder: Path) -> set[str]:
    """Return the names of the files of a folder, without links to what is gone."""
    with os.scandir(folder) as found:
        return {entry.name for entry in found if entry.is_file()}
