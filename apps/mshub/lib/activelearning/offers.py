"""The next case for somebody: asked of a strategy, leased to one client, and explained.

Patients who judge versions are not offered by a strategy that looks at scores, since a version would be judged by the
cases it finds hard; every fifth choice or so is one of them, drawn at random.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from lib.activelearning.casebook import Casebook, patients_of
from lib.conf import Config
from mshub.case_index import Lease
from mshub.holdout import HoldOut
from mshub.selection import STRATEGIES
from mshub.selection import Strategy as Ranking
from mshub.store import ModelStore, ModelVersion

ATTEMPTS = 20
SOON = 50
"""So many cases, the best, are tried before the others are looked at again: some may just have been taken."""


@dataclass(frozen=True)
class Offer:
    """A case for somebody.

    Attributes
    ----------
    image, why : str
    strategy : str
        The one that chose it: ``random`` for an audit, whatever was asked for.
    audit : bool
        It was drawn at random, so that its label may judge versions.
    again : bool
        The client has it already.
    """

    image: str
    why: str
    strategy: str
    audit: bool = False
    again: bool = False


class Offers:
    """Chooses cases for clients; no two clients get the same one.

    Parameters
    ----------
    casebook : Casebook
    store : ModelStore
    config : Config
    rng : random.Random, optional
    """

    def __init__(self, casebook: Casebook, store: ModelStore, config: Config, rng: random.Random | None = None) -> None:
        self._casebook, self._store, self._config = casebook, store, config
        self._rng = rng or random.Random()

    def next(self, strategy: str, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Return the next case for a client.

        Parameters
        ----------
        strategy : str
            See `mshub.selection.STRATEGIES`.
        request : dict
            Optional ``model``, ``client_id``, ``skip`` (images not wanted now), ``modalities``, ``label_tag``,
            ``labels``.
        datastore : Datastore

        Returns
        -------
        dict
            ``id``, ``why``, ``chosen_by`` (the strategy), ``audit``, ``waiting`` (cases without a label), ``model``,
            ``version``, ``leased_until``; without ``id`` where there is no case, and ``why`` says so.
        """
        version = self._store.current(request["model"]) if request.get("model") else None
        asked = _Asked(STRATEGIES[strategy], str(request.get("client_id") or ""), version, request, datastore)
        cases = asked.cases()
        offer, leases = self._offer(asked, cases)
        offer = offer or self._own(asked, cases, leases)
        if offer is None:
            return {"why": _nothing(asked.ranking, cases, leases), "waiting": len(cases)}
        if not offer.again:
            model = asked.model
            self._casebook.index.keep_choice(offer.image, model, asked.client, offer.strategy, offer.audit, offer.why)
        facts = {"model": version.model_id, "version": version.version} if version else {}
        until = {"leased_until": int(time.time() + self._config.lease_s)}
        told = {"id": offer.image, "why": offer.why, "chosen_by": offer.strategy, "audit": offer.audit}
        return {**told, "waiting": len(cases), **facts, **until}

    def order(self, strategy: str, version: ModelVersion, images: Sequence[str], datastore: Datastore) -> list[str]:
        """Return waiting images in the order of a strategy of waiting ones, the best first."""
        pool = self._casebook.pool(version, images, labelled({}, datastore), datastore)
        return [choice.image for choice in STRATEGIES[strategy].ranked(pool, self._rng)]

    # -- private ------------------------------------------------------------------------------------------------

    def _offer(self, asked: _Asked, cases: Sequence[str]) -> tuple[Offer | None, dict[str, Lease]]:
        """Lease the best of the free cases, None where there is none; and return the leases there were before."""
        for _ in range(ATTEMPTS):
            leases = self._casebook.index.leases()
            free = _wanted(cases, leases, asked.request)
            offer = self._offer_of(asked, free, [image for image in cases if image in leases])
            if offer or not free:
                break
        return offer, leases

    def _offer_of(self, asked: _Asked, free: Sequence[str], held: Sequence[str]) -> Offer | None:
        judging = set() if asked.ranking.is_random else self._judging(asked.version, free, asked.datastore)
        fair = [image for image in free if image not in judging]
        audits = [] if asked.ranking.of_labelled else [image for image in free if image in judging]
        if audits and fair and self._casebook.index.audit_is_due(asked.model, self._every):
            return self._audit(asked, audits)
        return self._chosen(asked, fair, held) or (self._audit(asked, audits) if audits else None)

    def _chosen(self, asked: _Asked, fair: Sequence[str], held: Sequence[str]) -> Offer | None:
        """Lease the best of the cases a strategy may choose from."""
        if not fair:
            return None
        if asked.ranking.of_labelled:
            waiting, taken = [], list(fair)
        else:
            waiting, taken = list(fair), [*labelled(asked.request, asked.datastore), *held]
        pool = self._casebook.pool(asked.version, waiting, taken, asked.datastore)
        ranked = asked.ranking.ranked(pool, self._rng)
        choices = {choice.image: choice for choice in islice(ranked, SOON)}
        image = self._casebook.index.lease(list(choices), asked.client, self._config.lease_s, model=asked.model)
        return Offer(image, choices[image].why, asked.ranking.name, asked.ranking.is_random) if image else None

    @property
    def _every(self) -> int:
        return self._config.audit_every

    def _audit(self, asked: _Asked, audits: Sequence[str]) -> Offer | None:
        """Lease a random case of a patient who judges versions."""
        order = self._rng.sample(audits, len(audits))
        image = self._casebook.index.lease(order, asked.client, self._config.lease_s, model=asked.model)
        why = (
            f"drawn at random from {len(audits)} of patients who judge new versions: each {_ordinal(self._every)} "
            "case or so is one of these"
        )
        return Offer(image, why, "random", audit=True) if image else None

    def _judging(self, version: ModelVersion | None, images: Sequence[str], datastore: Datastore) -> set[str]:
        """Return the images of patients who judge versions of the model, or would."""
        if version is None or not self._every:
            return set()
        ledger = HoldOut(self._store.home / "models" / version.model_id / "holdout.json")
        patients = patients_of(datastore, images)
        judges = ledger.judging(set(patients.values()))
        return {image for image in images if patients[image] in judges}

    def _own(self, asked: _Asked, cases: Sequence[str], leases: dict[str, Lease]) -> Offer | None:
        """Return the case the client has had longest: nothing else waits. Clients without a name are one client."""
        skip = asked.request.get("skip")
        skipped = skip if isinstance(skip, list) else []
        own = [leases[image] for image in cases if image in leases and leases[image].client == asked.client]
        best = min(own, key=lambda lease: (lease.image in skipped, lease.until), default=None)
        if best is None:
            return None
        self._casebook.index.renew(best.image, asked.client, self._config.lease_s)
        return Offer(best.image, "you have it already, and no other case waits", "", again=True)


