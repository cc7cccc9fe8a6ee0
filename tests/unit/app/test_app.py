"""The app as MONAI Label drives it: what it offers, which images it takes, and what it answers when it cannot."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp

from factories import make_image, make_model_folder, odd_grids
from lib.app import MSHubApp
from lib.datastore import StudiesFolder
from lib.infers import results_folder
from mshub.bundled import app_folder
from mshub.errors import ConfigError
from mshub.install import add_model
from mshub.store import ModelStore
from mshub.volume_io import read_volume

pytestmark = pytest.mark.usefixtures("monailabel_here")

SHAPE = (29, 23, 14)
MakeApp = Callable[..., MSHubApp]


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Two cases of one channel and one of two, on one grid."""
    affine = odd_grids()["oblique-left-handed"]
    for number, name in enumerate(("a", "b", "mr_0000", "mr_0001")):
        make_image(tmp_path / "studies" / f"{name}.nii.gz", SHAPE, affine, seed=number)
    return tmp_path / "studies"


@pytest.fixture
def make_app(tmp_path: Path, studies: Path) -> MakeApp:
    """Make the app on the store of this test, as MONAI Label does."""

    def make(**conf: str) -> MSHubApp:
        return MSHubApp(str(tmp_path / "app"), str(studies), {"profile": "balanced", "device": "cpu", **conf})

    return make


@pytest.fixture
def app(installed: ModelStore, make_app: MakeApp) -> MSHubApp:
    """The app with the model ``tiny``."""
    return make_app()


@pytest.fixture
def labelled(app: MSHubApp, tmp_path: Path) -> Callable[[str], None]:
    """Give an image a final label."""
    label = make_image(tmp_path / "label.nii.gz", SHAPE)

    def save(image: str) -> None:
        app.datastore().save_prediction(image, label, "final", {})

    return save


def refusal(call: Callable[..., Any], *arguments: Any) -> tuple[int, str]:
    with pytest.raises(HTTPException) as caught:
        call(*arguments)
    return caught.value.status_code, str(caught.value.detail)


# -- what there is ------------------------------------------------------------------------------------------------


def test_info_obeys_what_the_clients_read(app: MSHubApp) -> None:
    info = app.info()
    assert "config" not in info
    assert info["labels"] == ["liver", "spleen"]
    assert list(info["models"]) == ["tiny"]
    assert "random" in info["strategies"]
    assert list(info["trainers"]) == ["tiny"]
    assert info["train_stats"] == {"tiny": {}}
    assert (info["datastore"]["completed"], info["datastore"]["total"]) == (0, 3)
    assert info["name"].startswith("MSHub ")


def test_the_labels_of_all_models_are_one_list_of_names(
    app: MSHubApp, installed: ModelStore, two_channels: Path, tmp_path: Path
) -> None:
    add_model(installed, "tumour", two_channels)
    other = make_model_folder(tmp_path / "m", labels={"background": 0, "spleen": 1, "kidney": 2})
    add_model(installed, "organs", other)
    labels = app.info()["labels"]
    assert isinstance(labels, list)
    assert sorted(labels) == ["core", "kidney", "liver", "spleen", "whole tumour"]


def test_a_model_added_while_the_server_runs_is_offered_and_a_removed_one_is_not(
    app: MSHubApp, installed: ModelStore, two_channels: Path, studies: Path
) -> None:
    add_model(installed, "tumour", two_channels)
    assert sorted(app.info()["models"]) == ["tiny", "tumour"]
    result = app.infer({"model": "tumour", "image": "mr"})
    assert result["params"]["label_names"] == {"whole tumour": 1, "core": 2}
    shutil.rmtree(installed.home / "models" / "tiny")
    assert sorted(app.info()["models"]) == ["tumour"]


