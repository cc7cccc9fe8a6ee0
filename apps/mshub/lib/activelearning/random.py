"""Offer a random case that nobody has labelled yet."""

from __future__ import annotations

import random
import time
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy


class Random(Strategy):  # type: ignore[misc]
    """Random among the unlabelled, those offered longest ago first in line.

    MONAI Label's own strategy fails when every case was offered within the current second.
    """

    def __init__(self) -> None:
        super().__init__("A random case that has no final label yet")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Return ``{"id": ..., "weight": ...}``, or None when every case is labelled."""
        images = datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels"))
        if not images:
            return None
        now = time.time()
        offered = [
            datastore.get_image_info(image).get("strategy", {}).get("random", {}).get("ts", 0) for image in images
        ]
        weights = [max(now - ts, 1.0) for ts in offered]
        chosen = random.choices(range(len(images)), weights=weights)[0]
        return {"id": images[chosen], "weight": weights[chosen]}
