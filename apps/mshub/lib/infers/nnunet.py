"""One installed nnU-Net model as a MONAI Label InferTask."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from lib import audit
from lib.activity import Activity, Run, check_client
from lib.conf import Config
from lib.faults import as_http_errors
from mshub.atomic_file import removed_on_failure
from mshub.catalogue import ModelCard
from mshub.errors import CaseError, LabelError
from mshub.geometry import Volume
from mshub.nnunet.devices import available_devices
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.image_cache import ImageCache
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, Prediction, PredictOptions
from mshub.nnunet.sliding_window import Check
from mshub.store import ModelStore, ModelVersion
from mshub.structures import structures
from mshub.uncertainty import Uncertainty
from mshub.volume_io import write_volume

logger = logging.getLogger(__name__)

RESULT_EXTENSIONS = (".nii.gz", ".nii", ".nrrd")
RESULT_DTYPES = ("uint8", "uint16", "int16", "uint32", "int32", "float32")
ALL_FOLDS = "all present"


class NNUNetInferTask(InferTask):  # type: ignore[misc]
    """Automatic segmentation with the current version of one model.

    Everything a client may send is optional: Slicer sends every ``config`` key with every request, OHIF only those the
    user changed, and either may send an empty string for "not set".
    """

    def __init__(
        self,
        model_id: str,
        store: ModelStore,
        cache: NetworkCache,
        config: Config,
        activity: Activity,
        images: ImageCache | None = None,
    ) -> None:
        self.model_id = model_id
        self._store, self._cache, self._config_options, self._activity = store, cache, config, activity
        self._prepared = images
        self._opened: tuple[Path, NNUNetPredictor] | None = None
        self._opening = threading.Lock()
        super().__init__(InferType.SEGMENTATION, labels={}, dimension=3, description="")

    def is_valid(self) -> bool:
        """Return whether the model is still installed."""
        return self.model_id in self._store.installed()

    def info(self) -> dict[str, Any]:
        """Return what ``/info/`` says of this model, from the store's record: nothing is loaded."""
        version = self._store.current(self.model_id)
        card = version.card
        return {
            "type": self.type,
            "labels": version.record["labels"],
            "dimension": 3,
            "description": _description(card, version),
            "config": _client_config(version, self._config_options),
            "mshub": _facts(card, version, self._store),
        }

    def config(self) -> dict[str, Any]:
        """Return the options a client may set, each with its default first."""
        return _client_config(self._store.current(self.model_id), self._config_options)

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Segment one case.

        Parameters
        ----------
        request : dict
            ``channels`` (list of paths), ``image`` (one path) or ``find``, a function of the model's channels and a
            progress that returns paths and what to say of them; optional ``device``, ``profile``, ``folds``,
            ``label_prompt`` (published values to keep), ``result_extension``, ``result_dtype``, ``result_compress``.
            ``check``, a function that raises to end the prediction, makes it one that nobody waits for.

        Returns
        -------
        path : str
            Temporary file with the label on the image's own grid; the caller removes it.
        params : dict
            ``label_names`` (name -> value, ascending), ``latencies``, ``centroids``, version, voxel counts, and
            ``uncertainty`` as `mshub.uncertainty.Uncertainty` has it.

        Raises
        ------
        fastapi.HTTPException
            4xx with a sentence, for anything wrong with the request, the image or the model.
        """
        with as_http_errors():
            version = self._store.current(self.model_id)
            predictor = self._predictor(version)
            options, output = self._options(request, version), _Output.parse(request)
            kept = _kept_labels(predictor.folder, request.get("label_prompt"))
            client = str(request.get("client_id") or "")
            image, check = str(request.get("image_id", "")), request.get("check")
            is_waited_for = check is None
            watched = (
                self._activity.run(self.model_id, image, client) if is_waited_for else _unseen(self.model_id, image)
            )
            with watched as run:
                images, facts = _images(request, version, run)
                run.predicting()
                prediction = predictor.predict(images, options, run.progress, check or check_client)
            started = time.perf_counter()
            path = output.write(_only(prediction.labels, kept, prediction.names))
            prediction.seconds["write"] = time.perf_counter() - started
        return str(path), {**_result_params(prediction, kept, version), **facts}

    def warm(self) -> None:
        """Load the current version's network where it serves by default, and run it once."""
        version = self._store.current(self.model_id)
        self._predictor(version).warm(self._options({}, version))

    def predict(self, version: ModelVersion, images: list[Path], check: Check) -> Prediction:
        """Segment a case nobody waits for, as the server does by default, and measure how sure the network is."""
        return self._predictor(version).predict(images, self._options({}, version), None, check)

    def measure(self, version: ModelVersion, images: list[Path], check: Check) -> Uncertainty:
        """Measure how sure the network is of a case nobody waits for."""
        return self._predictor(version).measure(images, self._options({}, version), check)

    def _predictor(self, version: ModelVersion) -> NNUNetPredictor:
        """Return the predictor of the current version, opened on first use and again after a promotion."""
        with self._opening:
            if self._opened is None or self._opened[0] != version.model_path:
                if self._opened is not None:
                    self._cache.forget(self._opened[0])
                folder = ModelFolder.open(version.model_path)
                self._opened = (version.model_path, NNUNetPredictor(folder, self._cache, self._prepared))
            return self._opened[1]

    def _options(self, request: dict[str, Any], version: ModelVersion) -> PredictOptions:
        profile = str(request.get("profile") or self._config_options.profile)
        if profile not in PROFILES:
            raise CaseError(f"The profile {profile!r} is unknown: expected one of {', '.join(PROFILES)}.")
        return PredictOptions(
            profile=PROFILES[profile],
            folds=_folds(request.get("folds")),
            device=str(request.get("device") or self._config_options.device),
            rules=version.card.input_rules,
            runtime=self._config_options.engine,
            measure=True,
        )


