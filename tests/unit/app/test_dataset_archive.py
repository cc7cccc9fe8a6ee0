"""The ZIP of labelled images: whole cases, each file with what was known of it then, and what is left out is named."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fastapi import HTTPException

from dicom_series_factory import SeriesMaker
from factories import make_image
from fake_pacs import FakePacs
from lib import dataset_archive, free_space
from lib.datastore import StudiesFolder
from lib.pacs import PacsStudies

SHAPE = (5, 4, 3)
LIVER = {"label_info": [{"name": "liver", "idx": 1}]}
SPLEEN = {"label_info": [{"name": "spleen", "idx": 1}]}
pytestmark = pytest.mark.usefixtures("monailabel_here")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let temporary files lie in a folder of the test's own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> StudiesFolder:
    for seed, name in enumerate(("a", "b", "c", "mr_0000", "mr_0001")):
        make_image(tmp_path / "studies" / f"{name}.nii.gz", SHAPE, seed=seed)
    return StudiesFolder(str(tmp_path / "studies"), lambda: ("liver", "spleen"), tmp_path / "refused")


def submit(store: StudiesFolder, image: str, info: dict[str, Any], voxels: int = 3) -> None:
    path = Path(store._datastore_path).parent / "submitted.nii.gz"
    read = nib.load(store.get_image_uri(image))
    array = np.zeros(read.shape, np.uint8)
    array.reshape(-1)[:voxels] = 1
    nib.save(nib.Nifti1Image(array, read.affine), path)
    store.save_label(image, str(path), "final", info)


def packed(store: StudiesFolder, most: int | None = None) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files of a download, and its metadata."""
    path = Path(store.get_dataset_archive(most))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        files = {name: archive.read(name) for name in archive.namelist()}
    path.unlink()
    return files, json.loads(files.pop("metadata.json"))


def test_the_metadata_is_the_index_of_what_is_in_it(store: StudiesFolder) -> None:
    submit(store, "a", LIVER)
    submit(store, "b", SPLEEN)
    files, metadata = packed(store)
    assert files.keys() == {"image/a.nii.gz", "label/a.nii.gz", "image/b.nii.gz", "label/b.nii.gz"}
    index = store.json()
    known = {image: index["objects"][image] for image in ("a", "b")}
    assert metadata == {**index, "objects": known, "left_out": {}}


