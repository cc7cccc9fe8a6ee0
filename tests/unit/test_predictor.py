"""The predictor: equal to nnU-Net voxel for voxel, on the image's own grid, and never a stand-in for a failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the name everybody uses
import torch

from factories import make_image, make_model_folder, odd_grids
from mshub.catalogue import InputRules
from mshub.errors import (
    CaseError,
    ChannelError,
    DeviceFull,
    GeometryError,
    LabelError,
    ModelFolderError,
    PredictionError,
)
from mshub.geometry import Volume, same_grid
from mshub.nnunet import engine as engine_module
from mshub.nnunet import network_cache as network_cache_module
from mshub.nnunet.devices import available_devices, candidate_devices, resolve_device
from mshub.nnunet.engine import Engine
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, Prediction, PredictOptions
from mshub.volume_io import read_grid, read_volume
from nnunet_itself import nnunet_label

CPU = torch.device("cpu")
BALANCED, ACCURATE = PredictOptions(PROFILES["balanced"], device="cpu"), PredictOptions(device="cpu")
SHAPE = (29, 23, 14)


@pytest.fixture(scope="module")
def cache() -> NetworkCache:
    return NetworkCache()


def predict(
    folder: Path, *images: Path, options: PredictOptions = BALANCED, cache: NetworkCache | None = None, **more: Any
) -> Prediction:
    return NNUNetPredictor(ModelFolder.open(folder), cache or NetworkCache()).predict(images, options, **more)


# -- equality -----------------------------------------------------------------------------------------------------


def assert_equal_to_nnunet(folder: Path, images: Sequence[Path], work: Path, options: PredictOptions) -> None:
    prediction = predict(folder, *images, options=options)
    opened, mirroring = ModelFolder.open(folder), options.profile.mirroring
    names = (opened.folds, opened.checkpoint_name)
    expected = nnunet_label(folder, images, work / "reference", *names, mirroring=mirroring)
    labels = prediction.labels.array_xyz
    assert set(np.unique(expected)) == {0, *prediction.names.values()}, "every class occurs, or the test proves little"
    assert np.count_nonzero(labels != expected) == 0
    assert same_grid(prediction.labels.grid, read_grid(images[0]))


@pytest.mark.parametrize(
    ("model", "grid", "options"),
    [
        pytest.param({"folds": ("0", "1")}, "oblique-left-handed", ACCURATE, id="two folds, mirrored"),
        pytest.param({"transpose": (2, 0, 1)}, "-z+x-y", BALANCED, id="transposed"),
        pytest.param({"transpose": (1, 2, 0), "mirror_axes": (0, 2)}, "+y+z+x", ACCURATE, id="transposed, mirrored"),
        pytest.param({"patch": (24, 20), "mirror_axes": (0, 1)}, "-x+y+z", ACCURATE, id="2d"),
        pytest.param({"patch": (20, 24), "transpose": (1, 0, 2)}, "+x+y-z", BALANCED, id="2d, transposed"),
        pytest.param({"reader": "NibabelIO"}, "oblique", BALANCED, id="NibabelIO"),
        pytest.param({"reader": "NibabelIOWithReorient"}, "-z+x-y", BALANCED, id="NibabelIOWithReorient"),
        pytest.param({"reader": "NibabelIOWithReorient"}, "oblique-left-handed", BALANCED, id="reoriented, oblique"),
        pytest.param({"reader": "SimpleITKIOWithReorient"}, "+x-y+z", BALANCED, id="SimpleITKIOWithReorient"),
        pytest.param({"mirror_axes": None}, "slightly-oblique", ACCURATE, id="mirroring not allowed"),
        pytest.param({"folds": ("all",)}, "thick-first-axis", BALANCED, id="fold all"),
        pytest.param(
            {"checkpoint_name": "checkpoint_best.pth", "spacing_zyx_mm": (5.0, 1.2, 1.4)},
            "very-anisotropic",
            BALANCED,
            id="best checkpoint, anisotropic",
        ),
    ],
)
def test_the_label_is_nnunets_own(tmp_path: Path, model: dict[str, Any], grid: str, options: PredictOptions) -> None:
    folder = make_model_folder(tmp_path / "model", **model)
    image = make_image(tmp_path / "case.nii.gz", SHAPE, odd_grids()[grid], seed=3)
    assert_equal_to_nnunet(folder, [image], tmp_path, options)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_two_channels_and_regions_are_as_nnunet_has_them(tmp_path: Path, reader: str) -> None:
    folder = make_model_folder(
        tmp_path / "model",
        channels=("T1w", "T2w"),
        labels={"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3},
        dataset_extra={"regions_class_order": [2, 1, 3]},
        reader=reader,
        seed=5,
    )
    affine = odd_grids()["-y-x-z"]
    images = [make_image(tmp_path / f"case_{index:04d}.nii.gz", SHAPE, affine, seed=index) for index in range(2)]
    assert ModelFolder.open(folder).labels.names == ("core", "whole", "enhancing")
    assert_equal_to_nnunet(folder, images, tmp_path, BALANCED)
    swapped = predict(folder, *reversed(images))
    assert np.any(swapped.labels.array_xyz != predict(folder, *images).labels.array_xyz), "the channels differ"


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_other_formats_are_read_by_nnunets_own_reader(
    liver_spleen: Path, image: Path, tmp_path: Path, ending: str
) -> None:
    copy = tmp_path / f"case{ending}"
    sitk.WriteImage(sitk.ReadImage(str(image)), str(copy))
    assert_equal_to_nnunet(liver_spleen, [copy], tmp_path, BALANCED)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii"])
def test_the_format_of_the_image_does_not_change_its_label(tmp_path: Path, image: Path, ending: str) -> None:
    folder = make_model_folder(tmp_path / "model", reader="NibabelIO")
    copy = tmp_path / f"case{ending}"
    sitk.WriteImage(sitk.ReadImage(str(image)), str(copy))
    expected = predict(folder, image)
    np.testing.assert_array_equal(predict(folder, copy).labels.array_xyz, expected.labels.array_xyz)


def test_labels_with_gaps_are_published_without_them(tmp_path: Path, image: Path) -> None:
    labels = {"background": 0, "spleen": 7, "liver": 3}
    folder = make_model_folder(tmp_path / "model", labels=labels)
    prediction = predict(folder, image)
    assert prediction.names == {"liver": 1, "spleen": 2}
    assert set(np.unique(prediction.labels.array_xyz)) == {0, 1, 2}
    assert prediction.labels.array_xyz.dtype == np.uint8


def test_the_label_lies_on_the_grid_of_the_first_file(two_channels: Path, tmp_path: Path) -> None:
    affine = odd_grids()["oblique-left-handed"]
    nudged = affine.copy()
    nudged[0, 3] += 1e-3
    first = make_image(tmp_path / "a.nii.gz", SHAPE, affine, seed=1)
    second = make_image(tmp_path / "b.nii.gz", SHAPE, nudged, seed=2)
    grid = predict(two_channels, first, second).labels.grid
    np.testing.assert_array_equal(grid.affine_ras, read_grid(first).affine_ras)
    assert grid.shape_xyz == SHAPE


def test_clipping_equals_predicting_a_clipped_file(liver_spleen: Path, image: Path, tmp_path: Path) -> None:
    low, high = -60.0, 75.0
    loaded = nib.load(image)
    clipped = np.clip(np.asarray(loaded.dataobj), low, high).astype(np.int16)
    assert np.mean(clipped != np.asarray(loaded.dataobj)) > 0.2
    nib.save(nib.Nifti1Image(clipped, loaded.affine, loaded.header), tmp_path / "clipped.nii.gz")
    options = PredictOptions(PROFILES["balanced"], device="cpu", rules=InputRules((low, high)))
    found = predict(liver_spleen, image, options=options)
    expected = predict(liver_spleen, tmp_path / "clipped.nii.gz")
    np.testing.assert_array_equal(found.labels.array_xyz, expected.labels.array_xyz)
    assert np.any(found.labels.array_xyz != predict(liver_spleen, image).labels.array_xyz)
    assert found.provenance["input_clip"] == [low, high]


# -- what a prediction tells --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("grid", ["-z+x-y", "oblique-left-handed", "+y+z+x"])
@pytest.mark.parametrize("orientation", ["LPS", "RAS"])
def test_a_model_made_for_another_orientation_sees_what_nnunet_sees_of_a_turned_file(
    tmp_path: Path, reader: str, grid: str, orientation: str
) -> None:
    """As MRSegmentator's own program does it: turn with SimpleITK, predict, turn back."""
    folder = make_model_folder(tmp_path / "model", reader=reader)
    image = make_image(tmp_path / "case.nii.gz", SHAPE, odd_grids()[grid], seed=3)
    turned = tmp_path / "turned.nii.gz"
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(image)), orientation), str(turned))
    expected = Volume(nnunet_label(folder, [turned], tmp_path / "o", ("0",), mirroring=False), read_grid(turned))
    options = PredictOptions(PROFILES["balanced"], device="cpu", rules=InputRules(orientation=orientation))
    prediction = predict(folder, image, options=options)
    back = expected.turned(read_grid(image).orientation)
    np.testing.assert_array_equal(prediction.labels.array_xyz, back.array_xyz)
    assert same_grid(prediction.labels.grid, read_grid(image))
    assert prediction.provenance["orientation"] == orientation


