"""Real scans through the command line with the starter model: right grid, no crash. Plausibility is not the point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    assert _mshub(folder, "fetch", "starter").returncode == 0
    return folder


def _mshub(home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mshub", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "MSHUB_HOME": str(home)}, capture_output=True, text=True)


def test_a_torso_ct_is_segmented_on_its_own_grid(home: Path, shared_data: Path, tmp_path: Path) -> None:
    image, label = shared_data / "ct_torso" / "example_ct.nii.gz", tmp_path / "label.nii.gz"
    done = _mshub(home, "predict", "starter", image, "-o", label)
    assert done.returncode == 0, done.stderr
    result = nib.load(label)
    assert result.shape == nib.load(image).shape
    np.testing.assert_allclose(result.affine, nib.load(image).affine, atol=1e-5)
    assert set(np.unique(np.asarray(result.dataobj))) <= set(range(6))


def test_a_compressed_dicom_series_with_empty_uids_is_segmented_on_its_own_grid(
    home: Path, shared_data: Path, tmp_path: Path
) -> None:
    label = tmp_path / "label.nrrd"
    done = _mshub(home, "predict", "starter", shared_data / "dicom_ct", "-o", label)
    assert done.returncode == 0, done.stderr
    result, reference = (
        sitk.ReadImage(str(label)),
        sitk.ReadImage(str(shared_data / "ct_torso/example_seg_dicom.nii.gz")),
    )
    assert sorted(result.GetSize()) == sorted(reference.GetSize()) == [20, 512, 512]
    corners = [_corners(volume) for volume in (result, reference)]
    np.testing.assert_allclose(corners[0], corners[1], atol=0.05)


def _corners(volume: sitk.Image) -> np.ndarray:
    """Return the lowest and highest patient coordinates (mm, LPS) of the corner voxels' centres."""
    ends = [(0, size - 1) for size in volume.GetSize()]
    points = [volume.TransformIndexToPhysicalPoint((x, y, z)) for x in ends[0] for y in ends[1] for z in ends[2]]
    return np.array([np.min(points, axis=0), np.max(points, axis=0)])
