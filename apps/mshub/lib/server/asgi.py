"""MONAI Label's FastAPI app with our routes and error answers: ``start_server --uvicorn_app lib.server.asgi:app``."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import deque
from enum import Enum
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import BackgroundTasks, Body, Depends, File, Form, HTTPException, Request, UploadFile
from fastapi import Path as InPath
from fastapi.responses import FileResponse, PlainTextResponse, Response
from monailabel import endpoints
from monailabel.config import settings
from monailabel.endpoints import activelearning, batch_infer, datastore, ohif, scoring, session
from monailabel.endpoints import logs as logs_of_monailabel
from monailabel.endpoints.infer import ResultType, run_inference
from monailabel.endpoints.user.auth import RBAC, User, get_current_user
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.others.generic import file_checksum
from starlette.middleware import Middleware
from starlette.routing import Match
from starlette.types import Scope

from lib import audit
from lib.faults import check_name, not_found
from lib.oidc_settings import OidcSettings
from lib.server.access import LOCAL_USER, USER, Access, Guards, address_of, comes_from_one_person
from lib.server.bodies import Bodies
from lib.server.disconnects import Disconnects
from lib.server.error_answers import add_error_answers
from lib.server.health import Health
from lib.server.in_threads import in_threads, plain
from lib.server.json_input import JsonRoute, json_object
from lib.server.login import Login
from lib.server.oidc import SignOn
from lib.server.proxy import pass_on
from lib.server.sent_files import SentOnce
from lib.server.uploads import base_name, check_images, received, rename, volume_ending
from lib.server.viewer import BuildFiles, add_viewer
from lib.sessions import refuse_archive

# Read when monailabel.app is imported; empty would let the pages of every origin read images and labels. Not set in
# the environment, where MONAI Label 0.8.5 cannot write it back.
if not settings.MONAI_LABEL_CORS_ORIGINS:
    settings.MONAI_LABEL_CORS_ORIGINS = [f"http://127.0.0.1:{settings.MONAI_LABEL_SERVER_PORT}"]

from monailabel.app import app

# Its own login, which nobody passes, would refuse whom `lib.server.access` lets through.
settings.MONAI_LABEL_AUTH_ENABLE = False

logger = logging.getLogger(__name__)

__all__ = ["app"]


INFER_OPTIONS = frozenset(
    {
        *("device", "profile", "folds", "label_prompt", "client_id", "save_label", "label_tag", "grid", "series"),
        *("result_extension", "result_dtype", "result_compress", "restore_label_idx"),
    }
)
"""What a client may ask of a prediction; whatever else it sends goes no further."""
BATCH_OPTIONS = INFER_OPTIONS - {"series"} | {
    *("images", "labels", "max_batch_size", "max_workers", "multi_gpu", "gpus")
}
"""And of MONAI Label's batch, a process of its own, which would look for programs where ``bundle_path`` says."""

EXPORTING = CapacityLimiter(2)
"""How many exports are made at a time."""

STOCK_VIEWER = Path(ohif.__file__).parent / "static" / "ohif"
STOCK_FOLDERS = frozenset({".", "..", *(path.name for path in STOCK_VIEWER.glob("*") if path.is_dir())})
"""What is asked of the viewer that comes with MONAI Label and is no file."""

_GPUS = re.compile(r"all|[0-9]{1,4}(,[0-9]{1,4})*")
_CHECKSUM = re.compile(r"((SHA256|SHA512|MD5):)?[0-9a-fA-F]+")


class DicomResult(str, Enum):
    """Answers of ``/infer`` that are DICOM objects."""

    seg = "dicom_seg"
    rtstruct = "dicom_rtstruct"


AnyUser = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))]
Annotator = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))]
Admin = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))]
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
    options = _by(user, {name: value for name, value in options.items() if name in INFER_OPTIONS})
    if not (image or session_id or file):
        raise HTTPException(400, "The request names no image: add ?image=ID, ?session_id=ID or a file.")
    if not file and not session_id and image.startswith(("/", "\\", ".")):
        raise HTTPException(404, f"There is no image {image!r} in the datastore.")
    if session_id and not _session_exists(session_id):
        raise HTTPException(404, f"The session {session_id!r} does not exist or has expired; create it again.")
    rename(file, "image")
    try:
        if isinstance(output, DicomResult):
            return _dicom_result(model, image, options, output)
        answer = run_inference(background_tasks, model, image, session_id, json.dumps(options), file, None, output)
    except BaseException:
        _clean_up(background_tasks)
        raise
    return _without_leftovers(answer, background_tasks)


