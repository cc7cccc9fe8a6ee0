"""A studies folder: MONAI Label's local datastore, with several channels per case and ids that stay inside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.datastore.local import LocalDatastore

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
FIRST_CHANNEL = "_0000"
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<number>\d{4})")


class StudiesFolder(LocalDatastore):  # type: ignore[misc]
    """Images of a folder, by id.

    ``case.nii.gz`` is the image ``case``. ``case_0000.nii.gz``, ``case_0001.nii.gz``... (nnU-Net's names) are the
    channels of one image ``case``, whose file, for clients that show it, is channel 0.
    """

    def __init__(self, path: str, auto_reload: bool = False, read_only: bool = False) -> None:
        super().__init__(
            path, extensions=[f"*{ending}" for ending in IMAGE_ENDINGS], auto_reload=auto_reload, read_only=read_only
        )

    def channels(self, image_id: str) -> list[Path]:
        """Return the files of an image, one per channel, in order.

        Raises
        ------
        HTTPException
            404 for an id that is not in the datastore, 422 for a gap in the channel numbers.
        """
        first = Path(self.get_image_uri(image_id))
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
        """Store an uploaded image under a checked id."""
        if image_id:
            _check_name("image id", image_id)
        if not image_filename.endswith(IMAGE_ENDINGS):
            raise HTTPException(
                415,
                f"The upload {Path(image_filename).name} is no volume: expected {', '.join(IMAGE_ENDINGS)}.",
            )
        stored: str = super().add_image(image_id, image_filename, image_info)
        return stored

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Store a label of an image that exists, under a checked tag."""
        self.get_image_uri(image_id)
        _check_name("label tag", label_tag)
        stored: str = super().save_label(image_id, label_filename, label_tag, label_info)
        return stored

    def remove_image(self, image_id: str) -> None:
        """Remove an image and its labels; 404 for an id that is not in the datastore."""
        self.get_image_uri(image_id)
        super().remove_image(image_id)

    def _to_id(self, file: str) -> tuple[str, str]:
        """Return (id, ending): ``case_0000.nii.gz`` is ``("case", "_0000.nii.gz")``."""
        ending = next((ending for ending in IMAGE_ENDINGS if file.endswith(ending)), Path(file).suffix)
        stem = file.removesuffix(ending) if ending else file
        if stem.endswith(FIRST_CHANNEL):
            return stem.removesuffix(FIRST_CHANNEL), FIRST_CHANNEL + ending
        return stem, ending

    def _list_files(self, path: str, patterns: list[str]) -> dict[str, str]:
        """Return the files of a folder without the second and further channels of a case."""
        found: dict[str, str] = super()._list_files(path, patterns)
        return {name: file for name, file in found.items() if not _is_further_channel(name, found)}


def _is_further_channel(name: str, siblings: dict[str, str]) -> bool:
    ending = next((ending for ending in IMAGE_ENDINGS if name.endswith(ending)), "")
    case = _channel_case(name, ending)
    return (
        case is not None
        and not name.startswith(f"{case}{FIRST_CHANNEL}")
        and f"{case}{FIRST_CHANNEL}{ending}" in siblings
    )


def _channel_case(name: str, ending: str) -> str | None:
    match = _CHANNEL.fullmatch(name.removesuffix(ending))
    return match["case"] if match else None


def _check_name(what: str, name: str) -> None:
    if not _ID.fullmatch(name) or ".." in name:
        raise HTTPException(
            400, f"The {what} {name[:80]!r} is refused: expected letters, digits, '.', '_' and '-', without '..'."
        )
