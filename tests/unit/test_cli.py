"""The command line, as a user meets it: what is printed where, and the exit code."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch

import mshub
from dicom_series_factory import SeriesMaker
from factories import make_image, make_model_folder, odd_grids
from mshub import cli
from mshub.audit_line import audit_file
from mshub.catalogue import Catalogue, draft_card
from mshub.cli import main
from mshub.errors import StoreError
from mshub.geometry import same_grid
from mshub.install import add_model, version_record
from mshub.jobs import Job, Jobs
from mshub.nnunet import network_agreement
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.openvino_library import is_installed
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, PredictOptions
from mshub.recipe import FROM_SCRATCH, Recipe
from mshub.store import ModelStore
from mshub.volume_io import read_grid, read_volume
from releases import write_release

LISTED = {"id", "title", "modality", "status", "installed", "version", "labels"}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``mshub ARGUMENTS`` in this process."""

    def run(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["mshub", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Result(int(end.value.code or 0), out, err)

    return run


def new_version(store: ModelStore, folder: Path, work: Path) -> str:
    """Install the model ``tiny`` once more, with other weights."""
    changed = Path(shutil.copytree(folder, work / "changed"))
    path = changed / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["network_weights"]["decoder.seg_layers.1.bias"][2] += 50
    torch.save(checkpoint, path)
    return add_model(store, "tiny", changed).version


def trained_here(store: ModelStore, folder: Path) -> None:
    """Publish the model ``tiny`` as a training from scratch does whose gate could not decide."""
    model = ModelFolder.open(folder)
    card = draft_card("tiny", model.dataset)
    record = version_record(model, card, {"how": "trained here", "from": "3 reviewed cases"})
    score = {"case": "d", "patient": "p", "dice": {"liver": 0.5, "spleen": 1.0}, "missed": []}
    record["lineage"] = {
        "cases": [{"case": name, "digest": name} for name in "abc"],
        "held_out": [{"case": "d", "digest": "d"}],
        "scores": {"candidate": [score]},
        "verdict": {"outcome": "needs a person", "reasons": ["1 case is too few"]},
    }
    with store.staging() as staging:
        store.publish("tiny", Path(shutil.copytree(folder, staging / "model")), record, serve_first=False)
    store.keep_card(card)


# -- looking ------------------------------------------------------------------------------------------------------


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version") == Result(0, f"mshub {mshub.__version__}\n", "")


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    result = run()
    assert all(command in result.out + result.err for command in ("list", "add", "predict", "serve", "rollback"))


def test_the_list_is_readable_in_80_columns(run: Run, installed: ModelStore) -> None:
    result = run("list")
    assert result.code == 0
    for card in Catalogue.load():
        row = next(line for line in result.out.splitlines() if line.startswith(card.id))
        assert card.title.split()[0] in row
        assert all(word in result.out for word in card.title.split())
        assert card.status in row
    assert "here (v1)" in next(line for line in result.out.splitlines() if line.startswith("tiny"))
    assert max(map(len, result.out.splitlines())) <= 80


def test_the_list_as_json_has_what_scripts_need(run: Run, installed: ModelStore) -> None:
    rows = {row["id"]: row for row in run("list", "--json").json()}
    assert set(rows) == {*Catalogue.load().ids, "tiny"}
    assert all(row.keys() >= LISTED for row in rows.values())
    tiny, starter = rows["tiny"], rows["starter"]
    assert {key: tiny[key] for key in LISTED} == {
        "id": "tiny",
        "title": "tiny",
        "modality": "CT",
        "status": "local",
        "installed": True,
        "version": "v1",
        "labels": ["liver", "spleen"],
    }
    assert (starter["status"], starter["installed"], starter["version"]) == ("bundled", False, None)
    assert starter["labels"] == list(Catalogue.load().get("starter").labels or ())


def test_the_version_that_serves_is_listed(run: Run, installed: ModelStore, liver_spleen: Path, tmp_path: Path) -> None:
    new_version(installed, liver_spleen, tmp_path)
    run("promote", "tiny", "v2")
    assert {row["id"]: row["version"] for row in run("list", "--json").json()}["tiny"] == "v2"


def test_a_model_is_shown_with_its_card_and_what_is_installed(run: Run, installed: ModelStore) -> None:
    facts = run("show", "tiny", "--json").json()
    assert facts["channels"] == ["CT"]
    assert (facts["configuration"], facts["folds"], facts["trainer"]) == ("3d_fullres", ["0"], "nnUNetTrainer")
    assert facts["labels"] == ["liver", "spleen"]
    shown = run("show", "tiny")
    assert shown.code == 0
    assert "liver, spleen" in shown.out


def test_a_model_that_is_not_installed_is_shown_from_its_card(run: Run) -> None:
    result = run("show", "liver-lesion-ct")
    assert result.code == 0
    assert "-125" in result.out
    assert run("show", "liver-lesion-ct", "--json").json()["installed"] is False


# -- installing ---------------------------------------------------------------------------------------------------


def test_a_model_is_added_and_its_structures_are_named(run: Run, store: ModelStore, liver_spleen: Path) -> None:
    result = run("add", "tiny", liver_spleen)
    assert result == Result(0, "tiny v1 is installed: liver, spleen.\nLicence: unknown; note it with --licence.\n", "")
    assert store.installed() == ["tiny"]


def test_a_further_version_says_how_to_switch_to_it(
    run: Run, installed: ModelStore, two_channels: Path, tmp_path: Path
) -> None:
    result = run("add", "tiny", make_model_folder(tmp_path / "model", seed=9))
    assert result.code == 0
    assert "mshub promote tiny v2" in " ".join(result.out.split())
    assert installed.current("tiny").version == "v1"


def test_a_model_is_added_with_a_card_of_its_own(
    run: Run, store: ModelStore, liver_spleen: Path, tmp_path: Path
) -> None:
    card = tmp_path / "card.toml"
    card.write_text(
        'id = "ours"\ntitle = "[red][/x]"\nsite = "abdomen"\nmodality = "CT"\ntarget = "liver"\nstatus = "local"\n'
        "generation = 2\n"
    )
    assert run("add", "ours", liver_spleen, "--card", card).code == 0
    assert store.catalogue().get("ours").title == "[red][/x]"
    assert "[red][/x]" in run("list").out
    assert "[red][/x]" in run("show", "ours").out


def test_where_a_model_is_from_and_its_terms_are_kept_and_shown(
    run: Run, store: ModelStore, liver_spleen: Path
) -> None:
    page = "https://example.org/record/1"
    result = run("add", "bought", liver_spleen, "--from", page, "--licence", "CC BY-NC [4.0]")
    assert "Licence: CC BY-NC [4.0].\n" in result.out
    assert store.current("bought").record["origin"] == {"how": "added", "from": page}
    shown = run("show", "bought", "--json").json()
    assert (shown["licence"], shown["origin"]["from"]) == ("CC BY-NC [4.0]", page)
    assert {"created", "trainer", "reader"} <= shown.keys()
    table = " ".join(run("show", "bought").out.split())
    assert "CC BY-NC [4.0]" in table
    assert page in table


def test_trust_warns_before_it_runs_anything_and_says_what_was_run(run: Run, store: ModelStore, tmp_path: Path) -> None:
    source, _ = write_release("v2 checkpoint with objects, --trust", tmp_path)
    refused = run("add", "theirs", source)
    assert refused.code == 1
    assert "`mshub add --trust` runs what is in it" in " ".join(refused.err.split())
    result = run("add", "theirs", source, "--trust")
    assert result.code == 0
    assert "may run on this computer with your rights" in " ".join(result.err.split())
    assert "Code in fold_0/checkpoint_final.pth was run, as asked" in " ".join(result.out.split())
    assert run("show", "theirs", "--json").json()["trusted"] == ["fold_0/checkpoint_final.pth"]


def test_verify_tells_how_many_files_are_as_installed(run: Run, installed: ModelStore) -> None:
    assert run("verify", "tiny") == Result(0, "tiny v1: all 3 files are as installed.\n", "")


def test_verify_names_a_changed_file(run: Run, installed: ModelStore) -> None:
    path = installed.current("tiny").model_path / "plans.json"
    path.chmod(0o644)
    path.write_text("{}")
    result = run("verify", "tiny")
    assert result.code == 1
    assert "plans.json" in result.err


@pytest.mark.skipif(not is_installed(), reason="OpenVINO is an extra: make openvino")
@pytest.mark.parametrize("agrees", [True, False])
def test_a_new_model_is_compared_with_openvino(
    run: Run, liver_spleen: Path, store: ModelStore, agrees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not agrees:
        monkeypatch.setattr(network_agreement, "LARGEST_DIFFERENCE", 1e-12)
    result = run("add", "tiny", liver_spleen, "--engine", "auto")
    assert result.code == 0
    kept = list((store.home / "openvino").glob("*.openvino"))
    if agrees:
        assert "On a CPU OpenVINO will run it." in result.out
        assert len(kept) == 1
    else:
        assert "On a CPU torch will run it: OpenVINO computes something else than torch" in result.out
        assert kept == []


def test_predict_writes_probabilities_beside_the_label(
    run: Run, installed: ModelStore, case: Path, tmp_path: Path
) -> None:
    target = tmp_path / "label.nii.gz"
    result = run("predict", "tiny", case, "-o", target, "--profile", "balanced", "--probabilities", "liver")
    assert result.code == 0
    written = tmp_path / "label_probability_liver.nii.gz"
    chances, label = read_volume(written), read_volume(target)
    assert same_grid(chances.grid, label.grid)
    inside = label.array_xyz == 1
    assert 0 < chances.array_xyz[~inside].mean() < chances.array_xyz[inside].mean() <= 1


def test_verify_measures_what_each_profile_costs_and_gives(run: Run, installed: ModelStore, case: Path) -> None:
    result = run("verify", "tiny", "--bench", case, "--device", "cpu")
    assert result.code == 0
    rows = {line.split("│")[1].strip(): line.split("│")[2:6] for line in result.out.splitlines() if "│" in line}
    assert list(rows) == list(PROFILES)
    for seconds, memory, mean, lowest in rows.values():
        assert float(seconds) >= 0
        assert float(memory) >= 0
        assert 0 < float(mean) <= 1
        assert lowest.split()[0] in {"liver", "spleen"}
    assert float(rows["accurate"][2]) == 1
    assert min(float(row[2]) for row in rows.values()) < 1, "an untrained network differs with every profile"


def test_verify_refuses_an_image_it_cannot_measure_with(run: Run, installed: ModelStore, tmp_path: Path) -> None:
    result = run("verify", "tiny", "--bench", tmp_path / "missing.nii.gz")
    assert result.code == 1
    assert "no such file" in result.err


def test_versions_are_promoted_and_rolled_back(
    run: Run, installed: ModelStore, liver_spleen: Path, tmp_path: Path
) -> None:
    assert new_version(installed, liver_spleen, tmp_path) == "v2"
    assert run("promote", "tiny", "v2", "--reason", "Dice 0.9").out == "tiny now serves v2.\n"
    rows = run("versions", "tiny", "--json").json()
    assert [(row["version"], row["current"]) for row in rows] == [("v1", False), ("v2", True)]
    assert installed.history("tiny")[-1]["reason"] == "Dice 0.9"
    assert run("rollback", "tiny").out == "tiny now serves v1 again.\n"
    told = [json.loads(line) for line in audit_file(installed.home).read_text().splitlines()]
    assert [(line["action"], line["model"], line["version"]) for line in told] == [
        ("mshub promote", "tiny", "v2"),
        ("mshub rollback", "tiny", "v1"),
    ]
    shown = run("versions", "tiny")
    assert shown.code == 0
    assert re.search(r"^ ?v1 +yes +20\d\d-", shown.out, re.MULTILINE)
    assert re.search(r"^ ?v2 +20\d\d-", shown.out, re.MULTILINE)


def test_versions_nobody_has_judged_are_listed_though_none_serves(
    run: Run, store: ModelStore, liver_spleen: Path
) -> None:
    trained_here(store, liver_spleen)
    (row,) = run("versions", "tiny", "--json").json()
    assert (row["version"], row["current"], row["outcome"]) == ("v1", False, "needs a person")
    assert (row["cases"], row["held_out"], row["mean_dice"]) == (3, 1, 0.75)
    shown = run("versions", "tiny")
    assert shown.code == 0
    assert re.search(r"^ ?v1 +20\d\d-.* 0\.7500 \(1\) +needs a", shown.out, re.MULTILINE)
    assert run("promote", "tiny", "v1").out == "tiny now serves v1.\n"
    assert run("versions", "tiny", "--json").json()[0]["current"] is True


# -- predicting ---------------------------------------------------------------------------------------------------


@pytest.fixture
def case(tmp_path: Path) -> Path:
    return make_image(tmp_path / "images" / "case.nii.gz", (29, 23, 14), odd_grids()["oblique-left-handed"])


def expected_label(store: ModelStore, *images: Path, model: str = "tiny") -> np.ndarray[Any, Any]:
    folder = ModelFolder.open(store.current(model).model_path)
    options = PredictOptions(PROFILES["balanced"], device="cpu", rules=store.current(model).card.input_rules)
    return NNUNetPredictor(folder, NetworkCache()).predict(images, options).labels.array_xyz


@pytest.mark.parametrize("name", ["label.nii.gz", "label.nii", "label.nrrd", "new/folder/label.nii.gz"])
def test_a_case_is_segmented_on_its_own_grid(
    run: Run, installed: ModelStore, case: Path, tmp_path: Path, name: str
) -> None:
    result = run("predict", "tiny", case, "-o", tmp_path / name, "--profile", "balanced", "--device", "cpu")
    assert result.code == 0, result.err
    label = read_volume(tmp_path / name)
    np.testing.assert_array_equal(label.array_xyz, expected_label(installed, case))
    assert same_grid(label.grid, read_grid(case))
    assert str(int((label.array_xyz == 1).sum())) in result.out
    assert name in result.out
    assert "liver" in result.out


def test_a_folder_as_output_gets_a_file_named_after_the_image(
    run: Run, installed: ModelStore, case: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels").mkdir()
    assert run("predict", "tiny", case, "-o", tmp_path / "labels", "--profile", "balanced").code == 0
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["case_label.nii.gz"]


def test_several_channels_are_given_in_order(
    run: Run, store: ModelStore, two_channels: Path, case: Path, tmp_path: Path
) -> None:
    add_model(store, "tumour", two_channels)
    second = make_image(tmp_path / "second.nii.gz", (29, 23, 14), odd_grids()["oblique-left-handed"], seed=8)
    target = tmp_path / "label.nii.gz"
    assert run("predict", "tumour", case, second, "-o", target, "--profile", "balanced").code == 0
    expected = expected_label(store, case, second, model="tumour")
    np.testing.assert_array_equal(read_volume(target).array_xyz, expected)
    result = run("predict", "tumour", case, "-o", target)
    assert (result.code, result.out) == (1, "")
    assert "needs 2, in this order: T1w, T2w" in result.err


def test_the_clipping_of_the_card_is_applied(
    run: Run, store: ModelStore, liver_spleen: Path, case: Path, tmp_path: Path
) -> None:
    card = tmp_path / "card.toml"
    card.write_text(
        'id = "clipped"\ntitle = "t"\nsite = "s"\nmodality = "CT"\ntarget = "t"\nstatus = "local"\ngeneration = 2\n'
        "input_clip = [-60, 75]\n"
    )
    add_model(store, "clipped", liver_spleen, card_path=card)
    add_model(store, "tiny", liver_spleen)
    target = tmp_path / "label.nii.gz"
    assert run("predict", "clipped", case, "-o", target, "--profile", "balanced").code == 0
    np.testing.assert_array_equal(read_volume(target).array_xyz, expected_label(store, case, model="clipped"))
    assert np.any(read_volume(target).array_xyz != expected_label(store, case))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("label.txt", "neither an existing folder nor a file ending in .nii.gz, .nii, .nrrd"),
        ("missing/folder", "neither an existing folder"),
        ("images/case.nii.gz", "is the image itself"),
        ("images/../images/case.nii.gz", "is the image itself"),
        ("images/case.nii.gz/label.nrrd", "cannot be made"),
    ],
)
def test_a_bad_output_is_refused_before_anything_is_computed(
    run: Run, installed: ModelStore, case: Path, tmp_path: Path, output: str, message: str
) -> None:
    before = case.read_bytes()
    result = run("predict", "tiny", case, "-o", tmp_path / output)
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert case.read_bytes() == before


@pytest.mark.parametrize(("format", "modality"), [("seg", "SEG"), ("rtstruct", "RTSTRUCT")])
def test_a_dicom_folder_gets_a_dicom_label(
    run: Run, installed: ModelStore, tmp_path: Path, format: str, modality: str
) -> None:
    maker = SeriesMaker("for planning")
    series = maker.write(tmp_path / "series")
    assert run("predict", "tiny", series, "-o", tmp_path / "x.dcm", "--format", format).code == 0
    assert run("predict", "tiny", series, "-o", tmp_path / "x.nii.gz").code == 0
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    assert (dataset.Modality, dataset.StudyInstanceUID) == (modality, maker.study_uid)
    assert run("predict", "tiny", series, "-o", tmp_path, "--format", format).code == 0
    assert (tmp_path / f"series_{format}.dcm").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "x.dcm"], "add --format seg or --format rtstruct"),
        (["-o", "x.dcm", "--format", "dicom"], "expected seg or rtstruct"),
        (["-o", "x.nii.gz", "--format", "seg"], "ending in .dcm"),
        (["-o", "x.dcm", "--format", "seg"], "expected the folder of a DICOM series"),
    ],
)
def test_a_dicom_label_that_cannot_be_is_refused_before_anything_is_computed(
    run: Run, installed: ModelStore, case: Path, options: list[str], message: str
) -> None:
    result = run("predict", "tiny", case, *options)
    assert (result.code, result.out) == (1, "")
    assert message in result.err


