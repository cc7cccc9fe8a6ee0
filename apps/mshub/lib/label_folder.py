"""A folder of labels whose files and index agree, wherever storing one breaks off."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.datastore.local import DataModel, ImageLabelModel
from monailabel.interfaces.datastore import DefaultLabelTag

from lib.faults import as_http_errors
from lib.free_space import check_space
from lib.index_entries import Entries, Index
from lib.index_file import plain
from lib.indexed_folder import IndexedFolder
from lib.label_note import NAME, LabelNote
from mshub.atomic_file import replace_by_copy, sync_folder
from mshub.checksums import file_sha256

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
REPLACED = ".label-being-replaced"
"""Where a pre-label that is replaced is kept until the new one is in the index."""
_VERSION = re.compile(r"version_(\d+)")


class LabelFolder(IndexedFolder):
    """Labels of images, each stored wholly or not at all; a label that is replaced stays as ``version_N``."""

    changes_of_final = 0
    """How often final labels came, went or became others, as far as it was noticed: who counts them looks here."""

    def __init__(self, path: str, auto_reload: bool, read_only: bool) -> None:
        extensions = [f"*{ending}" for ending in IMAGE_ENDINGS]
        super().__init__(path, extensions, auto_reload=auto_reload, read_only=read_only)
        if not read_only:
            self._settle_at_start()

    def _take_over(self, index: Index) -> None:
        super()._take_over(index)
        self.changes_of_final += 1

    def _apply(self, entries: Entries, absent: Entries) -> None:
        known = self._datastore.objects
        if any(_final(known.get(image)) != _final(entry) for image, entry in entries.items()):
            self.changes_of_final += 1
        super()._apply(entries, absent)

    def unfinished_in(self) -> list[Path]:
        """Return the folders in which files are written that are renamed once they are whole."""
        labels = self._labels_folder
        return [Path(self._datastore_path), *(path for path in labels.glob("*") if path.is_dir()), labels]

    def copy_label(self, image_id: str, tag: str, folder: Path) -> tuple[Path | None, dict[str, Any]]:
        """Copy a label into a folder; returns the copy, None if there is no such label, and what is known of that one.

        A label that is submitted meanwhile comes before or after: file and info are of the same one.
        """
        with self._lock:
            self._catch_up()
            self._settle_of_others()
            path = self._label_file(image_id, tag)
            if path is None:
                return None, {}
            try:
                return Path(shutil.copyfile(path, folder / path.name)), self.get_label_info(image_id, tag)
            except FileNotFoundError:  # removed by hand; a share may say for seconds that it is there
                return None, {}

    def settle(self) -> None:
        """Wait for labels that are being stored, and take in what other processes stored."""
        with self._lock:
            self._catch_up()
            self._settle_of_others()

    def labels_where(self, tag: str, is_so: Callable[[dict[str, Any]], bool]) -> list[str]:
        """Return the images with a label of which something is known."""
        objects = list(self._datastore.objects.items())
        return [image for image, entry in objects if tag in entry.labels and is_so(entry.labels[tag].info)]

    @contextmanager
    def changing_label(
        self, image_id: str, is_so: Callable[[str, dict[str, Any]], bool]
    ) -> Iterator[dict[str, Any] | None]:
        """Give what is known of one label of an image to be changed: the one whose tag and info are so; or None."""
        with self._changing(image_id) as entry:
            yield next((label.info for tag, label in entry.labels.items() if is_so(tag, label.info)), None)

    @property
    def _labels_folder(self) -> Path:
        return Path(self._datastore.label_path(None))

    def _label_file(self, image_id: str, tag: str) -> Path | None:
        """Return the file of a label; None if there is none."""
        label = self._datastore.label(image_id, tag)
        path = self._labels_folder / tag / f"{image_id}{label.ext}" if label else None
        return path if path and path.is_file() else None

    def _store_label(self, image_id: str, path: Path, tag: str, info: dict[str, Any]) -> str:
        """Put a label in place by one rename, after the one it replaces was put aside; then write the index.

        Where one of these fails, as on a full disk, everything is as before.
        """
        with as_http_errors():
            check_space(Path(self._datastore.image_path()), 2 * path.stat().st_size)  # and the one it replaces
        with self._lock:
            self._catch_up()
            self._settle()
            old, note = self._label_file(image_id, tag), self._note_of(image_id, path, tag, info)
            note.write(self._labels_folder)
            kept: Path | None = None
            try:
                if old is not None:
                    replace_by_copy(old, self._labels_folder / note.copy)
                    kept = self._labels_folder / note.copy
                replace_by_copy(path, self._labels_folder / note.file)
                self._settle()
            except OSError:
                self._take_back(note, old, kept)
                raise
        return image_id

    def _note_of(self, image_id: str, path: Path, tag: str, info: dict[str, Any]) -> LabelNote:
        """Return what is about to be stored of a label."""
        entry = self._entry(image_id)
        ending, old, copy = ending_of(path.name) or path.suffix, entry.labels.get(tag), REPLACED
        labels = {tag: {"ext": ending, "info": plain({**info, "ts": int(time.time()), "name": image_id + ending})}}
        if old is not None and tag != DefaultLabelTag.ORIGINAL.value:
            aside = self._next_version(image_id)
            labels[aside] = {"ext": old.ext, "info": {**old.info, "replaced_tag": tag}}
            copy = f"{aside}/{image_id}{old.ext}"
        return LabelNote(image_id, f"{tag}/{image_id}{ending}", file_sha256(path), labels, copy)

    def _settle(self) -> None:
        """Let the index say what is so, where a label was being stored: the new one is in place, or the old one is."""
        folder = self._labels_folder
        note = LabelNote.read(folder)
        known = note and self._known_of(note.image)
        if note is not None and known is not None:
            if note.is_done(folder):
                self._complete(note, known.labels)
            else:
                self._abandon(note, known.labels)
        _remove(folder / NAME)

    def _entry(self, image_id: str) -> ImageLabelModel:
        """Return what the index says of an image; 404 for an id that is not in the datastore."""
        entry: ImageLabelModel | None = self._datastore.objects.get(image_id)
        if entry is None:
            raise HTTPException(404, f"There is no image {image_id!r} in the datastore.")
        return entry

    def _known_of(self, image: str) -> ImageLabelModel | None:
        """Return what is known of an image, also of one whose file is gone for a moment."""
        return self._datastore.objects.get(image) or self._absent.get(image)

    def _complete(self, note: LabelNote, known: Mapping[str, DataModel]) -> None:
        folder = self._labels_folder
        there = {tag: one for tag, one in note.labels.items() if (folder / tag / (note.image + one["ext"])).is_file()}
        self._store_labels(note.image, {**known, **{tag: DataModel(**one) for tag, one in there.items()}})
        target = folder / note.file
        others = [target.with_name(note.image + ending) for ending in IMAGE_ENDINGS]
        _remove(folder / REPLACED, *(other for other in others if other != target))

    def _abandon(self, note: LabelNote, known: Mapping[str, DataModel]) -> None:
        if note.copy:
            (self._labels_folder / note.copy).unlink(missing_ok=True)
        aside = Path(note.copy).parts[0] if note.copy else ""
        if aside in known:
            self._store_labels(note.image, {tag: label for tag, label in known.items() if tag != aside})

    def _take_back(self, note: LabelNote, old: Path | None, kept: Path | None) -> None:
        """Let the label that was to be replaced be in its place again, by renaming: there may be no room for a copy."""
        folder = self._labels_folder
        target = folder / note.file
        try:
            if old != target:
                target.unlink(missing_ok=True)
            elif kept is not None:
                kept.replace(target)
            (folder / note.copy).unlink(missing_ok=True)
            sync_folder(target.parent)
            LabelNote.remove(folder)
        except OSError as error:
            logger.error("a label of %s that was not stored cannot be taken back: %s", note.image, error)

    def _settle_of_others(self) -> None:
        """Let the index say what is so where a process was killed that stored a label: a batch that was ended."""
        if not self._read_only and (self._labels_folder / NAME).exists():
            self._settle()

    def _settle_at_start(self) -> None:
        """Make good what a server left that was killed; on a full disk the note stays for later."""
        try:
            with self._lock:
                self._settle()
        except OSError as error:
            logger.error("the index cannot be written: %s", error)

    def _next_version(self, image_id: str) -> str:
        known = [table[image_id].labels for table in (self._datastore.objects, self._absent) if image_id in table]
        numbers = [int(match[1]) for labels in known for match in map(_VERSION.fullmatch, labels) if match]
        return f"version_{max(numbers, default=0) + 1}"


def ending_of(name: str) -> str:
    """Return the ending of a volume's file name; empty if it is none."""
    return next((ending for ending in IMAGE_ENDINGS if name.endswith(ending)), "")


def _final(entry: ImageLabelModel | None) -> DataModel | None:
    return entry.labels.get(DefaultLabelTag.FINAL.value) if entry else None


def _remove(*paths: Path) -> None:
    """Remove what is of no use any more; what cannot be removed is no reason to say that something was not stored."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is left: %s", path.name, error)
