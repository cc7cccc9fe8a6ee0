"""SEG and RT Structure Set of real scans: written, validated, read back voxel for voxel."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from skimage.measure import points_in_poly

from mshub.dicom_derived import Algorithm, Facts
from mshub.dicom_seg import read_seg
from mshub.dicom_series import SeriesStack, read_stack
from mshub.errors import CaseError
from mshub.label_export import FORMATS, export_labels

NAMES = {"brain": 1, "GTVp": 2, "BrainStem": 3}
FACTS = Facts(Algorithm("starter", "1"), "MSHub starter")


def drawn(shape: tuple[int, int, int]) -> np.ndarray:
    """Return a label of three structures, one with a hole, in some of the slices."""
    x, y, z = np.ogrid[: shape[0], : shape[1], : shape[2]]
    middle = np.array(shape) / 2
    distance = ((x - middle[0]) / 140) ** 2 + ((y - middle[1]) / 170) ** 2 + ((z - middle[2]) / 7) ** 2
    label = np.where(distance < 1, 1, 0).astype(np.uint8)
    label[distance < 0.1] = 0
    label[distance < 0.03] = 2
    label[200:215, 300:330, 3:9] = 3
    return label


def slice_filled(contour: Dataset, header: Dataset, shape: tuple[int, int]) -> np.ndarray:
    points = np.array([float(part) for part in contour.ContourData]).reshape(-1, 3)
    axes = np.array([float(part) for part in header.ImageOrientationPatient]).reshape(2, 3)
    spacing = np.array([float(part) for part in header.PixelSpacing])[::-1]
    pixels = (points - np.array([float(part) for part in header.ImagePositionPatient])) @ axes.T / spacing
    low, high = np.floor(pixels.min(axis=0)).astype(int).clip(0), np.ceil(pixels.max(axis=0)).astype(int) + 1
    mask = np.zeros(shape, bool)
    box = mask[low[0] : high[0], low[1] : high[1]]
    box[:] = points_in_poly(np.argwhere(np.ones(box.shape, bool)) + low, pixels).reshape(box.shape)
    return mask


def rasterised(rtstruct: Dataset, stack: SeriesStack) -> np.ndarray:
    label = np.zeros(stack.slices_shape, np.uint8)
    names = {roi.ROINumber: roi.ROIName for roi in rtstruct.StructureSetROISequence}
    slices = {header.SOPInstanceUID: k for k, header in enumerate(stack.headers)}
    for roi in rtstruct.ROIContourSequence:
        for contour in roi.ContourSequence:
            k = slices[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            mask = slice_filled(contour, stack.headers[k], stack.slices_shape[:2])
            label[:, :, k][mask] = NAMES[names[roi.ReferencedROINumber]]
    return label


@pytest.mark.parametrize("sequence", ["T1post", "FLAIR"])
@pytest.mark.parametrize("format", FORMATS)
def test_an_oblique_mr_series(format: str, sequence: str, shared_data: Path, tmp_path: Path) -> None:
    stack = read_stack(shared_data / "dicom_mr" / sequence)
    label, path = drawn(stack.slices_shape), tmp_path / "label.dcm"
    export_labels(path, format, label, NAMES, stack, FACTS)
    if format == "seg":
        found = read_seg(path, stack)
        assert set(found.names) == set(NAMES)
        for name, value in NAMES.items():
            np.testing.assert_array_equal(found.array_xyz == found.names[name], label == value)
    else:
        np.testing.assert_array_equal(rasterised(pydicom.dcmread(path), stack), label)
    if shutil.which("dciodvfy"):
        said = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False).stderr
        assert [line for line in said.splitlines() if line.startswith("Error")] == []


@pytest.mark.parametrize("format", FORMATS)
def test_a_ct_series_without_uids_is_refused_by_name(format: str, shared_data: Path, tmp_path: Path) -> None:
    stack = read_stack(shared_data / "dicom_ct")
    with pytest.raises(CaseError, match="has no StudyInstanceUID, SeriesInstanceUID"):
        export_labels(tmp_path / "label.dcm", format, drawn(stack.slices_shape), NAMES, stack, FACTS)
    assert list(tmp_path.iterdir()) == []