# -- training -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reviewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a folder of one image and one of its label; the files are not looked at."""
    for folder in ("images", "labels", "empty"):
        (tmp_path / "work" / folder).mkdir(parents=True)
    for folder in ("images", "labels"):
        (tmp_path / "work" / folder / "a.nii.gz").write_text(folder)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let trainings end with the given progress as soon as they start."""

    def end(**progress: object) -> None:
        monkeypatch.setattr(Job, "spawn", lambda job: job.tell(**progress))

    return end


FOLDERS = ["--images", "images", "--labels", "labels"]
REFUSALS = [
    (["tiny", "--images", "nowhere", "--labels", "labels"], "nowhere is no folder. Expected a folder of images"),
    (["tiny", "--images", "images", "--labels", "nowhere"], "nowhere is no folder. Expected a folder of images"),
    (["tiny", "--images", "images", "--labels", "empty"], "empty holds no labels"),
    (["tiny", "--images", "empty", "--labels", "labels"], "The label a.nii.gz has no image"),
    (["startr", *FOLDERS], "No model is called 'startr'. Did you mean 'starter'?"),
    (["hn-oar-ct", *FOLDERS], 'Expected: dataset.json there or beside it, with channel_names ({"0": "CT"}) and labels'),
    (["tiny", *FOLDERS, "--recipe", "epoch=3"], "The recipe has no 'epoch'. Did you mean epochs? Known: averaging"),
    (["tiny", *FOLDERS, "--recipe", "averaging"], "--recipe averaging has no value; expected KEY=VALUE"),
    (["tiny", *FOLDERS, "--recipe", "seed=x"], "The recipe's seed is 'x'"),
    (["tiny", *FOLDERS, "--epochs", "0"], "The recipe's epochs is 0; expected 1 to 10000."),
    (["tiny", *FOLDERS, "--guard", "hope"], "expected one of distil, interpolate, both, none"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=[" ".join(words) for words, _ in REFUSALS])
def test_a_training_that_cannot_start_is_refused_with_a_sentence_and_leaves_nothing(
    run: Run, installed: ModelStore, reviewed: Path, ending: Callable[..., None], arguments: list[str], message: str
) -> None:
    ending(state="failed", message="it was started")
    result = run("finetune", *arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("mshub: ")
    assert message in result.err
    assert not (installed.home / "jobs").exists()


def test_the_names_of_labels_must_be_the_models(run: Run, installed: ModelStore, reviewed: Path) -> None:
    (reviewed / "dataset.json").write_text('{"labels": {"background": 0, "lifer": 1}}')
    result = run("finetune", "tiny", *FOLDERS)
    assert result.code == 1
    assert "names lifer, which the model does not have. Did you mean liver?" in result.err


def test_what_was_asked_for_reaches_the_training(
    run: Run, installed: ModelStore, reviewed: Path, ending: Callable[..., None]
) -> None:
    ending(state="failed", message="The GPU ran out of memory.")
    options = ["--epochs", "3", "--iterations", "7", "--learning-rate", "2e-4", "--guard", "both", "--device", "cuda:1"]
    result = run("finetune", "tiny", *FOLDERS, *options, "--recipe", "averaging=0.3", "--recipe", "folds=0")
    job = Jobs(installed.home).latest("tiny")
    assert job is not None
    request = job.request
    assert request.recipe == Recipe(
        epochs=3, iterations=7, learning_rate=2e-4, guard="both", averaging=0.3, folds=("0",)
    )
    assert (request.parent, request.device, request.dataset) == ("v1", "cuda:1", None)
    (case,) = request.cases
    assert (case.case_id, case.images) == ("a", (reviewed / "images" / "a.nii.gz",))
    assert case.values == {"liver": 1, "spleen": 2}
    assert result.code == 1
    assert result.err.splitlines()[-1] == "mshub: The GPU ran out of memory."
    assert result.out.startswith("tiny: 1 reviewed cases, continuing v1. Log: ")
    assert result.out.rstrip().endswith("log.txt")


def test_a_model_that_is_only_announced_is_trained_from_scratch_by_dataset_json(
    run: Run, store: ModelStore, reviewed: Path, ending: Callable[..., None]
) -> None:
    ending(state="failed", message="no")
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "parotid": 4}}
    (reviewed / "dataset.json").write_text(json.dumps(dataset))
    result = run("finetune", "hn-oar-ct", *FOLDERS, "--epochs", "5")
    assert "a new model planned by nnU-Net" in result.out
    job = Jobs(store.home).latest("hn-oar-ct")
    assert job is not None
    request = job.request
    assert (request.parent, request.dataset) == (None, dataset)
    assert request.recipe == replace(FROM_SCRATCH, epochs=5)
    assert request.cases[0].values == {"parotid": 4}


def test_a_training_that_was_stopped_says_so(
    run: Run, installed: ModelStore, reviewed: Path, ending: Callable[..., None]
) -> None:
    ending(state="stopped", message="stopped; asked the same again, it goes on where it was")
    result = run("finetune", "tiny", *FOLDERS)
    assert result.code == 1
    assert result.err.splitlines()[-1] == "mshub: stopped; asked the same again, it goes on where it was"


def test_a_training_whose_process_died_says_so(
    run: Run, installed: ModelStore, reviewed: Path, ending: Callable[..., None]
) -> None:
    ending(state="running", pid=2**22, message="")
    result = run("finetune", "tiny", *FOLDERS)
    assert result.code == 1
    assert result.err.splitlines()[-1] == "mshub: The training ended as interrupted; see its log."


def test_who_stops_a_training_stops_it_whatever_was_done_just_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Stopping:
        def progress(self) -> dict[str, Any]:
            if not asked:
                raise KeyboardInterrupt
            return {"state": "stopped"}

        def ask_to_stop(self) -> None:
            asked.append("stop")

    assert cli._follow(Stopping()) == {"state": "stopped"}
    assert asked == ["stop"]


def test_a_model_is_not_trained_twice_at_once(
    run: Run, installed: ModelStore, reviewed: Path, ending: Callable[..., None]
) -> None:
    ending(state="failed", message="no")
    run("finetune", "tiny", *FOLDERS)
    job = Jobs(installed.home).latest("tiny")
    assert job is not None
    job.tell(state="running")
    with job.lock:
        result = run("finetune", "tiny", *FOLDERS)
    assert (result.code, result.out) == (1, "")
    assert f"tiny is being trained already ({job.id})" in result.err


# -- errors -------------------------------------------------------------------------------------------------------

FAILURES = [
    (["show", "startr"], "No model is called 'startr'. Did you mean 'starter'?"),
    (["verify", "starter"], "The model starter is not installed"),
    (["versions", "starter"], "The model starter is not installed"),
    (["promote", "tiny", "v7"], "tiny has no version v7; installed: v1"),
    (["rollback", "tiny"], "nothing to go back to"),
    (["fetch", "hn-oar-ct"], "its weights are not published"),
    (["fetch", "nothing"], "No model is called 'nothing'"),
    (["add", "mine", "no-such-folder"], "no-such-folder"),
    (["add", "Bad Id!", "."], ""),
    (["predict", "starter", "a.nii.gz", "-o", "b.nii.gz"], "mshub fetch starter"),
    (["predict", "tiny", "no-such.nii.gz", "-o", "b.nii.gz"], "no-such.nii.gz"),
    (["predict", "tiny", "{case}", "-o", "b.nii.gz", "--profile", "slow"], "expected one of accurate, balanced, fast"),
    (["predict", "tiny", "{case}", "-o", "b.nii.gz", "--device", "tpu"], "The device 'tpu' is unknown"),
    (["predict", "tiny", "{case}", "-o", "b.nii.gz", "--folds", "0, 4"], "Fold 4 was asked for"),
    (["serve"], "either --studies DIR"),
    (["serve", "--studies", ".", "--sample"], "either --studies DIR"),
    (["serve", "--studies", "no-such-folder"], "--studies no-such-folder is no folder"),
    (["serve", "--studies", ".", "--conf", "device"], "--conf device has no value; expected KEY=VALUE"),
]


@pytest.mark.parametrize(("arguments", "message"), FAILURES, ids=[" ".join(words) for words, _ in FAILURES])
def test_an_error_is_a_sentence_on_stderr_and_exit_code_1(
    run: Run,
    installed: ModelStore,
    case: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*[argument.format(case=case) for argument in arguments])
    assert result.code == 1
    assert result.out == ""
    lines = result.err.strip().splitlines()
    assert any(line.startswith("mshub: ") and message in line for line in lines), result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "b.nii.gz").exists()


@pytest.mark.parametrize("arguments", [["predict"], ["nonsense"], ["serve", "--port", "0"], ["list", "--jsn"]])
def test_a_wrong_command_line_is_exit_code_2(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err


def test_square_brackets_in_a_message_are_printed_as_they_are(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ModelStore, model_id: str) -> None:
        raise StoreError("found [bold]3[/] files in [x]")

    monkeypatch.setattr(ModelStore, "rollback", fail)
    assert run("rollback", "tiny").err == "mshub: found [bold]3[/] files in [x]\n"


def test_files_of_another_account_are_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/srv/mshub/models/tiny/.lock")

    monkeypatch.setattr(ModelStore, "rollback", refuse)
    result = run("rollback", "tiny")
    assert result.code == 1
    assert result.err.startswith("mshub: /srv/mshub/models/tiny/.lock cannot be used (Permission denied): ")


# -- serving ------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """The servers that would have been started: (command, environment)."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def start(command: list[str], environment: dict[str, str]) -> int:
        calls.append((command, environment))
        return 3

    monkeypatch.setattr("mshub.serve.run_server", start)
    monkeypatch.setattr("mshub.serve.check_address", lambda host, port: None)  # a server may be running here
    return calls