def infer_batch(
    user: Admin,
    model: str,
    images: BatchInferImageType = BatchInferImageType.IMAGES_ALL,
    params: Annotated[Any, Body()] = None,
    run_sync: bool = False,
) -> Any:
    """Run a model on many images, in a process of its own; see `BATCH_OPTIONS`."""
    asked = _object(params, '{"label_tag": "original"}')
    options = {name: value for name, value in asked.items() if name in BATCH_OPTIONS}
    gpus = options.get("gpus") or "all"
    if not isinstance(gpus, str) or not _GPUS.fullmatch(gpus):
        raise HTTPException(400, f"gpus is {str(gpus)[:80]!r}; expected all, or numbers such as 0,1.")
    return batch_infer.run(model, images, {**options, "gpus": gpus}, run_sync)


def score_all(user: Admin, params: Annotated[Any, Body()] = None, run_sync: bool = False) -> Any:
    """Run every scoring method; see `score`."""
    _object(params, "{}")
    return scoring.run(None, run_sync)


def score(user: Admin, method: str, params: Annotated[Any, Body()] = None, run_sync: bool = False) -> Any:
    """Run a scoring method, in a process of its own; `params` changes nothing: none here has options."""
    _object(params, "{}")
    known = app_instance().info()["scoring"]
    if method not in known:
        raise not_found("scoring method", method, sorted(known))
    return scoring.run_method(method, None, run_sync)


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
    if image and _session_exists(session_id) and Path(app_instance().sessions().get_session(session_id).image).is_dir():
        raise HTTPException(
            400, "This session holds several files, which are no single file: ask without image=true for what it is."
        )
    return session.get_session(session_id, update_ts, image)


def info(user: AnyUser) -> Any:
    """Return what clients read first; a plain function, as the reviewed cases are counted and their files looked at."""
    return app_instance().info()


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


def report(user: AnyUser, model: str, name: str) -> Response:
    """Return the report of one training round; `name` is the version, with or without ``.html``."""
    name = name.removesuffix(".html")
    check_name("model", model)
    check_name("report", name)
    path = app_instance().store.home / "reports" / model / f"{name}.html"
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.html"))) or "none"
        raise HTTPException(404, f"There is no report {name!r} of {model!r} here. Known: {known}.")
    return FileResponse(path, media_type="text/html; charset=utf-8")


def logs(user: AnyUser, lines: int = 300) -> Response:
    """Return the last lines of the server's log as text."""
    log = app_instance().store.home / "logs" / "server.log"
    if not log.is_file():
        raise HTTPException(404, "This server was not started by mshub serve and keeps no log of its own.")
    with log.open(encoding="utf-8", errors="replace") as file:
        return PlainTextResponse("".join(deque(file, max(1, min(lines, 10_000)))))


def list_datastore(user: AnyUser, output: datastore.ResultType | None = None) -> Any:
    """Return the images and labels; a plain function like those that follow, as the PACS is asked."""
    return datastore.datastore(output)


def download_image(user: AnyUser, image: str) -> Any:
    """Return an image as a file; of a series of the PACS, its volume."""
    return datastore.download_image(image)


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
    info = _signed(user, json_object(params, "params"))
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
        told = json.dumps(_signed(user, _by(user, json_object(params, "params"))))
        return datastore.save_label(background_tasks, image, told, tag, label, user.username)
    finally:
        _clean_up(background_tasks)


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


def gpu(user: Admin) -> Any:
    """Return what ``nvidia-smi`` says of the GPUs; 404 on a machine that does not have it."""
    if shutil.which("nvidia-smi") is None:
        raise HTTPException(
            404, "This machine has no nvidia-smi, which NVIDIA's driver brings: nothing is known of GPUs."
        )
    return plain(logs_of_monailabel.gpu_info)(user=user)


def stock_viewer(user: AnyUser, path: str) -> Any:
    """Return a file of the viewer that comes with MONAI Label, and its page for what is none; 404 for a folder."""
    if path in STOCK_FOLDERS:
        raise HTTPException(404, f"{path!r} is a folder of the viewer, and no file.")
    return ohif.get_ohif(path)


def next_sample(request: Request, user: AnyUser, strategy: str, params: Annotated[Any, Body()] = None) -> Any:
    """Return the next case to label; a plain function, as the PACS is asked for its series."""
    sample = _next_case({**_by(user, _object(params, '{"client_id": "me"}')), "strategy": strategy})
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
        Guards.of(_home()).offers.make(request.scope[USER], image, address_of(request))
    else:
        logger.warning("3D Slicer cannot fetch the next case: the proxy sends no X-Forwarded-For (docs/access.md)")