def test_an_image_that_lies_as_the_model_wants_it_is_read_as_it_is(tmp_path: Path, liver_spleen: Path) -> None:
    image = make_image(tmp_path / "case.nii.gz", SHAPE, odd_grids()["+x+y+z"])
    rules = InputRules(orientation=read_grid(image).orientation)
    found = predict(liver_spleen, image, options=PredictOptions(PROFILES["balanced"], device="cpu", rules=rules))
    np.testing.assert_array_equal(found.labels.array_xyz, predict(liver_spleen, image).labels.array_xyz)


def test_a_prediction_says_how_it_was_made(liver_spleen: Path, image: Path) -> None:
    prediction = predict(liver_spleen, image)
    assert prediction.provenance == {
        "configuration": "3d_fullres",
        "trainer": "nnUNetTrainer",
        "folds": ["0"],
        "profile": "balanced",
        "runtime": "torch",
        "device": "cpu",
        "input_clip": None,
    }
    assert list(prediction.seconds) == ["read", "load", "preprocess", "network", "export"]
    assert all(seconds >= 0 for seconds in prediction.seconds.values())


def test_voxels_are_counted_per_structure_absent_ones_too(liver_spleen: Path, image: Path) -> None:
    prediction = predict(liver_spleen, image)
    array = prediction.labels.array_xyz
    expected = {"liver": int((array == 1).sum()), "spleen": int((array == 2).sum())}
    assert prediction.voxel_counts() == expected
    array[array == 2] = 0
    assert prediction.voxel_counts() == {**expected, "spleen": 0}


