"""Image files as nnU-Net's readers see them: the same voxels and properties, whether a file is read again or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 -- the name its own documentation uses
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from factories import odd_grids
from mshub.nnunet.reading import read_as_nnunet, read_channels, to_input_axes

SHAPE = (7, 8, 9)
DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64")
READERS = (SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient)
GRIDS = odd_grids()


def write(path: Path, affine: np.ndarray, dtype: str = "int16", seed: int = 0, slope: float | None = None) -> Path:
    high = 100 if dtype in ("int8", "uint8") else 3000
    voxels = np.random.default_rng(seed).integers(0, high, SHAPE).astype(dtype)
    image = nib.Nifti1Image(voxels, affine, dtype=dtype)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    if slope:
        image.header.set_slope_inter(slope, -3)
    nib.save(image, path)
    return path


def same(one: Any, other: Any) -> bool:
    """Whether two properties of nnU-Net are equal, arrays in them included."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(np.array_equal(one, other))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_case_is_read_as_nnunet_reads_it(tmp_path: Path, grid: str, reader: Any) -> None:
    paths = [write(tmp_path / f"{number}.nii.gz", GRIDS[grid], seed=number) for number in range(2)]
    data, properties = read_as_nnunet(paths, read_channels(paths, ["a", "b"]), reader())
    expected, facts = reader().read_images([str(path) for path in paths])
    assert data.dtype == expected.dtype
    assert data.strides == expected.strides, "sums depend on the order of voxels in memory"
    np.testing.assert_array_equal(data, expected)
    assert same(properties, facts)


@pytest.mark.parametrize("slope", [None, 0.37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_of_voxels(tmp_path: Path, dtype: str, slope: float | None) -> None:
    path = write(tmp_path / "image.nii.gz", GRIDS["+x+y+z"], dtype, slope=slope)
    data, properties = read_as_nnunet([path], read_channels([path], ["a"]), SimpleITKIO())
    expected, facts = SimpleITKIO().read_images([str(path)])
    np.testing.assert_array_equal(data, expected)
    assert same(properties, facts)


@pytest.mark.parametrize("extension", [".nrrd", ".mha"])
def test_other_formats_of_itk(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"image{extension}"
    source = write(tmp_path / "image.nii.gz", GRIDS["oblique"])
    sitk.WriteImage(sitk.ReadImage(str(source)), str(path))
    data, properties = read_as_nnunet([path], read_channels([path], ["a"]), SimpleITKIO())
    expected, facts = SimpleITKIO().read_images([str(path)])
    np.testing.assert_array_equal(data, expected)
    assert same(properties, facts)


def test_whole_numbers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(SimpleITKIO, "read_images", lambda _, paths: read.append(paths))
    path = write(tmp_path / "image.nii.gz", GRIDS["+x+y+z"])
    read_as_nnunet([path], read_channels([path], ["a"]), SimpleITKIO())
    assert read == []


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_label_goes_back_as_the_readers_own_writer_has_it(tmp_path: Path, grid: str, reader: Any) -> None:
    path = write(tmp_path / "image.nii.gz", GRIDS[grid])
    volumes = read_channels([path], ["a"])
    data, properties = read_as_nnunet([path], volumes, reader())
    labels = (data[0] > 1000).astype(np.uint8) + (data[0] > 2000)
    reader().write_seg(labels, str(tmp_path / "label.nii"), properties)
    expected = np.asarray(nib.load(tmp_path / "label.nii").dataobj)
    got = to_input_axes(labels, properties, reader(), volumes[0].grid)
    np.testing.assert_array_equal(got, expected)
    halves = to_input_axes(labels.astype(np.float32) / 2, properties, reader(), volumes[0].grid)
    np.testing.assert_array_equal(halves, expected / 2)
    voxels = volumes[0].array_xyz
    np.testing.assert_array_equal(got, (voxels > 1000).astype(np.uint8) + (voxels > 2000))