def test_a_list_of_models_that_was_read_before_never_replaces_a_newer_one(
    app: MSHubApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, go_on = threading.Event(), threading.Event()

    def served() -> list[str]:
        if threading.current_thread() is not old:
            return ["tiny"]
        reads.set()
        go_on.wait(20)
        return []

    monkeypatch.setattr(app, "_served", served)
    old, new = threading.Thread(target=app._refresh), threading.Thread(target=app._refresh)
    old.start()
    assert reads.wait(20)
    new.start()
    new.join(0.5)  # it waits for the other
    go_on.set()
    for thread in (old, new):
        thread.join(20)
    assert (list(app._infers), list(app._trainers)) == (["tiny"], ["tiny"])


def test_info_says_where_a_model_is_from_and_on_which_terms(app: MSHubApp, liver_spleen: Path) -> None:
    origin = {"how": "added", "from": "https://example.org/record/1"}
    version = add_model(app.store, "bought", liver_spleen, origin=origin, licence="CC BY-NC 4.0")
    told = app.info()["models"]["bought"]["mshub"]
    assert (told["licence"], told["origin"], told["installed"]) == ("CC BY-NC 4.0", origin, version.record["created"])
    assert (told["converted"], told["trusted"]) == (None, [])


def test_a_model_can_be_used_before_anybody_asked_for_info(
    app: MSHubApp, installed: ModelStore, two_channels: Path
) -> None:
    add_model(installed, "tumour", two_channels)
    assert app.infer({"model": "tumour", "image": "mr"})["params"]["model"] == "tumour"


def test_only_the_chosen_models_are_served(installed: ModelStore, two_channels: Path, make_app: MakeApp) -> None:
    add_model(installed, "tumour", two_channels)
    app = make_app(models="tumour, starter")
    assert list(app.info()["models"]) == ["tumour"]
    status, text = refusal(app.infer, {"model": "tiny", "image": "a"})
    assert (status, "Known: tumour" in text) == (404, True)


def test_an_unknown_option_stops_the_start(make_app: MakeApp) -> None:
    with pytest.raises(ConfigError, match="Did you mean device"):
        make_app(devise="cpu")


def test_the_server_starts_without_a_model(store: ModelStore, make_app: MakeApp) -> None:
    info = make_app().info()
    assert (info["models"], info["labels"]) == ({}, [])


def test_the_status_tells_what_serves_and_what_is_loaded(app: MSHubApp, installed: ModelStore) -> None:
    before = app.status()
    assert (before["models"], before["loaded"], before["running"]) == ({"tiny": "v1"}, [], [])
    app.infer({"model": "tiny", "image": "a"})
    after = app.status()
    assert after["loaded"] == [str(Path("models") / "tiny" / "v1" / "model")]
    assert (after["finished"], after["failed"]) == (1, 0)
    assert "home" not in after, "no path of the server goes to clients"


def test_monailabel_finds_the_app_in_main() -> None:
    spec = importlib.util.spec_from_file_location("mshub_app_main", app_folder() / "main.py")
    assert spec is not None
    assert spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    found = [item for item in vars(main).values() if isinstance(item, type) and MONAILabelApp in item.__bases__]
    assert [item.__name__ for item in found] == ["MSHubApp"]


# -- images -------------------------------------------------------------------------------------------------------


def test_an_image_is_segmented_by_its_id(app: MSHubApp) -> None:
    result = app.infer({"model": "tiny", "image": "a"})
    assert set(np.unique(read_volume(Path(result["file"])).array_xyz)) == {0, 1, 2}
    assert result["label"] == result["file"]
    assert result["tag"] == "original"
    assert app.datastore().get_labels_by_image_id("a") == {}


def test_a_label_is_stored_when_that_is_asked_for(app: MSHubApp) -> None:
    result = app.infer({"model": "tiny", "image": "a", "save_label": True, "label_tag": "tiny"})
    assert app.datastore().get_labels_by_image_id("a") == {"tiny": "a"}
    stored = Path(app.datastore().get_label_uri("a", "tiny"))
    assert stored.read_bytes() == Path(result["file"]).read_bytes()
    assert app.datastore().get_label_info("a", "tiny")["params"]["model_version"] == "v1"


def test_a_case_of_several_channels_is_one_image(app: MSHubApp, installed: ModelStore, two_channels: Path) -> None:
    add_model(installed, "tumour", two_channels)
    assert sorted(app.datastore().list_images()) == ["a", "b", "mr"]
    result = app.infer({"model": "tumour", "image": "mr"})
    assert read_volume(Path(result["file"])).grid.shape_xyz == SHAPE


def test_a_missing_channel_is_named(app: MSHubApp, installed: ModelStore, two_channels: Path, studies: Path) -> None:
    add_model(installed, "tumour", two_channels)
    (studies / "mr_0001.nii.gz").rename(studies / "mr_0002.nii.gz")
    app.datastore().refresh()
    status, text = refusal(app.infer, {"model": "tumour", "image": "mr"})
    assert (status, "mr_0001.nii.gz is missing" in text) == (422, True)
    (studies / "mr_0002.nii.gz").unlink()
    status, text = refusal(app.infer, {"model": "tumour", "image": "mr"})
    assert (status, "needs 2, in this order: T1w, T2w" in text) == (422, True)


def test_a_model_of_one_channel_refuses_a_case_of_two(app: MSHubApp) -> None:
    status, text = refusal(app.infer, {"model": "tiny", "image": "mr"})
    assert status == 422
    assert "2 image file(s) were given; this model needs 1" in text


@pytest.mark.parametrize(
    "image", ["nothing", "../studies/a.nii.gz", "studies/a.nii.gz", "a.nii.gz", "/etc/passwd", ".", "a/../a", "{file}"]
)
def test_an_image_that_is_a_path_is_unknown(
    app: MSHubApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outside = make_image(tmp_path / "outside.nii.gz", SHAPE)
    status, text = refusal(app.infer, {"model": "tiny", "image": image.format(file=outside)})
    assert status == 404
    assert "There is no image" in text
    assert "a, b" in text


@pytest.mark.parametrize("image", [None, "", 7, ["a"]])
def test_a_request_without_an_image_is_a_400(app: MSHubApp, image: Any) -> None:
    status, text = refusal(app.infer, {"model": "tiny", "image": image})
    assert (status, "names no image" in text) == (400, True)


def test_an_upload_of_this_request_is_segmented_and_not_stored(app: MSHubApp) -> None:
    with tempfile.NamedTemporaryFile(suffix=".nii.gz") as upload:
        make_image(Path(upload.name), SHAPE, odd_grids()["oblique"])
        result = app.infer({"model": "tiny", "image": upload.name, "save_label": True})
    assert read_volume(Path(result["file"])).grid.shape_xyz == SHAPE
    assert sorted(app.datastore().list_images()) == ["a", "b", "mr"]


def test_a_session_of_several_files_is_a_case_of_several_channels(
    app: MSHubApp, installed: ModelStore, two_channels: Path, studies: Path, tmp_path: Path
) -> None:
    add_model(installed, "tumour", two_channels)
    session = tmp_path / "upload"
    session.mkdir()
    for number in range(2):
        shutil.copy(studies / f"mr_000{number}.nii.gz", session / f"mr_000{number}.nii.gz")
    _, info = app.sessions().add_session(str(session))
    result = app.infer({"model": "tumour", "image": info.image, "session": info.to_json()})
    expected = app.infer({"model": "tumour", "image": "mr"})
    np.testing.assert_array_equal(
        read_volume(Path(result["file"])).array_xyz, read_volume(Path(expected["file"])).array_xyz
    )


def test_a_request_that_only_claims_to_be_a_session_reads_no_file(app: MSHubApp, tmp_path: Path) -> None:
    secret = make_image(tmp_path / "another patient.nii.gz", SHAPE)
    for session in (True, {"image": str(secret)}, {"name": "x"}):
        status, _ = refusal(app.infer, {"model": "tiny", "image": str(secret), "session": session})
        assert status == 404


def test_a_bad_image_of_a_batch_is_told_in_its_place_and_the_others_are_done(app: MSHubApp, studies: Path) -> None:
    (studies / "bad.nii.gz").write_bytes(b"no image")
    app.datastore().refresh()
    default_body = {"device": "cuda", "multi_gpu": True, "gpus": "all", "max_workers": 1, "save_label": True}
    result = app.batch_infer({"model": "tiny", "images": ["a", "bad"], "profile": "balanced", **default_body})
    assert "damaged" in result["bad"]["error"]
    assert result["a"]["params"]["label_names"]
    assert "original" in app.datastore().get_labels_by_image_id("a")


@pytest.mark.parametrize("model", ["nothing", "", None, "../tiny", ["tiny"], {"a": 1}])
def test_an_unknown_model_is_a_404_that_names_the_known_ones(app: MSHubApp, model: Any) -> None:
    status, text = refusal(app.infer, {"model": model, "image": "a"})
    assert status == 404
    assert "Known: tiny" in text


def test_a_model_of_the_catalogue_that_is_not_installed_says_how_to_get_it(app: MSHubApp) -> None:
    status, text = refusal(app.infer, {"model": "liver-lesion-ct", "image": "a"})
    assert (status, "mshub fetch liver-lesion-ct" in text) == (404, True)


def test_a_batch_labels_every_image_that_has_none(app: MSHubApp, labelled: Callable[[str], None]) -> None:
    labelled("b")
    (Path(app.studies) / "mr_0001.nii.gz").unlink()
    app.datastore().refresh()
    app.batch_infer({"model": "tiny", "images": "unlabeled", "max_workers": 1})
    assert app.datastore().get_labels_by_image_id("a") == {"original": "a"}
    assert app.datastore().get_labels_by_image_id("mr") == {"original": "mr"}
    assert app.datastore().get_labels_by_image_id("b") == {"final": "b"}


# -- what to label next -------------------------------------------------------------------------------------------


def test_the_next_sample_has_not_been_labelled(app: MSHubApp, labelled: Callable[[str], None]) -> None:
    labelled("a")
    labelled("mr")
    for _ in range(5):
        sample = app.next_sample({"strategy": "random"})
        assert sample["id"] == "b"
        assert Path(sample["path"]).name == "b.nii.gz"


def test_the_first_channel_is_what_a_client_shows_of_a_case(app: MSHubApp, labelled: Callable[[str], None]) -> None:
    labelled("a")
    labelled("b")
    assert Path(app.next_sample({})["path"]).name == "mr_0000.nii.gz"


def test_every_case_is_offered_before_one_is_offered_again(app: MSHubApp) -> None:
    assert {app.next_sample({"strategy": "random"})["id"] for _ in range(3)} == {"a", "b", "mr"}
    again = app.next_sample({"strategy": "random"})
    assert again["id"] in ("a", "b", "mr")
    assert "you have it already" in again["why"]


def test_nothing_is_offered_when_everything_is_labelled(app: MSHubApp, labelled: Callable[[str], None]) -> None:
    for image in ("a", "b", "mr"):
        labelled(image)
    assert app.next_sample({"strategy": "random"}) == {}
    assert app.next_case({"strategy": "random"}) == {"why": "every case has a final label", "waiting": 0}


@pytest.mark.parametrize("strategy", ["epistemic", "Random", "../random"])
def test_an_unknown_strategy_is_a_404_that_names_the_known_ones(app: MSHubApp, strategy: str) -> None:
    status, text = refusal(app.next_sample, {"strategy": strategy})
    assert (status, "Known: class_stratified, diversity, first, hybrid, random" in text) == (404, True)


def test_no_strategy_means_random(app: MSHubApp) -> None:
    assert app.next_sample({})["id"] in ("a", "b", "mr")
    assert app.next_sample({"strategy": ""})["id"] in ("a", "b", "mr")


def test_the_studies_folder_is_ours(app: MSHubApp) -> None:
    assert isinstance(app.datastore(), StudiesFolder)


@pytest.mark.parametrize("moment", ["note_prediction", "save_prediction", "write_pixelwise"])
def test_a_prediction_that_cannot_be_kept_leaves_no_file(
    clinic: MSHubApp, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError(moment)

    request = {"model": "tiny", "image": "a", "device": "cpu", "grid": "series", "save_label": True}
    case = clinic._case(request, clinic.datastore())
    monkeypatch.setattr(clinic, "_case", lambda *_: case)
    monkeypatch.setattr("lib.app.PacsStudies", StudiesFolder)
    monkeypatch.setattr(StudiesFolder, "write_pixelwise", lambda *_: None, raising=False)
    monkeypatch.setattr(clinic.active_learning if moment == "note_prediction" else StudiesFolder, moment, fail)
    before = set(results_folder().iterdir())
    with pytest.raises(ZeroDivisionError, match=moment):
        clinic.infer(request)
    assert set(results_folder().iterdir()) == before
