"""From final labels of a studies folder to the cases models learn from: by name, by patient, and nothing guessed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from factories import make_image
from lib.datastore import StudiesFolder
from lib.digests import Digests
from mshub.cases import ReviewedCase
from mshub.errors import CaseError

SHAPE = (7, 5, 4)
pytestmark = pytest.mark.usefixtures("monailabel_here")


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Two images of one channel, one of two, one whose id has a space."""
    for name in ("ct", "late", "mr_0000", "mr_0001", "my scan"):
        make_image(tmp_path / "studies" / f"{name}.nii.gz", SHAPE)
    return tmp_path / "studies"


def open_folder(studies: Path) -> StudiesFolder:
    return StudiesFolder(str(studies), lambda: ("Liver", "spleen"), studies.parent / "refused")


@pytest.fixture
def datastore(studies: Path) -> StudiesFolder:
    return open_folder(studies)


def write_label(path: Path, *values: float, dtype: str = "uint8", shift_mm: float = 0.0) -> Path:
    """Write a label on the grid of `make_image`, the given values in its first voxels."""
    image = nib.load(make_image(path, SHAPE))
    array = np.zeros(SHAPE, dtype)
    array.reshape(-1)[: len(values)] = values
    affine = image.affine.copy()
    affine[:3, 3] += shift_mm
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def submit(datastore: StudiesFolder, tmp_path: Path) -> Callable[..., None]:
    """Submit a label as Slicer does."""

    def save(image: str, *values: int, **segments: int) -> None:
        label = write_label(tmp_path / "submitted.nii.gz", *values)
        info = [{"name": name, "idx": value} for name, value in segments.items()]
        datastore.save_label(image, str(label), "final", {"label_info": info, "client_id": "ann"})

    return save


@pytest.fixture
def drop(datastore: StudiesFolder, tmp_path: Path) -> Callable[..., None]:
    """Put a final label in place that nobody submitted here: another tool's, with what that tool says of it."""

    def put(image: str, label: Path | None = None, **info: Any) -> None:
        datastore.save_prediction(image, label or write_label(tmp_path / "other.nii.gz", 2, 2, 5), "final", info)

    return put


def only(datastore: StudiesFolder) -> ReviewedCase:
    (case,) = datastore.reviewed_cases()
    return case


# -- what a label says ------------------------------------------------------------------------------------------------


def test_a_submitted_label_is_a_case_by_names_spelled_as_the_models_spell_them(
    datastore: StudiesFolder, submit: Callable[..., None], studies: Path
) -> None:
    submit("ct", 4, 4, liver=4, SPLEEN=2)
    case = only(datastore)
    assert case.case_id == "ct"
    assert case.values == {"Liver": 4, "spleen": 2}
    assert case.reviewed == ("Liver",)
    assert case.images == (studies / "ct.nii.gz",)
    assert case.label == studies / "labels" / "final" / "ct.nii.gz"
    assert case.facts["client_id"] == "ann"
    assert case.facts["submitted"].endswith("+00:00")
    assert case.facts["started_from"] is None


def test_the_version_a_label_started_from_is_kept(
    datastore: StudiesFolder, submit: Callable[..., None], tmp_path: Path
) -> None:
    prelabel = {"model": "tiny", "model_version": "v3", "voxel_counts": {"spleen": 4}}
    datastore.save_prediction("ct", write_label(tmp_path / "made.nii.gz", 1), "original", {"params": prelabel})
    submit("ct", 1, Liver=1, spleen=2)
    assert only(datastore).facts["started_from"] == {"model": "tiny", "version": "v3"}
    assert only(datastore).reviewed == ("Liver", "spleen")


def test_images_without_a_final_label_are_no_cases(datastore: StudiesFolder, tmp_path: Path) -> None:
    datastore.save_prediction("ct", write_label(tmp_path / "made.nii.gz", 1), "original", {"params": {}})
    assert datastore.reviewed_cases() == []


def test_all_channels_of_an_image_belong_to_its_case(datastore: StudiesFolder, submit: Callable[..., None]) -> None:
    submit("mr", 1, Liver=1)
    assert [path.name for path in only(datastore).images] == ["mr_0000.nii.gz", "mr_0001.nii.gz"]


def test_cases_come_in_the_order_of_their_ids(datastore: StudiesFolder, submit: Callable[..., None]) -> None:
    for image in ("mr", "late", "ct"):
        submit(image, 1, Liver=1)
    assert [case.case_id for case in datastore.reviewed_cases()] == ["ct", "late", "mr"]


