"""Batches of pre-labels: a model run over many cases, in the order of a strategy, resumable.

A batch is a list in the case index; it goes on after a restart of the server. `lib.activelearning.spare_time` takes its
cases one by one whenever no client waits for a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from fastapi import HTTPException

from lib.activelearning.casebook import FINAL, ORIGINAL
from lib.activelearning.offers import Offers, unlabelled
from lib.datastore import StudiesFolder
from lib.faults import not_found
from mshub.case_index import Batch, CaseIndex
from mshub.selection import DEFAULT, STRATEGIES
from mshub.store import ModelVersion

OPTIONS = frozenset({"images", "strategy", "limit", "client_id", "again"})


class Prelabels:
    """Starts, shows and stops batches.

    Parameters
    ----------
    index : CaseIndex
    offers : Offers
        Puts the cases in order.
    """

    def __init__(self, index: CaseIndex, offers: Offers) -> None:
        self._index, self._offers = index, offers

    def start(
        self, version: ModelVersion, request: Mapping[str, Any], modalities: list[str], datastore: StudiesFolder
    ) -> dict[str, Any]:
        """Start a batch for the version that serves.

        Parameters
        ----------
        version : ModelVersion
        request : mapping
            ``images`` (ids; default: all without a final label), ``strategy`` (whose order; `DEFAULT` without one),
            ``limit`` (the first so many of them), ``client_id``, ``again`` (true: also cases the version has a
            pre-label of).
        modalities : list of str
            Which series of a PACS the model is for.
        datastore : StudiesFolder

        Raises
        ------
        HTTPException
            400 for options that cannot be, 404 for an unknown image.
        """
        strategy, limit = _checked(request)
        chosen = request.get("images")
        images = unlabelled({"modalities": modalities}, datastore) if chosen is None else list(dict.fromkeys(chosen))
        for image in images if chosen is not None else ():
            datastore.get_image_info(image)  # 404 before anything starts
        again = bool(request.get("again"))
        if chosen is None:  # a limit is of cases there is something to do for
            images = [image for image in images if not self.reason_to_skip(datastore, image, version, again)]
        ordered = self._offers.order(strategy, version, images, datastore)[:limit]
        options = {"strategy": strategy, "again": again}
        batch = self._index.new_batch(version.model_id, ordered, str(request.get("client_id") or ""), options)
        return self.status(batch)

    def status(self, batch: int) -> dict[str, Any]:
        """Return how far a batch is; 404 for an unknown one."""
        return _told(self._known(batch))

    def all(self) -> list[dict[str, Any]]:
        """Return all batches, newest first."""
        return [_told(batch) for batch in self._index.batches()]

    def stop(self, batch: int) -> dict[str, Any]:
        """Let a batch stop before its next case."""
        self._known(batch)
        self._index.stop_batch(batch)
        return self.status(batch)

    def resume(self, batch: int) -> dict[str, Any]:
        """Let a stopped batch go on."""
        self._known(batch)
        self._index.resume_batch(batch)
        return self.status(batch)

    def reason_to_skip(self, datastore: StudiesFolder, image: str, version: ModelVersion, again: bool) -> str | None:
        """Return why an image gets no pre-label, or None.

        One that somebody has in work keeps the pre-label the correction starts from.
        """
        if datastore.get_label_uri(image, FINAL):
            return "it has a final label"
        if image in self._index.leases():
            return "somebody has it in work"
        params = datastore.get_label_info(image, ORIGINAL).get("params", {})
        mine = params.get("model") == version.model_id and params.get("model_version") == version.version
        return f"{version.version} has labelled it already" if mine and not again else None

    def _known(self, batch: int) -> Batch:
        found = self._index.batch(batch)
        if found is None:
            raise not_found("batch", str(batch), [str(other.id) for other in self._index.batches()])
        return found


def _checked(request: Mapping[str, Any]) -> tuple[str, int | None]:
    """Return strategy and limit of a request."""
    unknown = sorted(set(request) - OPTIONS)
    if unknown:
        raise HTTPException(400, f"Unknown option {', '.join(unknown)}. Known: {', '.join(sorted(OPTIONS))}.")
    images = request.get("images")
    if images is not None and not (isinstance(images, list) and all(isinstance(image, str) for image in images)):
        raise HTTPException(400, f"images is {images!r}; expected a list of image ids, or nothing for all that wait.")
    strategy = str(request.get("strategy") or DEFAULT)
    if strategy not in STRATEGIES or STRATEGIES[strategy].of_labelled:
        known = ", ".join(name for name, other in STRATEGIES.items() if not other.of_labelled)
        raise HTTPException(400, f"The strategy {strategy!r} cannot put waiting cases in order. Known: {known}.")
    limit = request.get("limit")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise HTTPException(400, f"limit is {limit!r}; expected a number of cases, such as 20.")
    return strategy, limit


def _told(batch: Batch) -> dict[str, Any]:
    facts = asdict(batch)
    total = sum(batch.counts.values())
    ended = total - batch.counts["waiting"] - batch.counts["running"]
    created = datetime.fromtimestamp(batch.created, timezone.utc).isoformat(timespec="seconds")
    failures = [{"image": image, "message": message} for image, message in batch.failures]
    return {**facts, "created": created, "failures": failures, "total": total, "ended": ended}
