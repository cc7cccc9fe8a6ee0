"""The studies folder: images by id, several channels as one image, and ids that stay inside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastapi import HTTPException

from factories import make_image
from lib.datastore import StudiesFolder

SHAPE = (5, 4, 3)
pytestmark = pytest.mark.usefixtures("monailabel_here")


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """A folder of single images, of a case of two channels, and of what is no image."""
    folder = tmp_path / "studies"
    for name in ("ct.nii.gz", "phase_1.nii.gz", "mr_0000.nii.gz", "mr_0001.nii.gz", "pet.nii", "a.b.nii.gz"):
        make_image(folder / name, SHAPE)
    for name in ("notes.txt", "raw.nrrd", "old.mha", "scan.dcm"):
        (folder / name).write_text("")
    return folder


@pytest.fixture
def datastore(studies: Path) -> StudiesFolder:
    return StudiesFolder(str(studies))


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_every_volume_is_an_image_and_channels_are_one(datastore: StudiesFolder) -> None:
    assert sorted(datastore.list_images()) == ["a.b", "ct", "mr", "old", "pet", "phase_1", "raw"]


def test_the_channels_of_a_case_come_in_order(datastore: StudiesFolder, studies: Path) -> None:
    assert names(datastore.channels("mr")) == ["mr_0000.nii.gz", "mr_0001.nii.gz"]
    assert names(datastore.channels("ct")) == ["ct.nii.gz"]
    assert names(datastore.channels("phase_1")) == ["phase_1.nii.gz"]
    assert all(path.is_absolute() and path.is_file() for path in datastore.channels("mr"))
    assert Path(datastore.get_image_uri("mr")) == studies / "mr_0000.nii.gz"


def test_cases_that_begin_alike_keep_their_own_channels(studies: Path) -> None:
    for name in ("mr_0000_0000.nii.gz", "mr_2_0000.nii.gz", "mr_2_0001.nii.gz", "mr_2_0002.nii.gz"):
        make_image(studies / name, SHAPE)
    datastore = StudiesFolder(str(studies))
    assert names(datastore.channels("mr")) == ["mr_0000.nii.gz", "mr_0001.nii.gz"]
    assert names(datastore.channels("mr_2")) == ["mr_2_0000.nii.gz", "mr_2_0001.nii.gz", "mr_2_0002.nii.gz"]


def test_a_number_is_only_a_channel_beside_a_channel_zero(studies: Path) -> None:
    make_image(studies / "week_0003.nii.gz", SHAPE)
    assert "week_0003" in StudiesFolder(str(studies)).list_images()


@pytest.mark.parametrize(("there", "missing"), [((0, 2), "0001"), ((0, 1, 3), "0002"), ((0, 3), "0001")])
def test_a_gap_in_the_channels_names_the_missing_file(studies: Path, there: tuple[int, ...], missing: str) -> None:
    for number in there:
        make_image(studies / f"gap_{number:04d}.nii.gz", SHAPE)
    with pytest.raises(HTTPException) as caught:
        StudiesFolder(str(studies)).channels("gap")
    assert caught.value.status_code == 422
    assert f"gap_{missing}.nii.gz is missing" in caught.value.detail


def test_labels_keep_the_id_of_their_image(datastore: StudiesFolder, studies: Path) -> None:
    label = make_image(studies.parent / "label.nii.gz", SHAPE)
    assert datastore.save_label("mr", str(label), "final", {"who": "me"}) == "mr"
    assert Path(datastore.get_label_uri("mr", "final")) == studies / "labels" / "final" / "mr.nii.gz"
    again = StudiesFolder(str(studies))
    assert again.get_label_info("mr", "final")["who"] == "me"
    assert again.get_labeled_images() == ["mr"]
    assert names(again.channels("mr")) == ["mr_0000.nii.gz", "mr_0001.nii.gz"]


def test_opening_a_folder_twice_finds_the_same(datastore: StudiesFolder, studies: Path) -> None:
    before = json.loads((studies / "datastore_v2.json").read_text())
    StudiesFolder(str(studies)).refresh()
    assert json.loads((studies / "datastore_v2.json").read_text()) == before


def test_an_image_that_was_removed_from_disk_disappears(datastore: StudiesFolder, studies: Path) -> None:
    (studies / "ct.nii.gz").unlink()
    (studies / "mr_0000.nii.gz").unlink()
    datastore.refresh()
    assert "ct" not in datastore.list_images()
    assert "mr" not in datastore.list_images()


@pytest.mark.parametrize("image", ["nothing", "", "mr_0000", "mr_0001", "ct.nii.gz", "../studies/ct", "/etc/passwd"])
def test_an_unknown_id_is_a_404_that_repeats_it(datastore: StudiesFolder, image: str, studies: Path) -> None:
    label = make_image(studies.parent / "label.nii.gz", SHAPE)
    for ask in (
        lambda: datastore.get_image_uri(image),
        lambda: datastore.get_image_info(image),
        lambda: datastore.channels(image),
        lambda: datastore.remove_image(image),
        lambda: datastore.save_label(image, str(label), "final", {}),
    ):
        with pytest.raises(HTTPException) as caught:
            ask()
        assert caught.value.status_code == 404
        assert repr(image) in caught.value.detail


@pytest.mark.parametrize("image", ["../evil", "a/b", "/etc/evil", "..", ".hidden", "a..b", "a b", "ä", "a\n", "-a"])
def test_an_upload_cannot_leave_the_folder(datastore: StudiesFolder, studies: Path, image: str) -> None:
    upload = make_image(studies.parent / "upload.nii.gz", SHAPE)
    before = sorted(studies.parent.rglob("*"))
    with pytest.raises(HTTPException) as caught:
        datastore.add_image(image, str(upload), {})
    assert caught.value.status_code == 400
    assert sorted(studies.parent.rglob("*")) == before


@pytest.mark.parametrize("tag", ["../../evil", "a/b", "..", "", "final/../../x"])
def test_a_label_tag_cannot_leave_the_folder(datastore: StudiesFolder, studies: Path, tag: str) -> None:
    label = make_image(studies.parent / "label.nii.gz", SHAPE)
    before = sorted(studies.parent.rglob("*"))
    with pytest.raises(HTTPException) as caught:
        datastore.save_label("ct", str(label), tag, {})
    assert caught.value.status_code == 400
    assert sorted(studies.parent.rglob("*")) == before


def test_an_upload_becomes_an_image(datastore: StudiesFolder, studies: Path) -> None:
    upload = make_image(studies.parent / "upload.nii.gz", SHAPE, seed=4)
    assert datastore.add_image("new-case", str(upload), {}) == "new-case"
    assert (studies / "new-case.nii.gz").read_bytes() == upload.read_bytes()
    assert datastore.add_image("", str(upload), {}) == "upload"
    assert {"new-case", "upload"} <= set(datastore.list_images())


@pytest.mark.parametrize("name", ["virus.exe", "slice.dcm", "picture.png"])
def test_an_upload_that_is_no_volume_is_refused(datastore: StudiesFolder, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(HTTPException) as caught:
        datastore.add_image("case", str(tmp_path / name), {})
    assert caught.value.status_code == 415


def test_removing_an_image_removes_its_labels(datastore: StudiesFolder, studies: Path) -> None:
    label = make_image(studies.parent / "label.nii.gz", SHAPE)
    datastore.save_label("ct", str(label), "final", {})
    datastore.remove_image("ct")
    assert "ct" not in datastore.list_images()
    assert not (studies / "ct.nii.gz").exists()
    assert not (studies / "labels" / "final" / "ct.nii.gz").exists()
