"""What is odd about a reviewed label beside what a model sees in the image.

None of it is an error: the person may be right and the model wrong. Somebody should look before a model that learned
from such labels serves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from mshub.geometry import Array

MOSTLY, HARDLY = 0.5, 0.1
"""Shares of a structure's voxels from which it lies where the model saw another one, and not where it saw itself."""


def label_doubts(
    reviewed: Collection[str],
    label: Array,
    values: Mapping[str, int],
    predicted: Array,
    predicted_values: Mapping[str, int],
) -> list[str]:
    """Return clauses for whoever decides about a version, none for a label that looks as expected.

    Parameters
    ----------
    reviewed : collection of str
        Structures a person looked at; of those the model knows, the others are not compared.
    label, predicted : ndarray of int
        The label, and what the model predicted, of the same shape.
    values, predicted_values : mapping of str to int
        Structure -> integer in each. Structures absent from the label may be left out of its `values`.
    """
    known = {name: value for name, value in predicted_values.items() if name in reviewed}
    seen = np.isin(predicted, list(known.values())).any()
    left = np.isin(label, [values[name] for name in known if name in values]).any()
    if seen and not left:
        return ["nothing is left of what the model saw"]
    pairs = swapped_names(label, values, predicted, known)
    return [f"{one} and {other} look exchanged: each lies where the model saw the other" for one, other in pairs]


def swapped_names(
    label: Array, values: Mapping[str, int], predicted: Array, predicted_values: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Return pairs of structures that look as if their names were exchanged.

    A person corrects borders and removes or adds structures; that each of two structures lies where the model saw the
    other, and hardly where it saw itself, is far more often a slip in the list of segments.

    Parameters
    ----------
    label, values, predicted, predicted_values
        As in `label_doubts`.
    """
    names = [name for name in values if name in predicted_values]
    moved: dict[str, str] = {}
    for name in names:
        inside = predicted[label == values[name]]
        shares = {other: np.count_nonzero(inside == predicted_values[other]) / max(1, inside.size) for other in names}
        likeliest = max(shares, key=shares.__getitem__)
        if shares[likeliest] >= MOSTLY and shares[name] <= HARDLY:
            moved[name] = likeliest
    return [(name, other) for name, other in moved.items() if name < other and moved.get(other) == name]
