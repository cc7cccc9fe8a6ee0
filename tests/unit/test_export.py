"""Labels out of logits: every voxel as nnU-Net's own export has it, ties included, on the CPU and by devices' road."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from scipy.ndimage import zoom

from factories import make_model_folder
from mshub.errors import PredictionError
from mshub.nnunet import device_export
from mshub.nnunet.device_export import write_labels_on_device
from mshub.nnunet.export import Export, linear_axis, nearest_axis, region_threshold
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.half_precision import bits_of, double_to_half
from mshub.nnunet.kernels import in_parts

REGIONS = {"background": 0, "whole": (1, 2, 3), "core": (2, 3), "active": (3,)}
ISOTROPIC, FLAT = (2.0, 2.0, 2.0), (6.0, 1.0, 1.0)
Make = Callable[..., ModelFolder]


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that writes a model folder with so many classes, or with regions."""

    def make(classes: int = 0, **options: Any) -> ModelFolder:
        path = tmp_path_factory.mktemp("models") / "model"
        labels = {"background": 0, **{f"s{value}": value for value in range(1, classes)}}
        extra = {} if classes else {"regions_class_order": [1, 2, 3]}
        return ModelFolder.open(
            make_model_folder(path, labels=labels if classes else REGIONS, dataset_extra=extra, **options)
        )

    return make


def properties(target: tuple[int, ...], spacing: Any, border: int = 0) -> dict[str, Any]:
    """Return nnU-Net's properties of an image cropped by so many voxels on every side."""
    return {
        "spacing": [float(edge) for edge in spacing],
        "shape_before_cropping": tuple(count + 2 * border for count in target),
        "bbox_used_for_cropping": [[border, border + count] for count in target],
        "shape_after_cropping_and_before_resampling": target,
    }


def as_nnunet(folder: ModelFolder, logits: torch.Tensor, facts: dict[str, Any]) -> Any:
    plans, labels = folder.plans_manager, folder.plans_manager.get_label_manager(folder.dataset)
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        logits.numpy(), plans, folder.configuration_manager, labels, facts
    )


def random_logits(rng: np.random.Generator, classes: int, shape: tuple[int, ...], kind: str) -> torch.Tensor:
    """Return logits of one kind: noise of any size, rounded to many ties, one step apart, smooth as a network's."""
    values = rng.normal(size=(classes, *shape)) * 10.0 ** rng.integers(-5, 4)
    if kind == "ties":
        values = np.round(rng.normal(size=values.shape) * 2) / 2
    if kind == "near ties":
        values = 2.0 ** rng.integers(-16, 12) * (1 + rng.integers(-6, 7, values.shape) * 2.0**-10)
        values *= rng.choice([-1, 1])
    if kind == "smooth":
        coarse = torch.from_numpy(rng.normal(size=(1, classes, 2, 2, 2)) * 8)
        values = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")[0].numpy()
    return torch.from_numpy(np.clip(values, -6e4, 6e4)).half()


def random_grids(rng: np.random.Generator, folder: ModelFolder) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the shape of the network's grid, and the properties of an image that has it."""
    shape = tuple(int(count) for count in rng.integers(1, 20, 3))
    network = np.array(folder.configuration_manager.spacing)
    spacing = network * rng.choice([1, rng.uniform(0.4, 2.5), rng.uniform(3.1, 5)], 3)
    target = tuple(int(max(1, round(count * edge))) for count, edge in zip(shape, network / spacing, strict=True))
    backward = np.empty(3)
    backward[folder.plans_manager.transpose_forward] = spacing
    return shape, properties(target, backward, border=int(rng.integers(0, 3)))


def on_another_device(folder: ModelFolder, logits: torch.Tensor, facts: dict[str, Any]) -> Any:
    """Return the label map by the road of other devices, run here."""
    export = Export(folder)
    out = np.zeros(facts["shape_after_cropping_and_before_resampling"], np.uint8)
    threshold = (
        region_threshold() if folder.plans_manager.get_label_manager(folder.dataset).has_regions else float("nan")
    )
    codes = np.array(export._codes(), out.dtype)
    write_labels_on_device(logits, threshold, export._axes(logits.shape[1:], facts), codes, 255, out)
    whole = np.zeros(facts["shape_before_cropping"], np.uint8)
    whole[tuple(slice(*edges) for edges in facts["bbox_used_for_cropping"])] = out
    return whole.transpose(folder.plans_manager.transpose_backward)