def test_a_label_replaced_meanwhile_has_its_own_names(store: StudiesFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for image in ("a", "b"):
        submit(store, image, LIVER)
    copy, replaced = shutil.copyfileobj, list[str]()

    def replacing(source: Any, target: Any) -> None:
        if not replaced:
            replaced.append("both")
            for image in ("a", "b"):
                submit(store, image, SPLEEN, voxels=5)
        copy(source, target)

    monkeypatch.setattr(dataset_archive.shutil, "copyfileobj", replacing)
    files, metadata = packed(store)
    assert replaced
    for image, names in (("a", {"liver": 3}), ("b", {"spleen": 5})):
        label = nib.Nifti1Image.from_bytes(gzip.decompress(files[f"label/{image}.nii.gz"]))
        assert metadata["objects"][image]["labels"]["final"]["info"]["voxels"] == names
        assert int(np.asarray(label.dataobj).sum()) == next(iter(names.values()))


def test_all_channels_of_an_image_are_in_it(store: StudiesFolder, tmp_path: Path) -> None:
    submit(store, "mr", LIVER)
    files, metadata = packed(store)
    assert files.keys() == {"image/mr_0000.nii.gz", "image/mr_0001.nii.gz", "label/mr.nii.gz"}
    for number in range(2):
        name = f"mr_000{number}.nii.gz"
        assert files[f"image/{name}"] == (tmp_path / "studies" / name).read_bytes()
    assert metadata["objects"].keys() == {"mr"}


def test_so_many_as_are_asked_for_are_in_it(store: StudiesFolder, tmp_path: Path) -> None:
    for image in ("a", "b", "c"):
        submit(store, image, LIVER)
    (tmp_path / "studies" / "labels" / "final" / "a.nii.gz").unlink()
    files, metadata = packed(store, 1)
    assert files.keys() == {"image/b.nii.gz", "label/b.nii.gz"}
    assert metadata["objects"].keys() == {"b"}
    assert metadata["left_out"].keys() == {"a"}


def test_what_is_left_out_is_named_with_the_reason(
    store: StudiesFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for image in ("a", "b", "c", "mr"):
        submit(store, image, LIVER)
    (tmp_path / "studies" / "a.nii.gz").unlink()
    (tmp_path / "studies" / "labels" / "final" / "b.nii.gz").unlink()
    (tmp_path / "studies" / "mr_0001.nii.gz").rename(tmp_path / "studies" / "mr_0002.nii.gz")
    with caplog.at_level(logging.WARNING):
        files, metadata = packed(store)
    assert files.keys() == {"image/c.nii.gz", "label/c.nii.gz"}
    assert metadata["left_out"].keys() == {"a", "b", "mr"}
    assert metadata["left_out"]["a"] == "there is no file a.nii.gz on this machine"
    assert metadata["left_out"]["b"] == "there is no file b.nii.gz on this machine"
    assert "mr_0001.nii.gz is missing" in metadata["left_out"]["mr"]
    (line,) = [message for message in caplog.messages if "left out" in message]
    assert "3 of 4" in line
    assert all(image in line for image in ("a", "b", "mr"))


def test_nothing_to_download_is_a_404_that_says_why(store: StudiesFolder, tmp_path: Path, temporary: Path) -> None:
    with pytest.raises(HTTPException, match="no image with a final label yet") as caught:
        store.get_dataset_archive(None)
    assert caught.value.status_code == 404
    submit(store, "a", LIVER)
    (tmp_path / "studies" / "a.nii.gz").unlink()
    with pytest.raises(HTTPException, match=r"a: there is no file a\.nii\.gz") as caught:
        store.get_dataset_archive(None)
    assert caught.value.status_code == 404
    assert list(temporary.iterdir()) == []


def test_a_series_without_a_copy_on_this_machine_is_named(tmp_path: Path) -> None:
    makers = [SeriesMaker(f"packed {number}", (14, 11, 5), seed=number) for number in range(2)]
    pacs = PacsStudies(
        FakePacs(*(maker.slices() for maker in makers)),  # type: ignore[arg-type]
        str(tmp_path / "copies"),
        lambda: {"liver"},
        dict,
        tmp_path / "refused",
        ("CT", "MR"),
    )
    for maker in makers:
        submit(pacs, maker.uid, LIVER)
    here, away = (maker.uid for maker in makers)
    Path(pacs.get_image_uri(away)).unlink()
    files, metadata = packed(pacs)
    assert files.keys() == {f"image/{here}.nii", f"label/{here}.nii.gz"}
    assert metadata["objects"].keys() == {here}
    assert metadata["left_out"] == {away: f"there is no file {away}.nii on this machine"}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Path, int]]:
    found: dict[Path, int] = {}
    monkeypatch.setattr(free_space, "free_bytes", lambda folder: found.get(folder, 2**50))
    return found


def test_a_full_temporary_folder_is_an_answer(store: StudiesFolder, temporary: Path, free: dict[Path, int]) -> None:
    submit(store, "a", LIVER)
    submit(store, "mr", LIVER)
    studies = Path(store._datastore_path)
    labels = [studies / "labels" / "final" / f"{image}.nii.gz" for image in ("a", "mr")]
    images = [studies / f"{name}.nii.gz" for name in ("a", "mr_0000", "mr_0001")]
    needed = sum(path.stat().st_size for path in (*labels, *images))
    free[temporary] = needed + free_space.RESERVE_BYTES - 1
    with pytest.raises(HTTPException, match="MB left") as caught:
        store.get_dataset_archive(None)
    assert caught.value.status_code == 507
    assert list(temporary.iterdir()) == []
    assert packed(store, 1)[1]["objects"].keys() == {"a"}
    free[temporary] += 1
    assert packed(store)[1]["objects"].keys() == {"a", "mr"}
