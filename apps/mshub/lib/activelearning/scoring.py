"""How well final labels agree with the pre-labels they started from: MONAI Label's scoring method ``dice``.

MONAI Label's own compares two label maps as if there were one structure: with several, exchanged labels score 1.33.
"""

from __future__ import annotations

from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod

from lib.activelearning.casebook import submitted_agreement
from lib.activelearning.offers import labelled
from lib.datastore import StudiesFolder


class AgreementScoring(ScoringMethod):  # type: ignore[misc]
    """Dice of ``final`` against ``original``, structure by structure, as it was when the label was submitted."""

    def __init__(self) -> None:
        super().__init__("Dice of final labels against the pre-labels they started from, per structure")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Return the agreement of every case that has one: ``cases`` (by image), ``dice`` (means per structure)."""
        images = labelled({}, datastore) if isinstance(datastore, StudiesFolder) else []
        found = {image: submitted_agreement(datastore, image) for image in images}
        cases = {image: {**known[0].as_dict(), **known[1]} for image, known in found.items() if known}
        means: dict[str, list[float]] = {}
        for case in cases.values():
            for name, value in case["dice"].items():
                means.setdefault(name, []).append(value)
        return {"cases": cases, "dice": {name: sum(values) / len(values) for name, values in means.items()}}