def start_prelabelling(user: Annotator, model: str, params: Annotated[Any, Body()] = None) -> Any:
    """Start pre-labelling waiting or chosen cases; see `lib.activelearning.Prelabels.start` for the options."""
    return app_instance().start_prelabelling(model, _by(user, _object(params, '{"limit": 20}')))


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


def labels(user: AnyUser, image: str) -> dict[str, Any]:
    """Return what is known of the labels of one image, by tag, and which SEGs of the PACS are none, and why."""
    return dict(app_instance().labels_of(image))


async def export(user: AnyUser, image: str, tag: str = "final", format: str = "nrrd") -> Response:
    """Return a stored label as a file; ``nrrd`` is what a viewer reads pixel by pixel, with its names in a header.

    A few are made at a time, as each holds volumes in memory; the others wait in the event loop and keep no thread.
    """
    check_name("label tag", tag)
    path, names = await to_thread.run_sync(app_instance().export_of, image, tag, format, limiter=EXPORTING)
    media = "application/octet-stream" if format == "nrrd" else "application/dicom"
    headers = {"X-MSHub-Segments": json.dumps(names)}
    return SentOnce(path, media_type=media, filename=f"{image}_{tag}{path.suffix}", headers=headers)


def channels(user: AnyUser, model: str, image: str) -> dict[str, Any]:
    """Return which series of the study a model would take for which channel, or why that cannot be told."""
    return dict(app_instance().channels_of(model, image))


def status() -> dict[str, Any]:
    """Return the server's version, models, running predictions and trainings."""
    return dict(app_instance().status())


async def proxy(user: AnyUser, request: Request, path: str) -> Response:
    """Pass a request of the viewer on to the PACS."""
    return await pass_on(request, path)


def _dicom_result(model: str, image: str, options: dict[str, Any], output: DicomResult) -> Response:
    """Return a prediction as a DICOM object, named and coded by the model's card."""
    if not image:
        raise HTTPException(400, f"output={output.value} needs ?image=ID of a series of the PACS.")
    path = app_instance().infer_dicom({**options, "model": model, "image": image}, output.name)
    return SentOnce(path, media_type="application/dicom", filename=f"{model}_{image}.dcm")


def _clean_up(background_tasks: BackgroundTasks, but: str = "") -> None:
    """Remove a request's upload: FastAPI forgets background tasks when an error is answered, or who asked hangs up."""
    for task in background_tasks.tasks:
        if task.args != (but,):
            task.func(*task.args, **task.kwargs)
    background_tasks.tasks.clear()


def _without_leftovers(answer: Any, background_tasks: BackgroundTasks) -> Any:
    """Return MONAI Label's answer to a prediction so that it leaves no file, however it ends."""
    is_file = isinstance(answer, FileResponse) and (answer.path,) in [task.args for task in background_tasks.tasks]
    _clean_up(background_tasks, answer.path if is_file else "")
    return SentOnce(answer.path, media_type=answer.media_type, filename=answer.filename) if is_file else answer


def _session_exists(session_id: str) -> bool:
    sessions = app_instance().sessions()
    return sessions is not None and session_id.replace("-", "").isalnum() and bool(sessions.get_session(session_id))


def _train_params(params: Any, user: User) -> dict[str, Any]:
    return _by(user, _object(params, '{"epochs": 20}'))


def _by(user: User, options: dict[str, Any]) -> dict[str, Any]:
    """Return a client's options with who it is: whoever logged in, whatever the client says."""
    return {**options, "client_id": user.username} if user.username else options


