"""Routes of images, labels and uploads for a while: MONAI Label's, with what it leaves unchecked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from fastapi import BackgroundTasks, File, Form, HTTPException, UploadFile
from fastapi.responses import Response
from monailabel.endpoints import datastore, session
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.others.generic import file_checksum, get_mime_type

from lib import audit
from lib.exports import copy_of_label
from lib.faults import check_name
from lib.server.asked import Admin, Annotator, AnyUser, by, signed
from lib.server.json_input import json_object
from lib.server.sent_files import SentOnce, sent
from lib.server.uploads import (
    base_name,
    check_images,
    received,
    remove_uploads,
    rename,
    volume_ending,
)
from lib.sessions import refuse_archive

_CHECKSUM = re.compile(r"((SHA256|SHA512|MD5):)?[0-9a-fA-F]+")


def list_datastore(user: AnyUser, output: datastore.ResultType | None = None) -> Any:
    """Return the images and labels; a plain function like those that follow, as the PACS is asked."""
    return datastore.datastore(output)


def download_image(user: AnyUser, image: str) -> Any:
    """Return an image as a file; of a series of the PACS, its volume."""
    return sent(datastore.download_image(image))


def check_image(user: AnyUser, image: str, check_sum: str | None = None) -> Any:
    """Say whether there is an image, by 200 or 404; with a checksum, whether it is this one."""
    if check_sum and not _CHECKSUM.fullmatch(check_sum):
        raise HTTPException(400, "check_sum is odd: expected SHA256:, SHA512: or MD5: and hexadecimal digits.")
    datastore.download_image(image, check_only=True)
    if check_sum:
        algorithm, _, digits = check_sum.rpartition(":")
        found = file_checksum(app_instance().datastore().get_image_uri(image), algorithm or "SHA256")
        if digits.lower() != found.rpartition(":")[2]:
            raise HTTPException(404, f"The image {image!r} has another checksum: {found}.")
    return {}


def add_image(
    user: Annotator,
    file: Annotated[UploadFile, File()],
    image: str = "",
    params: Annotated[str, Form()] = "{}",
) -> dict[str, str]:
    """Take an image into the datastore, under the id that is asked for or else its file's name without the ending."""
    info = signed(user, json_object(params, "params"))
    ending = volume_ending(file.filename)
    image = image or base_name(file.filename)[: -len(ending)]
    check_name("image id", image)
    rename(file, "image")
    with received([file]) as folder:
        return {"image": app_instance().datastore().add_image(image, str(folder / f"image{ending}"), info)}


def image_info(user: AnyUser, image: str) -> Any:
    """Return what is known about an image."""
    return datastore.get_image_info(image)


def save_label(
    background_tasks: BackgroundTasks,
    user: Annotator,
    image: str,
    label: Annotated[UploadFile, File()],
    params: Annotated[str, Form()] = "{}",
    tag: str = DefaultLabelTag.FINAL.value,
) -> Any:
    """Store a label; a plain function, as checking it and storing it in the PACS take seconds."""
    rename(label, "label")
    try:
        told = json.dumps(signed(user, by(user, json_object(params, "params"))))
        return datastore.save_label(background_tasks, image, told, tag, label, user.username)
    finally:
        remove_uploads(background_tasks)


def download_label(user: AnyUser, label: str, tag: str) -> Response:
    """Return a label as a file: a copy, as another one may take its place while it is sent; 404 if there is none."""
    path, name = copy_of_label(app_instance().datastore(), label, tag)
    return SentOnce(path, media_type=get_mime_type(name), filename=name)


def remove_image(user: Admin, id: str) -> Any:
    """Remove an image with its labels, and what is known of it; 404 if there is none."""
    answer = datastore.remove_image(id, user.username)
    app_instance().active_learning.forget(id)
    return answer


def remove_label(user: Admin, id: str, tag: str) -> Any:
    """Remove a label; 404 if there is none."""
    if tag not in app_instance().datastore().get_labels_by_image_id(id):
        raise HTTPException(404, f"There is no label {tag!r} of an image {id!r}.")
    return datastore.remove_label(id, tag, user.username)


def note_image_info(user: Admin, image: str, info: Annotated[str, Form()] = "{}") -> Any:
    """Note what is known about an image."""
    return datastore.update_image_info(image, json.dumps(json_object(info, "info")), user.username)


def note_label_info(user: Admin, label: str, tag: str, info: Annotated[str, Form()] = "{}") -> Any:
    """Note what is known about a label."""
    return datastore.update_label_info(label, tag, json.dumps(json_object(info, "info")), user.username)


def note_label_params(user: Admin, label: str, tag: str, params: Annotated[str, Form()] = "{}") -> Any:
    """Note what is known about a label, as clients of old ask for it."""
    return note_label_info(user, label, tag, params)


def dataset(user: Admin, limit_cases: int | None = None) -> Response:
    """Return the images that have a final label, and these labels, as one ZIP; 404 if there are none."""
    path = app_instance().datastore().get_dataset_archive(limit_cases)
    return SentOnce(path, media_type="application/zip", filename="dataset.zip")


def create_session(
    user: AnyUser,
    files: Annotated[list[UploadFile], File()],
    uncompress: bool = False,
    expiry: int = 0,
) -> Any:
    """Keep an uploaded image for requests to come; archives are refused before they are looked at."""
    refuse_archive(uncompress)
    sessions = app_instance().sessions()
    if sessions is None:
        raise HTTPException(406, "This server keeps no sessions (MONAI_LABEL_SESSIONS).")
    with received(files) as folder:
        check_images(folder)
        kept = folder if len(files) > 1 else next(folder.iterdir())
        session_id, facts = sessions.add_session(str(kept), expiry)
        audit.note(session=session_id)
    return {"session_id": session_id, "session_info": facts.to_json()}


def show_session(user: Annotator, session_id: str, update_ts: bool = False, image: bool = False) -> Any:
    """Return what a session holds, or its image as a file."""
    answer = session.get_session(session_id, update_ts or image, image)
    if image and Path(answer.path).is_dir():
        raise HTTPException(
            400, "This session holds several files, which are no single file: ask without image=true for what it is."
        )
    return sent(answer) if image else answer


ROUTES = (
    ("GET", "/datastore/", list_datastore, "Datastore"),
    ("GET", "/datastore/image", download_image, "Datastore"),
    ("HEAD", "/datastore/image", check_image, "Datastore"),
    ("GET", "/datastore/image/info", image_info, "Datastore"),
    ("PUT", "/datastore/", add_image, "Datastore"),
    ("PUT", "/datastore/image", add_image, "Datastore"),
    ("DELETE", "/datastore/", remove_image, "Datastore"),
    ("DELETE", "/datastore/image", remove_image, "Datastore"),
    ("PUT", "/datastore/image/info", note_image_info, "Datastore"),
    ("GET", "/datastore/label", download_label, "Datastore"),
    ("PUT", "/datastore/label", save_label, "Datastore"),
    ("DELETE", "/datastore/label", remove_label, "Datastore"),
    ("PUT", "/datastore/label/info", note_label_info, "Datastore"),
    ("PUT", "/datastore/updatelabelinfo", note_label_params, "Datastore"),
    ("GET", "/datastore/dataset", dataset, "Datastore"),
    ("PUT", "/session/", create_session, "Session"),
    ("GET", "/session/{session_id}", show_session, "Session"),
)
