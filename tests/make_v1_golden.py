"""Make ``recorded/v1_golden.npz``: what nnU-Net v1 itself computes with the folders and images of ``v1_models.py``.

Run it in an environment of its own, which has nnU-Net v1 and not v2::

    pip install nnunet==1.7.1 torch==2.13.0 "numpy<2" medpy
    python tests/make_v1_golden.py

Per model: ``<name>_logits``, the network's output for `v1_patch`, axes (class, *patch), float32; and ``<name>_labels``,
the label map ``predict_cases`` writes with its defaults (mirroring, step 0.5, CPU), axes (x, y, z), uint8.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

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
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(TARGET, **golden)


def v1_logits(folder: Path, model: V1Model) -> np.ndarray:
    """Return the output of v1's network of the first fold, axes (class, *patch)."""
    from nnunet.training.model_restore import load_model_and_checkpoint_files

    folds = ["all" if fold == "all" else int(fold) for fold in model.folds]
    trainer, states = load_model_and_checkpoint_files(
        str(folder), folds[0], mixed_precision=False, checkpoint_name="model_final_checkpoint"
    )
    trainer.load_checkpoint_ram(states[0], False)
    trainer.network.do_ds = False
    with torch.inference_mode():
        return trainer.network.eval()(v1_patch(model))[0].numpy()


def v1_labels(folder: Path, name: str, model: V1Model) -> np.ndarray:
    """Return the label map v1 predicts, axes (x, y, z)."""
    from nnunet.inference.predict import predict_cases

    images = [str(path) for path in write_v1_images(folder, name, model)]
    result = folder / "result.nii.gz"
    folds = ["all" if fold == "all" else int(fold) for fold in model.folds]
    mirroring = "noMirroring" not in model.trainer
    predict_cases(str(folder), [images], [str(result)], folds, False, 1, 1, do_tta=mirroring, mixed_precision=False)
    return np.asarray(nib.load(result).dataobj).astype(np.uint8)


if __name__ == "__main__":
    main()
