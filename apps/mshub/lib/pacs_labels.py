"""Labels of the PACS: which DICOM SEGs it has that somebody corrected, and what became of each."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from lib.pacs_client import PacsClient
from lib.pacs_errors import PacsError, PacsUnreachable
from mshub.atomic_file import replace_json
from mshub.dicom_derived import Algorithm, Facts
from mshub.dicom_seg import created, referenced_series
from mshub.label_rules import fold
from mshub.structures import StructureOverride

logger = logging.getLogger(__name__)

PRELABEL = "original"
LONG_AGO = datetime.fromtimestamp(0, timezone.utc)
OURS, TAKEN, REFUSED, LEFT = "ours", "taken in", "refused", "left"


@dataclass(frozen=True)
class Finding:
    """A SEG nobody has looked at yet that may be a correction.

    Attributes
    ----------
    image : str
        SeriesInstanceUID of what it was made from.
    study, series, instance : str
        Its own UIDs.
    created : datetime
        When its content was made.
    """

    image: str
    study: str
    series: str
    instance: str
    created: datetime


class PacsLabels:
    """The SEGs of a PACS, each looked at once.

    Parameters
    ----------
    path : Path
        JSON file of what became of each.
    client : PacsClient
    """

    def __init__(self, path: Path, client: PacsClient) -> None:
        self._path, self._client = path, client
        self._lock = threading.Lock()
        self._known: dict[str, Any] = self._read()
        self._elsewhere: dict[str, tuple[int, str | None]] = {}
        self._untold: set[str] = set()

    def find(self, images: Collection[str], structures: Collection[str], study: str | None = None) -> list[Finding]:
        """Return the SEGs not looked at yet that somebody drew or corrected, oldest first.

        Left alone for good: those of other series than `images`, without any of the `structures`, and those a model
        made that nobody confirmed.

        Raises
        ------
        PacsError
            The PACS does not answer, or refuses.
        """
        names = {fold(name) for name in structures}
        found = [
            finding
            for series in self._client.series(Modality="SEG", **({"StudyInstanceUID": study} if study else {}))
            for finding in self._look_at(series, images, names)
        ]
        return sorted(found, key=lambda finding: finding.created)

    def note(self, series: str, instance: str, outcome: str, image: str = "", reason: str = "") -> None:
        """Remember what became of a SEG of an image: `OURS`, `TAKEN`, `REFUSED` or `LEFT`."""
        with self._lock:
            instances = self._known.setdefault(series, {"instances": {}})["instances"]
            instances[instance] = {"outcome": outcome, "image": image, "reason": reason}
            replace_json(self._path, self._known)

    def knows(self, finding: Finding) -> bool:
        """Return whether it is known what became of a SEG."""
        with self._lock:
            return finding.instance in self._known.get(finding.series, {"instances": {}})["instances"]

    def left_out(self, image: str) -> list[dict[str, str]]:
        """Return the SEGs of an image that are no label here, each with the reason."""
        with self._lock:
            notes = [(uid, note) for series in self._known.values() for uid, note in series["instances"].items()]
        return [
            {"SOPInstanceUID": uid, "reason": note["reason"]}
            for uid, note in notes
            if note["image"] == image and note["outcome"] in (REFUSED, LEFT)
        ]

    def _look_at(self, series: Dataset, images: Collection[str], names: Collection[str]) -> Iterator[Finding]:
        uid, study = str(series.SeriesInstanceUID), str(series.StudyInstanceUID)
        count = int(series.get("NumberOfSeriesRelatedInstances") or 0)
        known = self._known.get(uid, {"instances": {}})["instances"]
        if count and len(known) >= count:
            return
        counted, image = self._elsewhere.get(uid, (0, None))
        if count and counted == count and image not in images:
            return
        for header in self._headers(study, uid):
            instance = str(header.get("SOPInstanceUID") or "")
            if not instance or instance in known:
                continue
            image = referenced_series(header)
            if image is None:
                self.note(uid, instance, LEFT, reason=(reason := "it does not say which series it was made from"))
                logger.warning("the SEG %s in the PACS is left out: %s", instance, reason)
                continue
            if image not in images:
                self._elsewhere[uid] = (count, image)  # its series may still arrive
                continue
            reason = _why_left(header, names)
            if reason:
                self.note(uid, instance, LEFT, image, reason)
            else:
                yield Finding(image, study, uid, instance, created(header) or LONG_AGO)

    def _headers(self, study: str, series: str) -> list[Dataset]:
        """Return what the PACS says of a series of SEGs; nothing where it cannot, and others are looked at."""
        try:
            return self._client.instances(study, series)
        except PacsUnreachable:
            raise
        except PacsError as error:
            if series not in self._untold:
                self._untold.add(series)
                logger.warning("the SEGs of the series %s in the PACS are not looked at: %s", series, error)
            return []

    def _read(self) -> dict[str, Any]:
        try:
            known = dict(json.loads(self._path.read_text(encoding="utf-8")))
            for series in known.values():
                series["instances"] = {uid: note for uid, note in series["instances"].items() if not _was_away(note)}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
        return known


def _was_away(note: Mapping[str, Any]) -> bool:
    """Return whether a SEG was once refused only because the PACS did not give it."""
    return note.get("reason") in ("it cannot be read (PacsUnreachable)", "it cannot be read (PacsError)")


def _why_left(header: Dataset, names: Collection[str]) -> str:
    """Return why a SEG is no correction to learn from; empty if it may be one."""
    segments = header.get("SegmentSequence") or []
    kinds = {str(segment.get("SegmentAlgorithmType") or "") for segment in segments}
    if kinds == {"AUTOMATIC"}:
        return "made by a program, confirmed by nobody"
    if not any(fold(str(segment.get("SegmentLabel") or "")) in names for segment in segments):
        return "none of its segments is a structure of a model here"
    return ""


def label_facts(info: Mapping[str, Any], tag: str, overrides: Mapping[str, StructureOverride]) -> Facts:
    """Return what a DICOM object says of the label it was made from: which model made it, and who changed it."""
    params, origin = info.get("params", {}), info.get("started_from")
    if tag == PRELABEL and "model_version" in params:
        return Facts.of_model(Algorithm(str(params["model"]), str(params["model_version"])), overrides=overrides)
    creator = str(info.get("client_id") or "")
    if not origin:
        return Facts(None, "MSHub label", creator, overrides)
    return Facts.of_model(Algorithm(origin["model"], origin["version"], edited=True), creator, overrides)
