"""Routes of what takes time: predictions, pre-labels, trainings, and the choice of the next case."""

from __future__ import annotations

import json
import logging
from enum import Enum
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import BackgroundTasks, Body, File, Form, HTTPException, Request, UploadFile
from fastapi import Path as InPath
from fastapi.responses import FileResponse, Response
from monailabel.endpoints.infer import ResultType, run_inference
from monailabel.endpoints.user.auth import User
from monailabel.interfaces.exception import ImageNotFoundException
from monailabel.interfaces.utils.app import app_instance

from lib import audit
from lib.server.access import USER, Guards, address_of, comes_from_one_person
from lib.server.asked import Admin, Annotator, AnyUser, by, options_in
from lib.server.json_input import json_object
from lib.server.sent_files import SentOnce
from lib.server.uploads import remove_uploads, rename, session_exists

logger = logging.getLogger(__name__)

INFER_OPTIONS = frozenset(
    {
        *("device", "profile", "folds", "label_prompt", "client_id", "save_label", "label_tag", "grid", "series"),
        *("result_extension", "result_dtype", "result_compress", "restore_label_idx"),
    }
)
"""What a client may ask of a prediction; whatever else it sends goes no further."""


class DicomResult(str, Enum):
    """Answers of ``/infer`` that are DICOM objects."""

    seg = "dicom_seg"
    rtstruct = "dicom_rtstruct"


BatchNumber = Annotated[int, InPath(ge=1, lt=2**63)]
"""As the case index, which is SQLite, can count."""


def infer(
    background_tasks: BackgroundTasks,
    user: AnyUser,
    model: str,
    image: str = "",
    session_id: str = "",
    params: Annotated[str, Form()] = "{}",
    file: Annotated[UploadFile | None, File()] = None,
    label: Annotated[UploadFile | None, File()] = None,
    output: DicomResult | ResultType | None = None,
) -> Any:
    """Run a model; a plain function, so that Starlette runs it in a thread and the server keeps answering.

    `label` changes nothing: no model here takes a drawing to start from.
    """
    options = json_object(params, "params")
    unsafe = sorted(options.keys() & {"image", "model", "session", "channels", "image_id"})
    if unsafe:
        raise HTTPException(400, f"params may not set {', '.join(unsafe)}: use the query parameters of /infer.")
    options = by(user, {name: value for name, value in options.items() if name in INFER_OPTIONS})
    if not (image or session_id or file):
        raise HTTPException(400, "The request names no image: add ?image=ID, ?session_id=ID or a file.")
    if not file and not session_id and image.startswith(("/", "\\", ".")):
        raise HTTPException(404, f"There is no image {image!r} in the datastore.")
    if session_id and not session_exists(session_id):
        raise HTTPException(404, f"The session {session_id!r} does not exist or has expired; create it again.")
    if isinstance(output, DicomResult) and (file or session_id):
        raise HTTPException(400, f"output={output.value} is made of a series of the PACS: ask with ?image=ID alone.")
    rename(file, "image")
    try:
        if isinstance(output, DicomResult):
            return _dicom_result(model, image, options, output)
        answer = run_inference(background_tasks, model, image, session_id, json.dumps(options), file, None, output)
    except BaseException:
        remove_uploads(background_tasks)
        raise
    return _without_leftovers(answer, background_tasks)


def train(user: Admin, params: Annotated[Any, Body()] = None, run_sync: bool = False) -> Any:
    """Start fine-tuning every model with new reviewed cases: OHIF's button.

    `run_sync` changes nothing: a training takes longer than a request should.
    """
    return app_instance().start_all_training(_train_params(params, user))


def train_model(
    user: Admin, model: str, params: Annotated[Any, Body()] = None, run_sync: bool = False, enqueue: bool = False
) -> Any:
    """Start fine-tuning one model: 3D Slicer's button.

    `run_sync` changes nothing: a training takes longer than a request should. Nor does `enqueue`: trainings of several
    models always take turns.
    """
    return app_instance().start_training(model, _train_params(params, user))


def train_status(user: AnyUser, all: bool = False, check_if_running: bool = False) -> Any:
    """Return the training at work, or else the last one; 404 if there is none."""
    return app_instance().training_status(all, check_if_running)


def stop_training(user: Admin) -> Any:
    """Stop all trainings; null if there was none."""
    return app_instance().stop_training()