@pytest.mark.parametrize("folds", [("0",), ("0", "1")])
def test_progress_is_monotone_and_ends_at_the_total(tmp_path: Path, image: Path, folds: tuple[str, ...]) -> None:
    folder = make_model_folder(tmp_path / "model", folds=folds)
    steps: list[tuple[int, int]] = []
    predict(folder, image, progress=lambda done, total: steps.append((done, total)))
    totals = {total for _, total in steps}
    assert len(totals) == 1
    assert [done for done, _ in steps] == list(range(1, totals.pop() + 1))
    assert len(steps) > 2 * len(folds)


def test_a_chosen_fold_is_used_alone(tmp_path: Path, image: Path) -> None:
    folder = make_model_folder(tmp_path / "two", folds=("0", "1"))
    alone = make_model_folder(tmp_path / "one", folds=("1",), seed=1)
    chosen = predict(folder, image, options=PredictOptions(PROFILES["balanced"], folds=("1",), device="cpu"))
    np.testing.assert_array_equal(chosen.labels.array_xyz, predict(alone, image).labels.array_xyz)
    assert chosen.provenance["folds"] == ["1"]


# -- what is refused ----------------------------------------------------------------------------------------------


def test_the_wrong_number_of_channels_names_the_right_ones(two_channels: Path, image: Path) -> None:
    for count in (0, 1, 3):
        with pytest.raises(ChannelError, match=rf"{count} image file\(s\) were given; this model needs 2, .* T1w, T2w"):
            predict(two_channels, *[image] * count)


@pytest.mark.parametrize(
    ("shape", "grid", "named"),
    [((29, 23, 15), "oblique", "shape"), (SHAPE, "slightly-oblique", "direction"), (SHAPE, "+x+y+z", "direction")],
)
def test_channels_on_different_grids_are_refused(
    two_channels: Path, tmp_path: Path, shape: tuple[int, int, int], grid: str, named: str
) -> None:
    first = make_image(tmp_path / "a.nii.gz", SHAPE, odd_grids()["oblique"])
    second = make_image(tmp_path / "b.nii.gz", shape, odd_grids()[grid])
    with pytest.raises(GeometryError, match=f"channel 'T2w' and channel 'T1w'.*{named}"):
        predict(two_channels, first, second)


