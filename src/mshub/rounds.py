"""One round of the loop: reviewed cases in, a candidate version out, judged, and promoted or not.

Everything a round does can be done again: a job that was killed starts it anew and finds the preprocessed cases, the
checkpoints, the scores and, at the end, the published version where it left them. Until the one line that promotes the
candidate is written, the version that served goes on serving.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mshub.atomic_file import replace_by_copy, replace_json
from mshub.audit_line import tell
from mshub.cases import ReviewedCase
from mshub.catalogue import AS_STORED, ModelCard, draft_card
from mshub.dataset_json import read_labels
from mshub.errors import MSHubError, TrainingError
from mshub.evaluation import Evaluator, as_served
from mshub.gate import GatePolicy, Verdict, judge
from mshub.holdout import HoldOut
from mshub.install import version_record
from mshub.jobs import Job
from mshub.lineage import CANDIDATE, fitting_cases, original, unserved_cases
from mshub.nnunet.devices import resolve_device
from mshub.nnunet.engine import check_weights, prepare_openvino
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.model_writing import write_trained
from mshub.nnunet.planning import plan_model
from mshub.nnunet.predictor import PROFILES, PredictOptions
from mshub.nnunet.trainer import EpochReport, Fit, Stopped, train_fold
from mshub.nnunet.training_set import TrainingSet, prepare
from mshub.round_report import report_round
from mshub.scores import CaseScore
from mshub.store import ModelStore, ModelVersion

logger = logging.getLogger(__name__)

LOOKED_AT = 100
"""So many new labels, at most, are compared with what the parent sees: enough to notice a habit."""
GATE_FILE = "gate.toml"
"""The gate's thresholds, in `MSHUB_HOME`; without it, the defaults of `mshub.gate.GatePolicy`."""


def run_round(store: ModelStore, job: Job) -> None:
    """Do what a job asks for; its progress says how far it is and how it ended.

    Raises
    ------
    MSHubError
        The round cannot be done; nothing was promoted.
    Stopped
        Somebody asked the job to stop.
    """
    done = _published(store, job)
    if done is None:
        done = _Round(store, job).run()
    if done.model_id not in store.catalogue():
        store.keep_card(done.card)
    try:
        _promote(store, job, done)
    finally:
        report_round(store, job, done)  # also what a person has to decide about
    verdict = done.record["lineage"]["verdict"]
    message = verdict["summary"].replace("ID VERSION", f"{done.model_id} {done.version}")  # the gate knows neither
    job.tell(version=done.version, outcome=verdict["outcome"], message=message)
    shutil.rmtree(job.work, ignore_errors=True)


def _published(store: ModelStore, job: Job) -> ModelVersion | None:
    """Return the version this job published before it was interrupted."""
    versions = store.versions(job.model_id)
    return next((version for version in versions if version.record.get("lineage", {}).get("job") == job.id), None)


