"""What nnU-Net itself predicts, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch


def nnunet_label(
    folder: Path,
    images: Sequence[Path],
    output: Path,
    folds: Sequence[str],
    checkpoint_name: str = "checkpoint_final.pth",
    *,
    mirroring: bool = True,
) -> np.ndarray[Any, Any]:
    """Return nnU-Net's own segmentation of a case, axes x, y, z, as it lies in the file nnU-Net writes."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=mirroring, perform_everything_on_device=False, device=torch.device("cpu"))
    predictor.allow_tqdm = False
    predictor.initialize_from_trained_model_folder(str(folder), folds, checkpoint_name)
    output.mkdir()
    predictor.predict_from_files_sequential([[str(image) for image in images]], [str(output / "case")])
    return np.asarray(nib.load(output / "case.nii.gz").dataobj)
