"""A case of a PACS that does one thing wrong, and the series it is tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from dicom_series_factory import SeriesMaker, oblique
from wrong_pacs import Shelf, Way

FOR_EVER = 10**6
KINDS: dict[str, dict[str, Any]] = {
    "axial, 5": {"shape": (14, 11, 5)},
    "oblique, 20": {"shape": (12, 15, 20), "axes": oblique()},
    "MR, oblique, 9": {"shape": (13, 10, 9), "axes": oblique(5, 40, -10), "modality": "MR"},
    "axial, 60": {"shape": (16, 12, 60)},
}


Change = Callable[[list[Any]], Shelf]


@dataclass(frozen=True)
class Case:
    """One thing done wrong.

    Attributes
    ----------
    group, name : str
    maker : SeriesMaker
        The series as it is.
    change : callable
        Returns what the PACS has of it, by its slices.
    ways : dict
        How it answers.
    before : int
        So many slices are there first, and are fetched; then the others arrive.
    listed_since : bool
        Whether the server has seen the others listed before the PACS goes wrong.
    """

    group: str
    name: str
    maker: SeriesMaker
    change: Change
    ways: dict[str, Way] = field(default_factory=dict)
    before: int = 0
    listed_since: bool = False

    @property
    def stalls(self) -> bool:
        """Whether an answer stalls."""
        return self.group.startswith("no byte")


_NUMBERS = count()


@dataclass(frozen=True)
class Workshop:
    """Makes cases of one kind of series."""

    kind: str

    @property
    def n(self) -> int:
        """How many slices a series has."""
        return int(KINDS[self.kind]["shape"][2])

    @property
    def positions(self) -> list[int]:
        """Return slices at both ends and in the middle."""
        return sorted({0, 1, self.n // 2, self.n - 2, self.n - 1})

    @property
    def three(self) -> tuple[int, int, int]:
        """Return the first slice, one in the middle and the last."""
        return 0, self.n // 2, self.n - 1

    def case(self, group: str, name: str, change: Change = Shelf.of, ways: Any = None, **more: Any) -> Case:
        """Return a case on a series of its own."""
        number = next(_NUMBERS)
        maker = SeriesMaker(f"faults {number}", seed=number, **KINDS[self.kind])
        return Case(group, f"{self.kind}: {name}", maker, change, ways or {}, **more)


def told_or_not(told: bool) -> Change:
    """Return what a series is, with or without its number of instances."""
    return Shelf.of if told else lambda slices: Shelf.of(slices, count=None)


def counted(told: bool) -> str:
    """Return a word for it."""
    return "counted" if told else "not counted"
