"""A label and what the index says of it belong together, wherever a server is killed or its disk gets full."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from factories import make_image
from lib.datastore import StudiesFolder
from lib.index_file import INDEX
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
    monkeypatch.setattr(StudiesFolder, "_update_datastore_file", fail)
    with pytest.raises(Killed):
        submit(store, 7, liver=2, spleen=1)
    monkeypatch.undo()
    new = (tmp_path / "submitted.nii.gz").read_bytes()
    assert json.loads((studies / INDEX).read_text())["objects"]["ct"]["labels"].keys() == {"final"}
    again = opened(studies)
    assert (studies / "labels" / "final" / "ct.nii.gz").read_bytes() == new
    assert names_of(again) == {"liver": 2, "spleen": 1}
    assert (studies / "labels" / "version_1" / "ct.nii.gz").read_bytes() == old
    assert names_of(again, "version_1") == {"liver": 1, "spleen": 2}
    assert names_of(opened(studies), "version_1") == {"liver": 1, "spleen": 2}, "it is in the index"
    assert leave(tmp_path, studies) == []


@pytest.mark.parametrize("copies", [0, 1])
def test_a_label_that_was_not_stored_leaves_the_old_one_and_its_names(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    from lib import datastore

    store, left = opened(studies), [None] * copies
    old = submit(store, 5, liver=1, spleen=2)
    copy = datastore.replace_by_copy

    def fail_then(source: Path, target: Path) -> None:
        if not left:
            raise OSError(errno.ENOSPC, "no space left on device")
        left.pop()
        copy(source, target)

    monkeypatch.setattr(datastore, "replace_by_copy", fail_then)
    with pytest.raises(OSError, match="no space"):
        submit(store, 7, liver=2, spleen=1)
    monkeypatch.undo()
    for one in (store, opened(studies)):
        assert (studies / "labels" / "final" / "ct.nii.gz").read_bytes() == old
        assert names_of(one) == {"liver": 1, "spleen": 2}
        assert set(one.get_labels_by_image_id("ct")) == {"final"}
    assert leave(tmp_path, studies) == []


def test_a_full_disk_while_the_index_is_written_is_made_good_by_the_next_label(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(studies)
    submit(store, 5, liver=1, spleen=2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(StudiesFolder, "_update_datastore_file", full)
    with pytest.raises(OSError, match="no space"):
        submit(store, 7, liver=2, spleen=1)
    second = (tmp_path / "submitted.nii.gz").read_bytes()
    assert names_of(store) == {"liver": 2, "spleen": 1}, "what is in the file"
    opened(studies)  # starts all the same
    monkeypatch.undo()
    submit(store, 9, spleen=1, liver=2)
    again = opened(studies)
    assert (studies / "labels" / "version_2" / "ct.nii.gz").read_bytes() == second
    assert names_of(again, "version_2") == {"liver": 2, "spleen": 1}
    assert names_of(again, "version_1") == {"liver": 1, "spleen": 2}


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
