"""The series of a PACS as a datastore: images come from there, corrections go there as DICOM SEG.

All that concerns labels is what `StudiesFolder` does: checked, kept as versions, read by name. What differs is where
images come from. The index holds every series the PACS listed; a series is downloaded when it is first needed; labels
lie in a folder of this server, whatever becomes of the PACS.
"""

from __future__ import annotations

import logging
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence, Set
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cachetools import LRUCache
from fastapi import HTTPException
from monailabel.datastore.local import DataModel, ImageLabelModel
from monailabel.interfaces.datastore import DefaultLabelTag
from pydicom.dataset import Dataset

from lib.datastore import StudiesFolder
from lib.faults import as_http_errors
from lib.pacs_client import PacsClient, text_of
from lib.pacs_errors import PacsError
from lib.pacs_images import COUNT, VOLUME, Progress, SeriesFiles, untold
from lib.pacs_labels import PacsLabels
from lib.pacs_receiving import LabelReceiver
from lib.pacs_sending import FINAL, LabelSender, waiting_note
from lib.pacs_session import pause_after
from mshub.card_tables import Channel
from mshub.cases import ReviewedCase
from mshub.channel_series import ChannelSeries, choose_series
from mshub.dicom_series import SeriesStack
from mshub.errors import MSHubError
from mshub.geometry import Array, Grid
from mshub.mr_sequences import description_of, sequence_of
from mshub.structures import StructureOverride
from mshub.volume_io import read_volume, write_nifti, write_volume

