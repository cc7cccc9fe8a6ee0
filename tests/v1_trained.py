"""The cases and patches on which trained networks of nnU-Net v1 are compared: see ``train_v1.py``, which records them.

Knows numpy, torch and SimpleITK only, so that it runs beside nnU-Net v1 too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the name everybody uses
import torch

HIPPOCAMPUS_CASES = ("hippocampus_386", "hippocampus_387", "hippocampus_389")
"""Never trained on."""
PATCHES = {"hippocampus": (1, 16, 32, 24), "brain": (2, 8, 48, 40)}
"""Channels and voxels of the patch whose logits are recorded."""
SAMPLE = 100_000


def case_files(name: str, data: Path, scratch: Path) -> dict[str, list[Path]]:
    """Return case -> one file per channel; writes those that are DICOM in `data` to `scratch`."""
    if name == "brain":
        scratch.mkdir(parents=True, exist_ok=True)
        return {"study": write_brain_case(data, scratch)}
    return {case: [data / "hippocampus" / "imagesTr" / f"{case}_0000.nii.gz"] for case in HIPPOCAMPUS_CASES}


def write_brain_case(data: Path, folder: Path) -> list[Path]:
    """Write T1post and FLAIR of the brain study as NIfTI on the grid of T1post; returns the two files."""
    t1, flair = (_series(data / "dicom_mr" / name) for name in ("T1post", "FLAIR"))
    files = [folder / f"study_{channel:04d}.nii.gz" for channel in range(2)]
    sitk.WriteImage(sitk.Cast(t1, sitk.sitkInt16), str(files[0]))
    sitk.WriteImage(sitk.Cast(sitk.Resample(flair, t1), sitk.sitkInt16), str(files[1]))
    return files


def sampled_voxels(size: int) -> np.ndarray:
    """Return flat positions in a label map of `size` voxels, (x, y, z) in C order: all of them, or `SAMPLE`."""
    if size <= SAMPLE:
        return np.arange(size)
    return np.sort(np.random.default_rng(7).choice(size, SAMPLE, replace=False))


def seeded_patch(name: str) -> torch.Tensor:
    """Return an input of a network, axes (1, channel, z, y, x), float32."""
    values = np.random.default_rng(11).standard_normal((1, *PATCHES[name]))
    return torch.from_numpy(values.astype(np.float32))


def _series(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()
