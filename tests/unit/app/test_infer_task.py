"""One model as a MONAI Label task: what clients are told of it, and what they get back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the name everybody uses
import torch
from fastapi import HTTPException

from factories import make_image, make_model_folder, odd_grids
from lib.activity import Activity
from lib.conf import Config
from lib.infers import NNUNetInferTask
from mshub.geometry import Grid, Volume, same_grid
from mshub.install import add_model
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, Prediction, PredictOptions
from mshub.store import ModelStore
from mshub.volume_io import read_grid, read_volume

pytestmark = pytest.mark.usefixtures("monailabel_here")


@pytest.fixture
def cache() -> NetworkCache:
    return NetworkCache()


@pytest.fixture
def activity() -> Activity:
    return Activity()


@pytest.fixture
def task(installed: ModelStore, cache: NetworkCache, activity: Activity) -> NNUNetInferTask:
    """The task of the model ``tiny``; profile balanced, on the CPU, unless a request says otherwise."""
    config = Config(home=installed.home, device="cpu", profile="balanced", engine="torch")
    return NNUNetInferTask("tiny", installed, cache, config, activity)


@pytest.fixture
def infer(task: NNUNetInferTask, image: Path) -> Iterator[Callable[..., tuple[Path, dict[str, Any]]]]:
    """Segment the image; the label file is removed afterwards, as MONAI Label would."""
    made: list[Path] = []

    def call(**request: Any) -> tuple[Path, dict[str, Any]]:
        path, params = task({"image": str(image), "image_id": "case", **request})
        made.append(Path(path))
        return Path(path), params

    yield call
    for path in made:
        path.unlink()


def refusal(call: Callable[..., Any], **request: Any) -> tuple[int, str]:
    """Return the status and the text a client gets."""
    with pytest.raises(HTTPException) as caught:
        call(**request)
    assert caught.value.headers["X-MSHub-Error"]
    return caught.value.status_code, str(caught.value.detail)


def expected(store: ModelStore, *images: Path, profile: str = "balanced") -> np.ndarray[Any, Any]:
    from mshub.nnunet.folder import ModelFolder

    folder = ModelFolder.open(store.current("tiny").model_path)
    options = PredictOptions(PROFILES[profile], device="cpu")
    return NNUNetPredictor(folder, NetworkCache()).predict(images, options).labels.array_xyz


# -- info ---------------------------------------------------------------------------------------------------------


def test_info_has_what_slicer_ohif_and_mitk_read(task: NNUNetInferTask) -> None:
    info = task.info()
    assert info["type"] == "segmentation"
    assert info["dimension"] == 3
    assert "tiny" in info["description"]
    assert info["labels"] == {"liver": 1, "spleen": 2}


def test_labels_are_contiguous_ascending_and_without_background(
    store: ModelStore, tmp_path: Path, cache: NetworkCache, activity: Activity
) -> None:
    labels = {"background": 0, "spleen": 9, "liver": 4, "lesion": 6}
    add_model(store, "gaps", make_model_folder(tmp_path / "model", labels=labels))
    info = NNUNetInferTask("gaps", store, cache, Config(home=store.home), activity).info()
    assert list(info["labels"].items()) == [("liver", 1), ("lesion", 2), ("spleen", 3)]


def test_options_are_lists_of_text_with_the_default_first(
    installed: ModelStore, cache: NetworkCache, activity: Activity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.infers.nnunet.available_devices", lambda: ["cuda:0", "cuda:1", "cpu"])
    for profile, device in (("balanced", "cuda:1"), ("accurate", "cpu")):
        config = Config(home=installed.home, device=device, profile=profile)
        options = NNUNetInferTask("tiny", installed, cache, config, activity).config()
        assert set(options) == {"device", "profile", "folds"}
        assert all(isinstance(value, list) and value for value in options.values())
        assert all(type(item) is str for value in options.values() for item in value)
        assert (options["profile"][0], options["device"][0]) == (profile, device)
        assert set(options["device"]) == {"cuda:0", "cuda:1", "cpu"}


def test_folds_can_be_chosen_where_there_are_several(
    store: ModelStore, tmp_path: Path, cache: NetworkCache, activity: Activity, task: NNUNetInferTask
) -> None:
    add_model(store, "two-folds", make_model_folder(tmp_path / "model", folds=("0", "1")))
    two = NNUNetInferTask("two-folds", store, cache, Config(home=store.home), activity)
    assert two.config()["folds"] == ["all present", "0", "1"]
    assert task.config()["folds"] == ["all present"]


def test_info_loads_no_network(task: NNUNetInferTask, cache: NetworkCache) -> None:
    task.info()
    assert cache.loaded() == []
    assert task.is_valid()


def test_every_option_of_info_can_be_sent_back_as_it_is(
    task: NNUNetInferTask, infer: Callable[..., Any], installed: ModelStore, image: Path
) -> None:
    first = {key: values[0] for key, values in task.info()["config"].items()}
    path, _ = infer(**first)
    np.testing.assert_array_equal(read_volume(path).array_xyz, expected(installed, image))


# -- the label ----------------------------------------------------------------------------------------------------


def test_the_label_is_the_predictors_on_the_grid_of_the_image(
    infer: Callable[..., Any], installed: ModelStore, image: Path
) -> None:
    path, params = infer()
    label = read_volume(path)
    assert path.name.endswith(".nii.gz")
    np.testing.assert_array_equal(label.array_xyz, expected(installed, image))
    assert label.array_xyz.dtype == np.uint8
    assert same_grid(label.grid, read_grid(image))
    assert list(params["label_names"].items()) == [("liver", 1), ("spleen", 2)]
    assert params["voxel_counts"] == {
        name: int((label.array_xyz == value).sum()) for name, value in (("liver", 1), ("spleen", 2))
    }
    assert params["centroids"] == {}
    assert (params["model"], params["model_version"]) == ("tiny", "v1")
    assert params["provenance"]["profile"] == "balanced"
    stages = {key: value for key, value in params["latencies"].items() if key != "total"}
    assert {"read", "load", "preprocess", "network", "measure", "export", "write"} == set(stages)
    assert params["latencies"]["total"] == pytest.approx(sum(stages.values()), abs=0.01)


@pytest.mark.parametrize(
    ("extension", "written"),
    [
        (".nrrd", ".nrrd"),
        ("nrrd", ".nrrd"),
        (".NRRD", ".nrrd"),
        (".nii", ".nii"),
        ("nii.gz", ".nii.gz"),
        ("", ".nii.gz"),
    ],
)
def test_the_client_chooses_the_format(infer: Callable[..., Any], image: Path, extension: str, written: str) -> None:
    path, _ = infer(result_extension=extension)
    assert path.name.endswith(written)
    assert not path.name.endswith(".nii.nii.gz")
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0), read_volume(path).array_xyz
    )
    assert same_grid(read_grid(path), read_grid(image))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32", "float32"])
def test_the_client_chooses_the_voxel_type(infer: Callable[..., Any], dtype: str) -> None:
    path, _ = infer(result_extension=".nii.gz", result_dtype=dtype)
    assert nib.load(path).get_data_dtype() == np.dtype(dtype)


def test_ohif_gets_raw_bytes_in_the_order_of_the_voxels(
    infer: Callable[..., Any], installed: ModelStore, image: Path
) -> None:
    path, _ = infer(result_extension=".nrrd", result_dtype="uint8", result_compress=False, restore_label_idx=False)
    header, _, data = path.read_bytes().partition(b"\n\n")
    assert b"encoding: raw" in header
    assert b"type: unsigned char" in header
    array = expected(installed, image)
    assert len(data) == array.size
    np.testing.assert_array_equal(np.frombuffer(data, np.uint8), array.ravel(order="F"))


@pytest.mark.parametrize(("sent", "encoding"), [(True, b"gzip"), ("false", b"raw"), ("0", b"raw"), ("", b"gzip")])
def test_compression_is_the_clients_choice(infer: Callable[..., Any], sent: Any, encoding: bytes) -> None:
    path, _ = infer(result_extension=".nrrd", result_compress=sent)
    assert b"encoding: " + encoding in path.read_bytes().partition(b"\n\n")[0]


@pytest.mark.parametrize(
    ("request_part", "message"),
    [
        ({"result_extension": ".seg"}, "result_extension is '.seg'; expected one of .nii.gz, .nii, .nrrd"),
        ({"result_extension": "/../../x.nrrd"}, "result_extension is "),
        ({"result_dtype": "float64"}, "result_dtype is 'float64'; expected one of uint8"),
        ({"result_dtype": ["uint8"]}, "result_dtype is ['uint8']"),
        ({"profile": "turbo"}, "The profile 'turbo' is unknown: expected one of accurate, balanced, fast"),
        ({"device": "tpu"}, "The device 'tpu' is unknown"),
        ({"folds": "3"}, "Fold 3 was asked for; this model has fold 0"),
        ({"label_prompt": [3]}, "not the model's"),
        ({"label_prompt": [0]}, "not the model's"),
        ({"label_prompt": ["liver"]}, "expected a list of label values"),
        ({"label_prompt": [True]}, "expected a list of label values"),
        ({"label_prompt": 1}, "expected a list of label values"),
    ],
)
def test_an_impossible_wish_is_a_4xx_before_anything_is_computed(
    infer: Callable[..., Any], cache: NetworkCache, request_part: dict[str, Any], message: str
) -> None:
    status, text = refusal(infer, **request_part)
    assert 400 <= status < 500
    assert message in text
    assert cache.loaded() == []


def test_empty_text_means_not_set(infer: Callable[..., Any], installed: ModelStore, image: Path) -> None:
    nothing = dict.fromkeys(
        ("device", "profile", "folds", "result_extension", "result_dtype", "result_compress", "label_prompt"), ""
    )
    path, params = infer(**nothing)
    np.testing.assert_array_equal(read_volume(path).array_xyz, expected(installed, image))
    assert params["provenance"]["folds"] == ["0"]


@pytest.mark.parametrize("prompt", [[1], [2], [2, 1], [2, 2], []])
def test_a_label_prompt_keeps_the_chosen_structures_only(
    infer: Callable[..., Any], installed: ModelStore, image: Path, prompt: list[int]
) -> None:
    whole = expected(installed, image)
    path, params = infer(label_prompt=prompt)
    kept = prompt or [1, 2]
    np.testing.assert_array_equal(
        read_volume(path, allow_constant=True).array_xyz, np.where(np.isin(whole, kept), whole, 0)
    )
    names = {"liver": 1, "spleen": 2}
    assert params["label_names"] == {name: value for name, value in names.items() if value in kept}
    assert set(params["voxel_counts"]) == set(params["label_names"])


@pytest.fixture
def many_structures(monkeypatch: pytest.MonkeyPatch, image: Path) -> None:
    """Predictions hold 300 structures, of which the last one is there."""

    def predict(self: NNUNetPredictor, images: Any, options: Any, progress: Any, check: Any) -> Prediction:
        grid: Grid = read_grid(image)
        array = np.zeros(grid.shape_xyz, dtype=np.uint16)
        array[0, 0, 0], array[1, 1, 1] = 7, 300
        names = {f"structure {value}": value for value in range(1, 301)}
        return Prediction(Volume(array, grid), names, {})

    monkeypatch.setattr(NNUNetPredictor, "predict", predict)


@pytest.fixture
def crowded(
    store: ModelStore, tmp_path: Path, cache: NetworkCache, activity: Activity, image: Path, many_structures: None
) -> Callable[..., Any]:
    labels = {"background": 0, **{f"structure {value}": value for value in range(1, 301)}}
    add_model(store, "crowded", make_model_folder(tmp_path / "model", labels=labels))
    task = NNUNetInferTask("crowded", store, cache, Config(home=store.home), activity)
    return lambda **request: task({"image": str(image), **request})


def test_more_than_255_structures_do_not_fit_a_byte(crowded: Callable[..., Any]) -> None:
    status, text = refusal(crowded, result_dtype="uint8")
    assert status == 422
    assert "300, more than uint8 can carry" in text
    path, _ = crowded()
    assert nib.load(path).get_data_dtype() == np.uint16
    assert np.asarray(nib.load(path).dataobj).max() == 300


def test_a_prompt_makes_a_large_label_fit_a_byte(crowded: Callable[..., Any]) -> None:
    path, params = crowded(result_dtype="uint8", label_prompt=[7])
    assert nib.load(path).get_data_dtype() == np.uint8
    assert params["voxel_counts"] == {"structure 7": 1}


def test_two_results_never_share_a_file(infer: Callable[..., Any]) -> None:
    (first, _), (second, _) = infer(), infer()
    assert first != second
    assert first.exists()


# -- the case -----------------------------------------------------------------------------------------------------


def test_several_channels_are_read_in_order(
    store: ModelStore, two_channels: Path, image: Path, tmp_path: Path, cache: NetworkCache, activity: Activity
) -> None:
    add_model(store, "tiny", two_channels)
    task = NNUNetInferTask("tiny", store, cache, Config(home=store.home, profile="balanced", engine="torch"), activity)
    second = make_image(tmp_path / "second.nii.gz", (29, 23, 14), odd_grids()["oblique-left-handed"], seed=4)
    path, params = task({"image": str(image), "channels": [str(image), str(second)]})
    np.testing.assert_array_equal(read_volume(Path(path)).array_xyz, expected(store, image, second))
    assert params["label_names"] == {"whole tumour": 1, "core": 2}
    status, text = refusal(lambda: task({"image": str(image), "channels": [str(image)]}))
    assert status == 422
    assert "needs 2, in this order: T1w, T2w" in text


def test_an_image_that_cannot_be_segmented_is_a_422_with_a_reason(infer: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "cut.nii.gz").write_bytes(b"\x1f\x8b\x08")
    status, text = refusal(infer, image=str(tmp_path / "cut.nii.gz"))
    assert status == 422
    assert "cut.nii.gz" in text


def test_a_failing_network_is_a_4xx_and_counted(
    infer: Callable[..., Any], activity: Activity, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr("mshub.nnunet.engine.Engine.logits", fail)
    status, text = refusal(infer)
    assert status == 422
    assert "a kernel failed" in text
    assert activity.as_dict() == {"running": [], "finished": 0, "failed": 1, "refused": 0}


def test_a_running_prediction_can_be_watched(
    infer: Callable[..., Any], activity: Activity, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    predict = NNUNetPredictor.predict

    def watched(
        self: NNUNetPredictor, images: Any, options: Any, progress: Callable[[int, int], None], check: Any
    ) -> Prediction:
        def look(done: int, total: int) -> None:
            progress(done, total)
            seen.extend(activity.as_dict()["running"])

        return predict(self, images, options, look, check)

    monkeypatch.setattr(NNUNetPredictor, "predict", watched)
    infer()
    assert {(run["model"], run["image"]) for run in seen} == {("tiny", "case")}
    assert [run["tiles_done"] for run in seen] == list(range(1, seen[0]["tiles_total"] + 1))
    assert seen[-1]["seconds_left"] == 0
    assert activity.as_dict() == {"running": [], "finished": 1, "failed": 0, "refused": 0}


# -- versions -----------------------------------------------------------------------------------------------------


def add_second_version(store: ModelStore, folder: Path) -> None:
    assert add_model(store, "tiny", make_model_folder(folder, seed=77)).version == "v2"


def test_the_next_request_uses_the_promoted_version_and_forgets_the_old_network(
    task: NNUNetInferTask,
    infer: Callable[..., Any],
    installed: ModelStore,
    image: Path,
    cache: NetworkCache,
    tmp_path: Path,
) -> None:
    first, params = infer()
    old = read_volume(first).array_xyz
    assert params["model_version"] == "v1"
    add_second_version(installed, tmp_path / "second")
    assert infer()[1]["model_version"] == "v1", "a version serves only once it is promoted"
    installed.promote("tiny", "v2", "better")
    second, params = infer()
    assert params["model_version"] == "v2"
    assert "[v2]" in task.info()["description"]
    new = read_volume(second).array_xyz
    assert np.any(new != old)
    np.testing.assert_array_equal(new, expected(installed, image))
    assert cache.loaded() == [str(installed.current("tiny").model_path)]
    installed.rollback("tiny")
    np.testing.assert_array_equal(read_volume(infer()[0]).array_xyz, old)
    assert cache.loaded() == [str(installed.version("tiny", "v1").model_path)]


def test_a_running_request_finishes_with_the_version_it_started_with(
    infer: Callable[..., Any], installed: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_second_version(installed, tmp_path / "second")
    predict = NNUNetPredictor.predict

    def promoted_meanwhile(self: NNUNetPredictor, *arguments: Any) -> Prediction:
        installed.promote("tiny", "v2", "in the middle")
        return predict(self, *arguments)

    monkeypatch.setattr(NNUNetPredictor, "predict", promoted_meanwhile)
    assert infer()[1]["model_version"] == "v1"
    assert infer()[1]["model_version"] == "v2"


def test_a_removed_model_says_how_to_install_it_again(
    task: NNUNetInferTask, infer: Callable[..., Any], installed: ModelStore
) -> None:
    (installed.home / "models" / "tiny" / "current").unlink()
    assert not task.is_valid()
    status, text = refusal(infer)
    assert status == 404
    assert "mshub add tiny PATH" in text


def test_requests_at_the_same_time_all_get_their_label(
    infer: Callable[..., Any], installed: ModelStore, image: Path, cache: NetworkCache
) -> None:
    array, found = expected(installed, image), []
    threads = [threading.Thread(target=lambda: found.append(read_volume(infer()[0]).array_xyz)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    for label in found:
        np.testing.assert_array_equal(label, array)
    assert len(cache.loaded()) == 1


def test_the_accurate_profile_mirrors(infer: Callable[..., Any], installed: ModelStore, image: Path) -> None:
    accurate = read_volume(infer(profile="accurate")[0]).array_xyz
    np.testing.assert_array_equal(accurate, expected(installed, image, profile="accurate"))
    assert np.any(accurate != expected(installed, image))


def test_a_cuda_device_that_is_not_there_becomes_the_cpu(
    infer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert infer(device="cuda")[1]["provenance"]["device"] == "cpu"
