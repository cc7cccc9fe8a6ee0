"""Resampling and preprocessing for predictions, beside what nnU-Net itself does with the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling import default_resampling as resampling_of_nnunet
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg
from scipy.ndimage import zoom

from factories import make_model_folder
from mshub.errors import ModelFolderError
from mshub.nnunet import preprocessing, resampling
from mshub.nnunet.folder import V1_INFERENCE, ModelFolder
from mshub.nnunet.preprocessing import preprocess, preprocessor_of
from mshub.nnunet.resampling import resample

AXES = (None, 0, 1, 2)
ULP = 2.0**-23  # of float32, relative
VALUES = {
    "noise": lambda noise: noise,
    "tiny values": lambda noise: noise * 1e-6,
    "Hounsfield units": lambda noise: np.round(noise * 400) - 800,
    "ramps": lambda noise: np.cumsum(noise, axis=-1),
    "far from zero": lambda noise: noise + 1e4,
    "edges that ring": lambda noise: (noise > 0.5) * 3.0,
}
LAYOUTS = {
    "C": lambda image: image,
    "Fortran": np.asfortranarray,
    "view of a larger one": lambda image: np.pad(image, 3, mode="linear_ramp", end_values=9)[3:-3, 3:-3, 3:-3],
    "transposed": lambda image: np.ascontiguousarray(image.transpose(1, 2, 0)).transpose(2, 0, 1),
    "reversed": lambda image: np.ascontiguousarray(image[::-1, :, ::-1])[::-1, :, ::-1],
}


def nnunets(image: np.ndarray, shape: Sequence[int], axis: int | None) -> np.ndarray:
    """Return what nnU-Net makes of one channel."""
    return resample_data_or_seg(image[None], shape, False, axis, 3, axis is not None, order_z=0)[0]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Differences are of the last digit, and rare: both are rounded from float64 that agree to 1e-13 of the range."""
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    magnitude = float(np.abs(expected).max())
    difference = np.abs(found.astype(float) - expected)
    assert difference.max() <= ULP * magnitude
    assert np.count_nonzero(difference > 1e-12 * magnitude) <= 2 + difference.size // 1000


