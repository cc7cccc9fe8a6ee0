"""The studies folder: images by id, several channels as one image, and ids that stay inside it."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fastapi import HTTPException

from factories import make_image
from lib.datastore import StudiesFolder
from mshub.volume_io import read_volume, write_volume

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


def open_folder(studies: Path) -> StudiesFolder:
    return StudiesFolder(str(studies), lambda: ("liver", "spleen"), studies.parent / "refused")


def make_label(path: Path, *values: int) -> Path:
    """Write a label on the grid of `make_image`, the given values in its first voxels."""
    image = nib.load(make_image(path, SHAPE))
    array = np.zeros(SHAPE, np.uint8)
    array.reshape(-1)[: len(values)] = values
    nib.save(nib.Nifti1Image(array, image.affine), path)
    return path


def scene(**values: int) -> dict[str, Any]:
    return {"label_info": [{"name": name, "idx": value} for name, value in values.items()], "client_id": "me"}


@pytest.fixture
def datastore(studies: Path) -> StudiesFolder:
    return open_folder(studies)


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
    datastore = open_folder(studies)
    assert names(datastore.channels("mr")) == ["mr_0000.nii.gz", "mr_0001.nii.gz"]
    assert names(datastore.channels("mr_2")) == ["mr_2_0000.nii.gz", "mr_2_0001.nii.gz", "mr_2_0002.nii.gz"]


def test_a_number_is_only_a_channel_beside_a_channel_zero(studies: Path) -> None:
    make_image(studies / "week_0003.nii.gz", SHAPE)
    assert "week_0003" in open_folder(studies).list_images()


@pytest.mark.parametrize(("there", "missing"), [((0, 2), "0001"), ((0, 1, 3), "0002"), ((0, 3), "0001")])
def test_a_gap_in_the_channels_names_the_missing_file(studies: Path, there: tuple[int, ...], missing: str) -> None:
    for number in there:
        make_image(studies / f"gap_{number:04d}.nii.gz", SHAPE)
    with pytest.raises(HTTPException) as caught:
        open_folder(studies).channels("gap")
    assert caught.value.status_code == 422
    assert f"gap_{missing}.nii.gz is missing" in caught.value.detail


def test_labels_keep_the_id_of_their_image(datastore: StudiesFolder, studies: Path) -> None:
    label = make_label(studies.parent / "label.nii.gz", 1)
    assert datastore.save_label("mr", str(label), "final", scene(liver=1)) == "mr"
    assert Path(datastore.get_label_uri("mr", "final")) == studies / "labels" / "final" / "mr.nii.gz"
    again = open_folder(studies)
    assert again.get_label_info("mr", "final")["client_id"] == "me"
    assert again.get_labeled_images() == ["mr"]
    assert names(again.channels("mr")) == ["mr_0000.nii.gz", "mr_0001.nii.gz"]


def test_opening_a_folder_twice_finds_the_same(datastore: StudiesFolder, studies: Path) -> None:
    before = json.loads((studies / "datastore_v2.json").read_text())
    open_folder(studies).refresh()
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


@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.nrrd"])
def test_an_upload_takes_no_other_images_place(datastore: StudiesFolder, studies: Path, name: str) -> None:
    before = (studies / "ct.nii.gz").read_bytes()
    upload = make_image(studies.parent / "upload.nii.gz", SHAPE, seed=4).rename(studies.parent / name)
    with pytest.raises(HTTPException) as caught:
        datastore.add_image("ct", str(upload), {})
    assert caught.value.status_code == 409
    assert (studies / "ct.nii.gz").read_bytes() == before


def test_of_uploads_of_one_id_at_once_one_is_kept(datastore: StudiesFolder, studies: Path) -> None:
    uploads = [make_image(studies.parent / f"upload{number}.nii.gz", SHAPE, seed=number) for number in range(8)]

    def add(upload: Path) -> int:
        try:
            datastore.add_image("same", str(upload), {})
        except HTTPException as error:
            return error.status_code
        return 200

    with ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(add, uploads))
    assert sorted(statuses) == [200, *[409] * 7]
    assert (studies / "same.nii.gz").read_bytes() == uploads[statuses.index(200)].read_bytes()


@pytest.mark.parametrize("name", ["virus.exe", "slice.dcm", "picture.png"])
def test_an_upload_that_is_no_volume_is_refused(datastore: StudiesFolder, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(HTTPException) as caught:
        datastore.add_image("case", str(tmp_path / name), {})
    assert caught.value.status_code == 415


def test_removing_an_image_removes_its_labels(datastore: StudiesFolder, studies: Path) -> None:
    label = make_label(studies.parent / "label.nii.gz", 1)
    datastore.save_label("ct", str(label), "final", scene(liver=1))
    datastore.remove_image("ct")
    assert "ct" not in datastore.list_images()
    assert not (studies / "ct.nii.gz").exists()
    assert not (studies / "labels" / "final" / "ct.nii.gz").exists()


def test_uploaded_channels_are_one_image_now_and_after_a_restart(datastore: StudiesFolder, studies: Path) -> None:
    for number in range(2):
        upload = make_image(studies.parent / f"new_000{number}.nii.gz", SHAPE, seed=number)
        assert datastore.add_image(f"new_000{number}", str(upload), {"from": "scanner"}) == "new"
    for folder in (datastore, open_folder(studies)):
        assert [image for image in folder.list_images() if image.startswith("new")] == ["new"]
        assert names(folder.channels("new")) == ["new_0000.nii.gz", "new_0001.nii.gz"]
        assert folder.get_image_info("new")["from"] == "scanner"


def test_removing_an_image_removes_all_its_channels(datastore: StudiesFolder, studies: Path) -> None:
    datastore.remove_image("mr")
    assert not list(studies.glob("mr_*"))
    assert not [image for image in open_folder(studies).list_images() if image.startswith("mr")]


# -- corrections ----------------------------------------------------------------------------------------------------


def test_a_correction_is_stored_as_it_came_with_who_when_and_what_was_reviewed(
    datastore: StudiesFolder, studies: Path
) -> None:
    label = make_label(studies.parent / "label.nii.gz", 2, 2, 2)
    datastore.save_label("ct", str(label), "final", scene(liver=1, spleen=2))
    stored = datastore.get_label_info("ct", "final")
    assert Path(datastore.get_label_uri("ct", "final")).read_bytes() == label.read_bytes()
    assert stored["voxels"] == {"liver": 0, "spleen": 3}
    assert stored["reviewed"] == ["spleen"]
    assert stored["client_id"] == "me"
    assert stored["submitted"].endswith("+00:00")
    assert stored["started_from"] is None


def test_a_structure_that_was_deleted_from_the_prelabel_was_reviewed(datastore: StudiesFolder, studies: Path) -> None:
    prelabel = {"model": "tiny", "model_version": "v3", "voxel_counts": {"liver": 40, "spleen": 0}}
    made = make_label(studies.parent / "made.nii.gz", 1)
    datastore.save_prediction("ct", made, "original", {"params": prelabel})
    label = make_label(studies.parent / "label.nii.gz")
    datastore.save_label("ct", str(label), "final", scene(spleen=1, liver=2))
    stored = datastore.get_label_info("ct", "final")
    assert stored["reviewed"] == ["liver"]
    assert stored["started_from"] == {"model": "tiny", "version": "v3"}


@pytest.mark.parametrize(
    ("submitted", "doubts"),
    [
        ((1, 1, 0, 2, 2), ["liver and spleen look exchanged: each lies where the model saw the other"]),
        ((), ["nothing is left of what the model saw"]),
        ((2, 2, 0, 1, 1), []),
    ],
    ids=["exchanged", "emptied", "renumbered"],
)
def test_a_label_that_is_odd_beside_its_prelabel_is_stored_with_the_doubt(
    datastore: StudiesFolder, studies: Path, submitted: tuple[int, ...], doubts: list[str]
) -> None:
    made = make_label(studies.parent / "made.nii.gz", 1, 1, 0, 2, 2)
    datastore.save_prediction("ct", made, "original", {"params": {"label_names": {"liver": 1, "spleen": 2}}})
    label = make_label(studies.parent / "label.nii.gz", *submitted)
    datastore.save_label("ct", str(label), "final", scene(spleen=1, liver=2))
    assert datastore.get_label_info("ct", "final")["doubts"] == doubts
    (case,) = datastore.reviewed_cases()
    assert case.facts["doubts"] == doubts


def test_every_label_that_is_replaced_stays_as_a_version(datastore: StudiesFolder, studies: Path) -> None:
    contents = []
    for count in (1, 2, 3):
        label = make_label(studies.parent / f"label{count}.nii.gz", *[1] * count)
        contents.append(label.read_bytes())
        datastore.save_label("ct", str(label), "final", scene(liver=1))
    kept = [Path(datastore.get_label_uri("ct", tag)).read_bytes() for tag in ("version_1", "version_2", "final")]
    assert kept == contents
    assert datastore.get_label_info("ct", "version_1")["voxels"] == {"liver": 1}
    again = open_folder(studies)
    assert set(again.get_labels_by_image_id("ct")) == {"final", "version_1", "version_2"}
    assert again.get_label_info("ct", "version_2")["voxels"] == {"liver": 2}


def test_a_label_in_another_format_replaces_the_old_one_whole(datastore: StudiesFolder, studies: Path) -> None:
    first = make_label(studies.parent / "first.nii.gz", 1)
    datastore.save_label("ct", str(first), "final", scene(liver=1))
    second = studies.parent / "second.nrrd"
    volume = read_volume(first)
    write_volume(second, volume.array_xyz, volume.grid)
    datastore.save_label("ct", str(second), "final", scene(liver=1))
    assert sorted(path.name for path in (studies / "labels" / "final").iterdir()) == ["ct.nrrd"]
    assert (studies / "labels" / "version_1" / "ct.nii.gz").read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("params", "status", "message"),
    [
        ({}, 422, "without the names of its segments"),
        (scene(lung=1), 422, "structure called 'lung'"),
        (scene(spleen=2), 422, "the value 1, which no segment has"),
    ],
)
def test_a_refused_label_is_kept_aside_and_nothing_is_replaced(
    datastore: StudiesFolder, studies: Path, params: dict[str, Any], status: int, message: str
) -> None:
    good = make_label(studies.parent / "good.nii.gz", 1, 1)
    datastore.save_label("ct", str(good), "final", scene(liver=1))
    bad = make_label(studies.parent / "bad.nii.gz", 1)
    with pytest.raises(HTTPException, match=message) as caught:
        datastore.save_label("ct", str(bad), "final", params)
    assert caught.value.status_code == status
    kept = sorted((studies.parent / "refused").iterdir())
    assert [path.suffix for path in kept] == [".gz", ".json"]
    assert kept[0].name in caught.value.detail
    assert kept[0].read_bytes() == bad.read_bytes()
    assert message in json.loads(kept[1].read_text())["reason"]
    assert Path(datastore.get_label_uri("ct", "final")).read_bytes() == good.read_bytes()
    assert set(datastore.get_labels_by_image_id("ct")) == {"final"}


def test_an_image_that_is_a_link_is_removed_and_what_it_leads_to_stays(studies: Path, tmp_path: Path) -> None:
    original = make_image(tmp_path / "archive" / "scan.nii.gz", SHAPE)
    (studies / "linked.nii.gz").symlink_to(original)
    datastore = open_folder(studies)
    datastore.remove_image("linked")
    assert original.is_file()
    assert not (studies / "linked.nii.gz").is_symlink()
    assert "linked" not in datastore.list_images()


def test_channels_that_are_links_are_all_there(studies: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("flair", "t1")):
        original = make_image(tmp_path / "archive" / f"BRATS_001_{name}.nii.gz", SHAPE)
        (studies / f"p1_000{number}.nii.gz").symlink_to(original)
    assert [path.name for path in open_folder(studies).channels("p1")] == ["p1_0000.nii.gz", "p1_0001.nii.gz"]


def test_an_image_that_gets_its_name_when_it_is_whole_is_seen_and_one_that_is_renamed(studies: Path) -> None:
    datastore = StudiesFolder(str(studies), lambda: ("liver",), studies.parent / "refused", auto_reload=True)
    make_image(studies / "whole.nii.gz", SHAPE).rename(studies / ".rsynced.nii.gz.AbCd")
    time.sleep(0.5)  # it came and went
    for old, new in ((".rsynced.nii.gz.AbCd", "rsynced.nii.gz"), ("rsynced.nii.gz", "renamed.nii.gz")):
        (studies / old).rename(studies / new)
        image, until = new.removesuffix(".nii.gz"), time.monotonic() + 10
        while image not in datastore.list_images() and time.monotonic() < until:
            time.sleep(0.05)
        assert image in datastore.list_images()
    assert "rsynced" not in datastore.list_images()


def test_a_refusal_does_not_speak_of_the_name_of_a_temporary_file(datastore: StudiesFolder, studies: Path) -> None:
    garbage = studies.parent / "tmp0815.nii.gz"
    garbage.write_bytes(b"garbage")
    with pytest.raises(HTTPException, match=r"The label: the file is damaged.* again\. The submitted file") as caught:
        datastore.save_label("ct", str(garbage), "final", scene(liver=1))
    assert "tmp0815" not in caught.value.detail


def test_the_index_is_whole_when_writing_it_breaks_off(
    datastore: StudiesFolder, studies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError("disk full")

    before = (studies / "datastore_v2.json").read_bytes()
    label = make_label(studies.parent / "label.nii.gz", 1)
    with monkeypatch.context() as patch:
        patch.setattr("mshub.atomic_file.os.fsync", broken)
        with pytest.raises(OSError, match="disk full"):
            datastore.save_label("ct", str(label), "final", scene(liver=1))
    assert (studies / "datastore_v2.json").read_bytes() == before
    assert open_folder(studies).list_images() == datastore.list_images()
