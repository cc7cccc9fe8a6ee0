"""From a reviewed label to what a network may learn from it: a model's own integers, by name, and ``ignore``.

What nobody looked at is unknown, not background: learning it as background would unlearn the structures a person left
alone. nnU-Net leaves the voxels with the ``ignore`` value out of its loss.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from scipy import ndimage

from mshub.cases import ReviewedCase
from mshub.dataset_json import read_labels
from mshub.errors import TrainingError
from mshub.geometry import Array, Grid, check_same_grid
from mshub.label_rules import BACKGROUND, IGNORE, listed, refusal
from mshub.volume_io import read_volume

UNSURE_MARGIN_MM = 3.0
"""Voxels this near to an unreviewed structure, as the model sees it, are left out of the training too."""


def training_dataset(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``dataset.json`` to train with: the same outputs, and an ``ignore`` label, which adds no output.

    nnU-Net trains on integers without gaps only; where the declared ones have gaps, those it predicts are used.

    Raises
    ------
    TrainingError
        A region-based model whose predicted values do not lie in their own regions only: no label could be learned
        back.
    """
    labels = read_labels(dataset)
    if labels.has_regions:
        declared = dict(dataset["labels"])
        _refuse_odd_regions(declared, labels.predicted)
        highest = max(value for region in declared.values() for value in np.atleast_1d(region))
        ignore = labels.ignore_value if labels.ignore_value is not None else int(highest) + 1
        return {**dataset, "labels": {**declared, IGNORE: ignore}}
    ignore = max(labels.predicted.values()) + 1
    return {**dataset, "labels": {BACKGROUND: 0, **labels.predicted, IGNORE: ignore}}


def without_ignore(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``dataset.json`` without its ``ignore`` label."""
    return {**dataset, "labels": {name: value for name, value in dataset["labels"].items() if name != IGNORE}}


def refuse_unnamed(label: Array, values: Mapping[str, int]) -> None:
    """Refuse a label map with a value that has no name: training would take it for background.

    Parameters
    ----------
    label : ndarray
        Integers, or floats that are whole numbers, as some tools save them.
    values : mapping of str to int
        Structure -> integer.

    Raises
    ------
    LabelError
        Names the values.
    """
    nameless = sorted(set(np.unique(label).tolist()) - {0, *values.values()})
    if nameless:
        raise refusal(
            "The label holds values that no structure has",
            found=listed(f"{value:g}" for value in nameless[:5]),
            expected=listed(f"{value} ({name})" for name, value in values.items()),
            fix="name them in dataset.json, or paint them out; a resampled label must keep whole numbers",
        )


def read_reviewed_label(case: ReviewedCase, image: Grid) -> Array:
    """Read the label of a case, axes x, y, z, numbered as ``case.values`` says.

    Raises
    ------
    CaseError, GeometryError
        It cannot be read, or lies on another grid than its image.
    LabelError
        It holds a value without a name.
    """
    label = read_volume(case.label, allow_constant=True)
    check_same_grid(label.grid, image, f"the label of {case.case_id}", "its image")
    refuse_unnamed(label.array_xyz, case.values)
    return label.array_xyz


def training_labels(
    label: Array,
    values: Mapping[str, int],
    reviewed: Collection[str],
    targets: Mapping[str, int],
    ignore: int,
    unsure: Array | None = None,
) -> Array:
    """Return the label map to train on.

    Parameters
    ----------
    label : ndarray of int
        The reviewed label map, numbered as `values` says; any axis order.
    values : mapping of str to int
        Structure -> integer in `label`. Structures of other models are background here.
    reviewed : collection of str
        Structures a person looked at.
    targets : mapping of str to int
        The model's structures -> integers it is trained on.
    ignore : int
        For voxels nothing is known about.
    unsure : ndarray of bool, optional
        Where structures that nobody reviewed may be: voxels there that are none of the model's structures in `label`
        are ``ignore``. Without it, every unlabelled voxel is, if the model has such structures.

    Returns
    -------
    ndarray of uint8 or uint16
        Same shape and axis order.
    """
    trained = np.zeros(label.shape, np.uint8 if ignore <= np.iinfo(np.uint8).max else np.uint16)
    unknown = [name for name in targets if name not in reviewed]
    if unknown:
        trained[label == 0 if unsure is None else unsure] = ignore
    for name in targets.keys() & values.keys():
        trained[label == values[name]] = targets[name] if name in reviewed else ignore
    return trained


def unsure_region(predicted: Array, values: Collection[int], spacing_mm: Collection[float]) -> Array:
    """Return where the structures with these values are or may be: the prediction and `UNSURE_MARGIN_MM` around it.

    Parameters
    ----------
    predicted : ndarray of int
        A model's label map.
    values : collection of int
        The unreviewed structures in it.
    spacing_mm : collection of float
        Voxel size per axis of `predicted`.
    """
    found = np.isin(predicted, list(values))
    if not found.any():
        return found
    near: Array = ndimage.distance_transform_edt(~found, sampling=list(spacing_mm)) <= UNSURE_MARGIN_MM
    return near


def _refuse_odd_regions(declared: Mapping[str, Any], predicted: Mapping[str, int]) -> None:
    regions = {name: set(np.atleast_1d(value)) for name, value in declared.items() if name in predicted}
    odd: list[str] = []
    over: set[int] = set()
    for name, region in reversed(regions.items()):  # nnU-Net writes each over those before it
        if predicted[name] not in region - over:
            odd.append(name)
        over |= region
    if odd:
        raise TrainingError(
            f"The region-based model writes {', '.join(odd)} as a value outside the region itself, or inside one that "
            "is written over it (regions_class_order in dataset.json), so its labels cannot be turned back into "
            "training labels. Expected: each region's value among the integers that no later region is made of. How to "
            "fix: fine-tune it with nnU-Net."
        )
