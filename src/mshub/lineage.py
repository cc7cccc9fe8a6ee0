"""Where a version comes from: its parents, the cases it saw, and the verdict it got.

A version that a training made has ``lineage`` in its record::

    {"original": "v1", "cases": [{"case", "digest", "reviewed", ...}], "held_out": [...], "left_out": {case: reason},
     "unusable": [digests of readable cases that were left out],
     "recipe": {...}, "scores": {"candidate": [...], "v3": [...]}, "losses": [...], "verdict": {...}, "job": "...",
     "seconds": {...}}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mshub.cases import ReviewedCase
from mshub.scores import CaseScore, mean_dice
from mshub.store import ModelStore, ModelVersion

CANDIDATE = "candidate"
"""The version's own name among the ``scores`` of its record, which are written before it has a number."""


def original(store: ModelStore, version: ModelVersion) -> ModelVersion:
    """Return the version that `version` descends from, itself if it was installed as it is."""
    while version.record["parent"] is not None:
        version = store.version(version.model_id, version.record["parent"])
    return version


def used_digests(version: ModelVersion) -> set[str]:
    """Return the digests of the reviewed cases that a version was trained on or judged by, or that were of no use."""
    lineage = version.record.get("lineage", {})
    cases = [*lineage.get("cases", []), *lineage.get("held_out", [])]
    return {case["digest"] for case in cases} | set(lineage.get("unusable", []))


def new_cases(store: ModelStore, model_id: str, cases: Iterable[ReviewedCase]) -> list[ReviewedCase]:
    """Return the reviewed cases that no version of a model has seen as they are now."""
    return _unseen(cases, store.versions(model_id))


def unserved_cases(store: ModelStore, model_id: str, cases: Iterable[ReviewedCase]) -> list[ReviewedCase]:
    """Return the reviewed cases that no version which ever served has seen as they are now."""
    served = {step["to"] for step in store.history(model_id)}
    return _unseen(cases, [version for version in store.versions(model_id) if version.version in served])


def _unseen(cases: Iterable[ReviewedCase], versions: Iterable[ModelVersion]) -> list[ReviewedCase]:
    seen: set[str] = set().union(*(used_digests(version) for version in versions))
    return [case for case in cases if case.digest not in seen]


def fitting_cases(cases: Iterable[ReviewedCase], structures: Sequence[str], channels: int) -> list[ReviewedCase]:
    """Return the cases a model can learn from: some of its structures reviewed, and its number of channels."""
    return [case for case in cases if case.structures(structures) and len(case.images) == channels]


def rounds(store: ModelStore, model_id: str) -> list[dict[str, Any]]:
    """Return one row per version, oldest first, for tables and curves.

    Each has ``version``, ``parent``, ``created``, ``cases`` (trained on), ``held_out``, ``outcome`` (of the gate; None
    where none was asked) and ``mean_dice`` (on the hold-out; None where it was not measured).
    """
    return [_row(version) for version in store.versions(model_id)]


def _row(version: ModelVersion) -> dict[str, Any]:
    lineage = version.record.get("lineage", {})
    own = [CaseScore.from_dict(score) for score in lineage.get("scores", {}).get(CANDIDATE, [])]
    return {
        "version": version.version,
        "parent": version.record["parent"],
        "created": version.record["created"],
        "cases": len(lineage.get("cases", [])),
        "held_out": len(lineage.get("held_out", [])),
        "outcome": lineage.get("verdict", {}).get("outcome"),
        "mean_dice": mean_dice(own) if own else None,
    }
