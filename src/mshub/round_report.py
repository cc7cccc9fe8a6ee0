"""The report of one round: what is in the version's record, and pictures of the cases it did worst."""

from __future__ import annotations

import logging
from typing import Any

from mshub.evaluation import Evaluator, as_served
from mshub.jobs import Job, JobRequest
from mshub.lineage import CANDIDATE, rounds
from mshub.nnunet.folder import ModelFolder
from mshub.report.contents import Overlay, RoundReport, worst_cases
from mshub.report.page import write_report
from mshub.scores import CaseScore
from mshub.store import ModelStore, ModelVersion
from mshub.volume_io import read_volume

logger = logging.getLogger(__name__)

OVERLAYS = 3


def report_round(store: ModelStore, job: Job, version: ModelVersion) -> None:
    """Write the round's report; a report that cannot be drawn must not undo a round that is done."""
    path = store.home / "reports" / version.model_id / f"{version.version}.html"
    try:
        job.tell(stage="writing the report")
        write_report(path, _round_report(store, job.request, version))
        job.tell(report=str(path.relative_to(store.home)))
    except Exception:
        logger.exception("the report could not be written")


def _round_report(store: ModelStore, request: JobRequest, version: ModelVersion) -> RoundReport:
    lineage = version.record["lineage"]
    scores = {
        version.version if name == CANDIDATE else name: [CaseScore.from_dict(score) for score in stored]
        for name, stored in lineage["scores"].items()
    }
    history = [row for row in rounds(store, version.model_id) if int(row["version"][1:]) <= version.number]
    left_out = [f"{case} was left out: {reason}" for case, reason in lineage["left_out"].items()]
    return RoundReport(
        model_id=version.model_id,
        title=version.card.title,
        version=version.version,
        parent=version.record["parent"],
        original=lineage["original"],
        created=version.record["created"],
        verdict=lineage["verdict"],
        recipe={**lineage["recipe"], "device": lineage["device"], "trained with": lineage["trained_with"]},
        lineage=history,
        training_cases=[_training_row(case) for case in lineage["cases"]],
        held_out_cases=[case["case"] for case in lineage["held_out"]],
        scores=scores,
        losses=lineage["losses"],
        overlays=_overlays(store, request, version, scores),
        seconds=lineage["seconds"],
        notes=left_out,
    )


def _training_row(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "case": case["case"],
        "structures": case["reviewed"],
        "started_from": case.get("started_from"),
        "submitted": case.get("submitted"),
        "client": case.get("client_id"),
    }


def _overlays(
    store: ModelStore, request: JobRequest, version: ModelVersion, scores: dict[str, list[CaseScore]]
) -> list[Overlay]:
    """Return the worst held-out cases, predicted again by the candidate and by its parent."""
    parent = version.record["parent"]
    after = {score.case_id: score for score in scores[version.version]}
    before = {score.case_id: score for score in scores.get(parent or "", [])}
    worst = worst_cases(after.values(), before.values(), OVERLAYS)
    cases = {case.case_id: case for case in request.cases}
    versions = [version, *([store.version(version.model_id, parent)] if parent else [])]
    evaluators = [Evaluator(ModelFolder.open(one.model_path), as_served(one.card, request.device)) for one in versions]
    found = []
    for case_id in worst:
        case = cases[case_id]
        predictions = [evaluator.predict(case) for evaluator in evaluators]
        names = {name: value for name, value in predictions[0].names.items() if name in case.reviewed}
        label = read_volume(case.label, allow_constant=True).array_xyz
        reviewed = label * 0
        for name, value in names.items():
            if name in case.values:
                reviewed[label == case.values[name]] = value
        found.append(
            Overlay(
                case_id=case_id,
                image=read_volume(case.images[0]),
                names=names,
                reviewed=reviewed,
                after=predictions[0].labels.array_xyz,
                before=predictions[1].labels.array_xyz if parent else None,
                dice_after=after[case_id].mean,
                dice_before=before[case_id].mean if case_id in before else None,
            )
        )
    return found
