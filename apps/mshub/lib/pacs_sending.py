"""Final labels on their way to the PACS, as DICOM SEG: what became of each is noted with that label and no other."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from traceback import format_tb
from typing import Any
from uuid import uuid4

import pydicom
from fastapi import HTTPException
from monailabel.interfaces.datastore import DefaultLabelTag

from lib.datastore import StudiesFolder
from lib.pacs_client import PacsClient
from lib.pacs_errors import PacsError, PacsUnreachable
from lib.pacs_images import SeriesFiles
from lib.pacs_labels import OURS, PacsLabels, label_facts
from mshub.corrections import read_correction
from mshub.dicom_seg import write_seg
from mshub.errors import MSHubError
from mshub.structures import StructureOverride

logger = logging.getLogger(__name__)

FINAL = str(DefaultLabelTag.FINAL.value)
RETRY_S, LONGEST_RETRY_S = 10.0, 600.0
"""How often labels that wait for the PACS are tried, at most, and one that it refuses, at least."""
SENT = ("SeriesInstanceUID", "SOPInstanceUID")
"""What a label's note says of the SEG that was made of it last."""
MARK = "mark"
Note = dict[str, Any]
"""What a label's info says in ``pacs``: ``stored``, ``waits``, ``message``, ``mark``, and `SENT`."""

STORED: Note = {"stored": True, "waits": False, "message": ""}


def waiting_note() -> Note:
    """Return the note of a label that is about to be sent; its mark tells it from all others of its image."""
    return {"stored": False, "waits": True, "message": "On its way to the PACS.", MARK: uuid4().hex}


class LabelSender:
    """Stores final labels in a PACS, and notes in their info what came of it.

    Parameters
    ----------
    labels : StudiesFolder
        Where they are.
    files : SeriesFiles
        The series they belong to.
    client : PacsClient
    known : PacsLabels
        Which SEGs of the PACS are this server's own.
    overrides : callable
        Returns what the models' cards say of their structures: codes and colours.
    """

    def __init__(
        self,
        labels: StudiesFolder,
        files: SeriesFiles,
        client: PacsClient,
        known: PacsLabels,
        overrides: Callable[[], Mapping[str, StructureOverride]],
    ) -> None:
        self._labels, self._files, self._client = labels, files, client
        self._known, self._overrides = known, overrides
        self._storing: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._beginning, self._again, self._tried_at = threading.Lock(), threading.Thread(), float("-inf")
        self._pauses: dict[str, tuple[float, float]] = {}

    def send(self, image_id: str) -> bool:
        """Send an image's final label, if it waits for that; return whether the PACS answered, if it was asked.

        What goes wrong is noted with the label, which is stored here and, but for what will never do, goes on waiting.
        """
        with self._storing[image_id]:
            try:
                with tempfile.TemporaryDirectory(prefix="mshub-label-") as folder:
                    return self._send(image_id, Path(folder))
            except OSError as error:  # the label is stored, and that is what counts
                logger.error("%s: what became of the label at the PACS is not noted: %s", image_id, error)
                return True

    def send_waiting(self) -> None:
        """Begin to send the labels that the PACS could not take, now that it answers; nobody waits for that.

        What it refuses is tried less and less often.
        """
        with self._beginning:
            if self._again.is_alive() or time.monotonic() - self._tried_at < RETRY_S:
                return
            self._tried_at = time.monotonic()
            self._again = threading.Thread(target=self._send_waiting, name="labels to the PACS", daemon=True)
            self._again.start()

    def _send_waiting(self) -> None:
        for image in self._labels.labels_where(FINAL, lambda info: bool(_note_in(info).get("waits"))):
            not_before, _ = self._pauses.get(image, (0.0, 0.0))
            if time.monotonic() >= not_before and not self.send(image):
                return

    def _send(self, image_id: str, folder: Path) -> bool:
        label, info = self._labels.copy_label(image_id, FINAL, folder)
        waits = _note_in(info)
        if label is None or not waits.get("waits"):  # another request sent it meanwhile, or it is gone
            return True
        answered = True
        try:
            self._fetch(image_id)
            news = self._arrived(image_id, waits) or self._stored(image_id, label, info)
        except (PacsError, OSError, HTTPException) as error:
            answered = not isinstance(error, PacsUnreachable)
            reason = error.detail if isinstance(error, HTTPException) else error
            news = {"message": f"{reason} The label is kept here and sent later."}
        except MSHubError as error:
            news = {"waits": False, "message": f"Not stored as DICOM SEG: {error}"}
        except Exception as error:
            where = "".join(format_tb(error.__traceback__))  # without its message, which can hold what the headers say
            logger.error("%s: a label that cannot be sent (%s):\n%s", image_id, type(error).__name__, where)
            reason = f"MSHub failed ({type(error).__name__}), please report it: the server's log says where."
            news = {"waits": False, "message": f"Not stored as DICOM SEG: {reason}"}
        if not news.get("stored"):
            logger.warning("%s: %s", image_id, news["message"])
        self._pause(image_id, answered and not news.get("stored"))
        self._note(image_id, waits, news)
        return answered

    def _pause(self, image_id: str, was_refused: bool) -> None:
        """Let a label that was refused wait twice as long as before until it is sent again."""
        _, before = self._pauses.pop(image_id, (0.0, RETRY_S / 2))
        if was_refused:
            pause = min(2 * before, LONGEST_RETRY_S)
            self._pauses[image_id] = time.monotonic() + pause, pause

    def _arrived(self, image_id: str, waits: Note) -> Note | None:
        """Return what is new of a label that the PACS has from an attempt of which it was not said how it ended."""
        sent = [waits.get(key, "") for key in SENT]
        if not all(sent):
            return None
        study = str(self._files.stack(image_id).headers[0].StudyInstanceUID)
        return STORED if self._client.lists(study, *sent) else None

    def _stored(self, image_id: str, label: Path, info: Mapping[str, Any]) -> Note:
        stack = self._files.stack(image_id)
        correction = read_correction(label, info.get("label_info"), stack.grid, self._labels.structures())
        voxels = stack.to_slices(correction.labels.array_xyz)
        path = label.with_name("label.dcm")
        written = write_seg(path, voxels, correction.values, stack, label_facts(info, FINAL, self._overrides()))
        self._known.note(written.series_uid, written.sop_uid, OURS, image_id)  # before anybody can find it there
        self._note(image_id, info["pacs"], dict(zip(SENT, (written.series_uid, written.sop_uid), strict=True)))
        self._client.store(pydicom.dcmread(path))
        return STORED

    def _fetch(self, image_id: str) -> None:
        """Fetch the series of a label again, where its copy was removed since."""
        if not self._files.has(image_id):
            self._labels.get_image_uri(image_id)

    def _note(self, image_id: str, waits: Note, news: Note) -> None:
        """Note something of the label that was sent, which another may have replaced since."""
        mark = waits.get(MARK)

        def is_sent(tag: str, info: dict[str, Any]) -> bool:
            return _note_in(info).get(MARK) == mark if mark else tag == FINAL

        with self._labels.changing_label(image_id, is_sent) as info:
            if info is None:
                logger.info("%s: the label that was sent is gone", image_id)
            else:
                info["pacs"] = {**_note_in(info), **news}


def _note_in(info: Mapping[str, Any]) -> Note:
    return info.get("pacs") or {}
