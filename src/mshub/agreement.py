"""How a submitted label agrees with the pre-label it started from: what a correction was worth.

MONAI Label has a scoring method of that name, which is wrong for several structures: two that are exchanged altogether
score 1.33 there. Here every structure is compared with its namesake, and by the definition of Dice that the gate uses.

Every number comes from one joint histogram of the two label maps, so that forty structures cost no more than two.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mshub.errors import GeometryError
from mshub.geometry import Array


@dataclass(frozen=True)
class Agreement:
    """Agreement of a submitted label with the pre-label it started from.

    Attributes
    ----------
    dice : dict of str to float
        Structure -> Dice of the two, 0 to 1, for every structure a person reviewed that the pre-label's model knows,
        in the model's order. A structure that is absent from both scores 1.
    edited_voxels : int
        Voxels that are another structure, or none, in the submitted label.
    """

    dice: dict[str, float]
    edited_voxels: int

    @property
    def mean(self) -> float | None:
        """Mean Dice over the structures; None where the person reviewed none of the model's."""
        return float(np.mean(list(self.dice.values()))) if self.dice else None

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON; `Agreement.from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Agreement:
        """Read what `as_dict` wrote."""
        return cls(dict(stored["dice"]), stored["edited_voxels"])


def agreement(
    reviewed: Collection[str],
    label: Array,
    values: Mapping[str, int],
    predicted: Array,
    predicted_values: Mapping[str, int],
) -> Agreement:
    """Compare a submitted label with the pre-label it started from, by the names of their structures.

    Parameters
    ----------
    reviewed : collection of str
        Structures a person looked at. Those of the model that are not among them are unknown: they are neither scored
        nor edited, whatever is drawn. Structures that the model does not know are no part of a Dice; their voxels
        count as edited.
    label, predicted : ndarray of int
        The submitted label and the pre-label, of the same shape, any axis and memory order.
    values, predicted_values : mapping of str to int
        Structure -> integer, not 0, in each. Structures absent from the label may be left out of its `values`.

    Raises
    ------
    GeometryError
        The two have different shapes.
    """
    if label.shape != predicted.shape:
        raise GeometryError(
            f"The label and its pre-label cannot be compared. Found: {label.shape} and {predicted.shape} voxels. "
            "Expected: the same grid. How to fix: bring both onto the image's grid first."
        )
    scored = [name for name in predicted_values if name in reviewed]
    names = [*scored, *(name for name in values if name not in predicted_values)]
    joint = _joint_counts(label, _Codes.of(values, names), predicted, _Codes.of(predicted_values, names), len(names))
    same, sizes = np.diagonal(joint), joint.sum(axis=0) + joint.sum(axis=1)
    dice = {name: _dice(int(same[code]), int(sizes[code])) for code, name in enumerate(scored, start=1)}
    return Agreement(dice, int(joint.sum() - same.sum()))


def _dice(both: int, sizes: int) -> float:
    """Return what `mshub.scores.dice` does, from the voxels in both and the sum of the voxels in each."""
    return 2 * both / sizes if sizes else 1.0


@dataclass(frozen=True, eq=False)
class _Codes:
    """The integers of one label map, ascending, and the code of the structure that each stands for; 0 for none."""

    numbers: Array
    codes: Array

    @classmethod
    def of(cls, values: Mapping[str, int], names: Sequence[str]) -> _Codes:
        """Number the structures `names` from 1, whatever their integers."""
        known = {0: 0, **{values[name]: code for code, name in enumerate(names, start=1) if name in values}}
        numbers = sorted(known)
        return cls(np.array(numbers), np.array([known[number] for number in numbers]))

    def __call__(self, voxels: Array) -> Array:
        """Return the codes of voxels. A search, not a table: clients choose the integers, and may choose large ones."""
        places = np.minimum(np.searchsorted(self.numbers, voxels), len(self.numbers) - 1)
        return np.where(self.numbers[places] == voxels, self.codes[places], 0)


def _joint_counts(label: Array, codes: _Codes, predicted: Array, predicted_codes: _Codes, structures: int) -> Array:
    """Return how many voxels have which code in the label (rows) and in the prediction (columns).

    The voxels that are 0 in both, most of a scan, are left out.
    """
    size = structures + 1
    counts = np.zeros(size * size, np.int64)
    slabs_axis = int(np.argmax(np.abs(label.strides)))  # slabs that are contiguous in memory, whatever its order
    for one, other in zip(np.moveaxis(label, slabs_axis, 0), np.moveaxis(predicted, slabs_axis, 0), strict=True):
        drawn = (one != 0) | (other != 0)
        joint = codes(one[drawn]) * size + predicted_codes(other[drawn])
        counts += np.bincount(joint, minlength=size * size)
    return counts.reshape(size, size)
