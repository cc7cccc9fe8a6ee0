"""Files that come with a request: under names of ours, looked at before they are kept, gone when it is answered."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastapi import BackgroundTasks, HTTPException, UploadFile
from monailabel.interfaces.utils.app import app_instance
from pydicom.misc import is_dicom

from lib.faults import as_http_errors
from lib.free_space import check_space
from mshub.volume_io import READABLE, read_volume

LONGEST_NAME = 100
_ODD = re.compile(r"[^A-Za-z0-9_.-]+")


def base_name(filename: str | None) -> str:
    """Return the last part of the name a client gave a file, in signs that every file system takes; may be empty."""
    last = re.split(r"[/\\]", filename or "")[-1]
    return _ODD.sub("_", last).lstrip(".")[-LONGEST_NAME:]


def volume_ending(filename: str | None) -> str:
    """Return the ending of a volume's name, such as ``.nii.gz``.

    Raises
    ------
    HTTPException
        415: it is no format that can be read.
    """
    name = base_name(filename).lower()
    ending = max((ending for ending in READABLE if name.endswith(ending)), key=len, default="")
    if not ending or ending == ".mhd":
        raise HTTPException(
            415,
            f"The file {base_name(filename) or '(without a name)'!r} is no volume: expected one that ends in "
            f"{', '.join(ending for ending in READABLE if ending != '.mhd')}.",
        )
    return ending


def rename(file: UploadFile | None, name: str) -> None:
    """Give an upload a name of ours and its own ending: MONAI Label makes paths of what a client says."""
    if file is not None:
        file.filename = name + volume_ending(file.filename)


@contextmanager
def received(files: Sequence[UploadFile]) -> Iterator[Path]:
    """Yield a folder with the files of a request, under their own names; it is removed afterwards.

    Raises
    ------
    HTTPException
        400: no file, or two of one name; 507: no room for them.
    """
    names = [base_name(file.filename) or f"file{number}" for number, file in enumerate(files)]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled or not names:
        raise HTTPException(
            400,
            f"The upload holds {', '.join(doubled[:5])} more than once: expected files of different names, such as the "
            "slices of one series."
            if doubled
            else "The request holds no file: expected the image, or the files of its series.",
        )
    folder = Path(tempfile.mkdtemp(prefix="mshub-upload-"))
    try:
        with as_http_errors():
            check_space(folder, sum(file.size or 0 for file in files))
        for name, file in zip(names, files, strict=True):
            with (folder / name).open("wb") as written:
                shutil.copyfileobj(file.file, written)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_images(folder: Path) -> None:
    """Read what somebody uploaded as images: one volume, several channels, or the files of one DICOM series.

    Raises
    ------
    HTTPException
        4xx: nothing could be segmented in it, or there are other files beside.
    """
    files = sorted(folder.iterdir())
    volumes = [path for path in files if path.name.lower().endswith(READABLE)]
    with as_http_errors():
        for path in volumes or ([folder] if len(files) > 1 else files):
            read_volume(path)
    _refuse_others([path for path in files if path not in volumes and (volumes or not is_dicom(path))])


def _refuse_others(files: Sequence[Path]) -> None:
    """Refuse what lies beside images: nothing reads it here, and a folder of images is no place to keep programs."""
    if files:
        named = ", ".join(path.name for path in files[:5]) + (" ..." if len(files) > 5 else "")
        raise HTTPException(
            415,
            f"The upload holds {len(files)} file(s) that are no part of the image: {named}. Expected volumes only, or "
            "the DICOM files of one series: send it without the others.",
        )


def remove_uploads(background_tasks: BackgroundTasks, but: str = "") -> None:
    """Remove a request's files now: FastAPI forgets background tasks when an error is answered, or who asked hangs up.

    Parameters
    ----------
    background_tasks : BackgroundTasks
        Those that MONAI Label gave the request, each of which removes a file.
    but : str
        A file that is still needed.
    """
    for task in background_tasks.tasks:
        if task.args != (but,):
            task.func(*task.args, **task.kwargs)
    background_tasks.tasks.clear()


def session_exists(session_id: str) -> bool:
    """Return whether there is an upload for a while of this id."""
    sessions = app_instance().sessions()
    return sessions is not None and session_id.replace("-", "").isalnum() and bool(sessions.get_session(session_id))