class _Output:
    """How the client wants the label file."""

    def __init__(self, extension: str, dtype: np.dtype[Any] | None, compress: bool) -> None:
        self.extension, self.dtype, self.compress = extension, dtype, compress

    @classmethod
    def parse(cls, request: dict[str, Any]) -> _Output:
        extension = str(request.get("result_extension") or ".nii.gz").lower()
        extension = extension if extension.startswith(".") else f".{extension}"
        if extension not in RESULT_EXTENSIONS:
            raise CaseError(f"result_extension is {extension!r}; expected one of {', '.join(RESULT_EXTENSIONS)}.")
        dtype = request.get("result_dtype") or None
        if dtype is not None and dtype not in RESULT_DTYPES:
            raise CaseError(f"result_dtype is {dtype!r}; expected one of {', '.join(RESULT_DTYPES)}.")
        return cls(extension, np.dtype(dtype) if dtype else None, _is_true(request.get("result_compress"), True))

    def write(self, labels: Volume) -> Path:
        array = labels.array_xyz
        dtype = self.dtype or array.dtype
        if dtype.kind in "iu" and int(array.max(initial=0)) > np.iinfo(dtype).max:
            raise LabelError(
                f"The label holds the value {int(array.max())}, more than {dtype} can carry. Ask for "
                "result_dtype uint16, or for fewer structures with label_prompt."
            )
        with tempfile.NamedTemporaryFile(dir=results_folder(), suffix=self.extension, delete=False) as file:
            path = Path(file.name)
        with removed_on_failure(path):
            write_volume(path, array.astype(dtype, copy=False), labels.grid, compress=self.compress)
        return path


