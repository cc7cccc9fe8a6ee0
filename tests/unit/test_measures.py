"""What is measured in the pass that predicts, beside the same numbers calculated the long way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from factories import make_image, make_model_folder
from mshub.errors import PredictionError
from mshub.nnunet.engine import Engine
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.measures import Heads, Measures, Votes
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, PredictOptions
from mshub.nnunet.reading import read_as_nnunet, read_channels
from mshub.uncertainty import Uncertainty

CPU = torch.device("cpu")
HEADS = Heads(("liver", "spleen"))
SHAPE = (29, 23, 14)
REGIONS = {"background": 0, "whole": [1, 2], "core": [2]}


def pairwise_dice(maps: Sequence[np.ndarray], value: int) -> float:
    """Return the Dice over all pairs of label maps, their voxels counted together."""
    pairs = [(one == value, other == value) for one, other in combinations(maps, 2)]
    common = sum(np.count_nonzero(one & other) for one, other in pairs)
    return float(2 * common / sum(np.count_nonzero(one) + np.count_nonzero(other) for one, other in pairs))


def scaled(*spacing_xyz_mm: float) -> np.ndarray:
    return np.diag([*spacing_xyz_mm, 1.0])


def predictor(folder: Path) -> NNUNetPredictor:
    return NNUNetPredictor(ModelFolder.open(folder), NetworkCache())


def measured(folder: Path, image: Path, profile: str = "accurate", **options: object) -> Uncertainty:
    found = (
        predictor(folder)
        .predict([image], PredictOptions(PROFILES[profile], device="cpu", measure=True, **options))
        .uncertainty
    )
    assert found is not None
    return found


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("images") / "case.nii.gz", SHAPE, scaled(1.5, 1.5, 2.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"), folds=("0", "1"), patch=(16, 24, 32))


def outputs_of(folder: Path, image: Path, folds: tuple[str, ...], mirroring: bool = True) -> torch.Tensor:
    """Return the averaged outputs of some folds, from an engine that measures nothing."""
    model = ModelFolder.open(folder)
    engine = Engine(model, folds, CPU)
    volumes = read_channels([image], model.channels)
    data, properties = read_as_nnunet(
        [image], volumes, model.plans_manager.image_reader_writer_class(), PredictOptions().rules
    )
    prepared, _ = engine.preprocess(data, properties)
    return engine.logits(prepared, mirroring=mirroring, step=0.5)


# -- votes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("voters", [2, 3, 8])
def test_votes_count_what_all_pairs_of_label_maps_have_in_common(voters: int) -> None:
    draw = np.random.default_rng(voters)
    tiles = [[draw.choice(3, (4, 5, 7), p=(0.6, 0.3, 0.1)).astype(np.uint8) for _ in range(voters)] for _ in range(3)]
    for tile in tiles:  # most voxels are the same in all maps
        for one in tile[1:]:
            one[:3] = tile[0][:3]
    votes = Votes(HEADS)
    for tile in tiles:
        votes.count([torch.from_numpy(one)[None] for one in tile])
    together = [np.stack([tile[voter] for tile in tiles]) for voter in range(voters)]
    assert votes.dice() == pytest.approx([pairwise_dice(together, 1), pairwise_dice(together, 2)])


def test_equal_maps_agree_fully_and_what_none_has_is_not_rated() -> None:
    votes, one = Votes(HEADS), torch.zeros((1, 4, 5, 6), dtype=torch.uint8)
    one[0, 1:3] = 1
    votes.count([one, one.clone(), one.clone()])
    assert votes.dice() == [1.0, None]


def test_a_single_map_says_nothing() -> None:
    votes = Votes(HEADS)
    votes.count([torch.ones((1, 4, 5, 6), dtype=torch.uint8)])
    assert votes.dice() == [None, None]


@pytest.mark.parametrize("slices", [7, 8, 9])
@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_of_a_large_tile_the_same_slices_of_every_copy_are_compared(
    every: int, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mshub.nnunet.measures.LARGE_TILE", 10**6 if every == 1 else slices * 64 // (every - 1))
    output = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, slices, 8, 8)).astype(np.float32))
    measures = Measures(HEADS)
    counted: list[torch.Size] = []
    count = measures._mirrors.count
    monkeypatch.setattr(
        measures._mirrors, "count", lambda maps: (counted.extend(one.shape for one in maps), count(maps))
    )
    for axes in ((), (2,), (3,), (2, 4)):
        measures.one_pass(output.flip(axes), 4, axes)
    measures.end_of_tile()
    assert measures._mirrors.dice() == [1.0, 1.0]
    assert {shape[1] for shape in counted} == {-(-slices // every)}


# -- in the pass ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["accurate", "balanced"])
def test_measuring_changes_no_voxel(folder: Path, image: Path, profile: str) -> None:
    labels = [
        predictor(folder).predict([image], PredictOptions(PROFILES[profile], device="cpu", measure=measure)).labels
        for measure in (False, True)
    ]
    assert np.array_equal(labels[0].array_xyz, labels[1].array_xyz)


def test_without_being_asked_nothing_is_measured(folder: Path, image: Path) -> None:
    assert predictor(folder).predict([image], PredictOptions(device="cpu")).uncertainty is None


def test_folds_are_compared_with_each_other(folder: Path, image: Path) -> None:
    found = measured(folder, image)
    maps = [outputs_of(folder, image, (fold,)).argmax(0).numpy() for fold in ("0", "1")]
    assert found.structures["liver"].fold_dice == pytest.approx(pairwise_dice(maps, 1))
    assert found.structures["spleen"].fold_dice == pytest.approx(pairwise_dice(maps, 2))


def test_one_fold_has_nothing_to_be_compared_with(folder: Path, image: Path) -> None:
    assert measured(folder, image, folds=("1",)).fold_dice is None


def test_mirrored_copies_are_compared_with_each_other(tmp_path: Path) -> None:
    """On an image of one tile, which the network is asked about by hand."""
    folder = make_model_folder(tmp_path / "model", mirror_axes=(0, 2))
    tile = torch.randn(1, 1, 16, 24, 24, generator=torch.Generator().manual_seed(5))
    engine = Engine(ModelFolder.open(folder), ("0",), CPU)
    measures = engine.measures()
    engine.logits(tile[0].numpy(), mirroring=True, step=0.5, measures=measures)
    network = engine._window.network
    with torch.inference_mode():
        maps = [
            torch.flip(network(torch.flip(tile, axes)), axes)[0].argmax(0).numpy() for axes in ((), (2,), (4,), (2, 4))
        ]
    assert measures._mirrors.dice() == pytest.approx([pairwise_dice(maps, 1), pairwise_dice(maps, 2)])


def test_without_mirroring_copies_cannot_disagree(folder: Path, image: Path) -> None:
    found = measured(folder, image, "balanced", folds=("0",))
    assert found.mirror_dice is None
    assert found.agreement == pytest.approx(found.soft_dice)


def test_what_the_probabilities_say_is_measured_inside_the_label_and_at_its_surface(folder: Path, image: Path) -> None:
    found = measured(folder, image)
    outputs = outputs_of(folder, image, ("0", "1")).float()
    probability, labels = outputs.softmax(0).numpy(), outputs.argmax(0).numpy()
    entropy = -(probability * np.log(probability)).sum(0) / np.log(3)
    surface = np.zeros(labels.shape, bool)
    for axis, step in product(range(3), (1, -1)):
        moved = np.roll(labels, step, axis) != labels
        edge = [slice(None)] * 3
        edge[axis] = slice(0, 1) if step == 1 else slice(-1, None)
        moved[tuple(edge)] = False
        surface |= moved
    looked = (labels != 0) | surface
    assert found.entropy_foreground == pytest.approx(entropy[labels != 0].mean(), rel=1e-3)
    assert found.entropy_border == pytest.approx(entropy[surface].mean(), rel=1e-3)
    for value, name in enumerate(("liver", "spleen"), start=1):
        mask, chance = labels == value, probability[value]
        soft = 2 * chance[mask].sum() / (chance[looked].sum() + mask.sum())
        assert found.structures[name].soft_dice == pytest.approx(soft, rel=1e-3)
        unsure = (chance * entropy)[looked].sum() / chance[looked].sum()
        assert found.structures[name].entropy == pytest.approx(unsure, rel=1e-3)


def test_volumes_are_those_of_the_label(folder: Path, image: Path) -> None:
    prediction = predictor(folder).predict([image], PredictOptions(device="cpu", measure=True))
    assert prediction.uncertainty is not None
    voxel_ml = 1.5 * 1.5 * 2.5 / 1000  # the image has the network's spacing
    for name, voxels in prediction.voxel_counts().items():
        assert prediction.uncertainty.structures[name].volume_ml == pytest.approx(voxels * voxel_ml, rel=1e-6)


def test_a_resampled_image_has_the_volumes_of_the_body_not_of_the_network(tmp_path: Path, folder: Path) -> None:
    image = make_image(tmp_path / "coarse.nii.gz", (31, 19, 17), scaled(2.0, 3.1, 1.7))
    prediction = predictor(folder).predict([image], PredictOptions(device="cpu", measure=True))
    assert prediction.uncertainty is not None
    voxels = sum(prediction.voxel_counts().values())
    found = sum(structure.volume_ml for structure in prediction.uncertainty.structures.values())
    assert found == pytest.approx(voxels * 2.0 * 3.1 * 1.7 / 1000, rel=0.1)


def test_measures_alone_are_those_of_a_prediction(folder: Path, image: Path) -> None:
    options = PredictOptions(device="cpu")
    alone = predictor(folder).measure([image], options)
    assert alone.as_dict() == measured(folder, image).as_dict()


def test_regions_are_measured_each_by_itself(tmp_path: Path, image: Path) -> None:
    extra = {"regions_class_order": [1, 2]}
    folder = make_model_folder(tmp_path / "model", labels=REGIONS, dataset_extra=extra, folds=("0", "1"))
    found = measured(folder, image)
    singles = [outputs_of(folder, image, (fold,)).numpy() for fold in ("0", "1")]
    both = outputs_of(folder, image, ("0", "1")).float()
    for channel, name in enumerate(("whole", "core")):
        maps = [(one[channel] > 0).astype(np.uint8) for one in singles]
        assert found.structures[name].fold_dice == pytest.approx(pairwise_dice(maps, 1))
        mask, chance = (both[channel] > 0).numpy(), both[channel].sigmoid().numpy()
        voxel_ml = 1.5 * 1.5 * 2.5 / 1000
        assert found.structures[name].volume_ml == pytest.approx(mask.sum() * voxel_ml, rel=1e-6)
        assert found.structures[name].soft_dice is not None
        assert found.structures[name].soft_dice <= 2 * chance[mask].sum() / (chance[mask].sum() + mask.sum()) + 1e-3


def test_slices_of_a_2d_model_are_measured(tmp_path: Path, image: Path) -> None:
    found = measured(make_model_folder(tmp_path / "model", patch=(24, 32), mirror_axes=(0, 1)), image)
    assert 0 < found.structures["liver"].mirror_dice < 1
    assert found.embedding


def test_the_embedding_is_that_of_the_first_fold_and_tells_images_apart(
    tmp_path: Path, folder: Path, image: Path
) -> None:
    own = measured(folder, image, "balanced", folds=("0",)).embedding
    assert own == pytest.approx(measured(folder, image).embedding)
    other = measured(
        folder, make_image(tmp_path / "other.nii.gz", SHAPE, scaled(1.5, 1.5, 2.5), seed=9), "balanced"
    ).embedding
    assert len(own) == 2 * 8  # mean and spread of 8 features
    assert not np.allclose(own, other)


def test_a_network_without_an_encoder_has_no_embedding() -> None:
    measures = Measures(HEADS)
    measures.one_pass(torch.randn(1, 3, 4, 5, 6), 1)
    measures.end_of_tile()
    outputs = torch.randn(3, 4, 5, 6)
    measures.end_of_fold(outputs)
    assert measures.result(outputs, CPU, 0.001).embedding == ()


def test_an_image_in_which_nothing_is_found_is_empty_and_not_agreed_upon() -> None:
    outputs = torch.zeros(3, 4, 5, 6)
    outputs[0] = 9.0
    measures = Measures(HEADS)
    measures.end_of_fold(outputs)
    found = measures.result(outputs, CPU, 0.001)
    assert found.empty == ("liver", "spleen")
    assert (found.agreement, found.entropy_foreground, found.soft_dice) == (0.0, None, None)


def test_many_classes_keep_their_names() -> None:
    names = tuple(f"s{number}" for number in range(1, 300))
    outputs = torch.zeros(300, 2, 10, 30)
    for value in range(300):
        outputs[value].flatten()[2 * value : 2 * value + 2] = 5.0
    measures = Measures(Heads(names))
    measures.end_of_fold(outputs)
    found = measures.result(outputs, CPU, 1.0)
    assert {structure.volume_ml for structure in found.structures.values()} == {2.0}


def test_a_check_ends_a_prediction_before_the_next_pass(folder: Path, image: Path) -> None:
    calls = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 4:
            raise PredictionError("somebody is waiting")

    with pytest.raises(PredictionError, match="somebody is waiting"):
        predictor(folder).measure([image], PredictOptions(device="cpu"), check)
    assert len(calls) == 4
    assert predictor(folder).measure([image], PredictOptions(device="cpu")).agreement > 0
