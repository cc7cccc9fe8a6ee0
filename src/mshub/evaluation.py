"""Score versions on held-out cases, each pair of version and case once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mshub.atomic_file import replace_json
from mshub.cases import ReviewedCase
from mshub.catalogue import ModelCard
from mshub.doubts import label_doubts
from mshub.errors import MSHubError
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, Prediction, PredictOptions
from mshub.scores import CaseScore, score_case
from mshub.training_labels import read_reviewed_label

logger = logging.getLogger(__name__)


def as_served(card: ModelCard, device: str) -> PredictOptions:
    """Return the options by which the server predicts by default."""
    return PredictOptions(PROFILES["accurate"], device=device, rules=card.input_rules)


class Evaluator:
    """Predicts as the server would, and compares with what a person reviewed.

    Parameters
    ----------
    folder : ModelFolder
        The version's model.
    options : PredictOptions
        Profile, device and input range of the server.
    kept : Path, optional
        JSON file that keeps the scores of a published version, by the digest of the case: labels that changed are
        scored again.
    """

    def __init__(self, folder: ModelFolder, options: PredictOptions, kept: Path | None = None) -> None:
        self._folder, self._options, self._kept = folder, options, kept
        self._predictor = NNUNetPredictor(folder, NetworkCache())

    def predict(self, case: ReviewedCase) -> Prediction:
        """Segment one case."""
        return self._predictor.predict(case.images, self._options)

    def doubts(self, case: ReviewedCase) -> list[str]:
        """Return what is odd about a reviewed label beside what the version predicts; see `mshub.doubts`."""
        prediction = self.predict(case)
        label = read_reviewed_label(case, prediction.labels.grid)
        return label_doubts(case.reviewed, label, case.values, prediction.labels.array_xyz, prediction.names)

    def score(
        self, cases: Sequence[ReviewedCase], on_case: Callable[[int], None]
    ) -> tuple[list[CaseScore], dict[str, str]]:
        """Score the version on every case.

        Parameters
        ----------
        cases : sequence of ReviewedCase
        on_case : callable
            Called with the number of cases before each one; it may raise to stop.

        Returns
        -------
        scores : list of CaseScore
            In the order of the cases, without those that failed.
        failures : dict of str to str
            Case id -> why no prediction was made.
        """
        known = self._read_kept()
        scores, failures = [], {}
        for number, case in enumerate(cases):
            on_case(number)
            try:
                if case.digest not in known:
                    known[case.digest] = self._score(case)
                    self._keep(known)
            except MSHubError as error:
                logger.warning("%s cannot be scored: %s", case.case_id, error)
                failures[case.case_id] = str(error)
                continue
            # Kept by what is in the files: meanwhile the case may have got another name.
            scores.append(replace(known[case.digest], case_id=case.case_id, patient=case.patient_key))
        return scores, failures

    def _score(self, case: ReviewedCase) -> CaseScore:
        prediction = self.predict(case)
        return score_case(
            case.case_id,
            case.patient_key,
            prediction.labels.array_xyz,
            prediction.names,
            read_reviewed_label(case, prediction.labels.grid),
            case.values,
            case.structures(self._folder.labels.names),
        )

    def _read_kept(self) -> dict[str, CaseScore]:
        if self._kept is None or not self._kept.is_file():
            return {}
        stored = json.loads(self._kept.read_text(encoding="utf-8"))
        return {digest: CaseScore.from_dict(score) for digest, score in stored.items()}

    def _keep(self, scores: dict[str, CaseScore]) -> None:
        if self._kept is not None:
            replace_json(self._kept, {digest: score.as_dict() for digest, score in scores.items()})