def next_sample(request: Request, user: AnyUser, strategy: str, params: Annotated[Any, Body()] = None) -> Any:
    """Return the next case to label; a plain function, as the PACS is asked for its series."""
    sample = _next_case({**by(user, options_in(params, '{"client_id": "me"}')), "strategy": strategy})
    if "id" in sample:
        audit.note(image=sample["id"])
        if "authorization" in request.headers:
            _offer(request, sample["id"])
    return sample


def _next_case(wanted: dict[str, Any], attempts: int = 3) -> dict[str, Any]:
    """Return the next case and what is known of its image; another case where that was removed just now."""
    try:
        sample: dict[str, Any] = app_instance().next_case(wanted)
        known = app_instance().datastore().get_image_info(sample["id"]) if "id" in sample else {}
    except (HTTPException, ImageNotFoundException) as error:
        if attempts == 1 or getattr(error, "status_code", HTTPStatus.NOT_FOUND) != HTTPStatus.NOT_FOUND:
            raise
        return _next_case(wanted, attempts - 1)
    return {**sample, **known}


def _offer(request: Request, image: str) -> None:
    """Let 3D Slicer, which says not who asks, fetch an image; not where its address is that of everybody."""
    if comes_from_one_person(request):
        Guards.of(app_instance().store.home).offers.make(request.scope[USER], image, address_of(request))
    else:
        logger.warning("3D Slicer cannot fetch the next case: the proxy sends no X-Forwarded-For (docs/access.md)")


def start_prelabelling(user: Annotator, model: str, params: Annotated[Any, Body()] = None) -> Any:
    """Start pre-labelling waiting or chosen cases; see `lib.activelearning.Prelabels.start` for the options."""
    return app_instance().start_prelabelling(model, by(user, options_in(params, '{"limit": 20}')))


def list_prelabelling(user: AnyUser) -> Any:
    """Return all batches of pre-labels, newest first."""
    return app_instance().active_learning.prelabels.all()


def prelabelling(user: AnyUser, batch: BatchNumber) -> Any:
    """Return how far a batch is."""
    return app_instance().active_learning.prelabels.status(batch)


def stop_prelabelling(user: Annotator, batch: BatchNumber) -> Any:
    """Let a batch stop before its next case."""
    return app_instance().active_learning.prelabels.stop(batch)


def resume_prelabelling(user: Annotator, batch: BatchNumber) -> Any:
    """Let a stopped batch go on."""
    return app_instance().active_learning.resume(batch)


def _dicom_result(model: str, image: str, options: dict[str, Any], output: DicomResult) -> Response:
    """Return a prediction as a DICOM object, named and coded by the model's card."""
    if not image:
        raise HTTPException(400, f"output={output.value} needs ?image=ID of a series of the PACS.")
    path = app_instance().infer_dicom({**options, "model": model, "image": image}, output.name)
    return SentOnce(path, media_type="application/dicom", filename=f"{model}_{image}.dcm")


def _without_leftovers(answer: Any, background_tasks: BackgroundTasks) -> Any:
    """Return MONAI Label's answer to a prediction so that it leaves no file, however it ends."""
    is_file = isinstance(answer, FileResponse) and (answer.path,) in [task.args for task in background_tasks.tasks]
    remove_uploads(background_tasks, answer.path if is_file else "")
    return SentOnce(answer.path, media_type=answer.media_type, filename=answer.filename) if is_file else answer


def _train_params(params: Any, user: User) -> dict[str, Any]:
    return by(user, options_in(params, '{"epochs": 20}'))


ROUTES = (
    ("POST", "/infer/{model}", infer, "Infer"),
    ("POST", "/train/", train, "Train"),
    ("POST", "/train/{model}", train_model, "Train"),
    ("GET", "/train/", train_status, "Train"),
    ("DELETE", "/train/", stop_training, "Train"),
    ("POST", "/activelearning/{strategy}", next_sample, "ActiveLearning"),
    ("POST", "/mshub/prelabels/{model}", start_prelabelling, "MSHub"),
    ("GET", "/mshub/prelabels", list_prelabelling, "MSHub"),
    ("GET", "/mshub/prelabels/{batch}", prelabelling, "MSHub"),
    ("DELETE", "/mshub/prelabels/{batch}", stop_prelabelling, "MSHub"),
    ("PUT", "/mshub/prelabels/{batch}", resume_prelabelling, "MSHub"),
)
