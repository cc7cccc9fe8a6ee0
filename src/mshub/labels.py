"""Names and integers of one model's labels, and what a client sees of them.

Three numberings meet here, and names are the only thing they share:

* *declared*: the integers in ``dataset.json``, by which the training labels were painted;
* *predicted*: the integers nnU-Net writes into a segmentation;
* *published*: the integers a client gets: contiguous 1..N in the order of the predicted values, never background.
  OHIF and 3D Slicer misname structures under any other numbering.

A client renumbers its segments as it likes, so what it sends back is mapped by name (`LabelMap.from_names`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mshub.dataset_json import is_v1_style, read_labels
from mshub.label_rules import BACKGROUND, IGNORE, fold, is_integer, listed, refusal, refuse_unfit_names, similar_names

__all__ = ["BACKGROUND", "IGNORE", "LabelMap", "is_v1_style", "refuse_unfit_names"]


@dataclass(frozen=True)
class LabelMap:
    """The structures one nnU-Net model predicts, by name.

    Build it with `LabelMap.from_dataset_json`. Instances are immutable.

    Attributes
    ----------
    names : tuple of str
        Foreground structures in ascending order of their predicted value.
    values : tuple of int
        Value of each name in nnU-Net's output, ascending, all >= 1.
    has_regions : bool
        The model was trained on overlapping regions. Its output then holds, at every voxel, the last region of
        ``regions_class_order`` that covers it: an outer region is predicted without the inner ones.
    ignore_value : int or None
        Declared value of the ``ignore`` label, which marks unlabelled voxels in training and is never predicted.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    has_regions: bool = False
    ignore_value: int | None = None

    @classmethod
    def from_dataset_json(cls, dataset: Mapping[str, object]) -> LabelMap:
        """Read the labels of a trained model.

        Parameters
        ----------
        dataset : mapping
            Content of ``dataset.json`` in nnU-Net v2 style (``labels: {name: int or [ints]}``, with
            ``regions_class_order`` for region-based models) or v1 style (``labels: {"1": name}``).

        Returns
        -------
        LabelMap
            Predicted values follow ``nnunetv2.utilities.label_handling.LabelManager``: region i is written as
            ``regions_class_order[i]``; any other model writes the index of the winning output channel, so where the
            declared integers have gaps the predicted ones have none.

        Raises
        ------
        LabelError
            The labels are missing, contradictory or ambiguous.
        """
        labels = read_labels(dataset)
        return cls(tuple(labels.predicted), tuple(labels.predicted.values()), labels.has_regions, labels.ignore_value)

    @property
    def predicted(self) -> dict[str, int]:
        """Name -> value in nnU-Net's output, foreground only, ascending."""
        return dict(zip(self.names, self.values, strict=True))

    @property
    def published(self) -> dict[str, int]:
        """Name -> value a client sees: 1..N without gaps, ascending, never background."""
        return {name: value for value, name in enumerate(self.names, start=1)}

    @property
    def dtype(self) -> np.dtype[Any]:
        """Smallest unsigned type for the published values: uint8 up to 255 structures, else uint16."""
        return np.dtype(np.uint8 if len(self.names) <= np.iinfo(np.uint8).max else np.uint16)

    def to_published_lut(self) -> npt.NDArray[Any]:
        """Return the table from predicted to published value.

        Returns
        -------
        numpy.ndarray, shape (max predicted value + 1,), uint8 or uint16
            Background and the values that no structure has map to 0: use `publish`, which refuses the latter.
        """
        lut = np.zeros(max(self.values) + 1, dtype=self.dtype)
        lut[list(self.values)] = np.arange(1, len(self.values) + 1)
        return lut

    def publish(self, segmentation: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Renumber a predicted segmentation for clients.

        Parameters
        ----------
        segmentation : numpy.ndarray
            Predicted values, integers, any shape and axis order.

        Returns
        -------
        numpy.ndarray
            Published values in a new array of the same shape and axis order; uint8, or uint16 above 255 structures.

        Raises
        ------
        LabelError
            The array does not hold integers, or holds a value that has no name.
        """
        _refuse_non_integers(segmentation)
        self._refuse_nameless(segmentation)
        if self.values == tuple(self.published.values()):  # saves the 8-byte index numpy builds per voxel
            return segmentation.astype(self.dtype)
        published: npt.NDArray[Any] = self.to_published_lut()[segmentation]
        return published

    def select(self, published_values: Iterable[int]) -> tuple[int, ...]:
        """Validate a client's choice of structures, such as OHIF's ``label_prompt``.

        Parameters
        ----------
        published_values : iterable of int
            Published values; repetitions are allowed.

        Returns
        -------
        tuple of int
            The same values, ascending, each once. An empty choice stays empty.

        Raises
        ------
        LabelError
            A value is no published value of this model.
        """
        chosen = list(published_values)
        known = self.published
        unknown = [value for value in chosen if not is_integer(value) or value not in known.values()]
        if unknown:
            raise refusal(
                "These label values are not the model's",
                found=listed(map(repr, unknown)),
                expected=f"a selection of {_numbered(known)}",
                fix="send values of models[].labels of /info/, without background",
            )
        return tuple(sorted({int(value) for value in chosen}))

    def from_names(self, client_labels: Mapping[str, int]) -> dict[int, int]:
        """Map the integers of a client's segmentation to published values, by name.

        Names are compared without regard to case and surrounding or repeated white space. A segment called
        ``background`` maps to 0.

        Parameters
        ----------
        client_labels : mapping of str to int
            Segment name -> integer in the client's array, for example ``{"Liver": 3}``.

        Returns
        -------
        dict of int to int
            Client's integer -> published value.

        Raises
        ------
        LabelError
            A name is unknown, two segments are the same structure, or an integer is 0, negative or used twice.
        """
        known = {fold(name): value for name, value in self.published.items()} | {fold(BACKGROUND): 0}
        self._refuse_unknown_names([name for name in client_labels if fold(name) not in known])
        _refuse_repeated_segments(client_labels)
        _refuse_client_values(client_labels)
        return {int(value): known[fold(name)] for name, value in client_labels.items()}

    def check_names(self, expected: Sequence[str]) -> None:
        """Check that a model card lists exactly these structures, in ascending order of value.

        Parameters
        ----------
        expected : sequence of str
            Names as the card gives them. The spelling counts.

        Raises
        ------
        LabelError
            A name is missing from the model, the model has one more, or the order differs.
        """
        if tuple(expected) == self.names:
            return
        missing = [name for name in expected if name not in self.names]
        extra = [name for name in self.names if name not in expected]
        raise refusal(
            f"The labels of the model card and of the model's dataset.json differ: {_difference(missing, extra)}",
            found=f"{listed(self.names)} (dataset.json)",
            expected=f"{listed(expected)} (card)",
            fix="check that these weights belong to this card, then correct 'labels' in the card",
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the map as plain dicts, lists, ints and strings, ready for JSON."""
        return {
            "predicted": self.predicted,
            "published": self.published,
            "has_regions": self.has_regions,
            "ignore_value": self.ignore_value,
        }

    def _refuse_nameless(self, segmentation: npt.NDArray[Any]) -> None:
        top = max(self.values)
        contiguous = top == len(self.values)
        if not segmentation.size or (contiguous and segmentation.min() >= 0 and segmentation.max() <= top):
            return
        nameless = sorted(set(np.unique(segmentation).tolist()) - {0, *self.values})
        if nameless:
            raise refusal(
                "The network predicted values that have no name",
                found=listed(nameless),
                expected=f"0 (background), {_numbered(self.predicted)}",
                fix="check that dataset.json belongs to these weights",
            )

    def _refuse_unknown_names(self, unknown: Sequence[str]) -> None:
        if unknown:
            raise refusal(
                "These segments are unknown to the model",
                found=listed(self._with_suggestion(name) for name in unknown),
                expected=f"names out of {listed(self.names)}",
                fix="rename the segments and send them again",
            )

    def _with_suggestion(self, name: str) -> str:
        close = similar_names(name, self.names)
        hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
        return f"{name!r}{hint}"


def _refuse_non_integers(segmentation: npt.NDArray[Any]) -> None:
    if not np.issubdtype(segmentation.dtype, np.integer):
        raise refusal(
            "A segmentation must hold integers",
            found=f"dtype {segmentation.dtype}",
            expected="an integer dtype",
            fix="pass nnU-Net's segmentation, not its probabilities",
        )


def _refuse_repeated_segments(client_labels: Mapping[str, int]) -> None:
    counts = Counter(fold(name) for name in client_labels)
    repeated = [repr(name) for name in client_labels if counts[fold(name)] > 1]
    if repeated:
        raise refusal(
            "Several segments are the same structure",
            found=listed(repeated),
            expected="one segment per structure",
            fix="merge or delete the spare ones and send the segmentation again",
        )


def _refuse_client_values(client_labels: Mapping[str, int]) -> None:
    counts = Counter(client_labels.values())
    for name, value in client_labels.items():
        lowest = 0 if fold(name) == BACKGROUND else 1
        if not is_integer(value) or value < lowest or counts[value] > 1:
            raise refusal(
                f"Segment {name!r} has an unusable integer",
                found=repr(value),
                expected=f"an integer >= {lowest} that no other segment has",
                fix="send each segment with the integer it has in the file",
            )


def _difference(missing: Sequence[str], extra: Sequence[str]) -> str:
    parts = [f"the model lacks {listed(missing)}"] * bool(missing) + [f"it also has {listed(extra)}"] * bool(extra)
    return ", ".join(parts) or "the names agree, but not their order and number"


def _numbered(values: Mapping[str, int]) -> str:
    return listed(f"{value} ({name})" for name, value in values.items())