def some(seed: int, shape: Sequence[int], values: str = "noise") -> np.ndarray:
    return VALUES[values](np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def random_case(seed: int) -> tuple[np.ndarray, tuple[int, ...], int | None]:
    """Return an image of random shape, values and layout, a random shape for it and an axis."""
    generator = np.random.default_rng(seed)
    longest = generator.choice([3, 12, 40])
    shape = generator.integers(1, longest + 1, size=3)
    target = np.where(generator.random(3) < 0.2, shape, generator.integers(1, longest + 1, size=3))
    image = some(seed, shape, list(VALUES)[seed % len(VALUES)])
    return LAYOUTS[generator.choice(list(LAYOUTS))](image), tuple(target.tolist()), AXES[generator.integers(4)]


@pytest.fixture
def threads() -> Iterator[None]:
    """Put back the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- one channel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(120))
def test_any_image_becomes_what_nnunet_makes_of_it(seed: int) -> None:
    image, shape, axis = random_case(seed)
    assert_same(resample(image, shape, axis), nnunets(image, shape, axis))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("values", VALUES)
def test_values_of_every_kind_are_equal(values: str, axis: int | None) -> None:
    image = some(3, (17, 23, 31), values)
    assert_same(resample(image, (22, 19, 40), axis), nnunets(image, (22, 19, 40), axis))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_in_memory_makes_no_difference(layout: str, axis: int | None) -> None:
    image = some(5, (37, 20, 15))
    found = resample(LAYOUTS[layout](image), (30, 26, 18), axis)
    np.testing.assert_array_equal(found, resample(image, (30, 26, 18), axis))
    assert_same(found, nnunets(image, (30, 26, 18), axis))


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((5, 9, 300), (7, 11, 411)),  # more than three strips
        ((5, 9, 411), (4, 8, 129)),  # the second strip is nearly the first
        ((5, 9, 90), (6, 9, 128)),
        ((4, 400, 6), (5, 150, 5)),
        ((300, 7, 6), (410, 9, 6)),
        ((1, 1, 1), (3, 4, 5)),
        ((1, 30, 1), (2, 30, 1)),
        ((2, 3, 40), (40, 3, 2)),
        ((40, 31, 20), (1, 1, 1)),
        ((9, 31, 20), (9, 40, 20)),
        ((9, 31, 20), (12, 31, 20)),
    ],
)
@pytest.mark.parametrize("axis", AXES)
def test_shapes_of_every_kind_are_equal(shape: Sequence[int], target: Sequence[int], axis: int | None) -> None:
    image = some(7, shape)
    assert_same(resample(image, target, axis), nnunets(image, target, axis))


@pytest.mark.parametrize(("size", "new_size"), [(1, 4), (2, 7), (3, 2), (6, 6), (11, 29), (29, 11), (40, 400)])
def test_splines_are_scipys_in_float64(size: int, new_size: int) -> None:
    samples = np.random.default_rng(size).normal(size=(size, 3))
    margin = resampling._MARGIN
    block, found = np.pad(samples, ((margin, margin), (0, 0))), np.empty((new_size, 3))
    resampling._resample_rows(block, resampling._taps(size, new_size), -np.inf, np.inf, found)
    expected = zoom(samples, (new_size / size, 1), order=3, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_the_nearest_slice_is_nnunets() -> None:
    for size in range(1, 25):
        numbered = np.arange(size, dtype=np.float32).reshape(-1, 1, 1)
        for new_size in range(1, 25):
            expected = nnunets(numbered, (new_size, 1, 1), 0)
            np.testing.assert_array_equal(resample(numbered, (new_size, 1, 1), 0), expected)


@pytest.mark.parametrize("axis", AXES)
def test_nothing_leaves_the_range_of_the_image_or_of_its_slice(axis: int | None) -> None:
    image = some(1, (15, 20, 25), "edges that ring")
    np.moveaxis(image, axis or 0, 0)[4] *= 100
    found = resample(image, (30, 33, 44), axis)
    assert_same(found, nnunets(image, (30, 33, 44), axis))
    assert (found.min(), found.max()) == (image.min(), image.max())
    assert np.count_nonzero((found == image.min()) | (found == image.max())) > 100  # it would ring


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("value", [0.0, -1024.0, 0.1, 3e38])
def test_a_constant_image_stays_constant(value: float, axis: int | None) -> None:
    found = resample(np.full((7, 8, 200), value, np.float32), (5, 11, 301), axis)
    np.testing.assert_array_equal(found, np.full((5, 11, 301), value, np.float32))


@pytest.mark.parametrize("axis", AXES)
def test_what_is_no_number_spreads_as_far_as_with_nnunet(axis: int | None) -> None:
    image = some(2, (9, 20, 21))
    image[4, 5, 6] = np.nan
    with np.errstate(invalid="ignore"):
        expected = nnunets(image, (12, 17, 30), axis)
        np.testing.assert_array_equal(np.isnan(resample(image, (12, 17, 30), axis)), np.isnan(expected))
    assert np.isnan(expected).any()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("layout", ["C", "Fortran"])
def test_the_number_of_threads_makes_no_difference(layout: str, axis: int | None, threads: None) -> None:
    image = LAYOUTS[layout](some(4, (23, 33, 200)))
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(resample(image, (31, 29, 177), axis))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("target", [(9, 12, 30), (7, 12, 30), (9, 15, 33), (7, 15, 33)])
@pytest.mark.parametrize("axis", AXES)
def test_an_image_prepared_in_parts_is_one_prepared_before(target: Sequence[int], axis: int | None) -> None:
    def prepare(part: np.ndarray) -> np.ndarray:
        np.clip(part, -0.5, 1.5, out=part)
        part -= 0.25
        return part

    image = some(6, (9, 12, 30))
    whole = prepare(image.copy())
    image.flags.writeable = False  # and it must not be changed
    found = resample(image, target, axis, prepare=prepare)
    np.testing.assert_array_equal(found, resample(whole, target, axis))
    assert_same(found, nnunets(whole, target, axis))


@pytest.mark.parametrize("axis", AXES)
def test_a_result_can_be_written_where_it_belongs(axis: int | None) -> None:
    image, out = some(8, (9, 12, 30)), np.full((2, 7, 15, 33), 5, np.float32)
    assert resample(image, (7, 15, 33), axis, out=out[1]).base is out
    np.testing.assert_array_equal(out[1], resample(image, (7, 15, 33), axis))
    np.testing.assert_array_equal(out[0], 5)


# -- whole images ---------------------------------------------------------------------------------------------------

SHAPE = (14, 26, 31)
SPACING_ZYX_MM = (3.1, 1.3, 1.7)
SCHEMES = ("CTNormalization", "NoNormalization", "RescaleTo01Normalization", "ZScoreNormalization")
STATISTICS = {"mean": 60.5, "std": 133.7, "percentile_00_5": -310.2, "percentile_99_5": 421.9}
SAME = (0, 1, 2)  # network axes for which `make_model_folder` is asked where nothing else is said


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ModelFolder]:
    """A model folder of a 2d and one of a 3d configuration, two channels."""
    home = tmp_path_factory.mktemp("models")
    patches = {2: (24, 24), 3: (8, 16, 16)}
    return {
        axes: ModelFolder.open(make_model_folder(home / str(axes), channels=("CT", "T1w"), patch=patch))
        for axes, patch in patches.items()
    }


def model(
    folder: ModelFolder,
    schemes: Sequence[str] = ("CTNormalization", "ZScoreNormalization"),
    masks: Sequence[bool] = (False, False),
    spacing: Sequence[float] = (2.5, 1.5, 1.4),
    transpose: Sequence[int] = SAME,
    v1: bool = False,
    **resampling: Any,
) -> ModelFolder:
    """Return `folder` with other plans; `spacing` is the network's."""
    before = folder.plans["configurations"][folder.configuration]
    configuration = {
        **before,
        "normalization_schemes": list(schemes),
        "use_mask_for_norm": list(masks),
        "spacing": list(spacing)[-len(before["patch_size"]) :],
        "resampling_fn_data_kwargs": {**before["resampling_fn_data_kwargs"], **resampling},
    }
    plans = {
        **folder.plans,
        "configurations": {folder.configuration: configuration},
        "transpose_forward": list(transpose),
        "foreground_intensity_properties_per_channel": {str(number): STATISTICS for number in range(len(schemes))},
        V1_INFERENCE: v1,
    }
    return replace(folder, plans=plans)


def make_case(channels: int = 2, shape: Sequence[int] = SHAPE, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    """Return an image with air around and a hole within, as a reader gives it."""
    data = some(seed, (channels, *shape), "Hounsfield units")
    data[data == 0] = 1
    data[:, :2], data[:, :, -3:], data[:, :, :, :1] = 0, 0, 0
    data[0, :, :9, 5:12] = 0  # only one channel shows that this is no air
    data[:, 5:8, 9:14, 9:15] = 0
    return data, {"spacing": list(SPACING_ZYX_MM), "sitk_stuff": {"origin": (1.0, 2.0, 3.0)}}


def by_nnunet(folder: ModelFolder, data: np.ndarray, properties: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    prepared, _, changed = preprocessor_of(folder).run_case_npy(
        data, None, dict(properties), folder.plans_manager, folder.configuration_manager, folder.dataset
    )
    return prepared, changed


def assert_prepared_as_by_nnunet(folder: ModelFolder, data: np.ndarray, properties: dict[str, Any]) -> np.ndarray:
    """Return what is prepared."""
    kept, known = data.copy(), dict(properties)
    found, changed = preprocess(folder, data, properties)
    expected, changed_by_nnunet = by_nnunet(folder, data, properties)
    np.testing.assert_array_equal(data, kept)
    assert properties == known
    assert changed == changed_by_nnunet
    for channel, expected_channel in zip(found, expected, strict=True):
        assert_same(channel, expected_channel)
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("transpose", [SAME, (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("v1", [False, True])
@pytest.mark.parametrize("scheme", [*SCHEMES, "RGBTo01Normalization"])
def test_every_normalisation_is_equal(
    scheme: str, v1: bool, axes: int, transpose: Sequence[int], masked: bool, folders: dict[int, ModelFolder]
) -> None:
    folder = model(folders[axes], (scheme, "ZScoreNormalization"), (masked, masked), transpose=transpose, v1=v1)
    data, properties = make_case()
    if scheme.startswith("RGB"):
        data[0] = np.abs(data[0]) % 256
    if v1 and scheme.startswith("R"):
        with pytest.raises(ModelFolderError, match=f"not normalised by {scheme}"):
            preprocess(folder, data, properties)
    else:
        found = assert_prepared_as_by_nnunet(folder, data, properties)
        assert found.shape[1:] != data[0].transpose(transpose).shape


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("transpose", [SAME, (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("v1", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_where_nothing_is_resampled_not_a_bit_differs(
    order: str, scheme: str, v1: bool, transpose: Sequence[int], masked: bool, folders: dict[int, ModelFolder]
) -> None:
    spacing = [SPACING_ZYX_MM[axis] for axis in transpose]
    schemes = (scheme if not v1 or scheme[0] != "R" else "CTNormalization", "ZScoreNormalization")
    folder = model(folders[3], schemes, (masked, masked), spacing, transpose, v1)
    data, properties = make_case(shape=(23, 41, 57))
    data = np.asarray(data, order=order)
    np.testing.assert_array_equal(preprocess(folder, data, properties)[0], by_nnunet(folder, data, properties)[0])


@pytest.mark.parametrize("v1", [False, True])
@pytest.mark.parametrize("force", [None, False, True])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((9.0, 1.3, 1.7), (3.0, 1.5, 1.5)),  # thick slices before
        ((1.3, 1.1, 1.7), (5.5, 1.5, 1.4)),  # thick slices after
        ((1.3, 8.0, 1.7), (1.5, 3.0, 1.5)),
        ((1.3, 1.7, 9.0), (1.5, 1.5, 3.0)),
        ((6.0, 6.0, 1.7), (2.0, 2.0, 1.5)),  # two axes are thick: none is resampled apart
        ((2.0, 2.0, 2.0), (1.5, 1.5, 1.5)),
    ],
)
def test_thick_slices_are_resampled_apart_as_nnunet_decides(
    before: Sequence[float], after: Sequence[float], force: bool | None, v1: bool, folders: dict[int, ModelFolder]
) -> None:
    folder = model(folders[3], spacing=after, masks=(False, True), v1=v1, force_separate_z=force)
    data, properties = make_case()
    assert_prepared_as_by_nnunet(folder, data, {**properties, "spacing": list(before)})


@pytest.mark.parametrize("threshold", [1.5, 6.0])
def test_the_plans_may_say_how_thick_is_thick(threshold: float, folders: dict[int, ModelFolder]) -> None:
    folder = model(folders[3], force_separate_z=None, separate_z_anisotropy_threshold=threshold)
    data, properties = make_case()
    assert_prepared_as_by_nnunet(folder, data, {**properties, "spacing": [4.0, 1.3, 1.3]})


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("v1", [False, True])
@pytest.mark.parametrize("content", ["air", "no air", "one voxel", "one slice", "one channel", "three channels"])
def test_images_of_every_content_are_equal(content: str, v1: bool, axes: int, folders: dict[int, ModelFolder]) -> None:
    schemes = ("CTNormalization", "ZScoreNormalization", "NoNormalization")
    folder = model(folders[axes], schemes, (False, content == "three channels", True), v1=v1)
    whole, properties = make_case(channels=3)
    data = np.zeros_like(whole)
    if content == "no air":
        data[:] = np.where(whole == 0, 7, whole)
    elif content == "one voxel":
        data[1, 4, 5, 6] = 9
    elif content == "one slice":
        data[:, 5] = whole[:, 5]
    elif content == "one channel":
        data[1, 3:9, 4:15, 5:25] = whole[1, 3:9, 4:15, 5:25]
    elif content == "three channels":
        data[:] = whole
    assert_prepared_as_by_nnunet(folder, data, properties)


def test_an_image_that_shrinks_to_nothing_is_refused_by_nnunet(folders: dict[int, ModelFolder]) -> None:
    data, properties = make_case()
    data[:, 4:] = 0  # two slices of 0.5 mm, for a network of 2.5 mm
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="zero-size"):
        preprocess(model(folders[3]), data, {**properties, "spacing": [0.5, 1.3, 1.7]})


def test_other_number_types_are_taken_as_float32(folders: dict[int, ModelFolder]) -> None:
    data, properties = make_case()
    assert_prepared_as_by_nnunet(model(folders[3]), data.astype(np.int16), properties)
    doubles = data.astype(np.float64)
    doubles[:, 0, 0, 0] = 1e-60  # is zero as float32
    assert_prepared_as_by_nnunet(model(folders[3]), doubles, properties)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("v1", [False, True])
def test_nnunets_own_way_is_not_gone(
    v1: bool, axes: int, folders: dict[int, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DefaultPreprocessor, "run_case_npy", None)
    monkeypatch.setattr(resampling_of_nnunet, "resize", None)
    preprocess(model(folders[axes], v1=v1), *make_case())


class OtherPreprocessor(DefaultPreprocessor):
    """Somebody's own."""


OTHERS = {
    "another order": {"order": 1},
    "splines through thick slices": {"order_z": 1, "force_separate_z": True},
    "another function": {"resampling_fn_data": "resample_torch_fornnunet"},
    "no resampling": {"resampling_fn_data": "no_resampling_hack"},
    "another preprocessor": {},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_nnunets_default_is_done_its_own_way(
    other: str, folders: dict[int, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocessing, "resample", None)
    keywords = dict(OTHERS[other])
    function = keywords.pop("resampling_fn_data", None)
    folder = model(folders[3], **keywords)
    if function is not None:
        configuration = folder.plans["configurations"][folder.configuration]
        configuration.update(resampling_fn_data=function, resampling_fn_data_kwargs={})
    if other == "another preprocessor":
        monkeypatch.setattr(preprocessing, "preprocessor_of", lambda _: OtherPreprocessor(verbose=False))
    data, properties = make_case()
    found, changed = preprocess(folder, data, properties)
    expected, changed_by_nnunet = by_nnunet(folder, data, properties)
    np.testing.assert_array_equal(found, expected)
    assert changed == changed_by_nnunet


def test_an_unknown_normalisation_is_left_to_nnunet(folders: dict[int, ModelFolder]) -> None:
    with pytest.raises(RuntimeError, match="OurNormalization"):
        preprocess(model(folders[3], ("OurNormalization", "CTNormalization")), *make_case())
