"""What nnU-Net v1 did to a finished label map: of chosen structures, only the largest connected component is kept.

A release of v1 says in ``postprocessing.json`` for which, as cross-validation found it to help. Its converted
``plans.json`` says the same under `KEEP_LARGEST`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from mshub.errors import ModelFolderError
from mshub.geometry import Array

KEEP_LARGEST = "mshub_keeps_largest_component"  # in plans.json; nnU-Net itself ignores it
Rule = dict[str, Any]
MAX_RULES = 1000
_MAX_BYTES = 10 * 2**20  # it lists scores per case beside what is needed


def read_v1_rules(path: Path, classes: int) -> list[Rule]:
    """Return the rules in a v1 model's ``postprocessing.json``, in the order v1 applies them.

    Parameters
    ----------
    path : Path
    classes : int
        Number of structures of the model; v1's ``null`` stands for each of them.

    Returns
    -------
    list of dict
        ``classes`` (values taken together as one structure) and ``minimum_mm3`` (components of at least this size are
        kept too; None keeps none of them).

    Raises
    ------
    ModelFolderError
        It is not as v1 writes it.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        chosen = content["for_which_classes"]
        if chosen is not None and len(chosen) > MAX_RULES:
            raise ValueError(f"{len(chosen):,} classes in for_which_classes, at most {MAX_RULES} are followed")
        sizes = ast.literal_eval(content.get("min_valid_object_sizes", "None"))
        return [_rule(item, sizes, classes) for item in (range(1, classes + 1) if chosen is None else chosen)]
    except (LookupError, TypeError, ValueError, SyntaxError, AttributeError, RecursionError, MemoryError) as error:
        raise ModelFolderError(
            f"postprocessing.json is not as nnU-Net v1 writes it ({type(error).__name__}: {error}). Expected "
            "for_which_classes, and the size per class in min_valid_object_sizes: copy the model again, or leave the "
            "file out to predict without it."
        ) from error


def check_rules(rules: Sequence[Rule]) -> None:
    """Refuse rules in a ``plans.json`` that MSHub did not write.

    Raises
    ------
    ModelFolderError
        Names `KEEP_LARGEST`.
    """
    if len(rules) > MAX_RULES:
        raise ModelFolderError(
            f"plans.json: {KEEP_LARGEST} has {len(rules):,} rules; at most {MAX_RULES} are followed."
        )
    for rule in rules:
        size, values = rule["minimum_mm3"], rule["classes"]
        if not all(type(value) is int for value in values) or not isinstance(size, (int, float, type(None))):
            raise ModelFolderError(f"plans.json: {KEEP_LARGEST} is not as MSHub writes it. Add the model again.")


def keep_largest(segmentation: Array, rules: Sequence[Rule], voxel_mm3: float) -> Array:
    """Apply rules to a label map, as nnU-Net v1's ``remove_all_but_the_largest_connected_component`` does.

    Parameters
    ----------
    segmentation : ndarray of int, axes (z, y, x)
    rules : sequence of dict
        As `read_v1_rules` returns them. Of components of one largest size, all are kept.
    voxel_mm3 : float
        Volume of a voxel.

    Returns
    -------
    ndarray
        A copy, or the same where there is no rule; components are connected by faces.
    """
    if not rules:
        return segmentation
    kept = segmentation.copy()
    for rule in rules:
        components, count = ndimage.label(np.isin(kept, rule["classes"]))
        if count < 2:
            continue
        sizes = np.bincount(components.reshape(-1), minlength=count + 1)[1:] * voxel_mm3
        removed = sizes != sizes.max()
        if rule["minimum_mm3"] is not None:
            removed &= sizes < rule["minimum_mm3"]
        kept[np.concatenate([[False], removed])[components]] = 0
    return kept


def _rule(item: Any, sizes: Any, classes: int) -> Rule:
    group = item if isinstance(item, list) else [item]
    if not group or not all(type(value) is int and 1 <= value <= classes for value in group):
        raise ValueError(f"for_which_classes names {item!r}, the model has the classes 1 to {classes}")
    size = None if sizes is None else float(sizes[tuple(item) if isinstance(item, list) else item])
    return {"classes": group, "minimum_mm3": size}