def test_channels_whose_spacing_nnunets_reader_finds_different_are_a_case_error(
    two_channels: Path, tmp_path: Path
) -> None:
    wider = odd_grids()["+x+y+z"] @ np.diag([1.0001, 1, 1, 1])
    first = make_image(tmp_path / "a.nii.gz", SHAPE, odd_grids()["+x+y+z"])
    second = make_image(tmp_path / "b.nii.gz", SHAPE, wider)
    with pytest.raises(CaseError, match="reader SimpleITKIO cannot read"):
        predict(two_channels, first, second)


def test_an_unknown_fold_names_the_known_ones(liver_spleen: Path, image: Path) -> None:
    with pytest.raises(PredictionError, match="Fold 3, 4 was asked for; this model has fold 0"):
        predict(liver_spleen, image, options=PredictOptions(folds=("0", "3", "4")))


def test_a_missing_file_is_a_case_error(liver_spleen: Path, tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"nothing\.nii\.gz"):
        predict(liver_spleen, tmp_path / "nothing.nii.gz")


@pytest.mark.parametrize("name", ["tpu", "cuda0", "mps", "gpu0", "meta"])
def test_an_unknown_device_is_refused(name: str, liver_spleen: Path, image: Path) -> None:
    with pytest.raises(CaseError, match=f"device '{name}' is unknown"):
        predict(liver_spleen, image, options=PredictOptions(device=name))