@pytest.fixture(params=["cpu", "other device"])
def label_map(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Return the export of the CPU, or that of other devices run on the CPU, a few slices at a time."""
    if request.param == "cpu":
        yield lambda folder, logits, facts: Export(folder).label_map(logits, facts)
        return
    monkeypatch.setattr(device_export, "VALUES_AT_ONCE", 2**14)
    yield on_another_device


@pytest.mark.parametrize("kind", ["noise", "ties", "near ties", "smooth"])
@pytest.mark.parametrize("spacing", [ISOTROPIC, FLAT], ids=["isotropic", "separate axis"])
@pytest.mark.parametrize("classes", [2, 5, 0], ids=["two classes", "five classes", "regions"])
def test_every_voxel_is_nnunets(make_folder: Make, label_map: Any, classes: int, spacing: Any, kind: str) -> None:
    rng = np.random.default_rng([classes, int(spacing[0]), len(kind)])
    found, resampled = set(), 0
    for transpose in [(0, 1, 2), (1, 0, 2), (2, 1, 0)]:
        folder = make_folder(classes, spacing_zyx_mm=spacing, transpose=transpose)
        for _ in range(10):
            shape, facts = random_grids(rng, folder)
            logits = random_logits(rng, classes or 3, shape, kind)
            expected = as_nnunet(folder, logits, facts)
            got = label_map(folder, logits, facts)
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected, f"{shape} {facts}")
            found |= set(np.unique(expected).tolist())
            resampled += shape != facts["shape_after_cropping_and_before_resampling"]
    assert len(found) > 1
    assert resampled > 10


def test_the_cases_above_include_separate_axes_of_every_number(make_folder: Make) -> None:
    apart = set()
    for spacing in [(6.0, 1.0, 1.0), (1.0, 6.0, 1.0), (1.0, 1.0, 6.0)]:
        folder = make_folder(4, spacing_zyx_mm=spacing)
        target = (9, 10, 11)
        axes = Export(folder)._axes(torch.Size((4, 5, 6)), properties(target, spacing))
        apart |= {number for number, axis in enumerate(axes) if not axis[3].any()}
        logits = random_logits(np.random.default_rng(1), 4, (4, 5, 6), "noise")
        facts = properties(target, spacing)
        np.testing.assert_array_equal(Export(folder).label_map(logits, facts), as_nnunet(folder, logits, facts))
    assert apart == {0, 1, 2}


def test_more_than_255_structures(make_folder: Make) -> None:
    folder = make_folder(300, spacing_zyx_mm=ISOTROPIC)
    logits = random_logits(np.random.default_rng(2), 300, (4, 5, 6), "noise")
    facts = properties((7, 8, 9), ISOTROPIC)
    expected = as_nnunet(folder, logits, facts)
    got = Export(folder).label_map(logits, facts)
    assert got.dtype == expected.dtype == np.uint16
    np.testing.assert_array_equal(got, expected)
    assert expected.max() > 255


def test_single_precision_as_nnunet_v1_averages_in(make_folder: Make, label_map: Any) -> None:
    folder, rng = make_folder(5, spacing_zyx_mm=ISOTROPIC), np.random.default_rng(3)
    for kind in ("noise", "ties", "smooth"):
        shape, facts = random_grids(rng, folder)
        probabilities = torch.softmax(random_logits(rng, 5, shape, kind).float(), 0)
        expected = as_nnunet(folder, probabilities, facts)
        np.testing.assert_array_equal(label_map(folder, probabilities, facts), expected)


def test_regions_right_above_zero_are_decided_as_the_sigmoid_does(make_folder: Make, label_map: Any) -> None:
    folder = make_folder(0, spacing_zyx_mm=ISOTROPIC)
    step = 2.0**-24
    assert 0 < region_threshold() < 1e-5
    logits = (
        torch.tensor([-2, -1, 0, 1, 2, 3, 4, 8], dtype=torch.float64).mul(step).half().expand(3, 2, 2, 8).contiguous()
    )
    for target in [(2, 2, 8), (3, 3, 30)]:
        facts = properties(target, ISOTROPIC)
        expected = as_nnunet(folder, logits, facts)
        assert len(np.unique(expected)) == 2
        np.testing.assert_array_equal(label_map(folder, logits, facts), expected)


@pytest.mark.parametrize("spacing", [ISOTROPIC, FLAT], ids=["isotropic", "separate axis"])
@pytest.mark.parametrize("classes", [4, 0], ids=["classes", "regions"])
def test_probabilities_are_nnunets(
    make_folder: Make, classes: int, spacing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_export, "VALUES_AT_ONCE", 2**12)
    rng = np.random.default_rng([classes, int(spacing[0])])
    for transpose in [(0, 1, 2), (2, 0, 1)]:
        folder = make_folder(classes, spacing_zyx_mm=spacing, transpose=transpose)
        labels = folder.plans_manager.get_label_manager(folder.dataset)
        for kind in ("noise", "smooth"):
            shape, facts = random_grids(rng, folder)
            logits = random_logits(rng, classes or 3, shape, kind)
            _, expected = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits.numpy(), folder.plans_manager, folder.configuration_manager, labels, facts, True
            )
            for channels in ([0, 1, 2], [2, 0]):
                got = Export(folder).probabilities(logits, facts, channels)
                assert got.dtype == np.float32
                np.testing.assert_allclose(got, expected[channels], rtol=0, atol=2e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("classes", [4, 0])
def test_what_is_not_finite_is_an_error_and_no_background(make_folder: Make, classes: int, value: float) -> None:
    folder = make_folder(classes, spacing_zyx_mm=ISOTROPIC)
    logits = torch.zeros((classes or 3, 4, 5, 6), dtype=torch.half)
    logits[1, 3, 4, 5] = value
    with pytest.raises(PredictionError, match="not finite"):
        Export(folder).label_map(logits, properties((4, 5, 6), ISOTROPIC))


def test_another_resampling_is_left_to_nnunet(make_folder: Make) -> None:
    folder = make_folder(3, spacing_zyx_mm=ISOTROPIC)
    folder.configuration_manager.configuration["resampling_fn_probabilities_kwargs"]["order"] = 0
    logits = random_logits(np.random.default_rng(4), 3, (4, 5, 6), "noise")
    facts = properties((9, 9, 9), ISOTROPIC)
    expected = as_nnunet(folder, logits, facts)
    np.testing.assert_array_equal(Export(folder).label_map(logits, facts), expected)
    linear = make_folder(3, spacing_zyx_mm=ISOTROPIC)
    assert (Export(linear).label_map(logits, facts) != expected).any()


def test_the_weights_of_neighbours_are_scipys_to_the_last_bit() -> None:
    rng = np.random.default_rng(5)
    for source in range(1, 12):
        for target in range(1, 30, 3):
            values = rng.normal(size=source)
            expected = zoom(values, target / source, order=1, mode="nearest", grid_mode=True)
            left, right, near, far = linear_axis(source, target)
            np.testing.assert_array_equal(values[left] * near + values[right] * far, expected)
            assert nearest_axis(source, target)[0].max() < source


def test_double_precision_is_rounded_to_half_as_numpy_does() -> None:
    rng, step = np.random.default_rng(6), 2.0**-24
    halves = np.arange(-(2**15), 2**15, dtype=np.int16).view(np.float16)
    halves = halves[np.isfinite(halves)].astype(np.float64)
    between = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate(
        [rng.normal(size=5000), rng.normal(size=5000) * step * 100, halves, between, between * (1 + 1e-15)]
    )
    values = values[np.abs(values) < 65504]
    rounded = np.array([double_to_half(value) for value in values])
    np.testing.assert_array_equal(rounded, values.astype(np.float16).astype(np.float64))


def test_bits_are_no_copy() -> None:
    for dtype, kind in ((torch.half, np.int16), (torch.float32, np.int32)):
        tensor = torch.ones(3, dtype=dtype)
        bits = bits_of(tensor)
        assert bits.dtype == kind
        bits[:] = 0
        assert not tensor.any()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parts_cover_everything_once(count: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    parts = in_parts(lambda begin, end: list(range(begin, end)), count)
    assert sorted(place for part in parts for place in part) == list(range(count))


def test_an_error_in_a_part_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def work(begin: int, end: int) -> None:
        raise PredictionError(f"{begin}")

    with pytest.raises(PredictionError):
        in_parts(work, 10)
