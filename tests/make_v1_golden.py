"""Make ``recorded/v1_golden.npz``: what nnU-Net v1 itself computes with the folders and images of ``v1_models.py``.

Needs an environment of its own, which has nnU-Net v1 and not v2::

    make v1-golden

Per model: ``<name>_logits``, the network's output for `v1_patch`, axes (class, *patch), float32; and ``<name>_labels``,
the label map ``predict_cases`` writes with its defaults (mirroring, step 0.5, CPU), axes (x, y, z), uint8. Per setting
of ``v1_components.py``: ``components_<setting>``, what v1's postprocessing keeps of a label map.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from v1_components import SETTINGS, SPACING_ZYX_MM, component_map, write_postprocessing
from v1_models import MODELS, V1Model, v1_patch, write_v1_folder, write_v1_images

TARGET = Path(__file__).parent / "recorded" / "v1_golden.npz"


def main() -> None:
    """Run v1 on every model and write the file."""
    torch.load = functools.partial(torch.load, weights_only=False)  # v1 is older than that default
    golden: dict[str, np.ndarray] = {}
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_v1_folder(Path(scratch) / "model", model)
            golden[f"{name}_logits"] = v1_logits(folder, model)
            golden[f"{name}_labels"] = v1_labels(folder, name, model)
    golden |= {f"components_{setting}": v1_components(setting) for setting in SETTINGS}
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(TARGET, **golden)


def v1_logits(folder: Path, model: V1Model) -> np.ndarray:
    """Return the output of v1's network of the first fold, axes (class, *patch)."""
    network = restored(folder, "all" if model.folds[0] == "all" else int(model.folds[0])).network
    network.do_ds = False
    with torch.inference_mode():
        return network.eval()(v1_patch(model))[0].numpy()


def restored(folder: Path, fold: str | int) -> Any:
    """Return v1's trainer of one fold with its weights."""
    from nnunet.training.model_restore import load_model_and_checkpoint_files

    trainer, states = load_model_and_checkpoint_files(
        str(folder), fold, mixed_precision=False, checkpoint_name="model_final_checkpoint"
    )
    trainer.load_checkpoint_ram(states[0], False)
    return trainer


def v1_labels(folder: Path, name: str, model: V1Model) -> np.ndarray:
    """Return the label map v1 predicts, axes (x, y, z)."""
    folds = ["all" if fold == "all" else int(fold) for fold in model.folds]
    images = write_v1_images(folder, name, model)
    return predicted_label(folder, images, folder / "result.nii.gz", folds, "noMirroring" not in model.trainer)


def predicted_label(
    folder: Path, images: Sequence[Path], result: Path, folds: Sequence[str | int], mirroring: bool = True
) -> np.ndarray:
    """Return the label map v1 predicts for one case (step 0.5, CPU, float32), axes (x, y, z), uint8."""
    from nnunet.inference.predict import predict_cases

    files = [str(path) for path in images]
    predict_cases(str(folder), [files], [str(result)], folds, False, 1, 1, do_tta=mirroring, mixed_precision=False)
    return np.asarray(nib.load(result).dataobj).astype(np.uint8)


def v1_components(setting: str) -> np.ndarray:
    """Return what v1 keeps of `component_map`, axes (z, y, x), uint8."""
    from nnunet.postprocessing.connected_components import (
        load_postprocessing,
        remove_all_but_the_largest_connected_component,
    )

    with tempfile.TemporaryDirectory() as scratch:
        classes, sizes = load_postprocessing(str(write_postprocessing(Path(scratch) / "postprocessing.json", setting)))
    kept = remove_all_but_the_largest_connected_component(
        component_map(), classes, float(np.prod(SPACING_ZYX_MM)), sizes
    )
    return kept[0]


if __name__ == "__main__":
    main()
