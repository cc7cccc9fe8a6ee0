"""The labels in nnU-Net's ``dataset.json``, and the values nnU-Net writes for them.

Both styles are read: v2 (``labels: {name: int or [ints]}``, with ``regions_class_order`` for region-based models) and
v1 (``labels: {"1": name}``). What contradicts itself is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

from mshub.label_rules import BACKGROUND, IGNORE, MAX_VALUE, is_integer, listed, refusal, refuse_similar_names

_Declared = list[tuple[str, tuple[int, ...]]]
_refusal = partial(refusal, fix="use the dataset.json the model was trained with")


@dataclass(frozen=True)
class DatasetLabels:
    """What ``dataset.json`` says about a model's labels.

    Attributes
    ----------
    predicted : dict of str to int
        Foreground structures and their values in nnU-Net's output, ascending, all >= 1.
    drawn : dict of str to int
        The same structures and their values in label files: as declared, gaps and all; for regions, as predicted.
    has_regions : bool
        The model was trained on overlapping regions.
    ignore_value : int or None
        Declared value of the ``ignore`` label, where there is one.
    """

    predicted: dict[str, int]
    drawn: dict[str, int]
    has_regions: bool
    ignore_value: int | None


def read_labels(dataset: Mapping[str, object]) -> DatasetLabels:
    """Read the labels of a trained model.

    Parameters
    ----------
    dataset : mapping
        Content of ``dataset.json``.

    Returns
    -------
    DatasetLabels
        Predicted values follow ``nnunetv2.utilities.label_handling.LabelManager``: region i is written as
        ``regions_class_order[i]``; any other model writes the index of the winning output channel, so where the
        declared integers have gaps the predicted ones have none.

    Raises
    ------
    LabelError
        The labels are missing, contradictory or ambiguous.
    """
    declared = _declared_labels(dataset)
    refuse_similar_names([name for name, _ in declared])
    structures = [(name, values) for name, values in declared if name not in (BACKGROUND, IGNORE)]
    has_regions = any(len(values) > 1 for _, values in structures)
    predicted = _region_values(structures, dataset) if has_regions else _channel_values(structures)
    _refuse_no_foreground(predicted)
    ascending = dict(sorted(predicted.items(), key=itemgetter(1)))
    declared_values = {name: values[0] for name, values in structures}
    drawn = ascending if has_regions else {name: declared_values[name] for name in ascending}
    return DatasetLabels(ascending, drawn, has_regions, _ignore_value(declared))


def is_v1_style(labels: object) -> bool:
    """Tell whether `labels` of a ``dataset.json`` are in nnU-Net v1 style, ``{"0": "background", "1": "liver"}``."""
    return (
        isinstance(labels, Mapping)
        and bool(labels)
        and all(str(key).strip().isdecimal() and isinstance(value, str) for key, value in labels.items())
    )


def _declared_labels(dataset: Mapping[str, object]) -> _Declared:
    labels = dataset.get("labels")
    if not isinstance(labels, Mapping) or not labels:
        raise _refusal(
            "dataset.json has no usable labels",
            found=f"labels: {labels!r}",
            expected="a table of names and integers, such as {'background': 0, 'liver': 1}",
        )
    if is_v1_style(labels):
        return _declared_by_v1(labels)
    declared = [(str(name), _integers(str(name), value)) for name, value in labels.items()]
    _refuse_missing_background(labels)
    return declared


def _declared_by_v1(labels: Mapping[Any, str]) -> _Declared:
    """Turn ``{"1": "liver"}`` around; v1 gives 0 to the background whatever its name."""
    by_value = [(int(str(key)), name) for key, name in labels.items()]
    return [(BACKGROUND, (0,)), *((name, (value,)) for value, name in by_value if value != 0)]


def _integers(name: str, value: object) -> tuple[int, ...]:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    usable = tuple(int(item) for item in items if is_integer(item) and 0 <= item <= MAX_VALUE)
    if not usable or len(usable) != len(items):
        raise _refusal(
            f"Label {name!r} in dataset.json has an impossible value",
            found=repr(value),
            expected=f"an integer from 0 to {MAX_VALUE:,} or, for a region, a list of them",
        )
    return usable


def _refuse_missing_background(labels: Mapping[Any, object]) -> None:
    if not is_integer(labels.get(BACKGROUND)) or labels[BACKGROUND] != 0:
        raise _refusal(
            "dataset.json does not declare the background",
            found=f"{BACKGROUND}: {labels.get(BACKGROUND)!r}",
            expected=f"{BACKGROUND}: 0",
        )


def _refuse_no_foreground(predicted: Mapping[str, int]) -> None:
    if not predicted:
        raise _refusal(
            "dataset.json declares no structure to segment",
            found="background and ignore only",
            expected="at least one more label",
        )


def _ignore_value(declared: _Declared) -> int | None:
    ignored = dict(declared).get(IGNORE)
    if ignored is None:
        return None
    expected = 1 + max(value for name, values in declared if name != IGNORE for value in values)
    if ignored != (expected,):
        raise _refusal(
            "The 'ignore' label must come last, as nnU-Net demands",
            found=f"{IGNORE}: {listed(ignored)}",
            expected=f"{IGNORE}: {expected}, one above all others",
        )
    return expected


def _channel_values(structures: _Declared) -> dict[str, int]:
    """Values of a model without regions: nnU-Net writes the channel index, one channel per label, ascending."""
    value_of = {name: values[0] for name, values in structures}
    _refuse_shared_values([(BACKGROUND, 0), *value_of.items()])
    return {name: channel for channel, name in enumerate(sorted(value_of, key=value_of.__getitem__), start=1)}


def _region_values(structures: _Declared, dataset: Mapping[str, object]) -> dict[str, int]:
    names = [name for name, values in structures if set(values) != {0}]  # nnU-Net gives a background region no value
    order = dataset.get("regions_class_order")
    given = list(order) if isinstance(order, (list, tuple)) else None
    values = [value for value in given or () if is_integer(value) and 0 < value <= MAX_VALUE]
    if given is None or not len(given) == len(values) == len(names):
        raise _refusal(
            "A region-based model needs 'regions_class_order' in dataset.json",
            found=f"regions_class_order: {order!r}",
            expected=f"{len(names)} positive integers up to {MAX_VALUE:,}, one for each of {listed(names)}",
        )
    value_of = dict(zip(names, map(int, values), strict=True))
    _refuse_shared_values(list(value_of.items()))
    return value_of


def _refuse_shared_values(named_values: Sequence[tuple[str, int]]) -> None:
    counts = Counter(value for _, value in named_values)
    shared = [f"{name} = {value}" for name, value in named_values if counts[value] > 1]
    if shared:
        raise _refusal("Labels in dataset.json share a value", found=listed(shared), expected="one value per name")