@cache
def results_folder() -> Path:
    """Return this process's own folder for results.

    A client on the same machine saves the answer under the same file name in the system's temporary folder, and the
    server removes its own file afterwards: the two must not be the same file.
    """
    folder = tempfile.mkdtemp(prefix="mshub-results-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextmanager
def _unseen(model: str, image: str) -> Iterator[Run]:
    """Return a run that is not among the running predictions: nobody waits for it."""
    yield Run(0, model, image)


def _images(request: dict[str, Any], version: ModelVersion, run: Run) -> tuple[list[Path], dict[str, Any]]:
    """Return the files of the case, one per channel, and what the answer says of where they come from."""
    if "find" in request:
        files, facts = request["find"](version.channels, run.loading)
        return list(files), dict(facts)
    return [Path(path) for path in request.get("channels") or [request["image"]]], {}


def _kept_labels(folder: ModelFolder, prompt: Any) -> dict[str, int]:
    """Return the structures a ``label_prompt`` (published values) asks for; all of them without one."""
    names = folder.labels.published
    if prompt is None or prompt == "" or prompt == []:
        return names
    if not isinstance(prompt, list) or not all(type(value) is int for value in prompt):
        raise LabelError(f"label_prompt is {prompt!r}; expected a list of label values such as [1, 3].")
    wanted = set(folder.labels.select(prompt))
    return {name: value for name, value in names.items() if value in wanted}


def _only(labels: Volume, kept: dict[str, int], names: dict[str, int]) -> Volume:
    if len(kept) == len(names):
        return labels
    return Volume(np.where(np.isin(labels.array_xyz, list(kept.values())), labels.array_xyz, 0), labels.grid)


def _result_params(prediction: Prediction, kept: dict[str, int], version: ModelVersion) -> dict[str, Any]:
    audit.note(model=version.model_id, version=version.version)
    counts = prediction.voxel_counts()
    latencies = {stage: round(seconds, 3) for stage, seconds in prediction.seconds.items()}
    return {
        "label_names": kept,
        "latencies": {**latencies, "total": round(sum(prediction.seconds.values()), 3)},
        "centroids": {},
        "voxel_counts": {name: counts[name] for name in kept},
        "model": version.model_id,
        "model_version": version.version,
        "provenance": prediction.provenance,
        "uncertainty": prediction.uncertainty.as_dict() if prediction.uncertainty else None,
    }


def _folds(value: Any) -> tuple[str, ...]:
    if value is None or str(value).strip() in ("", ALL_FOLDS):
        return ()
    names = value if isinstance(value, list) else str(value).split(",")
    return tuple(str(name).strip() for name in names)


def _is_true(value: Any, default: bool) -> bool:
    if value is None or value == "":
        return default
    return str(value).strip().lower() not in ("false", "0", "no")


def _client_config(version: ModelVersion, config: Config) -> dict[str, Any]:
    """Return the options for clients: lists of strings, the default first (what Slicer and OHIF can show)."""
    devices, profiles = available_devices(), list(PROFILES)
    return {
        "device": sorted(devices, key=lambda name: name != config.device),
        "profile": sorted(profiles, key=lambda name: name != config.profile),
        "folds": [ALL_FOLDS, *(version.record["folds"] if len(version.record["folds"]) > 1 else [])],
    }


def _description(card: ModelCard, version: ModelVersion) -> str:
    quality = f", Dice {card.dsc:.2f} ({card.dsc_source})" if card.dsc is not None else ""
    return f"{card.title} [{version.version}] - {card.modality}, {card.target}{quality}"


def _facts(card: ModelCard, version: ModelVersion, store: ModelStore) -> dict[str, Any]:
    described = structures(version.record["labels"], card.structures)
    versions = store.readable_versions(version.model_id)
    return {
        "title": card.title,
        "target": card.target,
        "colours": {name: list(structure.colour) for name, structure in described.items()},
        "versions": [_version_facts(other, version.version, store) for other in versions],
        "version": version.version,
        "modality": card.modality,
        "site": card.site,
        "channels": version.record["channels"],
        "sequences": {channel.name: channel.sequence for channel in version.channels},
        "training_scans": card.training_scans,
        "dsc": card.dsc,
        "dsc_source": card.dsc_source,
        "licence": version.record["licence"],
        "access": card.access,
        "origin": version.record["origin"],
        "installed": version.record["created"],
        "converted": version.record.get("converted"),
        "trusted": version.record.get("trusted", []),
    }


def _version_facts(version: ModelVersion, current: str, store: ModelStore) -> dict[str, Any]:
    """Return what a client shows of one version: what the gate said of it, and where its report is."""
    verdict = (version.record.get("lineage") or {}).get("verdict") or {}
    reason = str(verdict.get("summary") or "").replace("ID VERSION", f"{version.model_id} {version.version}")
    reason = reason.removeprefix(f"{verdict.get('outcome')}: ")
    report = store.home / "reports" / version.model_id / f"{version.version}.html"
    return {
        "version": version.version,
        "current": version.version == current,
        "created": version.record["created"],
        "origin": str(version.record["origin"].get("how", "")),
        "outcome": verdict.get("outcome"),
        "reason": reason or None,
        "report": f"/mshub/reports/{version.model_id}/{version.version}" if report.is_file() else None,
    }
