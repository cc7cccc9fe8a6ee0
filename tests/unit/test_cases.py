"""Reviewed cases: a digest that follows the content and not the place, and what is written down of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mshub.cases import ReviewedCase
from mshub.errors import StoreError

Change = Callable[[ReviewedCase], ReviewedCase]


@pytest.fixture
def case(tmp_path: Path) -> ReviewedCase:
    """A case of two channels, the second a folder of DICOM slices."""
    series = tmp_path / "images" / "t2w"
    series.mkdir(parents=True)
    for number in range(3):
        (series / f"slice{number}.dcm").write_bytes(b"slice %d" % number)
    image, label = tmp_path / "images" / "case_0000.nii.gz", tmp_path / "labels" / "case.nii.gz"
    label.parent.mkdir()
    image.write_bytes(b"T1w")
    label.write_bytes(b"a label")
    return ReviewedCase(
        case_id="case",
        images=(image, series),
        label=label,
        values={"liver": 1, "spleen": 4},
        reviewed=("liver", "spleen"),
        patient="Doe^Jane",
        audit=False,
        facts={"client_id": "reader 1", "started_from": {"model": "tiny", "version": "v2"}, "submitted": None},
    )


def moved(case: ReviewedCase, folder: Path) -> ReviewedCase:
    """Return the same case, its files copied under other names."""
    folder.mkdir()
    image = Path(shutil.copy(case.images[0], folder / "another name.nii.gz"))
    series = Path(shutil.copytree(case.images[1], folder / "another series"))
    return replace(case, images=(image, series), label=Path(shutil.copy(case.label, folder / "l.nii.gz")))


# -- the digest ---------------------------------------------------------------------------------------------------


def test_the_digest_is_a_sha256_and_stays_the_same(case: ReviewedCase) -> None:
    assert len(bytes.fromhex(case.digest)) == 32
    assert replace(case).digest == case.digest


def test_the_digest_does_not_depend_on_where_the_files_are_or_on_whose_they_are(
    case: ReviewedCase, tmp_path: Path
) -> None:
    elsewhere = moved(case, tmp_path / "elsewhere")
    assert elsewhere.digest == case.digest
    renamed = replace(elsewhere, case_id="other", patient="somebody", audit=True, facts={})
    assert renamed.digest == case.digest


def test_the_digest_does_not_depend_on_the_order_of_names(case: ReviewedCase) -> None:
    turned = replace(case, values={"spleen": 4, "liver": 1}, reviewed=("spleen", "liver"))
    assert turned.digest == case.digest


def rewrite(number: int, content: bytes) -> Change:
    def change(case: ReviewedCase) -> ReviewedCase:
        (case.images[0], case.images[1] / "slice1.dcm", case.label)[number].write_bytes(content)
        return replace(case)

    return change


def add_slice(case: ReviewedCase) -> ReviewedCase:
    (case.images[1] / "slice3.dcm").write_bytes(b"")
    return replace(case)


def remove_slice(case: ReviewedCase) -> ReviewedCase:
    (case.images[1] / "slice2.dcm").unlink()
    return replace(case)


def swap_slices(case: ReviewedCase) -> ReviewedCase:
    one, two = case.images[1] / "slice0.dcm", case.images[1] / "slice1.dcm"
    one.rename(case.images[1] / "aside")
    two.rename(one)
    (case.images[1] / "aside").rename(two)
    return replace(case)


CHANGES: dict[str, Change] = {
    "the first image": rewrite(0, b"T1c"),
    "a slice": rewrite(1, b"slice X"),
    "a slice more": add_slice,
    "a slice less": remove_slice,
    "two slices swapped": swap_slices,
    "the label": rewrite(2, b"a labex"),
    "a structure's value": lambda case: replace(case, values={"liver": 4, "spleen": 1}),
    "a structure's name": lambda case: replace(case, values={"liver": 1, "kidney": 4}),
    "a structure more": lambda case: replace(case, values={**case.values, "kidney": 5}),
    "less reviewed": lambda case: replace(case, reviewed=("liver",)),
    "more reviewed": lambda case: replace(case, reviewed=("liver", "spleen", "kidney")),
    "the order of channels": lambda case: replace(case, images=case.images[::-1]),
    "a channel less": lambda case: replace(case, images=case.images[:1]),
    "an image taken for the label": lambda case: replace(
        case, images=(case.label, case.images[1]), label=case.images[0]
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_digest_changes_with(case: ReviewedCase, change: Change) -> None:
    before = case.digest
    assert change(case).digest != before


def test_a_label_written_again_with_the_same_bytes_is_the_same_case(case: ReviewedCase) -> None:
    before = case.digest
    case.label.write_bytes(case.label.read_bytes())
    assert replace(case).digest == before


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_file_that_is_gone_is_named_in_a_sentence(case: ReviewedCase, number: int) -> None:
    gone = (*case.images, case.label)[number]
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(StoreError, match=rf"{gone.name} cannot be read"):
        _ = case.digest


# -- what of a model's structures ---------------------------------------------------------------------------------


def test_reviewed_structures_come_in_the_models_order_and_only_if_the_model_knows_them(case: ReviewedCase) -> None:
    assert case.structures(["spleen", "kidney", "liver"]) == ("spleen", "liver")
    assert replace(case, reviewed=("kidney",)).structures(["kidney"]) == ("kidney",)  # found empty: it has no value
    assert case.structures(["kidney"]) == ()


# -- what is written down -----------------------------------------------------------------------------------------


def test_a_case_survives_json(case: ReviewedCase) -> None:
    stored = json.loads(json.dumps(case.as_dict()))
    again = ReviewedCase.from_dict(stored)
    assert again == case
    assert again.digest == case.digest
    assert isinstance(again.images[0], Path)
    assert isinstance(again.label, Path)


def test_writing_a_case_down_needs_none_of_its_files(tmp_path: Path) -> None:
    case = ReviewedCase("c", (tmp_path / "gone.nii.gz",), tmp_path / "gone too.nii.gz", {"liver": 1}, ("liver",), "p")
    assert ReviewedCase.from_dict(case.as_dict()) == case
    assert case.audit
    assert case.facts == {}


@pytest.mark.parametrize("patient", ["Doe^Jane", "肝臓", "", "PAT-0001"])
def test_the_key_of_a_patient_hides_the_name_and_stays_the_same(case: ReviewedCase, patient: str) -> None:
    named = replace(case, patient=patient)
    key = named.patient_key
    assert len(key) == 16
    assert int(key, 16) >= 0
    assert not patient or patient.lower() not in key
    assert replace(named, case_id="another scan").patient_key == key


def test_patients_have_keys_of_their_own(case: ReviewedCase) -> None:
    patients = [f"PAT-{number:04d}" for number in range(500)]
    assert len({replace(case, patient=patient).patient_key for patient in patients}) == 500