class _Round:
    """The part of a round before anything is published."""

    def __init__(self, store: ModelStore, job: Job) -> None:
        self._store, self._job, self._request = store, job, job.request
        self._seconds: dict[str, float] = {}
        self._left_out: dict[str, str] = {}  # case -> why it can neither train nor judge
        self._usable: list[ReviewedCase] = []
        self._device = resolve_device(self._request.device)

    def run(self) -> ModelVersion:
        policy = GatePolicy.load(self._store.home / GATE_FILE)  # a mistake in it is told before hours of training
        training, held_out = self._split()
        with self._stage("looking at the new labels"):
            new = self._new_cases([*training, *held_out])
            doubts = self._doubts(new)
        if self._parent is None:
            with self._stage("planning"):
                self._model_path = self._planned(training)
        folds = self._folds()
        with self._stage("preparing"):
            prepared = self._prepare(training)
        with self._stage("training"):
            fits = self._train(prepared, folds)
        candidate = self._write_candidate(fits)
        with self._stage("judging"):
            scores, failures = self._score(candidate, held_out)
            baselines = {name: found for name, found in scores.items() if name != CANDIDATE}
            verdict = judge(scores[CANDIDATE], baselines, policy, failures, doubts, len(new))
        return self._publish(candidate, prepared, held_out, fits, scores, verdict)

    # -- what is continued --------------------------------------------------------------------------------------

    @cached_property
    def _parent(self) -> ModelVersion | None:
        parent = self._request.parent
        return self._store.version(self._request.model_id, parent) if parent else None

    @cached_property
    def _model(self) -> ModelFolder:
        """The model folder to train: the parent's, or the one planned for these cases."""
        return ModelFolder.open(self._parent.model_path if self._parent else self._model_path)

    @cached_property
    def _card(self) -> ModelCard:
        if self._parent:
            return self._parent.card
        known = self._store.catalogue()
        model_id = self._request.model_id
        return known.get(model_id) if model_id in known else draft_card(model_id, self._model.dataset)

    @property
    def _options(self) -> PredictOptions:
        return as_served(self._card, str(self._device))

    # -- the stages ---------------------------------------------------------------------------------------------

    def _split(self) -> tuple[list[ReviewedCase], list[ReviewedCase]]:
        structures, channels = self._wanted()
        cases = fitting_cases(self._request.cases, structures, channels)
        if not cases:
            raise TrainingError(
                f"None of the {len(self._request.cases)} reviewed cases fits {self._request.model_id}: expected "
                f"{channels} channel(s) and at least one of {', '.join(structures)} reviewed."
            )
        ledger = self._store.home / "models" / self._request.model_id / "holdout.json"
        self._usable = self._readable(cases)
        training, held_out = HoldOut(ledger).split(self._usable)
        logger.info("%d cases to train on, %d held out", len(training), len(held_out))
        if not training:
            raise TrainingError(
                f"All {len(held_out)} reviewed cases belong to patients that judge versions and never train. Review "
                "cases of further patients."
            )
        return training, held_out

    def _readable(self, cases: Sequence[ReviewedCase]) -> list[ReviewedCase]:
        """Return the cases whose files are there; from here on, each knows its digest."""
        for case in cases:
            try:
                _ = case.digest
            except MSHubError as error:
                logger.warning("%s is left out: %s", case.case_id, error)
                self._left_out[case.case_id] = str(error)
        readable = [case for case in cases if case.case_id not in self._left_out]
        if not readable:
            raise TrainingError(f"None of the reviewed cases can be read. {next(iter(self._left_out.values()))}")
        return readable

    def _wanted(self) -> tuple[list[str], int]:
        """Return the model's structures and its number of channels."""
        if self._parent:
            return list(self._parent.record["labels"]), len(self._parent.record["channels"])
        dataset = self._request.dataset or {}
        return list(read_labels(dataset).predicted), len(dataset["channel_names"])

    def _new_cases(self, cases: Sequence[ReviewedCase]) -> list[ReviewedCase]:
        """Return the cases that no version that served has seen as they are now, of very many a sample."""
        new = unserved_cases(self._store, self._request.model_id, cases)
        if len(new) <= LOOKED_AT:
            return new
        logger.info("looking at %d of %d new labels", LOOKED_AT, len(new))
        return sorted(new, key=lambda case: (not case.facts.get("doubts"), case.digest))[:LOOKED_AT]

    def _doubts(self, new: Sequence[ReviewedCase]) -> dict[str, list[str]]:
        """Return what is odd about new labels: what was said when they came, and what the parent's eyes say now."""
        kept = self._job.work / "doubts.json"
        found: dict[str, list[str]] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        parent = Evaluator(self._model, replace(self._options, profile=PROFILES["balanced"])) if self._parent else None
        on_case = self._counting("looking at new label", len(new))
        for number, case in enumerate(new):
            if case.digest in found:
                continue
            on_case(number)
            try:
                seen = parent.doubts(case) if parent else []
            except MSHubError:
                seen = []  # the stage that needs the case says what is wrong with it
            found[case.digest] = list(dict.fromkeys([*(case.facts.get("doubts") or ()), *seen]))
            replace_json(kept, found)
        for case in new:
            for doubt in found[case.digest]:
                logger.warning("look at the label of %s: %s", case.case_id, doubt)
        return {case.case_id: found[case.digest] for case in new if found[case.digest]}

    def _planned(self, training: Sequence[ReviewedCase]) -> Path:
        target = self._job.work / "planned"
        if (target / "fold_0").is_dir():
            return target
        self._tell(stage="planning the network")
        request, known = self._request, self._store.catalogue()
        rules = known.get(request.model_id).input_rules if request.model_id in known else AS_STORED
        return plan_model(request.dataset or {}, training, self._job.work, request.recipe.seed, rules)

    def _prepare(self, training: Sequence[ReviewedCase]) -> TrainingSet:
        before = Evaluator(self._model, self._options) if self._parent else None

        def predict(case: ReviewedCase) -> tuple[Any, dict[str, int]]:
            prediction = before.predict(case)  # type: ignore[union-attr]
            return prediction.labels.array_xyz, prediction.names

        on_case = self._counting("preparing case", len(training))
        folder = self._store.home / "preprocessed" / self._request.model_id
        on_case(0)
        known = predict if before else None
        prepared = prepare(self._model, training, folder, known, on_case, self._card.input_rules)
        self._left_out |= prepared.left_out
        return prepared

    def _train(self, prepared: TrainingSet, folds: Sequence[str]) -> dict[str, Fit]:
        recipe = self._request.recipe
        total, started, fits = recipe.epochs * len(folds), time.monotonic(), {}
        first: list[int] = []
        for number, fold in enumerate(folds):

            def on_epoch(report: EpochReport, before: int = number * recipe.epochs) -> None:
                epoch = before + report.epoch
                first.append(epoch)
                pace = (time.monotonic() - started) / (epoch - first[0] + 1)
                best = max(report.dice, self._job.progress().get("best_metric") or 0.0)
                left = round(pace * (total - epoch))
                self._tell(epoch=epoch, best_metric=round(best, 4), loss=report.loss, eta_s=left)
                logger.info("epoch %d of %d: loss %.4f, patch Dice %.3f", epoch, total, report.loss, report.dice)

            self._tell(stage="training", epoch=number * recipe.epochs, total_epochs=total)
            stop = self._is_stopped
            fits[fold] = train_fold(self._model, fold, prepared, recipe, self._device, self._job.work, on_epoch, stop)
        return fits

    def _folds(self) -> tuple[str, ...]:
        unknown = sorted(set(self._request.recipe.folds) - set(self._model.folds))
        if unknown:
            raise TrainingError(
                f"The recipe asks for fold {', '.join(unknown)}; {self._request.model_id} has fold "
                f"{', '.join(self._model.folds)}."
            )
        return self._request.recipe.folds or self._model.folds

    def _write_candidate(self, fits: dict[str, Fit]) -> ModelFolder:
        path = self._job.work / "candidate"
        shutil.rmtree(path, ignore_errors=True)
        write_trained(path, self._model, {fold: fit.weights for fold, fit in fits.items()})
        candidate = ModelFolder.open(path)
        check_weights(candidate)
        return candidate

    def _score(
        self, candidate: ModelFolder, held_out: Sequence[ReviewedCase]
    ) -> tuple[dict[str, list[CaseScore]], dict[str, str]]:
        """Score the candidate, the version that serves and the original on the hold-out."""
        scores: dict[str, list[CaseScore]] = {}
        for version in self._baselines():
            options = as_served(version.card, str(self._device))
            evaluator = Evaluator(ModelFolder.open(version.model_path), options, self._kept_scores(version))
            scores[version.version], broken = evaluator.score(
                held_out, self._counting(f"judging {version.version}: case", len(held_out))
            )
            held_out = [case for case in held_out if case.case_id not in broken]  # judges nobody: not its fault
            self._left_out |= broken
        judges = {case.case_id for case in held_out}
        scores = {name: [score for score in found if score.case_id in judges] for name, found in scores.items()}
        evaluator = Evaluator(candidate, self._options, self._own_scores)
        scores[CANDIDATE], failures = evaluator.score(
            held_out, self._counting("judging the candidate: case", len(held_out))
        )
        return scores, failures

    @property
    def _own_scores(self) -> Path:
        return self._job.work / "scores.json"

    def _kept_scores(self, version: ModelVersion) -> Path:
        return self._store.home / "scores" / version.model_id / f"{version.version}.json"

    def _baselines(self) -> list[ModelVersion]:
        if self._parent is None:
            return []
        serving = self._store.current(self._request.model_id)
        first = original(self._store, serving)
        return [serving] if first.version == serving.version else [serving, first]

    # -- what comes of it ---------------------------------------------------------------------------------------

    def _publish(
        self,
        candidate: ModelFolder,
        prepared: TrainingSet,
        held_out: Sequence[ReviewedCase],
        fits: dict[str, Fit],
        scores: dict[str, list[CaseScore]],
        verdict: Verdict,
    ) -> ModelVersion:
        parent = self._parent
        origin = {"how": "fine-tuned" if parent else "trained here", "from": f"{len(prepared.cases)} reviewed cases"}
        record = version_record(candidate, self._card, origin, parent.version if parent else None)
        epochs = zip(*(fit.losses for fit in fits.values()), strict=True)
        record["lineage"] = {
            "job": self._job.id,
            "client": self._request.client,
            "original": original(self._store, parent).version if parent else None,
            "cases": [_case_facts(case) for case in prepared.cases.values()],
            "held_out": [_case_facts(case) for case in held_out if case.case_id not in self._left_out],
            "left_out": self._left_out,
            "unusable": [case.digest for case in self._usable if case.case_id in self._left_out],
            "recipe": self._request.recipe.as_dict(),
            "trained_with": {
                fold: {"batch_size": fit.batch_size, "patch_size": list(fit.patch_size)} for fold, fit in fits.items()
            },
            "device": str(self._device),
            "losses": [sum(losses) / len(losses) for losses in epochs],
            "scores": {name: [score.as_dict() for score in found] for name, found in scores.items()},
            "verdict": verdict.as_dict(),
            "seconds": {name: round(value, 1) for name, value in self._seconds.items()},
        }
        with self._store.staging() as staging:
            model = staging / "model"
            shutil.copytree(candidate.path, model)
            version = self._store.publish(self._request.model_id, model, record, serve_first=False)
        if version.record.get("lineage", {}).get("job") != self._job.id:
            raise TrainingError(
                f"The training made the very weights of {version.version}, which exists already, so there is no new "
                f"version. Judged again, it is {verdict.summary} How to fix: review further cases or change the "
                f"recipe; to serve these weights, `mshub promote {version.model_id} {version.version}`."
            )
        if self._own_scores.is_file():
            replace_by_copy(self._own_scores, self._kept_scores(version))
        return version

    def _is_stopped(self) -> bool:
        return self._job.is_to_end

    def _tell(self, **facts: Any) -> None:
        self._job.tell(**facts)

    def _counting(self, what: str, total: int) -> Callable[[int], None]:
        """Return what is to be called with the number of cases before each one."""

        def on_case(before: int) -> None:
            if self._is_stopped():
                raise Stopped
            self._tell(stage=f"{what} {min(before + 1, total)} of {total}")

        return on_case

    @contextmanager
    def _stage(self, name: str) -> Any:
        if self._is_stopped():
            raise Stopped
        started = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - started


def _case_facts(case: ReviewedCase) -> dict[str, Any]:
    return {"case": case.case_id, "digest": case.digest, "reviewed": list(case.reviewed), **case.facts}


def _prepare(store: ModelStore, version: ModelVersion) -> None:
    """Let OpenVINO prepare a version before it serves, so that nobody waits for that."""
    if os.environ.get("MSHUB_ENGINE") != "torch":
        reason = prepare_openvino(ModelFolder.open(version.model_path), store.prepared_networks)
        logger.info("on a CPU: %s", reason or "OpenVINO will run it")


def _promote(store: ModelStore, job: Job, version: ModelVersion) -> None:
    """Let the candidate serve if the gate says so, and if what it was compared with still serves."""
    lineage = version.record["lineage"]
    if lineage["verdict"]["outcome"] != "promoted" or any(
        step["to"] == version.version for step in store.history(version.model_id)
    ):
        return
    _prepare(store, version)
    reason = f"gate: {lineage['verdict']['summary']}"
    store.promote(version.model_id, version.version, reason, instead_of=lineage["scores"].keys())
    tell(store.home, "gate", model=version.model_id, version=version.version, job=job.id)