def test_serve_says_where_to_look_and_how_to_predict(
    run: Run, installed: ModelStore, case: Path, started: list[Any]
) -> None:
    result = run("serve", "--studies", case.parent, "--port", "8123", "--conf", "device=cpu")
    assert result.code == 3
    (command, environment) = started[0]
    assert command[command.index("--studies") + 1] == str(case.parent)
    assert command[-3:] == ["--conf", "device", "cpu"]
    assert environment["MSHUB_HOME"] == str(installed.home)
    assert "http://127.0.0.1:8123" in result.out
    assert "shows DICOM" in result.out
    assert "predict tiny IMAGE.nii.gz -o label.nii.gz" in result.out
    assert case.name not in result.out, "it can be a patient's name, and output goes to logs"
    assert "this machine only, no login" in result.out
    assert '"action": "mshub serve"' in audit_file(installed.home).read_text()


def test_another_home_is_that_of_all_the_server_has(
    run: Run, case: Path, started: list[Any], tmp_path: Path, home: Path
) -> None:
    assert run("users", "add", "ada", "--password-stdin", stdin="a long password\n").code == 0
    other = tmp_path / "other"
    arguments = ["serve", "--studies", case.parent, "--conf", f"home={other}"]
    assert "mshub users add" in run(*arguments, "--host", "0.0.0.0").err, "ada is no user of the other one"
    assert "this machine only, no login" in run(*arguments).out
    ((command, environment),) = started
    assert environment["MSHUB_HOME"] == str(other)
    assert "home" not in command
    assert (other / "logs" / "logging.json").is_file()


