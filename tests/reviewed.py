"""Small reviewed cases whose labels a network can learn: every structure is a band of intensities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - the name everybody uses

from factories import make_image
from mshub.cases import ReviewedCase

SHAPE = (22, 18, 10)
VALUES = {"liver": 1, "spleen": 2}

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_n_proc_DA")
"""What nnU-Net is told by the environment."""


def make_case(
    folder: Path,
    case_id: str,
    *,
    values: Mapping[str, int] = VALUES,
    reviewed: Sequence[str] | None = None,
    shape: Sequence[int] = SHAPE,
    affine: np.ndarray[Any, Any] | None = None,
    channels: int = 1,
    ending: str = ".nii",
    patient: str = "",
    seed: int = 0,
    audit: bool = True,
) -> ReviewedCase:
    """Write images and a label of one case; without `reviewed`, all of its structures were reviewed.

    Files are not compressed: gzip writes the time into them, and the digests and with them the order in which cases are
    trained on would be others every time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = [
        make_image(folder / f"{case_id}_{number:04d}.nii", shape, affine, seed=97 * seed + number)
        for number in range(channels)
    ]
    label = folder / f"{case_id}-label.nii"
    write_label(label, bands(array_of(images[0]), values), images[0])
    files = [_as(path, ending) for path in (*images, label)]
    return ReviewedCase(
        case_id=case_id,
        images=tuple(files[:-1]),
        label=files[-1],
        values=dict(values),
        reviewed=tuple(values) if reviewed is None else tuple(reviewed),
        patient=patient or f"patient of {case_id}",
        audit=audit,
    )


def make_cases(folder: Path, number: int, **options: Any) -> list[ReviewedCase]:
    """Return that many cases of as many patients."""
    return [make_case(folder, f"case{index}", seed=index, **options) for index in range(number)]


def bands(image: np.ndarray[Any, Any], values: Mapping[str, int]) -> np.ndarray[Any, Any]:
    """Return a label map: above the median, equal shares of the voxels for each structure in turn, darkest first."""
    label = np.zeros(image.shape, np.uint8)
    limits = np.quantile(image[image != 0], 0.5 + 0.5 * np.arange(len(values)) / len(values))
    for limit, value in zip(limits, values.values(), strict=True):
        label[image > limit] = value
    return label


def array_of(path: Path) -> np.ndarray[Any, Any]:
    """Return the voxels of a NIfTI file, axes x, y, z."""
    return np.asarray(nib.load(path).dataobj)


def write_label(path: Path, label: np.ndarray[Any, Any], image: Path) -> Path:
    """Write a label map on the grid of a NIfTI image."""
    source = nib.load(image)
    written = nib.Nifti1Image(label.astype(np.uint8), source.affine)
    written.set_qform(source.affine, 1)
    written.set_sform(source.affine, 1)
    nib.save(written, path)
    return path


def _as(path: Path, ending: str) -> Path:
    if ending == ".nii":
        return path
    copy = path.with_suffix(ending)
    sitk.WriteImage(sitk.ReadImage(str(path)), str(copy))
    return copy