def test_an_image_with_a_gap_in_its_channels_is_left_out_and_named(
    datastore: StudiesFolder, submit: Callable[..., None], studies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    submit("mr", 1, Liver=1)
    submit("ct", 1, Liver=1)
    (studies / "mr_0001.nii.gz").rename(studies / "mr_0002.nii.gz")
    assert only(datastore).case_id == "ct"
    assert "mr is left out of training: Channel mr_0001.nii.gz is missing" in caplog.text


def test_a_label_whose_file_is_gone_is_left_out(
    datastore: StudiesFolder, submit: Callable[..., None], studies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    submit("ct", 1, Liver=1)
    (studies / "labels" / "final" / "ct.nii.gz").unlink()
    assert datastore.reviewed_cases() == []
    assert "no file ct.nii.gz" in caplog.text


def test_structures_of_models_that_are_gone_keep_their_names(
    datastore: StudiesFolder, submit: Callable[..., None], studies: Path
) -> None:
    submit("ct", 1, 2, Liver=1, spleen=2)
    later = StudiesFolder(str(studies), lambda: ("spleen",), studies.parent / "refused")
    assert only(later).values == {"Liver": 1, "spleen": 2}
    assert only(later).structures(["spleen"]) == ("spleen",)


# -- labels of other tools --------------------------------------------------------------------------------------------


def test_in_a_label_of_another_tool_what_is_drawn_was_reviewed(
    datastore: StudiesFolder, drop: Callable[..., None]
) -> None:
    names = [{"name": "background", "idx": 0}, {"name": "liver", "idx": 2}, {"name": "spleen", "idx": 3}]
    drop("ct", label_info=[*names, {"name": "lesion", "idx": 5}])
    assert only(datastore).values == {"Liver": 2, "spleen": 3, "lesion": 5}
    assert only(datastore).reviewed == ("Liver", "lesion")


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({}, "without the names of its segments"),
        ({"label_info": []}, "without the names of its segments"),
        ({"label_info": "liver"}, "without the names of its segments"),
        ({"params": {"label_names": {"liver": 1}}}, "without the names of its segments"),  # a prediction, no review
        ({"label_info": ["liver"]}, "expected a name and a whole number"),
        ({"label_info": [{"name": "liver"}]}, "expected a name and a whole number"),
        ({"label_info": [{"name": " ", "idx": 1}]}, "expected a name and a whole number"),
        ({"label_info": [{"name": "liver", "idx": 1.5}]}, "expected a name and a whole number"),
        ({"label_info": [{"name": "liver", "idx": True}]}, "expected a name and a whole number"),
        ({"label_info": [{"name": "liver", "idx": 1}, {"name": "Liver ", "idx": 2}]}, "two of its segments"),
        ({"label_info": [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 1}]}, "two of its segments"),
        ({"label_info": [{"name": "liver", "idx": 0}]}, "not positive"),
    ],
)
def test_a_label_nobody_can_read_by_name_is_left_out_and_said_once(
    datastore: StudiesFolder,
    drop: Callable[..., None],
    submit: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    info: dict[str, Any],
    words: str,
) -> None:
    drop("ct", **info)
    submit("late", 1, Liver=1)
    for _ in range(3):
        assert only(datastore).case_id == "late"
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert words in told[0]
    assert "ct" in told[0]


