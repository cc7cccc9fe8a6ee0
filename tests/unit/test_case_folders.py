"""Cases from two folders: paired by name, channel by channel, with the integers of the labels' own dataset.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from mshub.case_folders import cases_from_folders, read_dataset_json
from mshub.cases import ReviewedCase
from mshub.errors import CaseError, LabelError
from mshub.geometry import Grid
from mshub.volume_io import read_volume, write_volume

PUBLISHED = {"liver": 1, "spleen": 2, "Portal vein": 3}
DATASET: dict[str, Any] = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}}


class Folders:
    """Two folders of empty files; names decide, contents are not looked at."""

    def __init__(self, root: Path) -> None:
        self.root, self.images, self.labels = root, root / "imagesTr", root / "labelsTr"
        self.images.mkdir(parents=True)
        self.labels.mkdir()

    def fill(self, images: Iterable[str], labels: Iterable[str]) -> Folders:
        for folder, names in ((self.images, images), (self.labels, labels)):
            for name in names:
                (folder / name).touch()
        return self

    def patients(self, content: str | bytes) -> Folders:
        (self.images / "patients.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return self

    def dataset(self, content: Any, *, beside: bool = False) -> Folders:
        text = content if isinstance(content, str) else json.dumps(content)
        ((self.root if beside else self.labels) / "dataset.json").write_text(text, encoding="utf-8")
        return self

    def cases(self, published: dict[str, int] | None = PUBLISHED) -> list[ReviewedCase]:
        return cases_from_folders(self.images, self.labels, published)

    def named(self) -> dict[str, list[str]]:
        """Return case id -> names of its images."""
        return {case.case_id: [path.name for path in case.images] for case in self.cases()}


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "Dataset001_Liver")


@pytest.fixture
def one(folders: Folders) -> Folders:
    """One case."""
    return folders.fill(["a.nii.gz"], ["a.nii.gz"])


# -- pairs --------------------------------------------------------------------------------------------------------


def test_images_and_labels_of_one_name_are_a_case(folders: Folders) -> None:
    names = ["b.nii.gz", "a.nii.gz", "c.nii"]
    cases = folders.fill([*names, "not reviewed yet.nii.gz"], names).cases()
    assert [case.case_id for case in cases] == ["a", "b", "c"]
    assert [case.images for case in cases] == [(folders.images / name,) for name in sorted(names)]
    assert [case.label for case in cases] == [folders.labels / name for name in sorted(names)]


def test_a_label_is_a_whole_review_of_a_case_that_may_judge(one: Folders) -> None:
    (case,) = one.cases()
    assert case.values == PUBLISHED
    assert case.reviewed == ("liver", "spleen", "Portal vein")
    assert case.patient == "a"
    assert case.audit


def test_channels_are_in_the_order_of_their_numbers(folders: Folders) -> None:
    folders.fill(["b_0000.nii.gz", "a_0001.nii.gz", "a_0000.nii.gz", "a_0002.nii.gz"], ["b.nii.gz", "a.nii.gz"])
    assert folders.named() == {"a": ["a_0000.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz"], "b": ["b_0000.nii.gz"]}


def test_the_pairs_are_those_of_nnunet(folders: Folders) -> None:
    folders.fill(
        [f"{case}_{channel:04d}.nii.gz" for case in ("liver_7", "scan_2023", "x_y") for channel in range(2)],
        ["liver_7.nii.gz", "scan_2023.nii.gz", "x_y.nii.gz"],
    )
    folders.dataset({**DATASET, "numTraining": 3, "file_ending": ".nii.gz"}, beside=True)
    expected = get_filenames_of_train_images_and_targets(str(folders.root))
    found = {
        case.case_id: {"images": [str(path) for path in case.images], "label": str(case.label)}
        for case in folders.cases()
    }
    assert found == expected


@pytest.mark.parametrize("name", ["case_0001", "case_0000", "scan_2023", "a_0001_0002"])
def test_a_case_whose_name_ends_in_four_digits_is_no_channel_of_another(folders: Folders, name: str) -> None:
    folders.fill([f"{name}.nii.gz"], [f"{name}.nii.gz"])
    assert folders.named() == {name: [f"{name}.nii.gz"]}


def test_cases_with_numbers_for_names_keep_their_own_image(folders: Folders) -> None:
    names = ["liver_0000.nii.gz", "liver_0001.nii.gz", "liver_0002.nii.gz"]
    folders.fill(names, names)
    assert folders.named() == {f"liver_{number:04d}": [f"liver_{number:04d}.nii.gz"] for number in range(3)}


def test_a_case_whose_name_begins_those_of_others_keeps_its_own_image(folders: Folders) -> None:
    names = ["a.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz"]
    folders.fill(names, names)
    assert folders.named() == {"a": [names[0]], "a_0001": [names[1]], "a_0002": [names[2]]}


def test_nrrd_and_metaimage_are_paired_too_and_one_format_with_another(folders: Folders) -> None:
    folders.fill(
        ["a.nrrd", "b.mha", "c_0000.mhd", "d.NII.GZ", "e.nii.gz"], ["a.nrrd", "b.nii.gz", "c.mha", "d.nii", "e.Nrrd"]
    )
    assert folders.named() == {
        "a": ["a.nrrd"],
        "b": ["b.mha"],
        "c": ["c_0000.mhd"],
        "d": ["d.NII.GZ"],
        "e": ["e.nii.gz"],
    }


def test_channels_in_upper_case_endings_are_channels(folders: Folders) -> None:
    folders.fill(["a_0000.NII.GZ", "a_0001.NII.GZ"], ["a.nii.gz"])
    assert folders.named() == {"a": ["a_0000.NII.GZ", "a_0001.NII.GZ"]}


def test_a_label_that_was_paired_can_be_read(folders: Folders) -> None:
    grid = Grid((4, 6, 3), np.array([[0, -1.5, 0, 10], [1.2, 0, 0, -4], [0, 0, 3.0, 7], [0, 0, 0, 1.0]]))
    label = np.zeros(grid.shape_xyz, np.uint8)
    label[1:3, 2:5, 1] = 2
    write_volume(folders.labels / "a.nrrd", label, grid)
    folders.fill(["a.nii.gz"], [])
    (case,) = folders.cases()
    found = read_volume(case.label, allow_constant=True).array_xyz == case.values["spleen"]
    np.testing.assert_array_equal(found, label == 2)


def test_other_files_and_hidden_ones_are_passed_over(folders: Folders) -> None:
    folders.fill(
        ["a.nii.gz", "._a.nii.gz", "readme.txt", "._patients.csv"],
        ["a.nii.gz", "._a.nii.gz", "notes.docx", ".DS_Store"],
    )
    (folders.labels / "old").mkdir()
    assert folders.named() == {"a": ["a.nii.gz"]}


# -- what does not pair -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["images", "labels"])
def test_a_folder_that_is_not_there_is_named(one: Folders, tmp_path: Path, which: str) -> None:
    missing = tmp_path / "nowhere"
    images, labels = (missing, one.labels) if which == "images" else (one.images, missing)
    with pytest.raises(CaseError, match=r"nowhere is no folder. Expected a folder of images and one of labels"):
        cases_from_folders(images, labels, PUBLISHED)


def test_a_file_is_no_folder(one: Folders) -> None:
    with pytest.raises(CaseError, match="is no folder"):
        cases_from_folders(one.images, one.labels / "a.nii.gz", PUBLISHED)


def test_a_label_without_an_image_says_which_file_is_missing(one: Folders) -> None:
    one.fill(["b_0000.nrrd"], ["c.nii.gz"])
    with pytest.raises(
        CaseError, match=r"The label c\.nii\.gz has no image: expected c\.nii\.gz or c_0000\.nii\.gz in .*imagesTr"
    ):
        one.cases()


def test_a_folder_without_labels_is_refused(folders: Folders) -> None:
    with pytest.raises(CaseError, match=r"labelsTr holds no labels: expected files ending in \.nii, \.nii\.gz, \.nrrd"):
        folders.fill(["a.nii.gz"], ["a.txt"]).cases()


@pytest.mark.parametrize(
    "images",
    [
        ["a_0000.nii.gz", "a_0002.nii.gz"],
        ["a_0001.nii.gz", "a_0002.nii.gz"],
        ["a_2023.nii.gz"],
        ["a.nii.gz", "a.nrrd"],
        ["a_0000.nii.gz", "a_0000.nrrd", "a_0001.nii.gz"],
    ],
    ids=" ".join,
)
def test_unclear_channels_are_refused_and_listed(folders: Folders, images: list[str]) -> None:
    with pytest.raises(CaseError, match=rf"The images of a are {', '.join(images)}\. Expected .* without gaps"):
        folders.fill(images, ["a.nii.gz"]).cases()


def test_two_labels_of_one_case_are_refused(folders: Folders) -> None:
    with pytest.raises(CaseError, match=r"a\.nii\.gz and a\.nrrd are labels of one case"):
        folders.fill(["a.nii.gz"], ["a.nii.gz", "a.nrrd"]).cases()


# -- patients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "case,patient\na,p1\nb,p1\n",
        "\ufeffcase,patient\r\na,p1\r\nb,p1\r\n",
        'patient,age,case\np1,61,a\n"p1",62,"b"\n',
        "case, patient\n a , p1\nb,p1 \n\nz,p9\n",
        "case,patient\na,p1\nb,p1\nb,p1\n",
    ],
    ids=["plain", "as Excel writes it", "more columns", "white space", "twice the same"],
)
def test_patients_are_read_from_their_file(folders: Folders, content: str) -> None:
    names = ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    cases = folders.fill(names, names).patients(content).cases()
    assert [case.patient for case in cases] == ["p1", "p1", "c"]


def test_a_case_with_no_patient_in_its_line_is_a_patient_of_its_own(one: Folders) -> None:
    (case,) = one.patients("case,patient\na,\nb\n,p1\n").cases()
    assert case.patient == "a"


def test_the_patient_of_a_case_with_channels_is_found_by_the_cases_name(folders: Folders) -> None:
    folders.fill(["a_0000.nii.gz", "a_0001.nii.gz"], ["a.nii.gz"]).patients("case,patient\na,Müller\n")
    assert [case.patient for case in folders.cases()] == ["Müller"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("case;patient\na;p1\n", "has the columns case;patient; expected case,patient"),
        ("a,p1\nb,p1\n", "has the columns a, p1"),
        ("a,p1\n", "has the columns a, p1"),
        ("image\na,p1,more\n", "has the columns image"),
        ("", "has the columns nothing"),
        ("case,patient\na,p1\na,p2\n", "says that a is of p1 and of p2"),
        (b"case,patient\na,M\xfcller\n", "cannot be read .*UTF-8"),
    ],
    ids=["semicolons", "no header", "no header, one line", "a row too long", "empty", "contradiction", "Latin-1"],
)
def test_a_file_of_patients_that_could_be_misread_is_refused(one: Folders, content: str | bytes, message: str) -> None:
    with pytest.raises(CaseError, match=rf"patients\.csv {message}"):
        one.patients(content).cases()


# -- names and integers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True], ids=["in the labels' folder", "beside it"])
def test_integers_are_those_of_the_labels_own_dataset_json(one: Folders, beside: bool) -> None:
    one.dataset({"labels": {"background": 0, "spleen": 1, "liver": 2}}, beside=beside)
    (case,) = one.cases()
    assert case.values == {"spleen": 1, "liver": 2}
    assert case.reviewed == ("spleen", "liver")


def test_a_dataset_json_among_the_labels_comes_before_one_beside_them(one: Folders) -> None:
    one.dataset({"labels": {"background": 0, "spleen": 1}}).dataset(DATASET, beside=True)
    assert one.cases()[0].values == {"spleen": 1}


def test_integers_with_gaps_are_those_in_the_label_files_not_those_a_network_would_write(one: Folders) -> None:
    one.dataset({"labels": {"background": 0, "spleen": 52, "liver": 5}})
    assert one.cases()[0].values == {"liver": 5, "spleen": 52}
    one.dataset({**DATASET, "labels": {"background": 0, "spleen": 52, "liver": 5}})
    assert one.cases(None)[0].values == {"liver": 5, "spleen": 52}


def test_a_v1_dataset_json_is_read_too(one: Folders) -> None:
    one.dataset({"modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen", "4": "liver"}})
    assert one.cases()[0].values == {"spleen": 1, "liver": 4}


def test_regions_have_the_integers_nnunet_writes_for_them(one: Folders) -> None:
    labels = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumour": 2}
    one.dataset({"labels": labels, "regions_class_order": [1, 3, 2]})
    assert one.cases({"kidney": 1, "tumour": 2, "masses": 3})[0].values == {"kidney": 1, "masses": 3, "tumour": 2}


def test_names_are_spelled_as_the_model_spells_them(one: Folders) -> None:
    one.dataset({"labels": {"background": 0, " LIVER": 1, "portal  VEIN": 2}})
    (case,) = one.cases()
    assert case.values == {"liver": 1, "Portal vein": 2}
    assert case.reviewed == ("liver", "Portal vein")


def test_a_name_the_model_does_not_have_is_refused_with_a_suggestion(one: Folders) -> None:
    one.dataset({"labels": {"background": 0, "Lifer": 1, "spleen": 2, "tumour": 3}})
    with pytest.raises(
        LabelError,
        match=r"names Lifer, tumour, which the model does not have\. Did you mean liver\? .*liver, spleen, Portal vein",
    ):
        one.cases()


def test_a_name_like_no_other_is_refused_without_a_suggestion(one: Folders) -> None:
    one.dataset({"labels": {"background": 0, "xyz": 1}})
    with pytest.raises(LabelError, match=r"names xyz, which the model does not have\. Its structures") as refused:
        one.cases()
    assert "Did you mean" not in str(refused.value)


def test_labels_with_voxels_nobody_decided_about_are_refused(one: Folders) -> None:
    one.dataset({**DATASET, "labels": {**DATASET["labels"], "ignore": 3}})
    for published in (PUBLISHED, None):
        with pytest.raises(LabelError, match=r"declares 'ignore' = 3.* remove 'ignore'"):
            one.cases(published)


# -- a model that is yet to be trained ----------------------------------------------------------------------------


def test_a_new_model_takes_its_structures_from_dataset_json(one: Folders) -> None:
    (case,) = one.dataset(DATASET, beside=True).cases(None)
    assert case.values == {"liver": 1, "spleen": 2}
    assert case.reviewed == ("liver", "spleen")


def test_a_new_model_without_dataset_json_says_what_one_must_hold(one: Folders) -> None:
    with pytest.raises(LabelError, match=r"Nothing says what the integers .* mean.*channel_names.*labels"):
        one.cases(None)


@pytest.mark.parametrize(
    "dataset",
    [
        {"labels": DATASET["labels"]},
        {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}},
        {"channel_names": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}},
        {"channel_names": ["CT"], "labels": DATASET["labels"]},
    ],
    ids=["no channels", "v1", "half v1", "a list of channels"],
)
def test_a_dataset_json_no_model_can_be_planned_from_is_refused(one: Folders, dataset: dict[str, Any]) -> None:
    with pytest.raises(LabelError, match="lacks what a new model needs"):
        one.dataset(dataset).cases(None)


# -- dataset.json itself ------------------------------------------------------------------------------------------


def test_dataset_json_is_returned_as_it_is(one: Folders) -> None:
    assert read_dataset_json(one.labels) is None
    one.dataset({**DATASET, "description": "Läsion"}, beside=True)
    assert read_dataset_json(one.labels) == {**DATASET, "description": "Läsion"}


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", r"dataset\.json is no JSON"), ("[1]", r"dataset\.json holds a list"), ('"x"', "holds a str")],
)
def test_a_dataset_json_nobody_can_read_is_named(one: Folders, content: str, message: str) -> None:
    one.dataset(content)
    with pytest.raises(LabelError, match=message):
        one.cases()


def test_a_dataset_json_that_is_no_text_is_named(one: Folders) -> None:
    (one.labels / "dataset.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LabelError, match=r"dataset\.json is no JSON"):
        one.cases()


@pytest.mark.parametrize("labels", [{"liver": 1}, {"background": 0}, {"background": 0, "a": 1, "b": 1}, 3, None])
def test_labels_that_contradict_themselves_are_refused(one: Folders, labels: Any) -> None:
    with pytest.raises(LabelError, match=r"dataset\.json"):
        one.dataset({"labels": labels}).cases()
