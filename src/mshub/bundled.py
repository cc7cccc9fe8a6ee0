"""Where the files that come with MSHub are: in a checkout beside ``src``, in a wheel inside the package."""

from __future__ import annotations

import shutil
from pathlib import Path

from mshub.errors import StoreError

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parents[1]


def app_folder() -> Path:
    """Return the MONAI Label app's folder."""
    return _first("the MONAI Label app", _PACKAGE / "_app", _CHECKOUT / "apps" / "mshub", marker="main.py")


def sample_data() -> Path:
    """Return the sample data's folder: read-only, see `copy_samples`."""
    return _first("the sample data", _PACKAGE / "_sample_data", _CHECKOUT / "sample-data", marker="manifest.json")


def copy_samples(studies: Path) -> None:
    """Copy the sample images into `studies` where they are not there yet; labels made there are kept."""
    studies.mkdir(parents=True, exist_ok=True)
    for image in sorted((sample_data() / "images").glob("*.nii.gz")):
        if not (studies / image.name).exists():
            pending = studies / f".{image.name}.part"
            shutil.copyfile(image, pending)
            pending.replace(studies / image.name)


def _first(what: str, *candidates: Path, marker: str) -> Path:
    for folder in candidates:
        if (folder / marker).is_file():
            return folder
    raise StoreError(
        f"{what.capitalize()} is missing from this installation (looked in {candidates}). Reinstall MSHub."
    )
