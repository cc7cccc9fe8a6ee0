"""A label and what the index says of it belong together, wherever a server is killed or its disk gets full."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from factories import make_image
from lib.datastore import StudiesFolder
from lib.index_journal import IndexJournal
from lib.label_folder import REPLACED
from lib.label_note import NAME, LabelNote

SHAPE = (5, 4, 3)
pytestmark = pytest.mark.usefixtures("monailabel_here")


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    make_image(tmp_path / "studies" / "ct.nii.gz", SHAPE)
    return tmp_path / "studies"


def opened(studies: Path) -> StudiesFolder:
    return StudiesFolder(str(studies), lambda: ("liver", "spleen"), studies.parent / "refused")


def submit(store: StudiesFolder, value: int, ending: str = ".nii.gz", **names: int) -> bytes:
    """Submit a label with one voxel of each number and `value` voxels in all; returns the file."""
    array = np.zeros(SHAPE, np.uint8)
    array.reshape(-1)[:value] = 1
    array.reshape(-1)[-2:] = 2
    path = Path(store._datastore_path).parent / f"submitted{ending}"
    nib.save(nib.Nifti1Image(array, nib.load(store.get_image_uri("ct")).affine), path)
    info = [{"name": name, "idx": number} for name, number in names.items()]
    store.save_label("ct", str(path), "final", {"label_info": info})
    return path.read_bytes()


def names_of(store: StudiesFolder, tag: str = "final") -> dict[str, int]:
    return {segment["name"]: segment["idx"] for segment in store.get_label_info("ct", tag)["label_info"]}


def fail(*_: Any, **__: Any) -> None:
    raise Killed


def leave(tmp_path: Path, studies: Path) -> list[str]:
    return sorted(path.name for path in studies.rglob("*") if path.name in (NAME,) or path.name.endswith(".part"))


def test_a_label_whose_index_was_not_written_has_its_own_names(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(studies)
    old = submit(store, 5, liver=1, spleen=2)
    monkeypatch.setattr(IndexJournal, "append", fail)
    with pytest.raises(Killed):
        submit(store, 7, liver=2, spleen=1)
    monkeypatch.undo()
    new = (tmp_path / "submitted.nii.gz").read_bytes()
    again = opened(studies)
    assert (studies / "labels" / "final" / "ct.nii.gz").read_bytes() == new
    assert names_of(again) == {"liver": 2, "spleen": 1}
    assert (studies / "labels" / "version_1" / "ct.nii.gz").read_bytes() == old
    assert names_of(again, "version_1") == {"liver": 1, "spleen": 2}
    assert names_of(opened(studies), "version_1") == {"liver": 1, "spleen": 2}, "it is in the index"
    assert leave(tmp_path, studies) == []


def test_a_label_whose_process_was_killed_has_its_own_names_in_another(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, batch = opened(studies), opened(studies)
    submit(batch, 5, liver=1, spleen=2)
    with monkeypatch.context() as patch:
        patch.setattr(IndexJournal, "append", fail)
        with pytest.raises(Killed):
            submit(batch, 7, liver=2, spleen=1)
    batch._lock.release(force=True)  # as a killed process does
    (tmp_path / "copy").mkdir()
    copy, info = server.copy_label("ct", "final", tmp_path / "copy")
    assert copy is not None
    assert copy.read_bytes() == (tmp_path / "submitted.nii.gz").read_bytes()
    assert {segment["name"]: segment["idx"] for segment in info["label_info"]} == {"liver": 2, "spleen": 1}


@pytest.mark.parametrize("copies", [0, 1])
def test_a_label_that_was_not_stored_leaves_the_old_one_and_its_names(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    from lib import label_folder

    store, left = opened(studies), [None] * copies
    old = submit(store, 5, liver=1, spleen=2)
    copy = label_folder.replace_by_copy

    def fail_then(source: Path, target: Path) -> None:
        if not left:
            raise OSError(errno.ENOSPC, "no space left on device")
        left.pop()
        copy(source, target)

    monkeypatch.setattr(label_folder, "replace_by_copy", fail_then)
    with pytest.raises(OSError, match="no space"):
        submit(store, 7, liver=2, spleen=1)
    monkeypatch.undo()
    for one in (store, opened(studies)):
        assert (studies / "labels" / "final" / "ct.nii.gz").read_bytes() == old
        assert names_of(one) == {"liver": 1, "spleen": 2}
        assert set(one.get_labels_by_image_id("ct")) == {"final"}
    assert leave(tmp_path, studies) == []


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_label_that_cannot_be_noted_is_taken_back(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, before: int
) -> None:
    store = opened(studies)
    for number in range(before):
        submit(store, 5 + number, liver=1, spleen=2)
    files, known = everything(studies), store.json()
    monkeypatch.setattr(IndexJournal, "append", full)
    monkeypatch.setattr(IndexJournal, "write_index", full)
    with pytest.raises(OSError, match="no space"):
        submit(store, 9, ending, liver=2, spleen=1)
    assert everything(studies) == files
    assert store.json() == known
    assert opened(studies).json() == known, "a server starts on a full disk, and finds no label it refused"
    monkeypatch.undo()
    assert opened(studies).json() == known
    submit(opened(studies), 9, ending, liver=2, spleen=1)
    again = opened(studies)
    assert names_of(again) == {"liver": 2, "spleen": 1}
    assert len(again.get_labels_by_image_id("ct")) == before + 1, "a version for each that was replaced, and no more"


def test_a_prelabel_that_cannot_be_noted_leaves_the_one_before(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(studies)
    first, second = (make_image(tmp_path / f"{name}.nii.gz", SHAPE, seed=seed) for seed, name in enumerate("ab"))
    store.save_prediction("ct", first, "original", {"model": "old"})
    files, known = everything(studies), store.json()
    monkeypatch.setattr(IndexJournal, "append", full)
    with pytest.raises(OSError, match="no space"):
        store.save_prediction("ct", second, "original", {"model": "new"})
    monkeypatch.undo()
    assert everything(studies) == files
    assert opened(studies).json() == known
    store.save_prediction("ct", second, "original", {"model": "new"})
    assert opened(studies).get_label_info("ct", "original")["model"] == "new"
    assert Path(store.get_label_uri("ct", "original")).read_bytes() == second.read_bytes()
    assert not (studies / "labels" / REPLACED).exists()


def test_a_kill_while_a_label_is_taken_back_leaves_one_of_the_two_whole(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(studies)
    old = submit(store, 5, liver=1, spleen=2)
    monkeypatch.setattr(IndexJournal, "append", full)
    monkeypatch.setattr("lib.label_folder.sync_folder", fail)
    with pytest.raises(Killed):
        submit(store, 7, liver=2, spleen=1)
    monkeypatch.undo()
    again = opened(studies)
    assert (studies / "labels" / "final" / "ct.nii.gz").read_bytes() == old
    assert names_of(again) == {"liver": 1, "spleen": 2}
    assert set(again.get_labels_by_image_id("ct")) == {"final"}
    assert leave(tmp_path, studies) == []


def everything(studies: Path) -> dict[str, bytes]:
    """Return the files of a folder that are of consequence: the locks are not."""
    return {
        str(path.relative_to(studies)): path.read_bytes()
        for path in studies.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_label_of_another_format_leaves_no_file_of_the_old_one(studies: Path) -> None:
    store = opened(studies)
    submit(store, 5, liver=1, spleen=2)
    submit(store, 6, ".nii", liver=1, spleen=2)
    assert [path.name for path in (studies / "labels" / "final").iterdir()] == ["ct.nii"]
    assert Path(opened(studies).get_label_uri("ct", "version_1")).is_file()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"image": "ct"}', '{"image": 3, "x": 1}'])
def test_a_damaged_note_is_no_obstacle(studies: Path, text: str) -> None:
    opened(studies)
    (studies / "labels" / NAME).write_text(text)
    assert LabelNote.read(studies / "labels") is None
    submit(opened(studies), 5, liver=1, spleen=2)
    assert not (studies / "labels" / NAME).exists()


def test_a_note_of_an_image_that_is_gone_is_forgotten(studies: Path) -> None:
    opened(studies)
    LabelNote("gone", "final/gone.nii.gz", "0" * 64, {}).write(studies / "labels")
    opened(studies)
    assert not (studies / "labels" / NAME).exists()
