"""All trainings of a server: what ``/train`` starts, shows and stops."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore

from lib.conf import Config
from lib.faults import as_http_errors
from lib.trainers.nnunet import NNUNetTrainTask, studies_of
from lib.trainers.options import TrainOptions, options_for
from lib.trainers.tasks import as_stats, as_task
from mshub.card_tables import Channel
from mshub.cases import ReviewedCase
from mshub.errors import MSHubError
from mshub.jobs import Job, Jobs

logger = logging.getLogger(__name__)

SLOW_S = 0.1
SHARE_OF_COUNTING = 0.05
"""At most so much of the time is spent on counting cases, where that is slow and no final label has changed."""
Trainers = Mapping[str, NNUNetTrainTask]


class Trainings:
    """The jobs of this server's store, in the words of MONAI Label's clients.

    Parameters
    ----------
    jobs : Jobs
    config : Config
    """

    def __init__(self, jobs: Jobs, config: Config) -> None:
        self._jobs, self._config = jobs, config
        self._counted: _Cases | None = None

    # -- what there is ------------------------------------------------------------------------------------------

    def trainers(self, trainers: Trainers, datastore: Datastore) -> dict[str, Any]:
        """Return what ``/info/`` says of the trainers, with their numbers of cases.

        Labels nobody can read, or a damaged ``patients.csv``, are a ``problem`` there: clients need the rest.
        """
        if not trainers:
            return {}
        try:
            cases = self._recent_cases(datastore)
            return {model: trainer.info(cases.of(trainer)) for model, trainer in trainers.items()}
        except (MSHubError, OSError) as error:
            logger.warning("reviewed cases cannot be counted: %s", error)
            return {model: {**trainer.info(), "mshub": {"problem": str(error)}} for model, trainer in trainers.items()}

    def _recent_cases(self, datastore: Datastore) -> _Cases:
        """Return the reviewed cases, for a while those of before if no label changed: viewers ask all the time."""
        counted = self._counted
        if counted is None or not counted.are_recent():
            counted = self._counted = _Cases(datastore)
        return counted

    def stats(self, trainers: Trainers) -> dict[str, Any]:
        """Return the statistics by model: first the trainer at work, or else the one that was at work last.

        3D Slicer and OHIF read the first entry only, whatever it is called.
        """
        stats = {model: trainer.stats() for model, trainer in trainers.items()}
        return dict(sorted(stats.items(), key=lambda item: _recency(item[1]), reverse=True))

    def opened(self) -> list[dict[str, Any]]:
        """Return the trainings that run or wait, the running one first."""
        return [{"model": job.model_id, "id": job.id, **as_stats(job)} for job in self._jobs.open()]

    def status(self, everything: bool = False, check_if_running: bool = False) -> Any:
        """Return the training at work, or else the one that was at work last, as a task of MONAI Label.

        Parameters
        ----------
        everything : bool
            Return a list of all trainings instead, oldest first.
        check_if_running : bool
            Return the training at work only.

        Raises
        ------
        HTTPException
            404 if there is none.
        """
        opened, jobs = self._jobs.open(), self._jobs.all()
        if check_if_running and not opened:
            raise HTTPException(404, "No training is running.")
        if not jobs:
            raise HTTPException(404, "Nothing has been trained on this server yet.")
        if everything and not check_if_running:
            return [_task(job, opened) for job in jobs]
        return _task(opened[0] if opened else max(jobs, key=_last_change), opened)

    # -- what it does -------------------------------------------------------------------------------------------

    def start(self, trainer: NNUNetTrainTask, params: Mapping[str, Any] | None, datastore: Datastore) -> dict[str, Any]:
        """Start fine-tuning one model with all reviewed cases that fit it.

        Parameters
        ----------
        trainer : NNUNetTrainTask
        params : mapping, optional
            Keys of `mshub.recipe.Recipe`, ``device``, ``client_id``; MONAI Label's own ones are ignored.
        datastore : Datastore

        Raises
        ------
        HTTPException
            429 while the model is being trained, another 4xx if no case fits or an option cannot be.
        """
        with as_http_errors():
            options = TrainOptions.parse(options_for(trainer.model_id, params), self._config)
            cases = _Cases(datastore)
            job = trainer.start(options, cases.of(trainer), cases.studies)
        return _task(job, self._jobs.open())

    def start_new(self, trainers: Trainers, params: Mapping[str, Any] | None, datastore: Datastore) -> dict[str, Any]:
        """Start fine-tuning every model that has reviewed cases no version of it has seen.

        Parameters
        ----------
        trainers : mapping of str to NNUNetTrainTask
        params : mapping, optional
            As for `start`, for all models; those of one model under its name.
        datastore : Datastore

        Returns
        -------
        dict
            For each model ``result``, the training or None, and ``detail``, why there is none.

        Raises
        ------
        HTTPException
            4xx if an option cannot be; nothing is started then.
        """
        with as_http_errors():
            options = {model: TrainOptions.parse(options_for(model, params), self._config) for model in trainers}
            cases = _Cases(datastore)
        return {model: self._start_if_new(trainer, options[model], cases) for model, trainer in trainers.items()}

    def _start_if_new(self, trainer: NNUNetTrainTask, options: TrainOptions, cases: _Cases) -> dict[str, Any]:
        try:
            reviewed = cases.of(trainer)
            reason = trainer.reason_to_wait(reviewed)
            job = None if reason else trainer.start(options, reviewed, cases.studies)
        except HTTPException as error:
            return {"result": None, "detail": error.detail}
        except (MSHubError, OSError) as error:
            return {"result": None, "detail": str(error)}
        return {"result": _task(job, self._jobs.open()) if job else None, "detail": reason}

    def stop(self) -> dict[str, Any] | None:
        """Stop all trainings, running and waiting; return the one that was at work, None if there was none.

        What serves goes on serving. A stopped training goes on where it was when the very same is asked for again.
        """
        stopped = self._jobs.stop_all()
        return _task(stopped[0], []) if stopped else None


class _Cases:
    """The reviewed cases of a datastore, gathered once for all models with the same channels."""

    def __init__(self, datastore: Datastore) -> None:
        self.studies = studies_of(datastore)
        self._known: dict[tuple[Channel, ...], list[ReviewedCase]] = {}
        self._began, self._took_s = time.monotonic(), 0.0
        self._changes = self.studies.changes_of_final

    def of(self, trainer: NNUNetTrainTask) -> list[ReviewedCase]:
        """Return the cases one model may learn from."""
        channels = trainer.channels() if len(trainer.channels()) > 1 else ()
        if channels not in self._known:
            began = time.monotonic()
            self._known[channels] = self.studies.reviewed_cases(channels)
            self._took_s += time.monotonic() - began
        return self._known[channels]

    def are_recent(self) -> bool:
        """Return whether they are the same still and to look again would take too much of the time, as thousands do."""
        if self._changes != self.studies.changes_of_final:
            return False
        return self._took_s > SLOW_S and time.monotonic() - self._began < self._took_s / SHARE_OF_COUNTING


def _task(job: Job, opened: list[Job]) -> dict[str, Any]:
    return as_task(job, is_first=not opened or opened[0].path == job.path)


def _recency(stats: Mapping[str, Any]) -> tuple[bool, bool, str]:
    state = stats.get("state")
    return state == "running", state == "queued", stats.get("updated", "")


def _last_change(job: Job) -> str:
    return str(job.progress().get("updated", ""))