def _signed(user: User, info: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be stored of an image or a label with who logged in to store it."""
    return {**info, "user": user.username} if user.username else info


def _object(params: Any, example: str) -> dict[str, Any]:
    """Return the options in a request's body; nothing stands for none."""
    if params is not None and not isinstance(params, dict):
        raise HTTPException(400, f"The request's body is no JSON object: expected options such as {example}.")
    return dict(params or {})


ROUTES = (
    ("GET", "/info/", info, "App"),
    ("POST", "/infer/{model}", infer, "Infer"),
    ("POST", "/batch/infer/{model}", infer_batch, "Infer"),
    ("POST", "/scoring/", score_all, "Scoring"),
    ("POST", "/scoring/{method}", score, "Scoring"),
    ("POST", "/train/", train, "Train"),
    ("POST", "/train/{model}", train_model, "Train"),
    ("GET", "/train/", train_status, "Train"),
    ("DELETE", "/train/", stop_training, "Train"),
    ("GET", "/datastore/", list_datastore, "Datastore"),
    ("GET", "/datastore/image", download_image, "Datastore"),
    ("HEAD", "/datastore/image", check_image, "Datastore"),
    ("GET", "/datastore/image/info", image_info, "Datastore"),
    ("PUT", "/datastore/", add_image, "Datastore"),
    ("PUT", "/datastore/image", add_image, "Datastore"),
    ("PUT", "/datastore/image/info", note_image_info, "Datastore"),
    ("PUT", "/datastore/label", save_label, "Datastore"),
    ("DELETE", "/datastore/label", remove_label, "Datastore"),
    ("PUT", "/datastore/label/info", note_label_info, "Datastore"),
    ("PUT", "/datastore/updatelabelinfo", note_label_params, "Datastore"),
    ("GET", "/datastore/dataset", dataset, "Datastore"),
    ("POST", "/activelearning/{strategy}", next_sample, "ActiveLearning"),
    ("PUT", "/session/", create_session, "Session"),
    ("GET", "/session/{session_id}", show_session, "Session"),
    ("GET", "/logs/", logs, "Others"),
    ("GET", "/logs/gpu", gpu, "Others"),
    ("GET", "/ohif/{path:path}", stock_viewer, "Others"),
    ("GET", "/mshub/status", status, "MSHub"),
    ("GET", "/mshub/reports/{model}/{name}", report, "MSHub"),
    ("POST", "/mshub/prelabels/{model}", start_prelabelling, "MSHub"),
    ("GET", "/mshub/prelabels", list_prelabelling, "MSHub"),
    ("GET", "/mshub/prelabels/{batch}", prelabelling, "MSHub"),
    ("DELETE", "/mshub/prelabels/{batch}", stop_prelabelling, "MSHub"),
    ("PUT", "/mshub/prelabels/{batch}", resume_prelabelling, "MSHub"),
    ("GET", "/mshub/labels/{image}", labels, "MSHub"),
    ("GET", "/mshub/export/{image}", export, "MSHub"),
    ("GET", "/mshub/channels/{model}", channels, "MSHub"),
    ("GET", "/proxy/dicom/{path:path}", proxy, "PACS"),
    ("POST", "/proxy/dicom/{path:path}", proxy, "PACS"),
)
UPSTREAM = [module.router for module in (batch_infer, datastore, logs_of_monailabel, ohif, scoring, session)]
"""What is left to MONAI Label."""
OVERTAKEN = [
    *UPSTREAM,
    *(module.router for module in (activelearning, endpoints.infer, endpoints.info, endpoints.train)),
]
"""Where routes of MONAI Label are that ours stand in front of."""


def _home() -> Path:
    home: Path = app_instance().store.home
    return home


def _sign_on() -> SignOn | None:
    settings: OidcSettings | None = app_instance().config.oidc
    return _sign_on_of(settings) if settings else None


@cache
def _sign_on_of(settings: OidcSettings) -> SignOn:
    return SignOn(settings)


def _upload_limit() -> int:
    return int(app_instance().config.upload_gb * 2**30)


def _current_user(request: Request) -> User:
    """Return who asks, as routes want to know it; without users, nobody. What they may was decided before."""
    user = request.scope[USER]
    return User(username="" if user is LOCAL_USER else user.name, roles=[user.role])


def _is_program(scope: Scope) -> bool:
    """Return whether a file of the viewer's program is asked for, which anybody may have."""
    return BuildFiles(_home).matches(scope)[0] is Match.FULL


def _describe_ours() -> None:
    """Leave out of ``/openapi.json`` what ours stand in front of: of two, the last would be described."""
    ours = {(method, path) for method, path, *_ in ROUTES}
    for route in (route for router in OVERTAKEN for route in router.routes):
        if ours.issuperset((method, route.path) for method in route.methods):
            route.include_in_schema = False


def _extend(api: Any) -> None:
    routes = [
        JsonRoute(path, answer, methods=[method], tags=[tag], dependency_overrides_provider=api)
        for method, path, answer, tag in ROUTES
    ]
    health = Health(_home, status)
    api.router.routes[:0] = [*routes, *Login(_home, _sign_on).routes(), *health.routes(), *in_threads(UPSTREAM, api)]
    add_viewer(api, _home)
    _describe_ours()
    api.dependency_overrides[get_current_user] = _current_user
    origins = [str(origin) for origin in settings.MONAI_LABEL_CORS_ORIGINS]
    access = Middleware(Access, _home, _is_program, origins, health.requests.observe, lambda: _sign_on() is not None)
    api.user_middleware += [access, Middleware(Disconnects), Middleware(Bodies, _upload_limit)]
    add_error_answers(api)


_extend(app)
