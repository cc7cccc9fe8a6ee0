"""How sure a model was of one prediction, measured while it was made.

nnU-Net has no dropout, but it predicts mirrored copies and several folds and averages them: how far these disagree says
more about the quality of a label than the averaged probabilities do (pairwise Dice of an ensemble ranks failures best
of all scores compared in Zenk et al., arXiv 2406.03323).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

DIGITS = 5


@dataclass(frozen=True)
class StructureUncertainty:
    """What was measured of one structure, at the network's spacing. None: not measured, or nothing to measure.

    Attributes
    ----------
    volume_ml : float
        0 for a structure that was not found.
    mirror_dice : float or None
        Pairwise Dice of the predictions of mirrored copies, 0 to 1.
    fold_dice : float or None
        Pairwise Dice of the predictions of single folds, 0 to 1.
    soft_dice : float or None
        Dice of the label with the probabilities it was made from: the Dice the network itself expects, 0 to 1.
    entropy : float or None
        Mean entropy in the structure and its border, 0 to 1 (all outcomes equally likely).
    """

    volume_ml: float
    mirror_dice: float | None = None
    fold_dice: float | None = None
    soft_dice: float | None = None
    entropy: float | None = None

    @property
    def agreement(self) -> float | None:
        """Mean of the pairwise Dice of folds and of mirrored copies, as far as there are any; else the soft Dice."""
        known = [value for value in (self.fold_dice, self.mirror_dice) if value is not None]
        return float(np.mean(known)) if known else self.soft_dice


@dataclass(frozen=True)
class Uncertainty:
    """What was measured of one prediction.

    Attributes
    ----------
    structures : dict of str to StructureUncertainty
        All structures of the model.
    entropy_foreground, entropy_border : float or None
        Mean entropy inside the label and in the voxels next to its surface, 0 to 1; None where nothing was found.
    embedding : tuple of float
        What the encoder saw: the mean and spread of the deepest features, the tiles weighted by the structures in
        them. Cases that look alike to the network are near to each other. Empty for a network without an encoder.
    """

    structures: dict[str, StructureUncertainty]
    entropy_foreground: float | None = None
    entropy_border: float | None = None
    embedding: tuple[float, ...] = field(default=(), repr=False)

    @property
    def empty(self) -> tuple[str, ...]:
        """Structures that were not found."""
        return tuple(name for name, found in self.structures.items() if found.volume_ml == 0)

    @property
    def mirror_dice(self) -> float | None:
        """Mean over the structures; None where nothing was mirrored."""
        return self._mean(lambda structure: structure.mirror_dice)

    @property
    def fold_dice(self) -> float | None:
        """Mean over the structures; None for one fold."""
        return self._mean(lambda structure: structure.fold_dice)

    @property
    def soft_dice(self) -> float | None:
        """Mean over the structures that were found."""
        return self._mean(lambda structure: structure.soft_dice)

    @property
    def agreement(self) -> float:
        """Mean of `StructureUncertainty.agreement`: 0 to 1, and 0 where nothing at all was found."""
        return self._mean(lambda structure: structure.agreement) or 0.0

    def _mean(self, of: Callable[[StructureUncertainty], float | None]) -> float | None:
        values = [value for value in map(of, self.structures.values()) if value is not None]
        return float(np.mean(values)) if values else None

    def as_dict(self, *, embedding: bool = True) -> dict[str, Any]:
        """Return it ready for JSON, rounded, the means over the structures beside what `from_dict` reads back."""
        stored = {
            "agreement": _rounded(self.agreement),
            "mirror_dice": _rounded(self.mirror_dice),
            "fold_dice": _rounded(self.fold_dice),
            "soft_dice": _rounded(self.soft_dice),
            "entropy_foreground": _rounded(self.entropy_foreground),
            "entropy_border": _rounded(self.entropy_border),
            "empty": list(self.empty),
            "structures": {
                name: {key: _rounded(value) for key, value in asdict(structure).items()}
                for name, structure in self.structures.items()
            },
        }
        return {**stored, **({"embedding": [_rounded(value) for value in self.embedding]} if embedding else {})}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Uncertainty:
        """Read what `as_dict` wrote."""
        return cls(
            structures={name: StructureUncertainty(**found) for name, found in stored["structures"].items()},
            entropy_foreground=stored["entropy_foreground"],
            entropy_border=stored["entropy_border"],
            embedding=tuple(stored.get("embedding", ())),
        )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), DIGITS)
