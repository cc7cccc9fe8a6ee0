"""Files of requests: under names of ours, looked at before they are kept, gone afterwards."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import pytest
from fastapi import HTTPException, UploadFile

from dicom_series_factory import SeriesMaker
from factories import make_image
from lib.faults import LONGEST_NAME, check_name
from lib.server.uploads import base_name, check_images, received, rename, volume_ending


def upload(name: str | None, content: bytes = b"x") -> UploadFile:
    return UploadFile(io.BytesIO(content), filename=name, size=len(content))


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("scan.nii.gz", "scan.nii.gz"),
        ("C:\\Users\\me\\scan.nii.gz", "scan.nii.gz"),
        ("../../etc/passwd", "passwd"),
        ("..", ""),
        (".hidden", "hidden"),
        ("a b\0c\n.dcm", "a_b_c_.dcm"),
        ("é/∕.nii", "_.nii"),
        ("", ""),
        (None, ""),
        ("x" * 300 + ".nii.gz", "x" * 93 + ".nii.gz"),
    ],
)
def test_a_name_is_what_every_file_system_takes(said: str | None, kept: str) -> None:
    assert base_name(said) == kept


@pytest.mark.parametrize("name", ["a.py", "scan", "", None, "scan.nii.gz.exe", "scan.mhd", ".nii.gz.zip", "scan.dcm"])
def test_what_is_no_volume_by_its_name_is_refused(name: str | None) -> None:
    with pytest.raises(HTTPException) as refused:
        volume_ending(name)
    assert refused.value.status_code == 415
    assert ".nii.gz" in str(refused.value.detail)


def test_an_upload_gets_a_name_of_ours_and_its_own_ending() -> None:
    for said, ending in (("1.2.840.113.1.NII.GZ", ".nii.gz"), ("a.b.nii", ".nii"), ("x.nrrd", ".nrrd")):
        file = upload(said)
        rename(file, "image")
        assert file.filename == f"image{ending}"
    rename(None, "image")


def test_files_are_there_under_their_names_and_gone_afterwards() -> None:
    with received([upload("b.dcm", b"1"), upload("x/a.dcm", b"22"), upload("..", b"3")]) as folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            "b.dcm": b"1",
            "a.dcm": b"22",
            "file2": b"3",
        }
    assert not folder.exists()
    with pytest.raises(ZeroDivisionError), received([upload("b.dcm")]) as folder:
        raise ZeroDivisionError
    assert not folder.exists()


def test_two_files_of_one_name_are_refused_and_none_is_lost_in_silence() -> None:
    with (
        pytest.raises(HTTPException, match=r"IM1\.dcm") as refused,
        received([upload("a/IM1.dcm"), upload("b/IM1.dcm")]),
    ):
        pytest.fail("it was taken")
    assert refused.value.status_code == 400
    with pytest.raises(HTTPException), received([]):
        pytest.fail("nothing was taken")


def test_a_full_disk_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.free_space.free_bytes", lambda _: 10**6)
    before = set(Path(tempfile.gettempdir()).glob("mshub-upload-*"))
    with pytest.raises(HTTPException) as refused, received([upload("a.nii")]):
        pytest.fail("it was taken")
    assert refused.value.status_code == 507
    assert set(Path(tempfile.gettempdir()).glob("mshub-upload-*")) == before


def test_what_can_be_segmented_passes_and_anything_else_does_not(tmp_path: Path) -> None:
    make_image(tmp_path / "good" / "a_0000.nii.gz")
    make_image(tmp_path / "good" / "a_0001.nii.gz", seed=3)
    check_images(tmp_path / "good")
    path = tmp_path / "good" / "a_0001.nii.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(HTTPException, match="a_0001") as refused:
        check_images(tmp_path / "good")
    assert refused.value.status_code == 422
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / name).write_text("hello")
    with pytest.raises(HTTPException, match="no DICOM"):
        check_images(tmp_path / "texts")
    (tmp_path / "texts" / "b").unlink()
    with pytest.raises(HTTPException, match="no extension"):
        check_images(tmp_path / "texts")


def test_a_folder_of_images_is_no_place_for_other_files(tmp_path: Path) -> None:
    make_image(tmp_path / "channels" / "a_0000.nii.gz")
    make_image(tmp_path / "channels" / "a_0001.nii.gz", seed=3)
    SeriesMaker("two").write(tmp_path / "series")
    first = min((tmp_path / "series").iterdir())
    first.rename(first.with_name("IM0"))
    for folder in (tmp_path / "channels", tmp_path / "series"):
        check_images(folder)
        (folder / "sitecustomize.py").write_text("import os")
        (folder / "notes").write_text("hello")
        with pytest.raises(HTTPException, match=r"2 file\(s\) .*: notes, sitecustomize\.py\. Expected") as refused:
            check_images(folder)
        assert refused.value.status_code == 415


def test_ids_and_tags_have_an_end() -> None:
    check_name("image id", "a" * LONGEST_NAME)
    with pytest.raises(HTTPException, match="up to 200"):
        check_name("image id", "a" * (LONGEST_NAME + 1))
