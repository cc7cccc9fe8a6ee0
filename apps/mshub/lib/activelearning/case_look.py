"""Looking at one case with the version that serves: what `lib.activelearning.spare_time` does with a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lib.activelearning.casebook import Casebook
from lib.datastore import StudiesFolder
from lib.infers import NNUNetInferTask
from mshub.agreement import agreement
from mshub.errors import CaseError
from mshub.nnunet.sliding_window import Check
from mshub.store import ModelVersion
from mshub.training_labels import read_reviewed_label

TaskOf = Callable[[str], NNUNetInferTask]
"""Returns the task of a model."""
Infer = Callable[[dict[str, Any], Check], dict[str, Any]]
"""Answers a request as the app does, ended by a check."""


class CaseLook:
    """Implements `lib.activelearning.spare_time.Look` with the app's tasks.

    Parameters
    ----------
    casebook : Casebook
    task : TaskOf
    datastore : callable
        Returns the datastore.
    infer : Infer
    """

    def __init__(
        self,
        casebook: Casebook,
        task: TaskOf,
        datastore: Callable[[], StudiesFolder],
        infer: Infer,
    ) -> None:
        self._casebook, self._task, self._datastore, self._infer = casebook, task, datastore, infer

    def measure(self, version: ModelVersion, image: str, check: Check) -> None:
        """Measure how sure the model is of an image, and keep it."""
        datastore = self._datastore()
        files = datastore.case_channels(image, version.channels)
        uncertainty = self._task(version.model_id).measure(version, files, check)
        self._casebook.note_uncertainty(image, version, uncertainty, datastore)

    def compare(self, version: ModelVersion, image: str, check: Check) -> None:
        """Predict a labelled image, and keep how sure the model is and how its label agrees."""
        datastore = self._datastore()
        case = datastore.reviewed_case(image, version.channels)
        if case is None:
            raise CaseError(f"The final label of {image} cannot be read; the log says why.")
        prediction = self._task(version.model_id).predict(version, list(case.images), check)
        label = read_reviewed_label(case, prediction.labels.grid)
        found = agreement(case.reviewed, label, case.values, prediction.labels.array_xyz, prediction.names)
        if prediction.uncertainty is not None:
            self._casebook.note_uncertainty(image, version, prediction.uncertainty, datastore)
        self._casebook.note_look(image, version, found, datastore)

    def prelabel(self, version: ModelVersion, image: str, check: Check) -> None:
        """Predict an image as a client would, and keep the label as its pre-label."""
        answer = self._infer({"model": version.model_id, "image": image, "save_label": True}, check)
        answer["file"].unlink(missing_ok=True)
