"""Strategies that look at nothing but which cases have no label yet."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
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
        """Return the case (``id``), ``why`` it, and how many are ``waiting``; None when every case is labelled."""
        images = _unlabelled(request, datastore)
        if not images:
            return None
        now = time.time()
        offered = [
            datastore.get_image_info(image).get("strategy", {}).get("random", {}).get("ts", 0) for image in images
        ]
        weights = [max(now - ts, 1.0) for ts in offered]
        chosen = random.choices(range(len(images)), weights=weights)[0]
        why = f"drawn at random from {_cases(images)} without a final label"
        return {"id": images[chosen], "weight": weights[chosen], "why": why, "waiting": len(images)}


class First(Strategy):  # type: ignore[misc]
    """The unlabelled in the order of the list, so that two people who work one after the other leave no gap."""

    def __init__(self) -> None:
        super().__init__("The first case of the list that has no final label yet")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Return as `Random`."""
        images = sorted(_unlabelled(request, datastore))
        if not images:
            return None
        why = f"the first of {_cases(images)} without a final label"
        return {"id": images[0], "why": why, "waiting": len(images)}


def _unlabelled(request: dict[str, Any], datastore: Datastore) -> Sequence[str]:
    """Return the unlabelled cases of the ``modalities`` asked for.

    Those a client wants to ``skip`` now are left out, unless no other is left.
    """
    images: Sequence[str] = datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels"))
    kinds = request.get("modalities")
    images = [image for image in images if not kinds or datastore.get_image_info(image).get("Modality") in kinds]
    skipped = request.get("skip")
    others = [image for image in images if image not in skipped] if isinstance(skipped, list) else images
    return others or images


def _cases(images: Sequence[str]) -> str:
    return f"{len(images)} case{'s' if len(images) != 1 else ''}"
