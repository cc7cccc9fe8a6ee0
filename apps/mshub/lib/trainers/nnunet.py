"""Fine-tuning of one installed model as a MONAI Label TrainTask."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from lib.conf import Config
from lib.datastore import StudiesFolder
from lib.digests import Digests
from lib.faults import as_http_errors
from lib.trainers.options import TrainOptions, client_options, options_for
from lib.trainers.tasks import as_stats
from mshub.card_tables import Channel
from mshub.cases import ReviewedCase
from mshub.errors import TrainingError
from mshub.jobs import Job, JobRequest, Jobs
from mshub.lineage import fitting_cases, new_cases, used_digests
from mshub.store import ModelStore, ModelVersion

logger = logging.getLogger(__name__)

ALREADY_RUNNING = 429  # MONAI Label's own answer


class NNUNetTrainTask(TrainTask):  # type: ignore[misc]
    """Fine-tuning of the current version of one model with all reviewed cases that fit it.

    Nothing is computed here: a training is a job of its own (`mshub.jobs`), which any process can follow.
    """

    def __init__(self, model_id: str, store: ModelStore, config: Config, digests: Digests) -> None:
        self.model_id = model_id
        self._store, self._config_options, self._digests = store, config, digests
        self._jobs = Jobs(store.home)
        super().__init__(f"Fine-tunes {model_id} with the reviewed cases")

    # -- what there is ------------------------------------------------------------------------------------------

    def info(self, cases: Sequence[ReviewedCase] | None = None) -> dict[str, Any]:
        """Return what ``/info/`` says of this trainer.

        Parameters
        ----------
        cases : sequence of ReviewedCase, optional
            All reviewed cases; with them, ``mshub`` holds the numbers ``reviewed_cases`` (that fit this model) and
            ``new_cases`` (of these, that no version has seen; left out while that is being looked at).
        """
        version = self._store.current(self.model_id)
        info = {
            "description": f"Fine-tunes {version.card.title} [{version.version}] with the reviewed cases",
            "config": self.config(),
        }
        if cases is None:
            return info
        fitting = self.fitting(cases)
        numbers = {"reviewed_cases": len(fitting)}
        if self._last_trained() is None:
            numbers["new_cases"] = len(fitting)
        elif self._digests.prepare_soon(fitting):
            numbers["new_cases"] = len(new_cases(self._store, self.model_id, fitting))
        return {**info, "mshub": numbers}

    def config(self) -> dict[str, Any]:
        """Return the options a client may set, each with its default."""
        return client_options(self._config_options)

    def stats(self) -> dict[str, Any]:
        """Return how far the model's latest training is: see `as_stats`; empty if there never was one."""
        job = self._jobs.latest(self.model_id)
        return as_stats(job) if job else {}

    def channels(self) -> tuple[Channel, ...]:
        """Return the images the current version takes."""
        return self._store.current(self.model_id).channels

    def fitting(self, cases: Sequence[ReviewedCase]) -> list[ReviewedCase]:
        """Return the cases this model can learn from."""
        record = self._store.current(self.model_id).record
        return fitting_cases(cases, list(record["labels"]), len(record["channels"]))

    def new(self, fitting: list[ReviewedCase]) -> list[ReviewedCase]:
        """Return the cases no version has seen as they are now; reads no image until a version was fine-tuned."""
        if self._last_trained() is None:
            return fitting
        self._digests.prepare(fitting)
        return new_cases(self._store, self.model_id, fitting)

    def reason_to_wait(self, cases: Sequence[ReviewedCase]) -> str | None:
        """Return why a training would be in vain, or None."""
        fitting = self.fitting(cases)
        if not fitting:
            return self._no_case(len(cases))
        trained = self._last_trained()
        if trained is not None and not self.new(fitting):
            return f"no new reviewed cases since {trained.version}"
        return None

    # -- what it does -------------------------------------------------------------------------------------------

    def start(
        self, options: TrainOptions, cases: Sequence[ReviewedCase], studies: StudiesFolder, *, resumable: bool = True
    ) -> Job:
        """Start a training with all cases that fit, seen before or not.

        Parameters
        ----------
        options : TrainOptions
        cases : sequence of ReviewedCase
            All reviewed cases.
        studies : StudiesFolder
            Where they are from, and where people may be submitting labels.
        resumable : bool
            See `mshub.jobs.Job.spawn`.

        Raises
        ------
        HTTPException
            429 while the model is being trained.
        TrainingError
            No case fits.
        LabelsChanged
            A label came with other names while it was copied.
        """
        running = [job for job in self._jobs.open() if job.model_id == self.model_id]
        if running:
            raise HTTPException(
                ALREADY_RUNNING, f"{self.model_id} is being trained already ({running[0].id}). Wait, or stop it first."
            )
        fitting = self.fitting(cases)
        if not fitting:
            raise TrainingError(self._no_case(len(cases)))
        parent = self._store.current(self.model_id).version
        request = JobRequest(
            self.model_id, parent, tuple(fitting), options.recipe, device=options.device, client=options.client
        )
        job = self._jobs.create(request, lambda: self._settled(studies))
        job.spawn(resumable=resumable)
        return job

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, and wait for it: what stock MONAI Label runs in a process of its own.

        SIGTERM asks the training to stop. Stock MONAI Label's own Stop kills this process and the training's alike;
        that training is not resumed by itself, but goes on when it is asked for again.

        Raises
        ------
        HTTPException
            4xx with a sentence: nothing to learn from, an impossible option, or the training failed.
        """
        with as_http_errors():
            options = TrainOptions.parse(options_for(self.model_id, request), self._config_options)
            studies = studies_of(datastore)
            job = self.start(options, studies.reviewed_cases(self.channels()), studies, resumable=False)
            with _stopped_by_sigterm(job):
                progress = job.wait()
            _raise_if_failed(job, progress)
        return as_stats(job)

    # -- private ------------------------------------------------------------------------------------------------

    def _settled(self, studies: StudiesFolder) -> list[ReviewedCase]:
        """Return the reviewed cases with the names of their labels as these are now."""
        studies.settle()
        return studies.reviewed_cases(self.channels())

    def _last_trained(self) -> ModelVersion | None:
        trained = [version for version in self._store.versions(self.model_id) if used_digests(version)]
        return trained[-1] if trained else None

    def _no_case(self, reviewed: int) -> str:
        record = self._store.current(self.model_id).record
        names, channels = list(record["labels"]), len(record["channels"])
        return (
            f"There is nothing {self.model_id} can learn from yet. Found: {reviewed} reviewed case(s), none of "
            f"{channels} channel(s) in which {' or '.join(names[:5])}{' or ...' if names[5:] else ''} was reviewed. "
            "How to fix: submit a label of such a case."
        )


def studies_of(datastore: Datastore) -> StudiesFolder:
    """Return the datastore if models can be trained with its labels; 405 if it is not one of ours."""
    if not isinstance(datastore, StudiesFolder):
        raise HTTPException(405, "Training needs a studies folder or a PACS: no other datastore keeps reviewed labels.")
    return datastore


def _raise_if_failed(job: Job, progress: Mapping[str, Any]) -> None:
    if progress["state"] not in ("failed", "interrupted"):
        return
    told = progress.get("message") if progress["state"] == "failed" else None
    reason = (told or "its process ended without saying why").rstrip(".")
    raise TrainingError(f"The training of {job.model_id} failed: {reason}. Its log is {job.path / 'log.txt'}.")


@contextmanager
def _stopped_by_sigterm(job: Job) -> Iterator[None]:
    """Let SIGTERM ask the job to stop for as long as the block runs; only a main thread can be told of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: job.ask_to_stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
