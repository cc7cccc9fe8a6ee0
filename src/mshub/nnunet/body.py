"""Where the body is in a CT image: the profile ``fast`` leaves out the air around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from mshub.geometry import Array

AIR_HU = -300.0
"""Skin and fat are above, air and most of the lungs below, foam and blankets too."""
MARGIN_MM = 20.0
PLACES_PER_AXIS = 128  # looked at: a coarse image tells where the body is
LEAST_SHARE = 0.02
"""A largest piece with a smaller share of the image is no body: nothing is left out then."""

Box = list[list[int]]


def body_box(image_hu: Array, spacing_mm: Sequence[float]) -> Box | None:
    """Return where the body is, with a margin.

    Parameters
    ----------
    image_hu : ndarray, 3 axes
        A CT image in HU.
    spacing_mm : sequence of float
        Of its axes.

    Returns
    -------
    list of [start, stop] or None
        Along each axis; None if no body can be told.
    """
    steps = [-(-size // PLACES_PER_AXIS) for size in image_hu.shape]
    coarse = image_hu[tuple(slice(None, None, step) for step in steps)] > AIR_HU
    pieces, _ = ndimage.label(coarse)
    sizes = np.bincount(pieces.ravel())[1:]
    if not len(sizes) or sizes.max() < LEAST_SHARE * coarse.size:
        return None
    [body] = ndimage.find_objects(pieces == 1 + int(sizes.argmax()))
    box = []
    for places, step, spacing, size in zip(body, steps, spacing_mm, image_hu.shape, strict=True):
        margin = round(MARGIN_MM / spacing)
        box.append([max(0, (places.start - 1) * step + 1 - margin), min(size, places.stop * step + margin)])
    return box
