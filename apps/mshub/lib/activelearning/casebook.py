"""What is known of the cases of a datastore, model by model: the case index in the words of the app."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from cachetools import TTLCache
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from lib.conf import Config
from lib.datastore import StudiesFolder, origin_of
from lib.reviews import case_id_of
from mshub.agreement import Agreement
from mshub.calibration import Calibration
from mshub.case_index import CaseIndex
from mshub.errors import MSHubError
from mshub.selection import Case, Pool
from mshub.stopping import round_gains, stopping_hint
from mshub.store import ModelStore, ModelVersion
from mshub.uncertainty import Uncertainty
from mshub.volumes import unusual_volume

logger = logging.getLogger(__name__)

FINAL, ORIGINAL = str(DefaultLabelTag.FINAL.value), str(DefaultLabelTag.ORIGINAL.value)
KEPT_VERSIONS, FRESH_S = 4, 30.0
"""Scores of so many versions are kept in memory, for so many seconds: another process may add some."""
RECENT = 20
"""So many of the labels submitted last are looked at for the stopping hint."""


class Casebook:
    """Keeps what becomes known of cases, and puts it together for strategies and clients.

    Only predictions with the server's own profile and all folds are kept: what others measured cannot be compared.

    Parameters
    ----------
    index : CaseIndex
    store : ModelStore
    config : Config
    """

    def __init__(self, index: CaseIndex, store: ModelStore, config: Config) -> None:
        self.index = index
        self._store, self._config = store, config
        self._recent: TTLCache[tuple[str, str], dict[str, Uncertainty]] = TTLCache(KEPT_VERSIONS, FRESH_S)
        self._lock = threading.Lock()

    # -- what becomes known -------------------------------------------------------------------------------------

    def note_prediction(self, image: str, params: Mapping[str, Any], datastore: Datastore) -> None:
        """Keep what a prediction measured; `params` are those of the answer."""
        if self._is_comparable(params):
            version = self._store.version(params["model"], params["model_version"])
            self.note_uncertainty(image, version, Uncertainty.from_dict(params["uncertainty"]), datastore)

    def _is_comparable(self, params: Mapping[str, Any]) -> bool:
        """Return whether a prediction was measured as the server does by default."""
        provenance = params.get("provenance") or {}
        if provenance.get("profile") != self._config.profile or not params.get("uncertainty"):
            return False
        version = self._store.version(params["model"], params["model_version"])
        return list(provenance["folds"]) == list(version.record["folds"])

    def note_uncertainty(
        self, image: str, version: ModelVersion, uncertainty: Uncertainty, datastore: Datastore
    ) -> None:
        """Keep what was measured of an image."""
        state, profile = image_state(datastore, image), self._config.profile
        self.index.keep_score(image, version.model_id, version.version, uncertainty, state=state, profile=profile)
        with self._lock:
            self._recent.pop((version.model_id, version.version), None)

    def note_submission(self, image: str, datastore: StudiesFolder) -> None:
        """Keep how a final label agrees with the pre-label it started from, and let others have the image."""
        self.index.release(image)
        found = submitted_agreement(datastore, image)
        if found is None:
            return
        agreement, started_from = found
        prelabel = datastore.get_label_info(image, ORIGINAL)
        is_its = origin_of(prelabel) == started_from  # another may be there now
        comparable = is_its and self._is_comparable(prelabel["params"])
        score = prelabel["params"]["uncertainty"]["agreement"] if comparable else None
        model, version = started_from["model"], started_from["version"]
        self.index.keep_agreement(image, model, version, agreement.dice, agreement.edited_voxels, score=score)

    def note_look(self, image: str, version: ModelVersion, agreement: Agreement, label_state: str) -> None:
        """Keep how a final label of an image agrees with what a version sees, which may have learned from it."""
        self.index.keep_label_dice(image, version.model_id, version.version, agreement.dice, label_state=label_state)

    def forget(self, image: str) -> None:
        """Forget all that is known of an image."""
        self.index.forget_image(image)
        with self._lock:
            self._recent.clear()

    # -- what is known ------------------------------------------------------------------------------------------

    def scores(self, version: ModelVersion) -> dict[str, Uncertainty]:
        """Return image -> what the version measured of it; read at most once in `FRESH_S` while nothing is added."""
        key = (version.model_id, version.version)
        with self._lock:
            known = self._recent.get(key)
        if known is None:
            known = self.index.scores(*key)
            with self._lock:
                self._recent[key] = known
        return known

    def pool(
        self, version: ModelVersion | None, waiting: Sequence[str], taken: Sequence[str], datastore: Datastore
    ) -> Pool:
        """Return what is known of the cases that wait, in their order, and of those that are labelled or in work."""
        patients = patients_of(datastore, [*waiting, *taken])
        if version is None:
            return Pool(
                tuple(Case(image, patients[image]) for image in waiting),
                tuple(Case(image, patients[image]) for image in taken),
            )
        scores = self.scores(version)
        label_dice = self.index.label_dice(version.model_id, version.version)
        calibration = self._calibration(version)

        def case(image: str) -> Case:
            known = scores.get(image)
            expected = calibration.predict(known.agreement) if calibration and known else None
            _, dice = label_dice.get(image, ("", None))
            return Case(image, patients[image], known, expected, dice)

        return Pool(tuple(map(case, waiting)), tuple(map(case, taken)))

    def expected_dice(self, version: ModelVersion, agreement: float) -> dict[str, Any] | None:
        """Return the Dice to expect of a prediction, with its interval; None until enough cases were reviewed."""
        calibration = self._calibration(version)
        if calibration is None:
            return None
        value, low, high = (round(number, 4) for number in calibration.predict(agreement))
        return {"dice": value, "low": low, "high": high, "level": calibration.level, "cases": calibration.cases}

    def flags(self, image: str, version: ModelVersion, uncertainty: Uncertainty) -> list[str]:
        """Return what is unusual about the volumes of a prediction beside those of other images."""
        others = [known for other, known in self.scores(version).items() if other != image]
        found = uncertainty.structures.items()
        usual = {
            name: [one.structures[name].volume_ml for one in others if name in one.structures] for name, _ in found
        }
        told = (unusual_volume(name, one.volume_ml, usual[name], "other predictions") for name, one in found)
        return [clause for clause in told if clause]

    def _calibration(self, version: ModelVersion) -> Calibration | None:
        """Return how scores and true Dice of the version go together, or else those of all versions of the model."""
        submitted = {
            (row.image, row.version): (row.score, _mean(row.dice))
            for row in self.index.agreements(version.model_id)
            if row.score is not None and row.dice
        }
        own = {image: pair for (image, name), pair in submitted.items() if name == version.version}
        looked = self._looked_at(version)
        return _fitted((*{**own, **looked}.values(),)) or _fitted((*submitted.values(), *looked.values()))

    def _looked_at(self, version: ModelVersion) -> dict[str, tuple[float, float]]:
        """Return score and Dice of labelled cases that neither the version nor one before it was trained on."""
        scores, trained = self.scores(version), self._trained_on(version)
        known = self.index.label_dice(version.model_id, version.version)
        return {
            image: (scores[image].agreement, _mean(dice))
            for image, (_, dice) in known.items()
            if dice and image in scores and case_id_of(image) not in trained
        }

    def _trained_on(self, version: ModelVersion) -> set[str]:
        found: set[str] = set()
        one: ModelVersion | None = version
        while one is not None:
            found |= {case["case"] for case in one.record.get("lineage", {}).get("cases", [])}
            parent = one.record["parent"]
            one = self._store.version(one.model_id, parent) if parent else None
        return found

    def hint(self, model: str) -> str | None:
        """Return what to say when recent rounds stopped paying; None otherwise."""
        recent = [_mean(row.dice) for row in self.index.agreements(model) if row.dice]
        try:
            return stopping_hint(round_gains(self._store, model), recent[-RECENT:])
        except (MSHubError, OSError) as error:
            logger.warning("no hint whether labelling %s still pays: %s", model, error)
            return None


@lru_cache(maxsize=64)
def _fitted(pairs: tuple[tuple[float, float], ...]) -> Calibration | None:
    return Calibration.fit(pairs)


def submitted_agreement(datastore: StudiesFolder, image: str) -> tuple[Agreement, dict[str, str]] | None:
    """Return how a final label agrees with its pre-label, and whose that was; None without a pre-label."""
    info = datastore.get_label_info(image, FINAL)
    agreement, started_from = info.get("agreement"), info.get("started_from")
    return (Agreement.from_dict(agreement), started_from) if agreement and started_from else None


def patients_of(datastore: Datastore, images: Collection[str]) -> dict[str, str]:
    """Return image id -> patient; an image of a datastore that says nothing of patients is a patient of its own."""
    if isinstance(datastore, StudiesFolder):
        return datastore.patients(images)
    return {image: image for image in images}


def image_state(datastore: Datastore, image: str) -> str:
    """Return what changes when the image does."""
    return datastore.image_state(image) if isinstance(datastore, StudiesFolder) else ""


def label_state(datastore: Datastore, image: str) -> str:
    """Return what changes when the final label of an image does."""
    return str(datastore.get_label_info(image, FINAL).get("ts", ""))


def _mean(dice: Mapping[str, float]) -> float:
    return sum(dice.values()) / len(dice)