def test_a_label_of_another_tool_must_lie_on_the_images_grid_and_hold_whole_numbers(
    datastore: StudiesFolder, drop: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [{"name": "liver", "idx": 1}]
    drop("ct", write_label(tmp_path / "a.nii.gz", 1, shift_mm=8.0), label_info=names)
    drop("late", write_label(tmp_path / "b.nii.gz", 0.5, dtype="float32"), label_info=names)
    (tmp_path / "c.nii.gz").write_bytes(b"no image")
    drop("mr", tmp_path / "c.nii.gz", label_info=names)
    assert datastore.reviewed_cases() == []
    for words in ("ct is left out of training: the label", "holds fractions", "final label of mr is left out"):
        assert words in caplog.text


def test_a_label_of_another_tool_that_is_replaced_is_read_again(
    datastore: StudiesFolder, drop: Callable[..., None], tmp_path: Path
) -> None:
    names = [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]
    drop("ct", write_label(tmp_path / "a.nii.gz", 1), label_info=names)
    assert only(datastore).reviewed == ("Liver",)
    drop("ct", write_label(tmp_path / "b.nii.gz", 1, 2), label_info=names)
    assert only(datastore).reviewed == ("Liver", "spleen")


# -- whose image, and who chose it ------------------------------------------------------------------------------------


def test_the_patient_comes_from_the_image_then_from_the_table_then_from_the_id(
    datastore: StudiesFolder, submit: Callable[..., None], studies: Path
) -> None:
    for image in ("ct", "late", "mr", "my scan"):
        submit(image, 1, Liver=1)
    datastore.update_image_info("ct", {"PatientID": 77, "patient": "not this"})
    datastore.update_image_info("late", {"patient": " P2 ", "PatientID": ""})
    (studies / "patients.csv").write_text("case,patient\nmr,P2\nct,P9\n")
    patients = {case.images[0].name: case.patient for case in datastore.reviewed_cases()}
    assert patients == {
        **{"ct.nii.gz": "77", "late.nii.gz": "P2", "mr_0000.nii.gz": "P2"},
        "my scan.nii.gz": "my scan",
    }


def test_a_table_that_could_be_misread_is_refused(datastore: StudiesFolder, studies: Path) -> None:
    (studies / "patients.csv").write_text("case;patient\nct;P1\n")
    with pytest.raises(CaseError, match=r"patients\.csv has the columns case;patient"):
        datastore.reviewed_cases()


def test_a_line_for_an_image_that_is_not_there_is_told(
    datastore: StudiesFolder, studies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (studies / "patients.csv").write_text("case,patient\nct_0000,P1\n")
    datastore.reviewed_cases()
    assert "patients.csv names ct_0000, which is no image here" in caplog.text


@pytest.mark.parametrize(
    ("strategy", "audit"),
    [
        (None, True),
        ({}, True),
        ({"random": {"ts": 1, "client_id": "me"}}, True),
        ({"uncertain": {"ts": 1}}, False),
        ({"random": {"ts": 1}, "uncertain": {"ts": 2}}, False),
    ],
)
def test_a_case_that_a_model_chose_is_no_audit(
    datastore: StudiesFolder, submit: Callable[..., None], strategy: dict[str, Any] | None, audit: bool
) -> None:
    submit("ct", 1, Liver=1)
    if strategy is not None:
        datastore.update_image_info("ct", {"strategy": strategy})
    assert only(datastore).audit is audit


def test_an_id_with_a_space_becomes_a_file_name_of_its_own(
    datastore: StudiesFolder, submit: Callable[..., None], studies: Path
) -> None:
    make_image(studies / "my_scan.nii.gz", SHAPE)
    datastore.refresh()
    submit("my scan", 1, Liver=1)
    submit("my_scan", 1, Liver=1)
    ids = [case.case_id for case in datastore.reviewed_cases()]
    assert ids[1] == "my_scan"
    assert ids[0].startswith("case-my_scan-")
    assert [case.patient for case in datastore.reviewed_cases()] == ["my scan", "my_scan"]
    assert [case.case_id for case in open_folder(studies).reviewed_cases()] == ids


# -- digests ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read to compute digests."""
    from mshub import cases

    read: list[str] = []
    original = cases.file_sha256

    def counted(path: Path) -> str:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(cases, "file_sha256", counted)
    return read


def test_a_digest_is_computed_once_even_across_restarts(
    datastore: StudiesFolder, submit: Callable[..., None], studies: Path, tmp_path: Path, reads: list[str]
) -> None:
    submit("mr", 1, Liver=1)
    expected = only(datastore).digest
    del reads[:]
    for folder, digests in ((datastore, Digests(tmp_path / "d.json")), (open_folder(studies), None)):
        digests = digests or Digests(tmp_path / "d.json")
        for _ in range(2):
            case = only(folder)
            digests.prepare([case])
            assert case.digest == expected
    assert sorted(reads) == ["mr.nii.gz", "mr_0000.nii.gz", "mr_0001.nii.gz"]


@pytest.mark.parametrize("change", ["label", "image", "names"])
def test_a_changed_case_has_another_digest(
    datastore: StudiesFolder, submit: Callable[..., None], studies: Path, tmp_path: Path, change: str
) -> None:
    digests = Digests(tmp_path / "digests.json")

    def digest() -> str:
        case = only(datastore)
        digests.prepare([case])
        assert case.digest == only(datastore).digest
        return case.digest

    submit("ct", 1, 1, Liver=1)
    before = digest()
    if change == "label":
        submit("ct", 1, 1, 1, Liver=1)
    elif change == "image":
        make_image(studies / "ct.nii.gz", SHAPE, seed=8)
    else:
        submit("ct", 1, 1, spleen=1)
    assert digest() != before


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null"])
def test_damaged_or_missing_memory_is_made_anew(
    datastore: StudiesFolder, submit: Callable[..., None], tmp_path: Path, content: str
) -> None:
    (tmp_path / "digests.json").write_text(content)
    submit("ct", 1, Liver=1)
    case = only(datastore)
    Digests(tmp_path / "digests.json").prepare([case])
    assert case.digest == only(datastore).digest
    assert case.digest in (tmp_path / "digests.json").read_text()