@pytest.mark.parametrize("name", ["auto", "", "cpu", "cuda", "CUDA:1", "gpu", " cuda:0 "])
def test_what_the_machine_lacks_becomes_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(name) == CPU
    assert available_devices() == ["cpu"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cuda:7", "cuda:0"), ("cpu", "cpu")],
)
def test_devices_are_chosen_by_number_where_they_exist(
    name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(resolve_device(name)) == expected
    assert available_devices() == ["cuda:0", "cuda:1", "cpu"]


# -- failures -----------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("stage", ["preprocess", "logits", "segmentation"])
def test_a_failure_of_any_stage_is_raised_and_never_an_empty_mask(
    liver_spleen: Path, image: Path, monkeypatch: pytest.MonkeyPatch, cache: NetworkCache, stage: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Engine, stage, raising(RuntimeError("a kernel failed")))
        with pytest.raises(PredictionError, match="RuntimeError: a kernel failed"):
            predict(liver_spleen, image, cache=cache)
    assert sum(predict(liver_spleen, image, cache=cache).voxel_counts().values()) > 0, "the device was given back"


def test_a_network_that_computes_nan_is_an_error_and_not_background(tmp_path: Path, image: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    path = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["network_weights"]["decoder.seg_layers.1.bias"][1] = float("nan")
    torch.save(checkpoint, path)
    with pytest.raises(PredictionError, match="not finite"):
        predict(folder, image)


def test_running_out_of_memory_says_what_to_do(
    liver_spleen: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "logits", raising(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(
        PredictionError, match=r"cpu ran out of memory on an image of \(29, 23, 14\) voxels.*another device"
    ):
        predict(liver_spleen, image)


def test_a_segmentation_of_another_shape_is_not_returned(
    liver_spleen: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "segmentation", lambda *_: np.ones(SHAPE, dtype=np.uint8))
    with pytest.raises(GeometryError, match="nothing is returned rather than a shifted mask"):
        predict(liver_spleen, image)


# -- probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("grid", ["+x+y+z", "-z+x-y", "oblique-left-handed"])
def test_probabilities_lie_where_the_label_does(tmp_path: Path, grid: str, reader: str) -> None:
    folder = make_model_folder(tmp_path / "model", reader=reader)
    path = make_image(tmp_path / "image.nii.gz", SHAPE, odd_grids()[grid])
    plain = predict(folder, path)
    found = predict(folder, path, options=replace(BALANCED, probabilities=("spleen", "liver")))
    np.testing.assert_array_equal(found.labels.array_xyz, plain.labels.array_xyz)
    assert plain.probabilities == {}
    assert list(found.probabilities) == ["spleen", "liver"]
    spleen, liver = found.probabilities.values()
    assert spleen.shape == liver.shape == SHAPE
    assert spleen.dtype == np.float32
    labels, background = found.labels.array_xyz, 1 - spleen - liver
    chances = np.stack([background, liver, spleen])
    assert (chances > -1e-5).all()
    chosen = np.take_along_axis(chances, labels[None].astype(int), 0)[0]
    assert (chosen >= chances.max(0) - 1e-3).all(), "the label is the most probable class, up to the rounding"
    assert set(np.unique(labels)) == {0, 1, 2}


def test_probabilities_of_regions(two_channels: Path, image: Path) -> None:
    options = replace(BALANCED, probabilities=("core", "whole tumour"))
    predictor = NNUNetPredictor(ModelFolder.open(two_channels), NetworkCache())
    found = predictor.predict([image, image], options)
    labels, names = found.labels.array_xyz, found.names
    np.testing.assert_array_equal(found.probabilities["core"] > 0.5, labels == names["core"])
    some = found.probabilities["whole tumour"] > 0.5
    np.testing.assert_array_equal(some | (labels == names["core"]), labels > 0)
    assert some.any()


def test_probabilities_of_what_the_model_does_not_know_are_refused(liver_spleen: Path, image: Path) -> None:
    with pytest.raises(LabelError, match="heart were asked for; this model knows liver, spleen"):
        predict(liver_spleen, image, options=replace(BALANCED, probabilities=("liver", "heart")))


# -- a GPU that is too small --------------------------------------------------------------------------------------


class SmallGPU(Engine):
    """An engine that says it is on a GPU, which lacks memory for what the test says, each once."""

    too_little: ClassVar[list[str]] = []

    def __init__(self, folder: ModelFolder, folds: tuple[str, ...], device: torch.device, *more: Any) -> None:
        super().__init__(folder, folds, CPU, *more)
        self.device = device

    def logits(self, data: np.ndarray, *, sums_in_main_memory: bool = False, **options: Any) -> torch.Tensor:
        lacks_room_for = self.too_little.pop(0) if self.too_little else ""
        if self.device.type == "cuda" and lacks_room_for == "the network":
            raise torch.OutOfMemoryError("none left")
        in_main_memory = sums_in_main_memory or (self.device.type == "cuda" and lacks_room_for == "the sums")
        return super().logits(data, sums_in_main_memory=in_main_memory, **options)


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.setattr("mshub.nnunet.network_cache.Engine", SmallGPU)
    monkeypatch.setattr("mshub.nnunet.predictor.candidate_devices", lambda _: (torch.device("cuda", 0),))
    yield SmallGPU.too_little
    SmallGPU.too_little.clear()


EMPTIED = "cuda:0 was emptied for it: beside other networks its memory did not suffice"
IN_MAIN_MEMORY = "what the network made on cuda:0 was added up in main memory"
STEPS = {
    "enough": ([], "cuda:0", None),
    "too little for the sums": (["the sums"], "cuda:0", IN_MAIN_MEMORY),
    "too little beside others": (["the network"], "cuda:0", EMPTIED),
    "too little for the sums, alone": (["the network", "the sums"], "cuda:0", f"{EMPTIED}; {IN_MAIN_MEMORY}"),
    "too little beside the sums": (["the network"] * 2, "cuda:0", f"{EMPTIED}; {IN_MAIN_MEMORY}"),
    "too little": (["the network"] * 3, "cpu", "cuda:0 has too little memory for it"),
}


@pytest.mark.parametrize(("lacks_room_for", "device", "said"), STEPS.values(), ids=STEPS.keys())
def test_a_gpu_without_memory_is_tried_alone_then_with_sums_elsewhere_then_the_cpu(
    liver_spleen: Path, image: Path, small_gpu: list[str], lacks_room_for: list[str], device: str, said: str | None
) -> None:
    expected = predict(liver_spleen, image, options=BALANCED)
    small_gpu.extend(lacks_room_for)
    found = NNUNetPredictor(ModelFolder.open(liver_spleen), NetworkCache()).predict([image], BALANCED)
    assert np.array_equal(found.labels.array_xyz, expected.labels.array_xyz)
    assert (found.provenance["device"], found.provenance.get("stepped_down")) == (device, said)
    assert found.provenance["profile"] == "balanced", "what would change the result and save nothing is left alone"
    assert small_gpu == []


def test_other_networks_are_given_up_before_a_request_is_tried_again(
    liver_spleen: Path, image: Path, small_gpu: list[str], three_folders: list[ModelFolder]
) -> None:
    cache, gpu = NetworkCache(), torch.device("cuda", 0)
    for folder in three_folders:
        load(cache, folder, gpu)
    load(cache, three_folders[0], CPU)
    small_gpu.extend(["the network"])
    NNUNetPredictor(ModelFolder.open(liver_spleen), cache).predict([image], BALANCED)
    assert cache.loaded() == [str(three_folders[0].path), str(liver_spleen)], "those on other devices stay"


def test_a_cpu_without_memory_is_an_error(liver_spleen: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def none_left(*_: Any, **__: Any) -> torch.Tensor:
        tried.append(1)
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Engine, "logits", none_left)
    with pytest.raises(DeviceFull, match="cpu ran out of memory"):
        predict(liver_spleen, image, options=BALANCED)
    assert tried == [1]


# -- the cache and its locks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_folders(tmp_path_factory: pytest.TempPathFactory) -> list[ModelFolder]:
    parent = tmp_path_factory.mktemp("three")
    return [ModelFolder.open(make_model_folder(parent / name, seed=ord(name))) for name in "abc"]


def load(cache: NetworkCache, folder: ModelFolder, device: torch.device = CPU) -> Engine:
    with cache.engine(folder, folder.folds, device) as engine:
        return engine


def test_networks_stay_warm(three_folders: list[ModelFolder]) -> None:
    cache = NetworkCache()
    first = load(cache, three_folders[0])
    assert load(cache, three_folders[0]) is first
    assert first.nbytes > 1000


def test_the_least_recently_used_network_goes_first(three_folders: list[ModelFolder]) -> None:
    a, b, c = three_folders
    size = load(NetworkCache(), a).nbytes
    cache = NetworkCache(max_bytes=int(2.5 * size))
    for folder in (a, b, a, c):
        load(cache, folder)
    assert cache.loaded() == [str(a.path), str(c.path)]
    load(cache, b)
    assert cache.loaded() == [str(c.path), str(b.path)]


def test_a_network_larger_than_the_budget_is_kept_while_it_is_the_last_one(three_folders: list[ModelFolder]) -> None:
    cache = NetworkCache(max_bytes=1)
    for folder in three_folders:
        load(cache, folder)
        assert cache.loaded() == [str(folder.path)]


def test_a_forgotten_network_is_loaded_anew(three_folders: list[ModelFolder]) -> None:
    a, b, _ = three_folders
    cache = NetworkCache()
    first = load(cache, a)
    load(cache, b)
    cache.forget(a.path)
    assert cache.loaded() == [str(b.path)]
    assert load(cache, a) is not first
    cache.forget(Path("/nowhere"))


class Overlap:
    """Counts how many threads are inside at once."""

    def __init__(self) -> None:
        self.most = self._now = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._now -= 1


def run_together(*tasks: Callable[[], Any]) -> None:
    """Run tasks in threads of their own; fail if one of them raises or hangs."""
    errors: list[BaseException] = []

    def guarded(task: Callable[[], Any]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []


def test_a_device_computes_one_case_at_a_time(
    three_folders: list[ModelFolder], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlap, cache = Overlap(), NetworkCache()
    compute = Engine.logits

    def watched(self: Engine, *arguments: Any, **options: Any) -> Any:
        with overlap:
            time.sleep(0.05)
            return compute(self, *arguments, **options)

    monkeypatch.setattr(Engine, "logits", watched)
    predictors = [NNUNetPredictor(folder, cache) for folder in three_folders]
    expected = [predictor.predict([image], BALANCED).labels.array_xyz for predictor in predictors]
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        found[index] = predictors[index % 3].predict([image], BALANCED).labels.array_xyz

    run_together(*[lambda index=index: work(index) for index in range(6)])
    assert overlap.most == 1
    for index, array in found.items():
        np.testing.assert_array_equal(array, expected[index % 3])


class FakeEngine:
    nbytes = 1

    def __init__(self, folder: ModelFolder, folds: tuple[str, ...], device: torch.device, *_: object) -> None:
        self.device = device


@pytest.fixture
def fake_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(network_cache_module, "Engine", FakeEngine)
    yield
    assert engine_module.Engine is Engine


@pytest.mark.usefixtures("fake_engines")
def test_two_devices_compute_at_once(three_folders: list[ModelFolder]) -> None:
    cache, together = NetworkCache(), threading.Barrier(2)

    def work(device: str) -> None:
        with cache.engine(three_folders[0], ("0",), torch.device(device)):
            together.wait(10)

    run_together(lambda: work("cpu"), lambda: work("cuda:0"))


@pytest.mark.usefixtures("fake_engines")
def test_requests_for_any_of_several_devices_go_where_the_fewest_wait(three_folders: list[ModelFolder]) -> None:
    cache, together = NetworkCache(), threading.Barrier(3)
    gpus = [torch.device("cuda", index) for index in range(3)]

    def work() -> None:
        with cache.engine(three_folders[0], ("0",), *gpus):
            together.wait(10)

    run_together(work, work, work)
    used = []
    for folder in (three_folders[1], three_folders[0]):
        with cache.engine(folder, ("0",), *gpus[:2]) as first, cache.engine(folder, ("0",), *gpus[:2]) as second:
            used += [first.device, second.device]
    assert used == [*gpus[:2], *gpus[:2]]


@pytest.mark.usefixtures("fake_engines")
def test_of_idle_devices_the_one_with_the_network_is_taken(three_folders: list[ModelFolder]) -> None:
    cache, gpus = NetworkCache(), [torch.device("cuda", index) for index in range(2)]
    load(cache, three_folders[0], gpus[1])
    with cache.engine(three_folders[0], ("0",), *gpus) as engine:
        assert engine.device == gpus[1]
    with cache.engine(three_folders[1], ("0",), *gpus) as engine:
        assert engine.device == gpus[0]


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cuda:1", 2, ["cuda:1"]),
        ("cuda:7", 2, ["cuda:0"]),
        ("cpu", 2, ["cpu"]),
        ("auto", 0, ["cpu"]),
        ("cuda:1", 0, ["cpu"]),
    ],
)
def test_a_request_that_names_no_gpu_may_run_on_any(
    name: str, gpus: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert [str(device) for device in candidate_devices(name)] == expected


def test_a_warm_predictor_loads_nothing_when_it_is_asked(
    liver_spleen: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = NNUNetPredictor(ModelFolder.open(liver_spleen), NetworkCache())
    expected = predict(liver_spleen, image).labels.array_xyz
    predictor.warm(BALANCED)
    monkeypatch.setattr(network_cache_module, "Engine", raising(AssertionError("loaded again")))
    np.testing.assert_array_equal(predictor.predict([image], BALANCED).labels.array_xyz, expected)


@pytest.mark.usefixtures("fake_engines")
def test_a_running_network_does_not_block_looking_at_the_cache(three_folders: list[ModelFolder]) -> None:
    cache = NetworkCache()
    with cache.engine(three_folders[0], ("0",), CPU):
        run_together(
            lambda: cache.forget(three_folders[1].path),
            lambda: cache.loaded(),
            lambda: load(cache, three_folders[1], torch.device("cuda:0")),
        )


def test_an_exception_in_the_block_gives_the_device_back(three_folders: list[ModelFolder]) -> None:
    cache = NetworkCache()
    with pytest.raises(ZeroDivisionError), cache.engine(three_folders[0], ("0",), CPU):
        raise ZeroDivisionError
    run_together(lambda: load(cache, three_folders[0]))


def test_a_network_that_does_not_load_gives_the_device_back(
    three_folders: list[ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = NetworkCache()
    with monkeypatch.context() as patch:
        patch.setattr(network_cache_module, "Engine", raising(ModelFolderError("damaged")))
        with pytest.raises(ModelFolderError, match="damaged"):
            load(cache, three_folders[0])
    run_together(lambda: load(cache, three_folders[0]))
    assert cache.loaded() == [str(three_folders[0].path)]


def test_a_constant_image_is_refused_before_a_network_is_loaded(liver_spleen: Path, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.full(SHAPE, 5, dtype=np.int16), np.diag([1.7, 1.3, 3.1, 1.0])), tmp_path / "c.nii.gz")
    cache = NetworkCache()
    with pytest.raises(CaseError, match="same value 5"):
        predict(liver_spleen, tmp_path / "c.nii.gz", cache=cache)
    assert cache.loaded() == []


def test_the_image_is_left_as_it_was(liver_spleen: Path, image: Path) -> None:
    before = image.read_bytes()
    predict(liver_spleen, image)
    assert image.read_bytes() == before
    assert read_volume(image).array_xyz.dtype == np.int16
