"""Labels that come from the PACS: the SEGs that others stored there, each looked at once."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import HTTPException

from lib.datastore import StudiesFolder
from lib.pacs_client import PacsClient
from lib.pacs_errors import PacsError, PacsUnreachable
from lib.pacs_images import SeriesFiles
from lib.pacs_labels import REFUSED, TAKEN, Finding, PacsLabels
from lib.pacs_session import pause_after
from mshub.dicom_seg import SegLabels, read_seg
from mshub.dicom_series import SeriesStack
from mshub.errors import CaseError, GeometryError, LabelError
from mshub.label_rules import fold
from mshub.volume_io import write_nifti

logger = logging.getLogger(__name__)

SEEN_S = 2.0
"""How long the list of SEGs is taken for new."""
WAIT_S = 5.0
"""How long a request waits for the corrections of others to be taken in; a first time can take minutes."""
WAITS_S = 600.0
"""How long one is left alone that the PACS does not give though it answers."""


class LabelReceiver:
    """Makes labels of what is found in a PACS.

    Parameters
    ----------
    labels : StudiesFolder
        Where they are.
    files : SeriesFiles
        The series they belong to.
    client : PacsClient
    known : PacsLabels
        What is known of the SEGs of the PACS, and what became of each.
    series : callable
        Returns what the PACS says of its image series, by UID.
    keep : callable
        Keeps a label: image, file, info, and when it was made.
    """

    def __init__(
        self,
        labels: StudiesFolder,
        files: SeriesFiles,
        client: PacsClient,
        known: PacsLabels,
        series: Callable[[], Mapping[str, Mapping[str, str]]],
        keep: Callable[[str, Path, dict[str, Any], datetime], None],
    ) -> None:
        self._labels, self._files, self._client, self._known = labels, files, client, known
        self._series, self._keep = series, keep
        self._taking, self._looking, self._look = threading.Lock(), threading.Lock(), threading.Thread()
        self._again_at = self._wait_until = float("-inf")
        self._not_before: dict[str, float] = {}

    def look(self) -> None:
        """Make labels of the SEGs others stored in the PACS; its first seconds are waited for, not minutes."""
        with self._looking:
            if not self._look.is_alive():
                if time.monotonic() < self._again_at:
                    return
                self._look = threading.Thread(target=self.look_now, daemon=True)
                self._look.start()
                self._wait_until = time.monotonic() + WAIT_S
            look, left_s = self._look, self._wait_until - time.monotonic()
        look.join(max(0.0, left_s))

    def look_now(self, study: str | None = None) -> None:
        """Take in what is new, of one study or of all; a PACS that is down has nothing to give."""
        started = time.monotonic()
        try:
            for finding in self._known.find(self._series(), self._labels.structures(), study):
                with self._taking:
                    if not self._known.knows(finding) and self._not_before.get(finding.instance, 0.0) <= started:
                        self._take(finding)
        except (PacsError, OSError) as error:
            self._labels.warn_once(f"corrections stored in the PACS cannot be looked for: {error}")
        finally:
            if study is None:
                now = time.monotonic()
                self._again_at = now + pause_after(now - started, SEEN_S)

    def _take(self, finding: Finding) -> None:
        """Make a label of one SEG: the final one if it is the newest, or else one of the versions."""
        if self._has_label_of(finding):  # what became of it was noted, and is lost
            self._known.note(finding.series, finding.instance, TAKEN, finding.image)
            return
        try:
            self._labels.get_image_uri(finding.image)
            stack = self._files.stack(finding.image)
            labels = read_seg(self._client.instance(finding.study, finding.series, finding.instance), stack)
            self._make(finding, labels, stack)
        except (PacsUnreachable, OSError):  # or a full disk: all of them another time
            raise
        except PacsError as error:
            self._wait(finding, str(error))
        except (LabelError, CaseError, GeometryError) as error:
            self._refuse(finding, str(error))
        except HTTPException as error:
            if error.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
                raise PacsUnreachable(str(error.detail)) from error
            if error.status_code >= 500:
                self._wait(finding, str(error.detail))
            else:
                self._refuse(finding, str(error.detail))
        except Exception as error:  # of one whose like nobody has seen; the others are taken all the same
            self._refuse(finding, f"it cannot be read ({type(error).__name__})")
        else:
            self._known.note(finding.series, finding.instance, TAKEN, finding.image)
            logger.info("%s: a correction was found in the PACS (%s)", finding.image, finding.instance)

    def _has_label_of(self, finding: Finding) -> bool:
        """Return whether a label here was made of this SEG, or it of a label here."""
        tags = self._labels.get_labels_by_image_id(finding.image)
        notes = [self._labels.get_label_info(finding.image, tag).get("pacs") or {} for tag in tags]
        return any(note.get("SOPInstanceUID") == finding.instance for note in notes)

    def _make(self, finding: Finding, labels: SegLabels, stack: SeriesStack) -> None:
        """Keep the label that a SEG holds, as far as the models here know its structures."""
        known = {fold(name): name for name in self._labels.structures()}
        names = {name: value for name, value in labels.names.items() if fold(name) in known}
        array = np.where(np.isin(labels.array_xyz, list(names.values())), labels.array_xyz, 0)
        if not array.any():
            raise LabelError(
                f"The DICOM SEG holds no voxel of {', '.join(names)}. Expected: an outlined structure. How to fix: "
                "nothing, if there is nothing to outline; to say so, submit an empty label from the panel."
            )
        info = {
            "label_info": [{"name": name, "idx": value} for name, value in names.items()],
            "client_id": labels.creator or labels.manufacturer or "PACS",
            "pacs": {
                "stored": True,
                "message": "found in the PACS",
                "SeriesInstanceUID": labels.series_uid,
                "SOPInstanceUID": labels.sop_uid,
                "left_out": sorted(set(labels.names) - set(names)),
            },
        }
        with tempfile.TemporaryDirectory(prefix="mshub-label-") as folder:
            path = Path(folder) / "label.nii.gz"
            write_nifti(path, stack.from_slices(array), stack.grid)
            self._keep(finding.image, path, info, finding.created)

    def _wait(self, finding: Finding, reason: str) -> None:
        """Look at a SEG another time, and go on to the others: the PACS does not give it, or its series, just now."""
        self._not_before[finding.instance] = time.monotonic() + WAITS_S
        self._labels.warn_once(f"the SEG {finding.instance} in the PACS waits: {reason}")

    def _refuse(self, finding: Finding, reason: str) -> None:
        self._known.note(finding.series, finding.instance, REFUSED, finding.image, reason)
        logger.warning("the SEG %s in the PACS is left out: %s", finding.instance, reason)
