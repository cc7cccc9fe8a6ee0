"""The MSHub app: every installed nnU-Net model a MONAI Label task."""

from __future__ import annotations

import atexit
import copy
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from fastapi import HTTPException
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy

import mshub
from lib import audit, background
from lib.activelearning import ActiveLearning
from lib.activity import Activity
from lib.conf import Config, short_hash
from lib.datastore import StudiesFolder
from lib.digests import Digests
from lib.exports import check_format, export_label, export_prediction
from lib.faults import as_http_errors, not_found
from lib.infers import NNUNetInferTask, results_folder
from lib.janitor import ANYTHING, Janitor, folders_below, keep, remove_abandoned, trim, unfinished
from lib.pacs import PacsStudies
from lib.pacs_client import PacsClient
from lib.sessions import UploadSessions
from lib.trainers import NNUNetTrainTask, Trainings, studies_of
from lib.warm_up import WarmUp
from mshub.atomic_file import removed_on_failure
from mshub.errors import MSHubError
from mshub.jobs import STOP_GRACE_S, Jobs
from mshub.label_export import FORMATS
from mshub.log_lines import hide_with
from mshub.nnunet.devices import available_devices, candidate_devices
from mshub.nnunet.image_cache import ImageCache
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.sliding_window import Check
from mshub.store import ModelStore, ModelVersion
from mshub.structures import StructureOverride

logger = logging.getLogger(__name__)

LAYER = "lib.server.asgi"
"""The module of MSHub's layer in front of MONAI Label's routes; imported first where it is used."""
UNPROTECTED = (
    "This server was started without MSHub's layer: nobody has to log in, whoever reaches it may read images, change "
    "labels and replace models, pages of any site may ask it, a prediction blocks all other requests, and "
    "nothing is audited. Use `mshub serve`, or add --uvicorn_app lib.server.asgi:app."
)
RESUME_WITHIN_S = 2 * STOP_GRACE_S
"""How long after its start a server looks for trainings that break off."""
WATCH_EVERY_S = 30.0
"""How often a server looks whether the folder of studies is still watched."""
PREPARED_BYTES = 20 * 2**30
"""Disk for networks that OpenVINO has prepared."""
DESCRIPTION = "nnU-Net models for automatic segmentation, fine-tuned with your corrections. For research use."


