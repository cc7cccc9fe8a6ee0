"""Looking at one case with the version that serves: what `lib.activelearning.spare_time` does with a case."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.activelearning.casebook import FINAL, Casebook, label_state
from lib.datastore import StudiesFolder
from lib.infers import NNUNetInferTask
from lib.pacs import PacsStudies
from mshub.agreement import agreement
from mshub.errors import CaseError
from mshub.nnunet.sliding_window import Check
from mshub.store import ModelVersion
from mshub.training_labels import read_reviewed_label

UNUSED_S = 600.0
"""A copy of a series that was made for a look is removed when nobody asked for it in so many seconds."""
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
        self._borrowed: set[str] = set()

    def measure(self, version: ModelVersion, image: str, check: Check) -> None:
        """Measure how sure the model is of an image, and keep it; not of one that was replaced meanwhile."""
        datastore = self._datastore()
        state = datastore.image_state(image)
        with self._borrowing(datastore):
            files = datastore.case_channels(image, version.channels)
            uncertainty = self._task(version.model_id).measure(version, files, check)
        if datastore.is_still(image, state):
            self._casebook.note_uncertainty(image, version, uncertainty, datastore)

    @contextmanager
    def _borrowing(self, datastore: StudiesFolder) -> Iterator[None]:
        """Remove copies of series of a PACS that were made for a look only, some time afterwards."""
        if not isinstance(datastore, PacsStudies):
            yield
            return
        self._borrowed = {series for series in self._borrowed if not datastore.drop_copy(series, UNUSED_S)}
        before = datastore.copies()
        try:
            yield
        finally:
            self._borrowed |= datastore.copies() - before

    def compare(self, version: ModelVersion, image: str, check: Check) -> None:
        """Predict a labelled image, and keep how sure the model is and how its label agrees.

        Where the image or its label is replaced meanwhile, nothing is kept: it is looked at again.
        """
        datastore = self._datastore()
        datastore.settle()
        state, label = datastore.image_state(image), label_state(datastore, image)
        case = datastore.reviewed_case(image, version.channels)
        if case is None:
            raise CaseError(f"The final label of {image} cannot be read; the log says why.")
        with tempfile.TemporaryDirectory(prefix="mshub-label-") as folder:
            path, _ = datastore.copy_label(image, FINAL, Path(folder))
            if path is None or label_state(datastore, image) != label:
                return
            case = replace(case, label=path)
            prediction = self._task(version.model_id).predict(version, list(case.images), check)
            array = read_reviewed_label(case, prediction.labels.grid)
        if not datastore.is_still(image, state):
            return
        found = agreement(case.reviewed, array, case.values, prediction.labels.array_xyz, prediction.names)
        if prediction.uncertainty is not None:
            self._casebook.note_uncertainty(image, version, prediction.uncertainty, datastore)
        self._casebook.note_look(image, version, found, label)

    def prelabel(self, version: ModelVersion, image: str, check: Check) -> None:
        """Predict an image as a client would, and keep the label as its pre-label."""
        answer = self._infer({"model": version.model_id, "image": image, "save_label": True}, check)
        answer["file"].unlink(missing_ok=True)
