"""Every bad file of bench/reliability is refused by the readers themselves, in words; a flipped bit is seen."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
import pytest

from bad_dicom import bad_dicom, good_series
from bad_nifti import bad_nifti, image, zipped
from mshub.errors import CaseError, GeometryError
from mshub.geometry import Grid
from mshub.volume_io import LARGE_VOXELS, MAX_VOXELS_PER_BYTE, read_grid, read_volume

SMALL = {name: (filename, content) for name, filename, content in bad_nifti(bombs=False)}
SERIES = {name: files for name, files in bad_dicom() if len(dict(files)) == len(files)}
FLIPS = 150


@pytest.mark.parametrize("name", SMALL)
def test_a_bad_nifti_is_refused(name: str, tmp_path: Path) -> None:
    filename, content = SMALL[name]
    path = tmp_path / filename
    path.write_bytes(content)
    with pytest.raises(CaseError, match=rf"^{filename}: (?!{filename}).{{20}}"):
        read_volume(path)


@pytest.mark.parametrize("name", SERIES)
def test_a_bad_series_is_refused(name: str, tmp_path: Path) -> None:
    for filename, content in SERIES[name]:
        (tmp_path / filename).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CaseError) as refused:
            read_volume(tmp_path)
    assert len(str(refused.value)) > 40
    assert "SOMEBODY ELSE" not in str(refused.value)


def test_the_files_they_are_made_of_are_good(tmp_path: Path) -> None:
    for filename, content in good_series():
        (tmp_path / filename).write_bytes(content)
    assert read_volume(tmp_path).grid.shape_xyz == (24, 20, 8)
    for name, content in (("a.nii", image()), ("a.nii.gz", zipped(image()))):
        path = tmp_path / name
        path.write_bytes(content)
        assert read_volume(path).grid.shape_xyz == (19, 23, 17)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    content = zipped(image((9, 8, 7)))
    path.write_bytes(content)
    before, chance, refused = read_volume(path), random.Random(3), 0
    for position in chance.sample(range(8 * len(content)), FLIPS):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(bytes(flipped))
        try:
            found = read_volume(path)
        except CaseError:
            refused += 1
        else:
            np.testing.assert_array_equal(found.array_xyz, before.array_xyz)
            np.testing.assert_array_equal(found.grid.affine_ras, before.grid.affine_ras)
    assert refused > FLIPS * 0.9


def test_a_bomb_is_refused_by_its_header_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scan.nii.gz"
    shape = (512, 512, LARGE_VOXELS // 512**2 + 1)
    voxels = int(np.prod(shape))
    grid = Grid(shape, np.diag([1.0, 1.0, 2.0, 1.0]))
    monkeypatch.setattr("mshub.volume_io._grid_of", lambda *_, **__: grid)
    monkeypatch.setattr("mshub.volume_io._read", lambda *_: pytest.fail("it was read"))
    path.write_bytes(bytes(voxels // MAX_VOXELS_PER_BYTE - 1))
    with pytest.raises(CaseError, match=r"no scan\s+shrinks so far"):
        read_volume(path)
    path.write_bytes(bytes(voxels // MAX_VOXELS_PER_BYTE + 1))
    with pytest.raises(pytest.fail.Exception, match="it was read"):
        read_volume(path)


def test_a_grid_is_refused_where_its_image_would_be(tmp_path: Path) -> None:
    for filename, content in SERIES["pixel spacing negative"]:
        (tmp_path / filename).write_bytes(content)
    with pytest.raises(GeometryError, match="spacing"):
        read_grid(tmp_path)