logger = logging.getLogger(__name__)

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
MAX_UID_LENGTH = 64
LISTED_S, SEEN_S = 1.0, 2.0
"""How long the list of series is taken for new, and what it says of one."""
UNUSED_S = 3600.0  # a copy somebody asked for within an hour is not swept away
KEPT_HEADERS = 512
MADE = "made"
"""What a label's info says when it was made, if it was found in the PACS."""
FACTS = (
    *("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "Modality", "StudyDate", "StudyTime", "StudyDescription"),
    *("SeriesDescription", "SeriesNumber", COUNT),
)


class PacsStudies(StudiesFolder):
    """The CT and MR series of a PACS, by SeriesInstanceUID.

    Parameters
    ----------
    client : PacsClient
    folder : str
        Where copies of series, labels and the index are kept.
    structures : callable
        Returns the names of the structures a submitted label may hold.
    overrides : callable
        Returns what the models' cards say of their structures: codes and colours.
    refused : Path
        Where labels that were refused are kept.
    modalities : sequence of str
        Which series are images.
    needed : callable, optional
        Returns files whose copies are not removed: those that a training is to read.
    exchanges_labels : bool
        Sends labels to the PACS, and takes in those it finds there: one process alone does, or both would.
    auto_reload, read_only : bool
        MONAI Label's.
    """

    def __init__(
        self,
        client: PacsClient,
        folder: str,
        structures: Callable[[], Collection[str]],
        overrides: Callable[[], Mapping[str, StructureOverride]],
        refused: Path,
        modalities: Sequence[str],
        needed: Callable[[], Collection[Path]] = frozenset,
        exchanges_labels: bool = True,
        auto_reload: bool = False,
        read_only: bool = False,
    ) -> None:
        self._client, self.overrides, self._modalities = client, overrides, tuple(modalities)
        self._files = SeriesFiles(Path(folder), client, needed)
        self._labels = PacsLabels(Path(folder) / "segs.json", client)
        self._exchanges = exchanges_labels
        self._sender = LabelSender(self, self._files, client, self._labels, overrides)
        self._receiver = LabelReceiver(self, self._files, client, self._labels, self._series, self._keep_found)
        self._listing = threading.Lock()
        self._listed: dict[str, dict[str, str]] = {}
        self._listed_until = self._listed_at = float("-inf")
        self._ambiguous: set[str] = set()
        self._headers: MutableMapping[str, Dataset] = LRUCache(KEPT_HEADERS)
        self._headers_lock = threading.Lock()
        super().__init__(folder, structures, refused, auto_reload=auto_reload, read_only=read_only)

    def name(self) -> str:
        """Return the address of the PACS."""
        return self._client.url

    # -- what there is ------------------------------------------------------------------------------------------

    def list_images(self) -> list[str]:
        """Return the series the PACS lists now; 503 if it does not answer."""
        with as_http_errors():
            return list(self._series())

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Return the series with a final label, those corrected elsewhere and stored in the PACS among them."""
        self._receive()
        return [image for image in self.list_images() if self.get_label_uri(image, FINAL)]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Return the series without a final label; single images, such as scouts, are not asked for."""
        self._receive()
        with as_http_errors():
            series = self._series()
        return [
            image for image, facts in series.items() if facts.get(COUNT) != "1" and not self.get_label_uri(image, FINAL)
        ]

    def status(self) -> dict[str, Any]:
        """Return the numbers of series and labels; while the PACS is down, those known last."""
        self._receive()
        try:
            listed = set(self.list_images())
        except HTTPException:
            listed = set(self._datastore.objects)
        objects = {image: item for image, item in list(self._datastore.objects.items()) if image in listed}
        tags = [tag for item in objects.values() for tag in list(item.labels)]
        return {
            "total": len(listed),
            "completed": tags.count(FINAL),
            "label_tags": {tag: tags.count(tag) for tag in sorted(set(tags))},
        }

    def json(self) -> dict[str, Any]:
        """Return the index, after the PACS was asked for its series; while it is down, as it was."""
        self._receive()
        self._listed_until = float("-inf")  # who asks for all wants what has just arrived
        try:
            listed = self._series()
        except PacsError:
            listed = {}
        index: dict[str, Any] = super().json()
        objects = {image: item for image, item in index["objects"].items() if not listed or image in listed}
        return {**index, "objects": objects}

    def pacs(self) -> dict[str, Any]:
        """Return the PACS' address, whether it answers, and if not, why."""
        try:
            self._series()
        except PacsError as error:
            return {"url": self._client.url, "reachable": False, "message": str(error)}
        return {"url": self._client.url, "reachable": True, "message": ""}

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """Return what the PACS says of a series; nothing is downloaded. 404 for one it does not have."""
        facts = self._facts(image_id)
        known = self._datastore.objects[image_id].image.info
        path = self._files.path(image_id)
        return {**known, **facts, "path": str(path), "name": path.name}

    def get_image_uri(self, image_id: str, progress: Progress = untold) -> str:
        """Return the path of a series as NIfTI, downloading it first if needed.

        Raises
        ------
        HTTPException
            404 for what is no series of the PACS, 503 if it does not answer and there is no copy, another 4xx for a
            series that is no regular volume.
        """
        facts = self._facts(image_id)
        with as_http_errors():
            return str(self._files.fetch(facts, progress))

    def copies(self) -> set[str]:
        """Return the series there are copies of on this machine."""
        return self._files.copies()

    def drop_copy(self, image_id: str, unused_s: float) -> bool:
        """Remove the copy of a series without labels, unused for so many seconds; return whether it is gone."""
        item = self._datastore.objects.get(image_id)
        return not (item and item.labels) and self._files.drop(image_id, unused_s)

    @property
    def pending(self) -> Path:
        """Where series are that are being downloaded."""
        return self._files.pending

    def trim_copies(self, most_bytes: int) -> str:
        """Remove the copies of series nobody asked for longest; see `SeriesFiles.trim`. The PACS has them all."""
        return self._files.trim(most_bytes, UNUSED_S)

    def channels(self, image_id: str) -> list[Path]:
        """Return the series alone: which others belong to it depends on the model. See `channel_files`."""
        return [Path(self.get_image_uri(image_id))]

    def choose_channels(
        self, image_id: str, channels: Sequence[Channel], overrides: Mapping[str, str] | None = None
    ) -> tuple[ChannelSeries, ...]:
        """Return which series of the study serves which channel of a model: see `choose_series`."""
        facts = self._facts(image_id)
        with as_http_errors():
            return choose_series(channels, image_id, self.study_headers(facts["StudyInstanceUID"]), overrides or {})

    def channel_files(self, image_id: str, chosen: Sequence[ChannelSeries], progress: Progress = untold) -> list[Path]:
        """Return the channels' files, all on the grid of the series `image_id`."""
        files = []
        for channel in chosen:
            path = Path(self.get_image_uri(channel.series_uid, progress))
            if channel.series_uid != image_id:
                self.get_image_uri(image_id, progress)
                with as_http_errors():
                    path = self._files.on_grid_of(image_id, channel.series_uid)
            files.append(path)
        return files

    def study_headers(self, study: str) -> dict[str, Dataset]:
        """Return the attributes of one instance of each image series of a study, by SeriesInstanceUID."""
        with as_http_errors():
            listed = self._client.series(StudyInstanceUID=study)
            images = [str(item.SeriesInstanceUID) for item in listed if item.get("Modality") in self._modalities]
            with self._headers_lock:
                known = {uid: self._headers.get(uid) for uid in images}
            headers = {uid: header or self._client.any_instance(study, uid) for uid, header in known.items()}
            counts = {str(item.SeriesInstanceUID): item.get(COUNT) for item in listed}
        for uid, header in headers.items():
            header.NumberOfSeriesRelatedInstances = counts[uid]
        with self._headers_lock:
            self._headers.update(headers)
        return headers

    def stack(self, image_id: str) -> SeriesStack:
        """Return where the slices of a series lie."""
        self.get_image_uri(image_id)
        return self._files.stack(image_id)

    def reviewed_cases(self, channels: Sequence[Channel] = ()) -> list[ReviewedCase]:
        """Return every series with a final label that a model could learn from.

        Parameters
        ----------
        channels : sequence of Channel
            The model's channels; with more than one, the other series of the study are found by them.
        """
        self._receive()
        return super().reviewed_cases(channels)

    def case_channels(self, image_id: str, channels: Sequence[Channel]) -> list[Path]:
        """Return the files a model learns a reviewed case from: the series its pre-label used, or those that match."""
        if len(channels) < 2:
            return self.channels(image_id)
        used = self.get_label_info(image_id, DefaultLabelTag.ORIGINAL.value).get("params", {}).get("series_used", {})
        named = {name: item["SeriesInstanceUID"] for name, item in used.items()}
        overrides = named if set(named) == {channel.name for channel in channels} else {}
        return self.channel_files(image_id, self.choose_channels(image_id, channels, overrides))

    def image_state(self, image_id: str) -> str:
        """Return what changes when the series does: its number of images. Nothing is downloaded for it."""
        return f"{self._facts(image_id).get(COUNT, '')} images"

    def caption(self, image_id: str) -> str:
        """Return patient and description of a series."""
        item = self._datastore.objects.get(image_id)
        facts = item.image.info if item else {}
        return ", ".join(filter(None, (facts.get("PatientID"), facts.get("SeriesDescription"))))

    def _noted_of(self, image_id: str) -> dict[str, Any]:
        return self.get_image_info(image_id)

    def _known_images(self) -> list[str]:
        return list(self._datastore.objects)

    # -- what it does -------------------------------------------------------------------------------------------

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Refuse an upload: images come to this server through the PACS."""
        raise HTTPException(405, "This server shows a PACS: store the image there, it appears here by itself.")

    def remove_image(self, image_id: str) -> None:
        """Refuse to remove a series: it is the PACS'."""
        raise HTTPException(405, "This server shows a PACS: remove the series there, it disappears here by itself.")

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Check and store a submitted label; a final one goes to the PACS as well, as DICOM SEG.

        It is stored here whatever becomes of that: its info says in ``pacs`` whether it is ``stored`` there, and why
        not. What the PACS could not take is sent again once it answers.
        """
        try:
            self.get_image_uri(image_id)
        except HTTPException as error:
            if error.status_code < 500:
                raise
            kept = self._refused.keep(Path(label_filename), image_id, label_tag, label_info, str(error.detail))
            detail = f"{error.detail} The submitted file is kept on the server as {kept}."
            raise HTTPException(error.status_code, detail) from error
        info = {**label_info, "pacs": waiting_note() if label_tag == FINAL else {}}
        info.pop(MADE, None)
        with self._on_grid(image_id, Path(label_filename)) as path:
            stored = super().save_label(image_id, str(path), label_tag, info)
        if label_tag == FINAL and self._exchanges:
            self._sender.send(image_id)
        return stored

    def find(
        self, image_id: str, overrides: Mapping[str, str], channels: Sequence[Channel], progress: Progress
    ) -> tuple[list[Path], dict[str, Any]]:
        """Return the files of a model's channels, and what to tell of them; see `choose_channels`, `channel_files`."""
        chosen = self.choose_channels(image_id, channels, overrides)
        files = self.channel_files(image_id, chosen, progress)
        reference = Path(self.get_image_uri(image_id))
        used = {
            item.channel: {
                "SeriesInstanceUID": item.series_uid,
                "description": item.description,
                "sequence": item.sequence,
                "why": item.why,
                "resampled": path.parent != reference.parent,
            }
            for item, path in zip(chosen, files, strict=True)
        }
        return files, {"series_used": used}

    def write_pixelwise(self, image_id: str, path: Path) -> None:
        """Rewrite a label file with the pixels of the series' slices, where a tilted gantry makes a difference."""
        if self.stack(image_id).tilted:
            slices, grid = self.pixelwise(image_id, read_volume(path, allow_constant=True).array_xyz)
            write_volume(path, slices, grid, compress=False)

    def pixelwise(self, image_id: str, array_xyz: Array) -> tuple[Array, Grid]:
        """Return an array of the image's grid as pixels of the series' slices, and a grid of their shape."""
        stack = self.stack(image_id)
        return stack.to_slices(array_xyz), _slices_grid(stack) if stack.tilted else stack.grid

    def describe_channels(self, image_id: str, channels: Sequence[Channel]) -> dict[str, Any]:
        """Return which series would serve which channel, why, and what else the study has; or the ``problem``."""
        headers = self.study_headers(self._facts(image_id)["StudyInstanceUID"])
        candidates = [
            {"SeriesInstanceUID": uid, "description": description_of(header), "sequence": sequence_of(header).name}
            for uid, header in headers.items()
        ]
        try:
            chosen = {item.channel: item for item in choose_series(channels, image_id, headers, {})}
            problem = None
        except MSHubError as error:
            chosen, problem = {}, str(error)
        rows = []
        for channel in channels:
            item = chosen.get(channel.name)
            rows.append(
                {
                    "name": channel.name,
                    "sequence": channel.sequence,
                    "series": item.series_uid if item else None,
                    "description": item.description if item else "",
                    "why": item.why if item else problem,
                    "candidates": candidates,
                }
            )
        return {"problem": problem, "channels": rows}

    def take_in(self, image_id: str) -> list[dict[str, str]]:
        """Look for corrections of one study that others stored in the PACS, now; return what was left out, and why."""
        study = self._facts(image_id)["StudyInstanceUID"]
        if self._exchanges:
            self._receiver.look_now(study)
        return self._labels.left_out(image_id)

    # -- private ------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take in the labels that others stored in the PACS."""
        if self._exchanges:
            self._receiver.look()

    def _series(self, *, asked_for: str = "") -> dict[str, dict[str, str]]:
        """Return the image series of the PACS, and take those not known yet into the index.

        Somebody who asks for a series that was not there a moment ago has the PACS asked again, for that one.
        """
        with self._listing:
            started = time.monotonic()
            if started > self._listed_until:
                found = [item for kind in self._modalities for item in self._client.series(Modality=kind)]
                answered = time.monotonic()
                new, ambiguous = _by_uid(found)
                self._register(new)  # first: what is listed is looked up in the index
                self._listed, self._ambiguous, self._listed_at = new, ambiguous, answered
                self._listed_until = answered + pause_after(answered - started, LISTED_S)
            elif asked_for and asked_for not in self._listed:
                found = [
                    item for item in self._client.series(SeriesInstanceUID=asked_for) if self._is_asked(item, asked_for)
                ]
                new, ambiguous = _by_uid(found)
                self._register(new)
                self._listed, self._ambiguous = self._listed | new, self._ambiguous | ambiguous
            listed = self._listed
        if self._exchanges:
            self._sender.send_waiting()
        return listed

    def _is_asked(self, header: Dataset, series: str) -> bool:
        """Return whether a PACS that may pay no heed to what it is asked tells of this series, and it is an image."""
        return str(header.SeriesInstanceUID) == series and str(header.get("Modality")) in self._modalities

    def _register(self, listed: Mapping[str, Mapping[str, str]]) -> None:
        """Take into the index what is new, and what has changed: while the PACS is down, that is what is known."""
        if not self._unknown(listed):
            return
        with self._lock:
            self._catch_up()
            self._take_note(self._unknown(listed))

    def _unknown(self, listed: Mapping[str, Mapping[str, str]]) -> dict[str, ImageLabelModel | None]:
        """Return entries for series the index does not know, or not as the PACS lists them."""
        known, entries = self._datastore.objects, dict[str, ImageLabelModel | None]()
        for image, facts in listed.items():
            if image not in known:
                entries[image] = ImageLabelModel(image=DataModel(info={**facts, "name": image + VOLUME}, ext=VOLUME))
            elif not facts.items() <= known[image].image.info.items():
                entry = known[image].model_copy(deep=True)
                entry.image.info.update(facts)
                entries[image] = entry
        return entries

    def _facts(self, image_id: str) -> dict[str, Any]:
        """Return what the PACS says of a series; while it is down, what it said of one there is a copy of."""
        if not _is_uid(image_id):
            raise HTTPException(404, f"There is no series {image_id[:80]!r}: expected a SeriesInstanceUID.")
        if image_id in self._listed and time.monotonic() - self._listed_at < SEEN_S:
            return self._listed[image_id]
        known = self._datastore.objects.get(image_id)
        try:
            listed = self._series(asked_for=image_id)
        except PacsError as error:
            if known is None or not self._files.has(image_id):
                with as_http_errors():
                    raise
            logger.warning("%s: the copy on this machine is used: %s", image_id, error)
            return {COUNT: str(self._files.count(image_id)), **known.image.info}
        if image_id in self._ambiguous:
            raise HTTPException(
                409,
                f"The PACS lists the series {image_id} in several studies, perhaps of several patients: nobody can "
                "tell which is meant. Expected: a SeriesInstanceUID of its own for every series. How to fix: correct "
                "or remove the copies in the PACS.",
            )
        if image_id not in listed:
            kinds = " or ".join(self._modalities)
            raise HTTPException(404, f"The PACS has no {kinds} series {image_id}.")
        return listed[image_id]

    def _is_there(self, image: str, entry: ImageLabelModel, files: Set[str]) -> bool:
        """Forget no series, whose copy may be gone: it can be downloaded again."""
        return True

    @contextmanager
    def _on_grid(self, image_id: str, label: Path) -> Iterator[Path]:
        """Give a submitted label on the grid of its image; one of a tilted series comes pixel by pixel."""
        stack = self._files.stack(image_id)
        if not stack.tilted:
            yield label
            return
        with as_http_errors():
            array = read_volume(label, allow_constant=True).array_xyz
        if array.shape != stack.slices_shape:
            yield label
            return
        with tempfile.TemporaryDirectory(prefix="mshub-label-") as folder:
            path = Path(folder) / "label.nii.gz"
            write_nifti(path, stack.from_slices(array), stack.grid)
            yield path

    def _keep_found(self, image_id: str, label: Path, info: dict[str, Any], made: datetime) -> None:
        """Keep a label that was found in the PACS, and is not sent there; which one it is, `_store_label` decides."""
        super().save_label(image_id, str(label), FINAL, {**info, MADE: made.isoformat()})

    def _store_label(self, image_id: str, path: Path, tag: str, info: dict[str, Any]) -> str:
        """Store a label; one that was found is the final one only if no newer one was submitted while it was read."""
        with self._lock:
            self._catch_up()
            if MADE in info:
                tag = self._tag_for(image_id, datetime.fromisoformat(info[MADE]))
            stored: str = super()._store_label(image_id, path, tag, info)
            return stored

    def _tag_for(self, image_id: str, made: datetime) -> str:
        """Return ``final``, or the next ``version_N`` for a label that is older than the final one."""
        info = self.get_label_info(image_id, FINAL)
        moment = info.get(MADE) or info.get("submitted")
        if not moment or datetime.fromisoformat(moment).astimezone(timezone.utc) <= made:
            return FINAL
        version: str = self._next_version(image_id)
        return version


def _by_uid(found: Sequence[Dataset]) -> tuple[dict[str, dict[str, str]], set[str]]:
    """Return what the PACS says of series, by UID, and the UIDs that several studies have."""
    studies = Counter(str(item.SeriesInstanceUID) for item in found)
    ambiguous = {uid for uid, count in studies.items() if count > 1}
    facts = {uid: text_of(item, FACTS) for item in found if _is_uid(uid := str(item.SeriesInstanceUID))}
    return {uid: said for uid, said in facts.items() if uid not in ambiguous}, ambiguous


def _is_uid(text: str) -> bool:
    return len(text) <= MAX_UID_LENGTH and _UID.fullmatch(text) is not None


def _slices_grid(stack: SeriesStack) -> Grid:
    """Return a grid of the slices' own shape: where they lie but for the tilt, which no grid can say."""
    affine = stack.grid.affine_ras.copy()
    affine[:3, 3] += affine[:3, :2] @ stack.offsets[0]
    return Grid(stack.slices_shape, affine)