def test_a_service_is_told_where_its_files_are_in_full(
    run: Run, installed: ModelStore, case: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(case.parent)
    assert f"Log: {installed.home}/logs" in run("serve", "--studies", case.parent).out
    monkeypatch.chdir(installed.home.parent)
    assert f"Log: {installed.home.name}/logs" in run("serve", "--studies", case.parent).out
    monkeypatch.chdir("/")
    assert f"Log: {installed.home}/logs" in run("serve", "--studies", case.parent).out


def test_a_server_for_the_whole_network_needs_users_and_says_that_passwords_are_read(
    run: Run, case: Path, started: list[Any]
) -> None:
    result = run("serve", "--studies", case.parent, "--host", "0.0.0.0")
    assert result.code == 1
    assert "mshub users add" in result.err
    assert started == []
    assert run("users", "add", "ada", "--password-stdin", stdin="a long password\n").code == 0
    result = run("serve", "--studies", case.parent, "--host", "0.0.0.0")
    assert "1 user(s), who log in" in result.out
    assert "travel unencrypted" in result.out
    assert "http://127.0.0.1:8000" in result.out
    assert "none installed yet" in result.out
    assert started[0][0][started[0][0].index("--host") + 1] == "0.0.0.0"


def test_single_sign_on_is_handed_on_and_lets_others_reach_the_server(
    run: Run, case: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer, arguments = "https://login.clinic/realms/clinic", ["serve", "--studies", case.parent, "--host", "0.0.0.0"]
    options = ["--oidc-issuer", issuer, "--oidc-client-id", "mshub", "--oidc-client-secret-file", "secret.txt"]
    result = run(*arguments, *options, "--oidc-roles", "admin=it,viewer=all", "--conf", "device=cpu")
    assert f"people of {issuer}" in result.out
    assert "travel unencrypted" in result.out
    command = started[0][0]
    pairs = {command[at + 1]: command[at + 2] for at, part in enumerate(command) if part == "--conf"}
    assert pairs == {
        "oidc_issuer": issuer,
        "oidc_client_id": "mshub",
        "oidc_client_secret_file": "secret.txt",
        "oidc_roles": "admin=it,viewer=all",
        "device": "cpu",
    }
    assert run(*arguments, "--conf", f"oidc_issuer={issuer}").code == 3
    monkeypatch.setenv("MSHUB_OIDC_ISSUER", issuer)
    assert run(*arguments).code == 3


def test_an_address_of_a_pacs_is_handed_on_and_the_viewer_named(
    run: Run, started: list[Any], installed: ModelStore
) -> None:
    result = run("serve", "--studies", "http://pacs:8042/dicom-web")
    assert result.code == 3
    assert "http://pacs:8042/dicom-web" in started[0][0]
    assert "make viewer" in result.out
    (installed.home / "viewer" / "3").mkdir(parents=True)
    (installed.home / "viewer" / "3" / "index.html").touch()
    assert ":8000/viewer/" in run("serve", "--studies", "http://pacs:8042/dicom-web").out


def test_the_samples_are_served_from_a_working_copy(
    run: Run, store: ModelStore, tmp_path: Path, started: list[Any]
) -> None:
    names = Catalogue.load().get("starter").labels or ()
    labels = {"background": 0, **{name: value for value, name in enumerate(names, start=1)}}
    add_model(store, "starter", make_model_folder(tmp_path / "starter", labels=labels))
    assert run("serve", "--sample").code == 3
    command = started[0][0]
    studies = Path(command[command.index("--studies") + 1])
    assert studies.is_relative_to(store.home)
    assert len(list(studies.glob("phantom_*.nii.gz"))) == 6