class MSHubApp(MONAILabelApp):  # type: ignore[misc]
    """MONAI Label's app interface, filled from the model store.

    Parameters
    ----------
    app_dir : str
        This app's folder.
    studies : str
        A folder of images, or the address of a DICOMweb server.
    conf : dict
        ``--conf`` pairs: see `lib.conf.Config`.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self._is_task = background.end_with_server()
        self.config = Config.parse(conf or {})
        self.store = ModelStore(self.config.home)
        self.cache = NetworkCache(int(self.config.cache_gb * 2**30), self.store.prepared_networks)
        self.images = ImageCache(int(self.config.images_gb * 2**30))
        devices = len(candidate_devices(self.config.device))
        self.activity = Activity(devices * (1 + self.config.queue))
        self.jobs = Jobs(self.store.home)
        self.trainings = Trainings(self.jobs, self.config)
        self._digests = Digests(self.store.home / "digests.json")
        self.active_learning = ActiveLearning(
            self.store.home / "cases" / f"{short_hash(_full(studies))}.sqlite", self.store, self.config
        )
        self._infers: dict[str, NNUNetInferTask] = {}
        self._warm_up = WarmUp(lambda: list(self._infers.values()), self.cache)
        self._trainers: dict[str, NNUNetTrainTask] = {}
        self._refreshing = threading.Lock()
        os.environ.setdefault("PYTHONPATH", app_dir)  # MONAI Label's background tasks read it without a default
        super().__init__(
            app_dir,
            studies,
            conf,
            name=f"MSHub {mshub.__version__}",
            description=DESCRIPTION,
            version=mshub.__version__,
        )
        # MONAI Label would start a process per scoring method at every next_sample.
        self._auto_update_scoring = False
        logger.info("MSHub %s; models in %s: %s", mshub.__version__, self.store.home, ", ".join(self._infers) or "none")
        missing = sorted(set(self.config.models) - set(self._infers))
        if missing:
            logger.warning("not installed, so not served: %s", ", ".join(missing))

    # -- what there is ------------------------------------------------------------------------------------------

    def init_datastore(self) -> Datastore:
        """Return the studies folder, or the series behind a DICOMweb address."""
        if "://" in self.studies:
            return self._init_dicomweb_datastore()
        return StudiesFolder(
            self.studies,
            self._structures,
            self.store.home / "refused-labels",
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def _init_dicomweb_datastore(self) -> Datastore:
        """Return the series of a PACS; it need not be up yet, and nothing else is asked for over the network."""
        client = PacsClient(self.studies, self.config.pacs_timeout)
        search = settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER
        return PacsStudies(
            client,
            str(self.config.data_folder(client.url)),
            self._structures,
            self._structure_overrides,
            self.store.home / "refused-labels",
            [kind.strip() for kind in str(search.get("Modality") or "CT,MR").split(",")],
            needed=self.jobs.images_to_read,
            exchanges_labels=not self._is_task,
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def init_infers(self) -> dict[str, NNUNetInferTask]:
        """Return one task per installed model."""
        return {model: self._infer_task(model) for model in self._served()}

    def init_trainers(self) -> dict[str, NNUNetTrainTask]:
        """Return one trainer per installed model."""
        return self._current_trainers()

    def init_strategies(self) -> dict[str, Strategy]:
        """Return the strategies by name, the default first; clients rely on ``random``."""
        return self.active_learning.strategies()

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """Return the scoring methods by name: MONAI Label's ``dice``, for several structures."""
        return self.active_learning.scoring_methods()

    def info(self) -> dict[str, Any]:
        """Return what clients read first; models added or removed since are taken in."""
        self._refresh()
        info: dict[str, Any] = super().info()
        info["trainers"] = self.trainings.trainers(self._trainers, self.datastore())
        info["train_stats"] = self.trainings.stats(self._trainers)
        datastore = self.datastore()
        info["mshub"] = {"pacs": datastore.pacs() if isinstance(datastore, PacsStudies) else None}
        return info

    def status(self) -> dict[str, Any]:
        """Return what the server is doing, for people and scripts."""
        return {
            "version": mshub.__version__,
            "models": {model: self.store.current(model).version for model in self._served()},
            "loaded": [str(Path(path).relative_to(self.store.home)) for path in self.cache.loaded()],
            "training": self.trainings.opened(),
            "warming_up": self._warm_up.doing,
            "spare_time": self.active_learning.doing(),
            **self.activity.as_dict(),
        }

    def on_init_complete(self) -> None:
        """Make models ready, take up trainings that broke off, and start MONAI Label's clean-up without its chatter.

        MONAI Label calls this in the server's process once it starts, never in its processes for single tasks.
        """
        if LAYER not in sys.modules:
            logger.warning(UNPROTECTED)
        background.begin()
        self._warm_up.start()
        if settings.MONAI_LABEL_TASKS_TRAIN:
            threading.Thread(target=self._resume_trainings, name="resume", daemon=True).start()
        logging.getLogger("timeloop").disabled = True
        self._hide_images()
        Janitor(self._sweeping()).start()
        self._leave_tidy()
        if isinstance(self.datastore(), StudiesFolder):
            Janitor([self.datastore().keep_watching], WATCH_EVERY_S).start()
            facts = (self._task, self._infer_in_turn, self._studies, self._served, self._modalities)
            self.active_learning.start(self.activity, self.jobs, *facts)
        if isinstance(self.datastore(), PacsStudies):
            threading.Thread(target=import_module, args=("highdicom.seg",), daemon=True).start()  # seconds, once
        super().on_init_complete()

    def _hide_images(self) -> None:
        """Let no image be named in the log: ids of a folder are names of files, which can be names of patients."""
        pseudonyms, datastore = audit.Pseudonyms(self.store.home), self.datastore()
        if isinstance(datastore, StudiesFolder):
            hide_with(partial(pseudonyms.hide, image_of=datastore.image_of))

    def _leave_tidy(self) -> None:
        """Leave an index for other programs when the server ends."""
        datastore = self.datastore()
        if isinstance(datastore, StudiesFolder):
            atexit.register(datastore.close)

    def _sweeping(self) -> Iterator[Callable[[], str]]:
        """Yield what the janitor does."""
        yield partial(keep, results_folder())
        yield remove_abandoned
        yield partial(remove_abandoned, self.store.home / "staging", names=ANYTHING)
        yield partial(unfinished, partial(folders_below, self.store.home))
        yield partial(trim, self.store.prepared_networks, PREPARED_BYTES)
        yield self.images.forget_gone
        datastore = self.datastore()
        if isinstance(datastore, StudiesFolder) and not settings.MONAI_LABEL_DATASTORE_READ_ONLY:
            yield partial(unfinished, datastore.unfinished_in)
            yield datastore.tidy_daily
        if isinstance(datastore, PacsStudies):
            yield partial(remove_abandoned, datastore.pending, names=ANYTHING)
            yield partial(datastore.trim_copies, int(self.config.disk_gb * 2**30))

    def _load_sessions(self, load: bool = False) -> UploadSessions | None:
        """Return the uploads of clients; MONAI Label calls this."""
        if not load:
            return None
        return UploadSessions(settings.MONAI_LABEL_SESSION_PATH, settings.MONAI_LABEL_SESSION_EXPIRY)

    def cleanup_sessions(self) -> None:
        """Remove uploads that have ended; whatever goes wrong, MONAI Label's thread that calls this goes on."""
        try:
            super().cleanup_sessions()
        except Exception:
            logger.exception("uploads that have ended were not removed; it is tried again")

    def _resume_trainings(self) -> None:
        """Let trainings that broke off go on, also those that are about to: the last server may have died just now."""
        until = time.monotonic() + RESUME_WITHIN_S
        try:
            while time.monotonic() < until:
                for job in self.jobs.resume_interrupted():
                    logger.info("%s broke off and goes on", job.id)
                time.sleep(1)
        except (OSError, ValueError, MSHubError) as error:  # models serve all the same
            logger.error("trainings that broke off cannot be resumed: %s", error)

    def _structures(self) -> set[str]:
        """Return the names of all structures the installed models know: what a submitted label may hold."""
        return {name for model in self._served() for name in self.store.current(model).record["labels"]}

    def _structure_overrides(self) -> dict[str, StructureOverride]:
        """Return what the cards of the installed models say of their structures: codes and colours."""
        cards = [self.store.current(model).card for model in self._served()]
        return {name: said for card in cards for name, said in card.structures.items()}

    def _served(self) -> list[str]:
        installed = self.store.installed()
        return [model for model in installed if not self.config.models or model in self.config.models]

    def _refresh(self) -> None:
        """Take in models installed or removed since; tasks that exist keep their open model."""
        with self._refreshing:  # or what was read before a model came would replace what was read after
            self._infers = {model: self._infers.get(model) or self._infer_task(model) for model in self._served()}
            self._trainers = self._current_trainers()

    def _infer_task(self, model: str) -> NNUNetInferTask:
        return NNUNetInferTask(model, self.store, self.cache, self.config, self.activity, self.images)

    def _current_trainers(self) -> dict[str, NNUNetTrainTask]:
        if not settings.MONAI_LABEL_TASKS_TRAIN or not isinstance(self.datastore(), StudiesFolder):
            return {}
        return {model: self._trainers.get(model) or self._train_task(model) for model in self._served()}

    def _train_task(self, model: str) -> NNUNetTrainTask:
        return NNUNetTrainTask(model, self.store, self.config, self._digests)

    # -- what it does -------------------------------------------------------------------------------------------

    def infer(
        self, request: dict[str, Any], datastore: Datastore | None = None, check: Check | None = None
    ) -> dict[str, Any]:
        """Segment one image; see `NNUNetInferTask` for the request.

        MONAI Label's own method takes any path that exists for an image and the working directory for a missing one;
        here an image is an id of the datastore, a session's image or a file uploaded with this request.

        With ``grid = "series"`` the label has the pixels of the series' slices, which differs for a tilted gantry: what
        OHIF shows. Its stock panel is known by the ``restore_label_idx`` that nobody else sends.

        Raises
        ------
        fastapi.HTTPException
            404 for an unknown model or image; 409 if the image was replaced meanwhile; 4xx from the task.
        """
        datastore = datastore or self.datastore()
        task = self._task(request.get("model"))
        request = {**copy.deepcopy(request), **self._case(request, datastore)}
        state = _state_of(datastore, request["image_id"])
        path, params = task({**request, "check": check} if check else request)
        with removed_on_failure(Path(path)):
            _check_same(datastore, request["image_id"], state)
            label = path
            if request["image_id"]:
                client = str(request.get("client_id") or "") if check is None else None
                params |= self.active_learning.note_prediction(request["image_id"], client, params, datastore)
            if request.get("save_label") and request["image_id"]:
                tag = request.get("label_tag") or DefaultLabelTag.ORIGINAL
                tag = str(getattr(tag, "value", tag))  # an enum in MONAI Label's batch, text in a request
                info = {"model": task.model_id, "params": _without_embedding(params)}
                label = _keep_prediction(datastore, request["image_id"], path, tag, info)
            pixelwise = "restore_label_idx" in request or request.get("grid") == "series"
            if pixelwise and isinstance(datastore, PacsStudies) and request["image_id"]:
                datastore.write_pixelwise(request["image_id"], Path(path))
        return {"label": label, "tag": DefaultLabelTag.ORIGINAL.value, "file": path, "params": params}

    def _infer_in_turn(self, request: dict[str, Any], check: Check) -> dict[str, Any]:
        """Segment one image nobody waits for."""
        answer = self.infer(request, check=check)
        return {**answer, "file": Path(answer["file"])}

    def infer_dicom(self, request: dict[str, Any], format: str) -> Path:
        """Segment one series of the PACS, and return the label as a temporary DICOM file; `format` as `FORMATS`."""
        check_format(format, tuple(FORMATS))
        answer = self.infer({**request, "result_extension": ".nii.gz", "result_dtype": "", "grid": ""})
        try:
            return export_prediction(self.datastore(), request["image"], Path(answer["file"]), answer["params"], format)
        finally:
            Path(answer["file"]).unlink(missing_ok=True)

    def batch_infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> Any:
        """Segment many images; MONAI Label, left to itself, shares them among the GPUs and divides by their number."""
        multi_gpu = request.get("multi_gpu", True) and available_devices() != ["cpu"]
        return self._batch_infer(
            {**request, "multi_gpu": multi_gpu}, datastore or self.datastore(), self._infer_or_tell
        )

    def _infer_or_tell(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Segment one image of a batch; a bad image is told in its place and does not end the batch."""
        try:
            return self.infer(request, datastore)
        except HTTPException as error:
            logger.warning("batch: %s: %s", request.get("image"), error.detail)
            return {"error": error.detail}

    def _is_session_image(self, request: dict[str, Any], image: str) -> bool:
        """Return whether `image` is the image of a session of this server: the request alone is not believed."""
        session = request.get("session")
        path = Path(image).resolve()
        folder = Path(self._sessions.store_path).resolve() if self._sessions else None
        return isinstance(session, dict) and session.get("image") == image and folder in path.parents

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the next case to label; empty without one, as MONAI Label has it. See `next_case`."""
        case = self.next_case(request)
        return case if "id" in case else {}

    def next_case(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the next case to label, or why there is none; 404 for an unknown strategy or model.

        For ``model``, or else the one the client used last, or the only one there is. Of a PACS, which holds more than
        one model is for, only series of the model's modality are offered.
        """
        strategy = request.get("strategy") or "random"
        if strategy not in self._strategies:
            raise not_found("strategy", str(strategy), sorted(self._strategies))
        self.activity.touch()
        model = self._model_for(request)
        modalities = self._modalities(self.store.current(model)) if model is not None else []
        with as_http_errors():
            return self.active_learning.next(
                strategy, {**request, "model": model, "modalities": modalities}, self.datastore()
            )

    def _model_for(self, request: dict[str, Any]) -> str | None:
        """Return the model a client wants cases for."""
        served = self._served()
        if request.get("model"):
            return self._task(request["model"]).model_id
        last = self.active_learning.last_model(str(request.get("client_id") or ""))
        return last if last in served else served[0] if len(served) == 1 else None

    def _modalities(self, version: ModelVersion) -> list[str]:
        """Return which series of a PACS a version is for; none where that does not matter."""
        kinds = sorted({str(channel.modality) for channel in version.channels} - {"other"})
        return kinds if isinstance(self.datastore(), PacsStudies) else []

    def start_prelabelling(self, model: str, request: dict[str, Any]) -> dict[str, Any]:
        """Start a batch of pre-labels; see `Prelabels.start`. 404 for an unknown model."""
        version = self.store.current(self._task(model).model_id)
        with as_http_errors():
            return self.active_learning.prelabel(version, request, self._modalities(version), self._studies())

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any]:
        """Return what the answer to a submitted label says of it, and let others have the image.

        What was reviewed, how it agrees with the pre-label, what is odd or looks unfinished, and the PACS.
        """
        datastore = self._studies()
        tags = datastore.get_labels_by_image_id(image_id)
        if DefaultLabelTag.FINAL.value not in tags:
            return {}
        self.activity.touch()
        self.active_learning.note_submission(image_id, datastore)
        info = datastore.get_label_info(image_id, DefaultLabelTag.FINAL.value)
        return {key: info[key] for key in ("reviewed", "agreement", "doubts", "hints", "pacs") if key in info}

    def labels_of(self, image: str) -> dict[str, Any]:
        """Return what is known of an image's labels, by tag, and of SEGs left out; 404 for an unknown image."""
        datastore = self._studies()
        left_out = datastore.take_in(image) if isinstance(datastore, PacsStudies) else []
        datastore.get_image_info(image)
        tags = {tag: datastore.get_label_info(image, tag) for tag in datastore.get_labels_by_image_id(image)}
        return {"tags": tags, "left_out": left_out}

    def export_of(self, image: str, tag: str, format: str) -> tuple[Path, dict[str, int]]:
        """Return a stored label as a temporary file, and its names; see `lib.exports.export_label`."""
        datastore = self._studies()
        datastore.get_image_info(image)
        return export_label(datastore, image, tag, format)

    def channels_of(self, model: str, image: str) -> dict[str, Any]:
        """Return what would serve each channel of a model, why, and what else could; 404 for an unknown model."""
        self._task(model)
        datastore, channels = self._studies(), self.store.current(model).channels
        if not isinstance(datastore, PacsStudies):
            files = datastore.channels(image)
            return {"problem": None, "channels": [{"name": c.name} for c in channels], "files": [p.name for p in files]}
        return datastore.describe_channels(image, channels)

    def _studies(self) -> StudiesFolder:
        return studies_of(self.datastore())

    def _task(self, model: Any) -> NNUNetInferTask:
        self._refresh()
        task = self._infers.get(model) if isinstance(model, str) else None
        return task or self._refuse_model(model)

    def _refuse_model(self, model: Any) -> NoReturn:
        if model in self.store.catalogue().ids and model not in self.store.installed():
            with as_http_errors():
                self.store.current(model)  # raises, and says how to install it
        raise not_found("model", str(model), sorted(self._infers))

    def _case(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Return ``image_id`` (empty for an upload), ``image`` and ``channels`` (paths) of the requested case."""
        image = request.get("image")
        if not isinstance(image, str) or not image:
            raise HTTPException(400, "The request names no image: send an image id, a session id or a file.")
        if self._is_session_image(request, image) or _is_upload(image):
            return {"image_id": "", "image": image, "channels": _files_of(Path(image))}
        if isinstance(datastore, PacsStudies):
            path = datastore.get_image_info(image)["path"]  # 404 before anything is computed
            find = partial(datastore.find, image, _chosen_series(request))
            return {"image_id": image, "image": path, "find": find}
        if not isinstance(datastore, StudiesFolder):
            uri = datastore.get_image_uri(image)
            return {"image_id": image, "image": uri, "channels": [uri]}
        if image not in datastore.list_images():
            raise not_found("image", image, sorted(datastore.list_images()))
        channels = [str(path) for path in datastore.channels(image)]
        return {"image_id": image, "image": channels[0], "channels": channels}

    # -- fine-tuning --------------------------------------------------------------------------------------------

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """Train, and return the statistics once it is done: what stock MONAI Label runs in a process of its own."""
        return self._trainer(request.get("model"))(copy.deepcopy(request), self.datastore())

    def start_training(self, model: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Start fine-tuning one model; see `Trainings.start`. 404 for an unknown model."""
        return self.trainings.start(self._trainer(model), params, self.datastore())

    def start_all_training(self, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Start fine-tuning every model with new reviewed cases; see `Trainings.start_new`."""
        self._refresh()
        return self.trainings.start_new(self._trainers, params, self.datastore())

    def training_status(self, everything: bool = False, check_if_running: bool = False) -> Any:
        """Return the training at work, the last one, or all; 404 without one. See `Trainings.status`."""
        return self.trainings.status(everything, check_if_running)

    def stop_training(self) -> dict[str, Any] | None:
        """Stop all trainings; return the one that was at work, None if there was none."""
        return self.trainings.stop()

    def _trainer(self, model: Any) -> NNUNetTrainTask:
        self._refresh()
        studies_of(self.datastore())
        if not settings.MONAI_LABEL_TASKS_TRAIN:
            raise HTTPException(405, "Training is switched off on this server (MONAI_LABEL_TASKS_TRAIN).")
        trainer = self._trainers.get(model) if isinstance(model, str) else None
        return trainer or self._refuse_model(model)


def _full(studies: str) -> str:
    """Return the same name for a studies folder however its path was written; an address as it is."""
    return studies if "://" in studies else str(Path(studies).resolve())


def _without_embedding(params: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a prediction as the datastore's index keeps them: it is read often, and kept small."""
    measured = params.get("uncertainty") or {}
    return {**params, "uncertainty": {key: value for key, value in measured.items() if key != "embedding"}}


def _chosen_series(request: dict[str, Any]) -> dict[str, str]:
    """Return the series a request names for channels: channel name to SeriesInstanceUID."""
    series = request.get("series") or {}
    if not isinstance(series, dict) or not all(isinstance(uid, str) for uid in series.values()):
        raise HTTPException(
            400, f'series is {series!r}; expected the SeriesInstanceUIDs of channels, such as {{"FLAIR": "1.2.3"}}.'
        )
    return {name: uid for name, uid in series.items() if uid}


def _state_of(datastore: Datastore, image: str) -> str | None:
    """Return what changes when an image of a folder is replaced; None for any other: a series has its own id."""
    is_named_by_people = isinstance(datastore, StudiesFolder) and not isinstance(datastore, PacsStudies)
    return datastore.image_state(image) if image and is_named_by_people else None


def _check_same(datastore: Datastore, image: str, state: str | None) -> None:
    """Refuse what was predicted of an image that is another one by now."""
    if state is not None and not datastore.is_still(image, state):
        raise HTTPException(
            409,
            f"The image {image} was replaced while it was segmented; nothing of that is kept. Segment it again.",
        )


def _keep_prediction(datastore: Datastore, image: str, path: str, tag: str, info: dict[str, Any]) -> str:
    if isinstance(datastore, StudiesFolder):
        return datastore.save_prediction(image, Path(path), tag, info)
    return str(datastore.save_label(image, path, tag, info))


def _is_upload(image: str) -> bool:
    """Return whether `image` is the temporary file MONAI Label made of a file sent with the request."""
    path = Path(image)
    return (
        path.is_absolute()
        and path.parent == Path(tempfile.gettempdir())
        and path.name.startswith("tmp")
        and path.is_file()
    )


def _files_of(path: Path) -> list[str]:
    """Return the channels of an upload: the volumes of a folder by name, or the file or DICOM folder itself."""
    volumes = sorted(str(file) for file in path.glob("*.n*") if file.is_file()) if path.is_dir() else []
    return volumes or [str(path)]
