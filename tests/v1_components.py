"""Label maps with many components, and what nnU-Net v1 is asked to keep of them; recorded by ``make_v1_golden.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SPACING_ZYX_MM = (2.5, 0.7, 1.1)
SETTINGS: dict[str, dict[str, Any]] = {
    "each": {"for_which_classes": [1, 2, 3]},
    "all, not named": {"for_which_classes": None},
    "together, then one": {"for_which_classes": [[1, 2], 2]},
    "of one size": {"for_which_classes": [4]},
    "with sizes": {"for_which_classes": [1, 3], "min_valid_object_sizes": str({1: 12.0, 3: 25.0})},
    "together with sizes": {"for_which_classes": [[1, 2, 3]], "min_valid_object_sizes": str({(1, 2, 3): 60.0})},
    "nothing": {"for_which_classes": []},
}
CLASSES = 4


def component_map() -> np.ndarray:
    """Return a label map with classes 0 to 4, uint8, axes (z, y, x); class 4 is two components of one size."""
    noise = np.random.default_rng(3).standard_normal((11, 26, 19))
    for axis in range(3):
        noise = (noise + np.roll(noise, 1, axis)) / 2
    label = np.digitize(noise, np.quantile(noise, (0.7, 0.8, 0.9))).astype(np.uint8)
    label[0:2, 0:3, 0:2] = label[-2:, -3:, -2:] = 4
    return label


def write_postprocessing(path: Path, setting: str) -> Path:
    """Write v1's ``postprocessing.json``, with what it lists beside."""
    path.write_text(json.dumps({**SETTINGS[setting], "num_samples": 3, "dc_per_class_raw": {"1": 0.5}}))
    return path
