"""The server's label equals that of ``nnUNetv2_predict_from_modelfolder`` on the same files and folder, every voxel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from factories import make_image, make_model_folder, odd_grids
from live import LiveServer
from mshub.install import add_model
from mshub.store import ModelStore

READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")
GRIDS = odd_grids()


@dataclass
class Pair:
    """A live server, and the folder with nnU-Net's own labels per reader."""

    server: LiveServer
    images: Path
    expected: dict[str, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("equality")
    images, home = folder / "images", folder / "home"
    for seed, (name, affine) in enumerate(GRIDS.items()):
        make_image(images / f"{_case(name)}_0000.nii.gz", (27, 22, 17), affine, seed)
    expected = {}
    for reader in READERS:
        model = make_model_folder(folder / reader, reader=reader, folds=("0", "1"), transpose=(1, 0, 2))
        add_model(ModelStore(home), reader.lower(), model)
        expected[reader] = _predict_with_nnunet(images, model, folder / f"{reader}-labels")
    server = LiveServer(home, ["--studies", str(images)], folder)
    yield Pair(server, images, expected)
    server.stop()


def _case(grid: str) -> str:
    return f"grid{list(GRIDS).index(grid):02d}"


def _predict_with_nnunet(images: Path, model: Path, target: Path) -> Path:
    command = Path(sys.executable).with_name("nnUNetv2_predict_from_modelfolder")
    folders = dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), str(target.parent))
    subprocess.run(
        [
            command,
            "-i",
            images,
            "-o",
            target,
            "-m",
            model,
            "-f",
            "0",
            "1",
            "-device",
            "cpu",
            "-npp",
            "1",
            "-nps",
            "1",
            "--disable_progress_bar",
        ],
        env={**os.environ, **folders},
        check=True,
        capture_output=True,
    )
    return target


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_voxel_equals_nnunets_own(pair: Pair, grid: str, reader: str, tmp_path: Path) -> None:
    answer = pair.server.infer(reader.lower(), f"image={_case(grid)}&output=image", {"result_extension": ".nii.gz"})
    assert answer.status_code == 200, answer.text
    (tmp_path / "label.nii.gz").write_bytes(answer.content)
    ours, expected = (nib.load(path) for path in (tmp_path / "label.nii.gz", _expected(pair, grid, reader)))
    labels = np.asarray(ours.dataobj)
    assert set(np.unique(labels)) == {0, 1, 2}, "a trivial mask proves nothing"
    assert int((labels != np.asarray(expected.dataobj)).sum()) == 0
    np.testing.assert_allclose(ours.affine, nib.load(pair.images / f"{_case(grid)}_0000.nii.gz").affine, atol=1e-5)


def _expected(pair: Pair, grid: str, reader: str) -> Path:
    return pair.expected[reader] / f"{_case(grid)}.nii.gz"


def test_the_grids_cover_what_matters() -> None:
    determinants = [np.linalg.det(affine[:3, :3]) for affine in GRIDS.values()]
    assert len(GRIDS) >= 12
    assert any(determinant < 0 for determinant in determinants)
    assert any(np.count_nonzero(np.abs(affine[:3, :3]) > 1e-6) == 9 for affine in GRIDS.values()), "an oblique one"
