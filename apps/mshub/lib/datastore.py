"""A studies folder: MONAI Label's local datastore, with several channels per case and ids that stay inside it."""

from __future__ import annotations

import logging
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.datastore.local import ImageLabelModel
from monailabel.interfaces.datastore import DefaultLabelTag

from lib import audit
from lib.dataset_archive import LabelledImage, write_archive
from lib.faults import as_http_errors, check_name
from lib.free_space import check_space
from lib.label_folder import IMAGE_ENDINGS, LabelFolder, ending_of
from lib.refused_labels import RefusedLabels
from lib.reviews import patient_of, reviewed_case
from mshub.agreement import agreement
from mshub.atomic_file import replace_by_copy
from mshub.card_tables import Channel
from mshub.case_folders import PATIENTS, read_patients
from mshub.cases import ReviewedCase
from mshub.corrections import Correction, read_correction
from mshub.doubts import label_doubts
from mshub.errors import CaseError, MSHubError
from mshub.geometry import Array, Grid
from mshub.label_quality import label_hints
from mshub.store import utc_now
from mshub.volume_io import read_grid, read_volume

logger = logging.getLogger(__name__)

FIRST_CHANNEL = "_0000"
MOST_COMPARED = 300
"""So many labels say what volume of a structure is usual; more would cost more and say the same."""
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<number>\d{4})")