@dataclass(frozen=True)
class _Asked:
    """What a client asks for."""

    ranking: Ranking
    client: str
    version: ModelVersion | None
    request: dict[str, Any]
    datastore: Datastore

    @property
    def model(self) -> str:
        return self.version.model_id if self.version else ""

    def cases(self) -> list[str]:
        """Return the cases the strategy chooses among, those in work included."""
        among = labelled if self.ranking.of_labelled else unlabelled
        return among(self.request, self.datastore)


class OfferStrategy(Strategy):  # type: ignore[misc]
    """One strategy as MONAI Label's clients see it."""

    def __init__(self, name: str, offers: Offers) -> None:
        self._name, self._offers = name, offers
        super().__init__(STRATEGIES[name].description)

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Return the next case; see `Offers.next`."""
        return self._offers.next(self._name, request, datastore)


def unlabelled(request: dict[str, Any], datastore: Datastore) -> list[str]:
    """Return the unlabelled cases of the ``modalities`` asked for, by name."""
    images = datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels"))
    kinds = request.get("modalities")
    return sorted(image for image in images if not kinds or datastore.get_image_info(image).get("Modality") in kinds)


def labelled(request: dict[str, Any], datastore: Datastore) -> list[str]:
    """Return the cases with a final label, by name."""
    return sorted(datastore.get_labeled_images(request.get("label_tag"), request.get("labels")))


def _wanted(cases: Sequence[str], leases: dict[str, Lease], request: dict[str, Any]) -> list[str]:
    """Return the cases nobody has in work, without those a client wants to skip, unless no other is left."""
    free = [image for image in cases if image not in leases]
    skipped = request.get("skip")
    others = [image for image in free if image not in skipped] if isinstance(skipped, list) else free
    return others or free


def _nothing(ranking: Ranking, cases: Sequence[str], leases: dict[str, Lease]) -> str:
    if ranking.of_labelled:
        return "no label looks wrong: none was looked at yet, or all agree with what the model sees"
    held = [leases[image].until for image in cases if image in leases]
    if not held:
        return "every case has a final label"
    free_at = time.strftime("%H:%M", time.localtime(min(held)))
    return f"all {len(held)} cases that wait are with other people; the first is free again at {free_at}"


def _ordinal(number: int) -> str:
    return {1: "", 2: "second", 3: "third", 4: "fourth", 5: "fifth"}.get(number, f"{number}th")
