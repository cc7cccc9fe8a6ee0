"""Active learning as the app sees it: one object in front of the casebook, the offers, the batches and the thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy

from lib.activelearning.case_look import CaseLook, Infer, TaskOf
from lib.activelearning.casebook import Casebook
from lib.activelearning.offers import Offers, OfferStrategy
from lib.activelearning.prelabels import Prelabels
from lib.activelearning.scoring import AgreementScoring
from lib.activelearning.spare_time import SpareTime
from lib.activity import Activity
from lib.conf import Config
from lib.datastore import StudiesFolder
from mshub.case_index import CaseIndex
from mshub.errors import MSHubError
from mshub.jobs import Jobs
from mshub.selection import STRATEGIES
from mshub.store import ModelStore, ModelVersion
from mshub.uncertainty import Uncertainty

logger = logging.getLogger(__name__)

PASSED_OVER_AT_MOST = 10
"""Cases that cannot be opened, in one request: each may have been downloaded to find out."""


class ActiveLearning:
    """Which case to label next, and all that is known for it.

    Parameters
    ----------
    path : Path
        The file of the case index.
    store, config
        The app's.
    """

    def __init__(self, path: Path, store: ModelStore, config: Config) -> None:
        self._store, self._config = store, config
        self.casebook = Casebook(CaseIndex(path), store, config)
        self.offers = Offers(self.casebook, store, config)
        self.prelabels = Prelabels(self.casebook.index, self.offers)
        self.spare_time: SpareTime | None = None

    def strategies(self) -> dict[str, Strategy]:
        """Return the strategies by name, the default first."""
        return {name: OfferStrategy(name, self.offers) for name in STRATEGIES}

    def scoring_methods(self) -> dict[str, ScoringMethod]:
        """Return MONAI Label's scoring methods by name."""
        return {"dice": AgreementScoring()}

    def start(
        self,
        activity: Activity,
        jobs: Jobs,
        task: TaskOf,
        infer: Infer,
        datastore: Callable[[], StudiesFolder],
        served: Callable[[], list[str]],
        modalities: Callable[[ModelVersion], list[str]],
    ) -> None:
        """Begin with what the server does while nobody needs it; see `SpareTime` for what it is told."""
        look = CaseLook(self.casebook, task, datastore, infer)
        facts = (self.casebook, self.prelabels, self._store, self._config, activity, jobs, look)
        self.spare_time = SpareTime(*facts, datastore, served, modalities)
        self.spare_time.start()

    def doing(self) -> dict[str, Any] | None:
        """Return what is computed now that nobody waits for."""
        return self.spare_time.doing() if self.spare_time else None

    # -- predictions and labels ---------------------------------------------------------------------------------

    def note_prediction(
        self, image: str, client: str | None, params: dict[str, Any], datastore: Datastore
    ) -> dict[str, Any]:
        """Keep what a prediction measured, and return what else is to be told of it.

        Parameters
        ----------
        image : str
        client : str or None
            Who asked, and so has the image in work; None where nobody did.
        params : dict
            Of the answer.
        datastore : Datastore

        Returns
        -------
        dict
            ``expected_dice`` (`Casebook.expected_dice`), ``flags`` (`Casebook.flags`); empty if the index failed: the
            prediction is what counts.
        """
        try:
            self.casebook.note_prediction(image, params, datastore)
            if client is not None:
                self._note_client(image, client, params["model"])
            version = self._store.version(params["model"], params["model_version"])
            uncertainty = Uncertainty.from_dict(params["uncertainty"])
            expected = self.casebook.expected_dice(version, uncertainty.agreement)
            return {"expected_dice": expected, "flags": self.casebook.flags(image, version, uncertainty)}
        except (MSHubError, OSError) as error:
            logger.error("what was measured of %s is not kept: %s", image, error)
            return {}

    def _note_client(self, image: str, client: str, model: str) -> None:
        self.casebook.index.note_interest(model, client)
        if client:
            self.casebook.index.renew(image, client, self._config.lease_s, model=model)

    def note_submission(self, image: str, datastore: StudiesFolder) -> None:
        """Keep how a submitted label agrees with its pre-label, and let others have the image."""
        try:
            self.casebook.note_submission(image, datastore)
        except (MSHubError, OSError) as error:  # the label is stored, and that is what counts
            logger.error("how the label of %s agrees with its pre-label is not kept: %s", image, error)

    def forget(self, image: str) -> None:
        """Forget an image that was removed: another one may come under its name."""
        try:
            self.casebook.forget(image)
        except MSHubError as error:  # the image is gone, and that is what counts
            logger.error("what was measured of %s is not forgotten: %s", image, error)

    # -- the next case ------------------------------------------------------------------------------------------

    def next(self, strategy: str, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Return the next case for a client that can be opened.

        Parameters and result are those of `Offers.next`; adds ``path``, ``hint`` where there is one, and
        ``passed_over``: image -> the reason, of cases that were chosen but cannot be opened. These stay with the
        client as long as any case, so that nobody else is offered them meanwhile.

        Raises
        ------
        HTTPException
            The images cannot be reached, or none that is left can be opened.
        """
        model, client = request.get("model"), str(request.get("client_id") or "")
        if model is not None:
            self.casebook.index.note_interest(model, client)
        sample = self._openable(strategy, request, datastore)
        hint = self.casebook.hint(model) if model is not None else None
        sample = {**sample, **({"hint": hint} if hint else {})}
        if sample.get("chosen_by") and isinstance(datastore, StudiesFolder):
            datastore.note_offer(sample["id"], sample["chosen_by"], client)
        return sample

    def _openable(self, strategy: str, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        passed_over: dict[str, str] = {}
        while True:
            sample = self.offers.next(strategy, request, datastore)
            told = {"passed_over": passed_over} if passed_over else {}
            image = sample.get("id")
            if image is None:
                return {**sample, **told}
            try:
                return {**sample, "path": datastore.get_image_uri(image), **told}
            except HTTPException as error:
                unreachable = error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
                if unreachable or image in passed_over or len(passed_over) == PASSED_OVER_AT_MOST:
                    raise
                logger.warning("%s is passed over as the next case: %s", image, error.detail)
                passed_over[image] = str(error.detail)

    def last_model(self, client: str) -> str | None:
        """Return the model a client used last."""
        return self.casebook.index.last_model(client)

    # -- batches ------------------------------------------------------------------------------------------------

    def prelabel(
        self, version: ModelVersion, request: dict[str, Any], modalities: list[str], datastore: StudiesFolder
    ) -> dict[str, Any]:
        """Start a batch of pre-labels; see `Prelabels.start`."""
        batch = self.prelabels.start(version, request, modalities, datastore)
        self._wake()
        return batch

    def resume(self, batch: int) -> dict[str, Any]:
        """Let a stopped batch go on; 404 for an unknown one."""
        told = self.prelabels.resume(batch)
        self._wake()
        return told

    def _wake(self) -> None:
        if self.spare_time:
            self.spare_time.wake()