class StudiesFolder(LabelFolder):
    """Images of a folder, by id.

    ``case.nii.gz`` is the image ``case``. ``case_0000.nii.gz``, ``case_0001.nii.gz``... (nnU-Net's names) are the
    channels of one image ``case``, whose file, for clients that show it, is channel 0.

    Parameters
    ----------
    path : str
        The folder; labels go to ``labels/<tag>/`` in it.
    structures : callable
        Returns the names of the structures a submitted label may hold.
    refused : Path
        Where labels that were refused are kept.
    auto_reload, read_only : bool
        MONAI Label's.
    """

    def __init__(
        self,
        path: str,
        structures: Callable[[], Collection[str]],
        refused: Path,
        auto_reload: bool = False,
        read_only: bool = False,
    ) -> None:
        self.structures, self._refused = structures, RefusedLabels(refused)
        self._warned: set[str] = set()
        self._adding = threading.Lock()
        super().__init__(path, auto_reload=auto_reload, read_only=read_only)

    def channels(self, image_id: str) -> list[Path]:
        """Return the files of an image, one per channel, in order.

        Raises
        ------
        HTTPException
            404 for an id that is not in the datastore, 422 for a gap in the channel numbers.
        """
        return _beside(image_id, self._file_of(image_id, self._entry(image_id)))

    def _file_of(self, image_id: str, entry: ImageLabelModel) -> Path:
        """Return the first file of an image as it is named in the folder: it may be a link to another name."""
        return Path(self._datastore.image_path()) / f"{image_id}{entry.image.ext}"

    def get_image_uri(self, image_id: str) -> str:
        """Return the path of an image's first channel; 404 for an id that is not in the datastore."""
        uri: str = super().get_image_uri(image_id)
        if not uri:
            raise HTTPException(404, f"There is no image {image_id!r} in the datastore.")
        return uri

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """Return what is known about an image; 404 for an id that is not in the datastore."""
        self.get_image_uri(image_id)
        info: dict[str, Any] = super().get_image_info(image_id)
        return info

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Store an uploaded image under a checked id, once it has been read to its end."""
        if image_id:
            check_name("image id", image_id)
        if not image_filename.endswith(IMAGE_ENDINGS):
            raise HTTPException(
                415,
                f"The upload {Path(image_filename).name} is no volume: expected {', '.join(IMAGE_ENDINGS)}.",
            )
        with as_http_errors():
            check_space(Path(self._datastore.image_path()), Path(image_filename).stat().st_size)
        ending = ending_of(image_filename)
        name = (image_id or Path(image_filename).name.removesuffix(ending)) + ending
        self._refuse_taken(name)
        with as_http_errors():
            read_volume(Path(image_filename))
        with self._adding:
            self._refuse_taken(name)  # meanwhile
            target = Path(self._datastore.image_path()) / name
            replace_by_copy(Path(image_filename), target)
            try:
                return self._take_in_image(name, image_info)
            except OSError:
                target.unlink(missing_ok=True)
                raise

    def _take_in_image(self, name: str, info: dict[str, Any]) -> str:
        """Let the index know a file that was added; it may be a further channel of an image that is known."""
        with self._lock:
            self._catch_up()
            image = self._id_of(name)
            self._store({image: self._entry_of(image, self._to_id(name)[1], info)})
        return image

    def _refuse_taken(self, name: str) -> None:
        """Refuse a file name that is, or would be, an image that is here already."""
        image = self._to_id(name)[0]
        if (Path(self._datastore.image_path()) / name).exists() or image in self._datastore.objects:
            raise HTTPException(
                409, f"There is an image {image!r} here already. Give another id, or delete that one first."
            )

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Check and store a label somebody submits; the one it replaces stays as ``version_N``.

        Parameters
        ----------
        image_id : str
        label_filename : str
            The submitted file.
        label_tag : str
            ``final``, or another name.
        label_info : dict
            Needs ``label_info``, the names of the segments: see `mshub.corrections.read_correction`. Stored with it are
            ``reviewed`` (structures a person looked at), ``voxels`` and ``volumes_ml``, ``started_from`` (model and
            version of the pre-label), ``agreement`` with it (`mshub.agreement.Agreement`), ``submitted`` (UTC),
            ``doubts`` (sentences for whoever decides about a version) and ``hints`` (for whoever drew it).

        Raises
        ------
        HTTPException
            404 for an unknown image; 4xx for a label that is refused. The refused file is kept, the message says where.
        """
        image = Path(self.get_image_uri(image_id))
        check_name("label tag", label_tag)
        with tempfile.TemporaryDirectory(prefix="mshub-label-") as folder:
            prelabel = self.copy_label(image_id, DefaultLabelTag.ORIGINAL.value, Path(folder))
            facts = self._checked(image_id, Path(label_filename), label_tag, label_info, image, *prelabel)
        return self._store_label(image_id, Path(label_filename), label_tag, {**label_info, **facts})

    def _checked(
        self,
        image_id: str,
        label: Path,
        label_tag: str,
        label_info: dict[str, Any],
        image: Path,
        prelabel: Path | None,
        started_from: dict[str, Any],
    ) -> dict[str, Any]:
        """Return what is found in a submitted label, also beside its pre-label; one that is refused is kept."""
        with as_http_errors():
            try:
                correction = read_correction(label, label_info.get("label_info"), read_grid(image), self.structures())
            except MSHubError as error:
                reason = str(error).replace(label.name, "The label").rstrip(".")
                kept = self._refused.keep(label, image_id, label_tag, label_info, f"{reason}.")
                raise type(error)(f"{reason}. The submitted file is kept on the server as {kept}.") from error
        audit.note(started_from=origin_of(started_from))
        predicted = started_from.get("params", {}).get("voxel_counts", {})
        reviewed = list(correction.reviewed([name for name, voxels in predicted.items() if voxels]))
        return {
            "reviewed": reviewed,
            "voxels": correction.voxels,
            "volumes_ml": _volumes_ml(correction, reviewed),
            "started_from": origin_of(started_from),
            "submitted": utc_now(),
            "hints": self._hints(image_id, correction, reviewed),
            **_beside_prelabel(correction, reviewed, prelabel, started_from.get("params", {}).get("label_names", {})),
        }

    def _hints(self, image_id: str, correction: Correction, reviewed: list[str]) -> list[str]:
        """Return what looks unfinished in a label, also beside other labels here."""
        labels, usual = correction.labels, self._usual_volumes(image_id, reviewed)
        return label_hints(labels.array_xyz, correction.values, reviewed, labels.grid.spacing_xyz_mm, usual)

    def _usual_volumes(self, image_id: str, structures: Sequence[str]) -> dict[str, list[float]]:
        """Return the volumes of structures in the final labels of other images, or of enough of them."""
        tag, objects = DefaultLabelTag.FINAL.value, list(self._datastore.objects.items())
        others = [item.labels[tag].info for other, item in objects if tag in item.labels and other != image_id]
        some = [info.get("volumes_ml") or {} for info in others[:: 1 + len(others) // MOST_COMPARED]]
        return {name: [volumes[name] for volumes in some if name in volumes] for name in structures}

    def save_prediction(self, image_id: str, path: Path, label_tag: str, label_info: dict[str, Any]) -> str:
        """Store a label a model made: a pre-label, whose names and numbers are the model's own."""
        self.get_image_uri(image_id)
        check_name("label tag", label_tag)
        return self._store_label(image_id, path, label_tag, label_info)

    def pixelwise(self, image_id: str, array_xyz: Array) -> tuple[Array, Grid]:
        """Return an array of an image's grid as a viewer counts its pixels, and their grid: here the same."""
        return array_xyz, read_grid(Path(self.get_image_uri(image_id)))

    def patients(self, images: Collection[str]) -> dict[str, str]:
        """Return image id -> patient.

        Raises
        ------
        CaseError
            ``patients.csv`` is not what `mshub.case_folders.read_patients` expects.
        """
        known = self._patients_table()
        return {image: patient_of(image, self._noted_of(image), known) for image in images}

    def _noted_of(self, image_id: str) -> dict[str, Any]:
        """Return what is noted of an image, without a look at its file: it is asked of all images at once."""
        item = self._datastore.objects.get(image_id)
        return item.image.info if item else self.get_image_info(image_id)

    def _patients_table(self) -> dict[str, str]:
        """Return what ``patients.csv`` in the folder says."""
        return read_patients(Path(self._datastore.image_path()) / PATIENTS)

    def image_state(self, image_id: str) -> str:
        """Return what changes when the image does: names, sizes and times of change of its files."""
        facts = [(path.name, path.stat()) for path in self.channels(image_id)]
        return ";".join(f"{name}:{found.st_size}:{found.st_mtime_ns}" for name, found in facts)

    def is_still(self, image_id: str, state: str) -> bool:
        """Return whether an image is the one that was in a state; 404 if there is none any more."""
        try:
            return self.image_state(image_id) == state
        except FileNotFoundError:
            return False

    def caption(self, image_id: str) -> str:
        """Return what a person calls an image, where its id does not say it: here it does."""
        return ""

    def note_offer(self, image_id: str, strategy: str, client: str) -> None:
        """Note which strategy offered an image to whom, where MONAI Label does; decides what may judge versions."""
        offers = dict(self.get_image_info(image_id).get("strategy") or {})
        offers[strategy] = {"ts": int(time.time()), "client_id": client}
        self.update_image_info(image_id, {"strategy": offers})

    def case_channels(self, image_id: str, channels: Sequence[Channel]) -> list[Path]:
        """Return the files a model with these channels learns an image from: here all it has."""
        return self.channels(image_id)

    def reviewed_cases(self, channels: Sequence[Channel] = ()) -> list[ReviewedCase]:
        """Return every image with a final label that a model could learn from, by id; others are named in the log.

        Parameters
        ----------
        channels : sequence of Channel
            The model's; of no consequence in a folder, where the names of the files say what belongs together.

        Raises
        ------
        CaseError
            ``patients.csv`` in the folder is not what `mshub.case_folders.read_patients` expects.
        """
        patients = self._patients_table()
        images = set(self._known_images())
        for case in sorted(patients.keys() - images):
            self.warn_once(f"{PATIENTS} names {case}, which is no image here")
        tag, structures, known = DefaultLabelTag.FINAL.value, self.structures(), self._datastore.objects
        labelled = sorted(image for image in images if image in known and tag in known[image].labels)
        cases = [self._reviewed_case(image, channels, patients, structures) for image in labelled]
        return [case for case in cases if case is not None]

    def reviewed_case(self, image_id: str, channels: Sequence[Channel]) -> ReviewedCase | None:
        """Return one image with its final label, as `reviewed_cases` does; None if a model cannot learn from it."""
        patients = self._patients_table()
        return self._reviewed_case(image_id, channels, patients, self.structures())

    def _known_images(self) -> list[str]:
        """Return the images there may be labels of."""
        return list(self.list_images())

    def status(self) -> dict[str, Any]:
        """Return the numbers of images and labels, from a copy: labels may be stored while a client asks."""
        tags = Counter(tag for item in list(self._datastore.objects.values()) for tag in list(item.labels))
        completed = tags[DefaultLabelTag.FINAL.value]
        return {"total": len(self.list_images()), "completed": completed, "label_tags": dict(tags)}

    def _reviewed_case(
        self, image_id: str, channels: Sequence[Channel], patients: dict[str, str], structures: Collection[str]
    ) -> ReviewedCase | None:
        tag = DefaultLabelTag.FINAL.value
        try:
            return reviewed_case(
                image_id,
                self.case_channels(image_id, channels),
                Path(self.get_label_uri(image_id, tag)),
                label_info=self.get_label_info(image_id, tag),
                image_info=self.get_image_info(image_id),
                patients=patients,
                structures=structures,
            )
        except (MSHubError, OSError) as error:
            self.warn_once(f"the final label of {image_id} is left out of training: {error}")
        except HTTPException as error:
            self.warn_once(f"{image_id} is left out of training: {error.detail}")
        return None

    def warn_once(self, message: str) -> None:
        """Say in the log what clients ask about every few seconds."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def remove_image(self, image_id: str) -> None:
        """Remove an image with all its channels and labels; 404 for an id that is not in the datastore."""
        channels = self.channels(image_id)
        with self._lock:
            self._catch_up()
            for path in [*self._files_of_labels(image_id), *channels]:
                path.unlink(missing_ok=True)
            self._take_note({image_id: None}, {image_id: None})

    def _is_there(self, image: str, entry: ImageLabelModel, files: Set[str]) -> bool:
        """Return whether the file of an image is among the files, and no channel of another one that came back."""
        name, drawn = image + entry.image.ext, entry.labels.keys() - {DefaultLabelTag.ORIGINAL.value}
        return name in files and (bool(drawn) or not _is_further_channel(name, files))

    def _id_of(self, name: str) -> str:
        """Return the id of the image that a file of the folder belongs to."""
        case = _channel_case(name, ending_of(name))
        return case if case is not None and case in self._datastore.objects else self._to_id(name)[0]

    def _to_id(self, file: str) -> tuple[str, str]:
        """Return (id, ending): ``case_0000.nii.gz`` is ``("case", "_0000.nii.gz")``."""
        ending = ending_of(file) or Path(file).suffix
        stem = file.removesuffix(ending) if ending else file
        if stem.endswith(FIRST_CHANNEL):
            return stem.removesuffix(FIRST_CHANNEL), FIRST_CHANNEL + ending
        return stem, ending

    def image_of(self, word: str) -> str | None:
        """Return the id of the image that a word means, also one that is the name of a file of it; None if none is.

        An image whose file is gone has its name for as long as its labels are kept.
        """
        return next((image_id for image_id in (word, self._id_of(word)) if self._known_of(image_id)), None)

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """Return a new ZIP of images that have a final label, and these labels.

        Each label is there with the names it had when it was read. What cannot be read, such as a series of a PACS
        without a copy on this machine, is named in its ``metadata.json``, under ``left_out``.

        Raises
        ------
        HTTPException
            404 if there is nothing to download, 507 if the folder for temporary files has no room for the ZIP.
        """
        images, most = sorted(self._datastore.filter_by_tag(DefaultLabelTag.FINAL.value)), limit_cases or 0
        if nbytes := self._bytes_to_pack(images, most):
            with as_http_errors():
                check_space(Path(tempfile.gettempdir()), nbytes)
        head = self._datastore.model_dump(exclude={"base_path", "objects"})
        path, left_out = write_archive(images, self._opened, most, head)
        if path is None:
            why = "; ".join(f"{image}: {reason}" for image, reason in list(left_out.items())[:10])
            raise HTTPException(
                404,
                f"None of the {len(left_out)} images with a final label can be downloaded: {why}."
                if left_out
                else "There is no image with a final label yet: nothing to download.",
            )
        return str(path)

    @contextmanager
    def _opened(self, image_id: str) -> Iterator[LabelledImage]:
        """Open the files of an image and its final label, and tell what is known of these; not of others meanwhile."""
        with ExitStack() as stack:
            with self._lock:
                self._catch_up()
                paths = self._paths_to_pack(image_id)
                try:
                    files = {name: stack.enter_context(path.open("rb")) for name, path in paths.items()}
                except FileNotFoundError as error:
                    raise CaseError(f"there is no file {Path(error.filename).name} on this machine") from None
                facts = self._entry(image_id).model_dump()
            yield LabelledImage(files, facts)

    def _paths_to_pack(self, image_id: str) -> dict[str, Path]:
        """Return the files of an image and of its final label, by their paths in a ZIP; nothing is downloaded."""
        entry, tag = self._datastore.objects.get(image_id), DefaultLabelTag.FINAL.value
        if entry is None or tag not in entry.labels:
            raise CaseError("the image or its label was removed meanwhile")
        try:
            images = _beside(image_id, self._file_of(image_id, entry))
        except HTTPException as error:
            raise CaseError(error.detail) from error
        label = self._labels_folder / tag / (image_id + entry.labels[tag].ext)
        return {**{f"image/{path.name}": path for path in images}, f"label/{label.name}": label}

    def _bytes_to_pack(self, images: Sequence[str], most: int) -> int:
        """Return how much a ZIP of images and labels will take, which is not compressed: they are already."""
        sizes = list[int]()
        for image in images:
            if len(sizes) >= most > 0:
                break
            with suppress(OSError, CaseError):
                sizes.append(sum(path.stat().st_size for path in self._paths_to_pack(image).values()))
        return sum(sizes)

    def _list_files(self, path: str, patterns: list[str]) -> dict[str, str]:
        """Return the files of a folder without the second and further channels of a case.

        A name that is no text would spoil the index; its file is left out, and the log says so.
        """
        found: dict[str, str] = super()._list_files(path, patterns)
        for name in [name for name in found if not _is_text(name)]:
            self.warn_once(f"a file is left out, as its name is not UTF-8: {name!a}")
            del found[name]
        return {name: file for name, file in found.items() if not _is_further_channel(name, found)}


def _beside(image_id: str, first: Path) -> list[Path]:
    """Return the files of the channels of an image whose first is known; 422 for a gap in their numbers."""
    if not first.name.startswith(f"{image_id}{FIRST_CHANNEL}."):
        return [first]
    ending = first.name.removeprefix(image_id + FIRST_CHANNEL)
    found = sorted(path for path in first.parent.glob(f"*{ending}") if _channel_case(path.name, ending) == image_id)
    expected = [f"{image_id}_{number:04d}{ending}" for number in range(len(found))]
    missing = sorted(set(expected) - {path.name for path in found})
    if missing:
        raise HTTPException(
            422,
            f"Channel {', '.join(missing)} is missing beside {', '.join(path.name for path in found)}: the "
            "channels of a case are numbered without gaps.",
        )
    return found


def _beside_prelabel(
    correction: Correction, reviewed: list[str], prelabel: Path | None, names: dict[str, int]
) -> dict[str, Any]:
    """Return ``doubts`` and ``agreement`` of a correction and the pre-label it started from."""
    submitted, values = correction.labels.array_xyz, correction.values
    predicted = read_volume(prelabel, allow_constant=True).array_xyz if names and prelabel else None
    if predicted is None or predicted.shape != submitted.shape:
        return {"doubts": []}
    doubts = label_doubts(values, submitted, values, predicted, names)
    return {"doubts": doubts, "agreement": agreement(reviewed, submitted, values, predicted, names).as_dict()}


def _volumes_ml(correction: Correction, structures: Sequence[str]) -> dict[str, float]:
    voxel_ml = prod(correction.labels.grid.spacing_xyz_mm) / 1000
    return {name: round(correction.voxels[name] * voxel_ml, 4) for name in structures}


def origin_of(prelabel: dict[str, Any]) -> dict[str, Any] | None:
    """Return model and version of the pre-label a correction started from; None without one."""
    params = prelabel.get("params", {})
    return {"model": params["model"], "version": params["model_version"]} if "model_version" in params else None


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_further_channel(name: str, siblings: Container[str]) -> bool:
    ending = ending_of(name)
    case = _channel_case(name, ending)
    return (
        case is not None
        and not name.startswith(f"{case}{FIRST_CHANNEL}")
        and f"{case}{FIRST_CHANNEL}{ending}" in siblings
    )


def _channel_case(name: str, ending: str) -> str | None:
    match = _CHANNEL.fullmatch(name.removesuffix(ending))
    return match["case"] if match else None
