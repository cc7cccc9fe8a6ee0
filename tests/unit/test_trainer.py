"""Training of one fold: from all of the parent's weights, stoppable anywhere, and never on what nobody looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import batchgeneratorsv2.transforms.noise.gaussian_blur as blur_module
import nibabel as nib
import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from scipy.special import expit, log_softmax, softmax

from factories import make_model_folder
from mshub.cases import ReviewedCase
from mshub.errors import ModelFolderError, TrainingError
from mshub.geometry import Array
from mshub.nnunet import trainer as trainer_module
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.model_writing import write_model_folder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, PredictOptions
from mshub.nnunet.trainer import EpochReport, Fit, Setting, Stopped, _nnunet_trainer, _Run, _Trainer, train_fold
from mshub.nnunet.training_set import TrainingSet, prepare
from mshub.recipe import Recipe
from reviewed import array_of, make_case, make_cases

CPU = torch.device("cpu")
BALANCED = PredictOptions(PROFILES["balanced"], device="cpu")
TINY: dict[str, Any] = {"spacing_zyx_mm": (3.1, 1.3, 1.7), "patch": (8, 16, 16)}
"""Of a model whose patches are small and whose voxels are those of the cases."""


def short(epochs: int = 2, iterations: int = 2, **more: Any) -> Recipe:
    """Return a short recipe without guards whose result are the last weights."""
    chosen: dict[str, Any] = {"optimiser": "sgd", "guard": "none", "averaging": 0.0, **more}
    return Recipe(epochs, iterations, **chosen)


SHORT = short()
REGIONS: dict[str, Any] = {
    "labels": {"background": 0, "whole": [1, 2], "core": 2},
    "dataset_extra": {"regions_class_order": [1, 2]},
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training tells nnU-Net by environment variables ends with the test."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_n_proc_DA"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("nnUNet_n_proc_DA")


@pytest.fixture
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a checkpoint after every epoch, however fast they are."""
    monkeypatch.setattr(trainer_module, "CHECKPOINT_EVERY_S", 0.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A model of liver and spleen."""
    return ModelFolder.open(make_model_folder(tmp_path_factory.mktemp("models") / "tiny", **TINY))


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory: pytest.TempPathFactory) -> list[ReviewedCase]:
    """Three cases of liver and spleen, completely reviewed."""
    return make_cases(tmp_path_factory.mktemp("cases"), 3)


@pytest.fixture(scope="module")
def whole(tiny: ModelFolder, reviewed: list[ReviewedCase], tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return prepare(tiny, reviewed, tmp_path_factory.mktemp("whole"), None, lambda _: None)


@pytest.fixture(scope="module")
def partial(tiny: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """Two cases in which only the liver was reviewed; the spleen is where the model says."""
    folder = tmp_path_factory.mktemp("partial")
    cases = make_cases(folder / "cases", 2, reviewed=["liver"])

    def ask(case: ReviewedCase) -> tuple[Array, dict[str, int]]:
        return predicted(tiny, case), {"liver": 1, "spleen": 2}

    return prepare(tiny, cases, folder / "set", ask, lambda _: None)


def go_on() -> bool:
    return False


def train(
    model: ModelFolder,
    training_set: TrainingSet,
    work: Path,
    recipe: Recipe = SHORT,
    fold: str = "0",
    on_epoch: Callable[[EpochReport], None] = lambda _: None,
    is_stopped: Callable[[], bool] = go_on,
) -> Fit:
    return train_fold(model, fold, training_set, recipe, CPU, work, on_epoch, is_stopped)


def written(model: ModelFolder, fit: Fit, path: Path) -> ModelFolder:
    """Return the folder of a trained model."""
    weights = {"0": fit.weights}
    write_model_folder(path, model.dataset, model.plans, model.configuration, model.trainer, model.mirror_axes, weights)
    return ModelFolder.open(path)


def predicted(model: ModelFolder, case: ReviewedCase) -> Array:
    return NNUNetPredictor(model, NetworkCache()).predict(case.images, BALANCED).labels.array_xyz


def parent_weights(model: ModelFolder, fold: str = "0") -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = model.checkpoint(fold)["network_weights"]
    return weights


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Two sets of weights are equal, bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of any two weights."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def spied(monkeypatch: pytest.MonkeyPatch, method: str, note: Callable[[_Run, tuple[Any, ...]], Any]) -> list[Any]:
    """Collect what `note` says at each call of a method of `_Run`, before it runs."""
    notes: list[Any] = []
    original = getattr(_Run, method)

    def spy(run: _Run, *args: Any) -> Any:
        notes.append(note(run, args))
        return original(run, *args)

    monkeypatch.setattr(_Run, method, spy)
    return notes


def source(model: ModelFolder, training_set: TrainingSet, work: Path, recipe: Recipe = SHORT) -> _Trainer:
    """Return nnU-Net's trainer as a training sets it up."""
    work.mkdir(exist_ok=True)
    configuration = model.configuration_manager
    setting = Setting(configuration.batch_size, tuple(configuration.patch_size))
    return _nnunet_trainer(model, training_set, recipe, CPU, work, setting)


# -- where it starts ----------------------------------------------------------------------------------------------


def test_a_training_starts_from_all_weights_of_its_fold_the_head_included(whole: TrainingSet, tmp_path: Path) -> None:
    model = ModelFolder.open(make_model_folder(tmp_path / "model", folds=("0", "1", "2", "3", "4"), **TINY))
    recipe = short(1, 1, learning_rate=1e-9)
    for fold in ("0", "4"):
        fit = train(model, whole, tmp_path / "work", recipe, fold)
        parent = parent_weights(model, fold)
        assert fit.weights.keys() == parent.keys()
        assert any("seg_layers" in name for name in parent)
        assert 0 < far(fit.weights, parent) < 1e-6
    assert far(parent_weights(model, "0"), parent_weights(model, "4")) > 0.01


def test_weights_of_another_architecture_are_refused(tiny: ModelFolder, whole: TrainingSet, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", **TINY)
    path = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["network_weights"]["decoder.seg_layers.0.bias"]
    torch.save(checkpoint, path)
    with pytest.raises(ModelFolderError, match="do not fit"):
        train(ModelFolder.open(folder), whole, tmp_path / "work")


def test_it_learns(tiny: ModelFolder, whole: TrainingSet, reviewed: list[ReviewedCase], tmp_path: Path) -> None:
    reports: list[EpochReport] = []
    recipe = short(5, 14, learning_rate=2e-2, averaging=0.1)
    fit = train(tiny, whole, tmp_path / "work", recipe, on_epoch=reports.append)
    assert fit.losses[-1] < fit.losses[0] - 0.5
    assert [report.epoch for report in reports] == [1, 2, 3, 4, 5]
    assert [report.loss for report in reports] == fit.losses
    assert reports[-1].dice > reports[0].dice + 0.1
    candidate = written(tiny, fit, tmp_path / "candidate")
    for case in reviewed:
        before, after = (np.mean(predicted(model, case) == array_of(case.label)) for model in (tiny, candidate))
        assert after > before + 0.2


@pytest.mark.parametrize(
    ("options", "case_options", "recipe"),
    [
        pytest.param({"patch": (20, 16), "mirror_axes": (0, 1)}, {}, SHORT, id="2d"),
        pytest.param({"channels": ("T1w", "T2w")}, {"channels": 2}, SHORT, id="two channels"),
        pytest.param(REGIONS, {"values": {"whole": 1, "core": 2}}, short(2, 2, guard="both"), id="regions"),
        pytest.param({"folds": ("all",)}, {}, SHORT, id="fold all"),
        pytest.param({"transpose": (2, 0, 1)}, {}, SHORT, id="transposed"),
        pytest.param({}, {}, short(2, 2, optimiser="adam"), id="adam"),
    ],
)
def test_every_kind_of_model_is_trained(
    tmp_path: Path, options: dict[str, Any], case_options: dict[str, Any], recipe: Recipe
) -> None:
    model = ModelFolder.open(make_model_folder(tmp_path / "model", **{**TINY, **options}))
    found = prepare(model, make_cases(tmp_path, 2, **case_options), tmp_path / "set", None, lambda _: None)
    (fold,) = model.folds
    fit = train(model, found, tmp_path / "work", recipe, fold)
    assert fit.patch_size == tuple(model.configuration_manager.patch_size)
    assert len(fit.losses) == 2
    assert 0 < far(fit.weights, parent_weights(model, fold)) < 0.1
    assert {tensor.device for tensor in fit.weights.values()} == {CPU}


def test_the_batch_size_of_the_recipe_is_used(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = spied(monkeypatch, "_step", lambda _, args: tuple(args[0]["data"].shape))
    fit = train(tiny, whole, tmp_path / "three", short(1, 1, batch_size=3))
    assert train(tiny, whole, tmp_path / "plans", short(1, 1)).batch_size == 2
    assert fit.batch_size == 3
    assert shapes == [(3, 1, 8, 16, 16), (2, 1, 8, 16, 16)]


def test_every_case_is_trained_on(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = spied(monkeypatch, "_step", lambda _, args: set(args[0]["keys"]))
    train(tiny, whole, tmp_path / "work", short(1, 12))
    assert set().union(*keys) == whole.cases.keys()


# -- steps --------------------------------------------------------------------------------------------------------


def test_every_step_has_its_learning_rate(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = spied(monkeypatch, "_step", lambda run, _: [group["lr"] for group in run._optimiser.param_groups])
    recipe = short(3, 3, learning_rate=0.03, warm_up=1 / 3)
    train(tiny, whole, tmp_path / "work", recipe)
    assert len(rates) == 9
    expected = [0.01, 0.02, 0.03, *(0.03 * (left / 6) ** 0.9 for left in (6, 5, 4, 3, 2, 1))]
    np.testing.assert_allclose(rates, np.reshape(expected, (9, 1)), rtol=1e-12)


@pytest.mark.parametrize("averaging", [0.0, 0.5, 1.0])
def test_the_result_is_an_exponential_average_of_the_weights(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, averaging: float
) -> None:
    def note(run: _Run, _: Any) -> dict[str, torch.Tensor]:
        return {name: value.double().clone() for name, value in run._network.state_dict().items()}

    steps = spied(monkeypatch, "_update_average", note)
    recipe = short(4, 2, learning_rate=0.05, averaging=averaging)
    fit = train(tiny, whole, tmp_path / "work", recipe)
    window = max(1.0, averaging * 8)
    expected = {name: value.double() for name, value in parent_weights(tiny).items()}
    for step, weights in enumerate(steps):
        keep = min(1 - 1 / window, (step + 1) / (step + 10))
        expected = {name: keep * expected[name] + (1 - keep) * weights[name] for name in weights}
    assert len(steps) == 8
    assert far(fit.weights, expected) < 1e-6
    assert (far(fit.weights, steps[-1]) == 0) == (averaging == 0)


def test_interpolation_is_exact(tiny: ModelFolder, whole: TrainingSet, tmp_path: Path) -> None:
    def fitted(guard: Any, interpolation: float) -> dict[str, torch.Tensor]:
        recipe = short(2, 2, learning_rate=0.05, guard=guard, interpolation=interpolation)
        return train(tiny, whole, tmp_path / f"{guard}-{interpolation}", recipe).weights

    parent, new = parent_weights(tiny), fitted("none", 0.5)
    assert far(new, parent) > 1e-3
    assert_same(fitted("interpolate", 0.0), parent)
    assert_same(fitted("interpolate", 1.0), new)
    mixed = {name: 0.75 * parent[name] + 0.25 * new[name] for name in new}
    assert far(fitted("interpolate", 0.25), mixed) < 1e-7


def test_a_diverged_training_is_an_error_that_names_epoch_and_learning_rate(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path
) -> None:
    def poison(report: EpochReport) -> None:
        raise_after.append(report.epoch)

    raise_after: list[int] = []
    recipe = short(4, 4, learning_rate=1e30, warm_up=0.0, optimiser="adam")
    with pytest.raises(TrainingError, match=r"diverged in epoch (\d): its loss is (nan|inf).*\(it is 1e\+30\)") as told:
        train(tiny, whole, tmp_path / "work", recipe, on_epoch=poison)
    assert f"epoch {len(raise_after) + 1}:" in str(told.value)


# -- augmentation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [None, (), (1,), (0, 2)])
def test_only_the_parents_mirror_axes_are_flipped(
    whole: TrainingSet, tmp_path: Path, axes: tuple[int, ...] | None
) -> None:
    model = ModelFolder.open(make_model_folder(tmp_path / "model", mirror_axes=axes, **TINY))
    with source(model, whole, tmp_path / "work").batches((0, "0"), 0) as batches:
        transforms = batches._loader.data_loader.transforms.transforms
    mirrored = [tuple(one.allowed_axes) for one in transforms if isinstance(one, MirrorTransform)]
    assert mirrored == ([axes] if axes else [])


def test_patches_are_centred_on_structures_as_often_as_the_recipe_says(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path
) -> None:
    trainer = source(tiny, whole, tmp_path / "work", short(foreground=0.8))
    with trainer.batches((0, "0"), 0) as batches:
        chosen = [batches._loader.data_loader.get_do_oversample(0) for _ in range(2000)]
    assert np.mean(chosen) == pytest.approx(0.8, abs=0.05)


# -- stopped and started again ------------------------------------------------------------------------------------

RESUMED = [
    pytest.param(short(4, 3, learning_rate=1e-2), id="plain"),
    pytest.param(short(4, 3, learning_rate=1e-2, averaging=0.5, guard="both"), id="averaged, both guards"),
    pytest.param(short(4, 3, optimiser="adam", averaging=0.2, guard="distil"), id="adam"),
]


class _Clock:
    """A clock by which nnU-Net's benchmark of its blur finds Fourier transforms the faster way, or the slower."""

    def __init__(self, fourier_is_slow: bool) -> None:
        self._slow, self._now, self._reads = fourier_is_slow, 0.0, 0

    def __call__(self) -> float:
        half = self._reads % 36 // 18  # nine timings of the direct way, then nine of the other, two readings each
        self._reads += 1
        self._now += 1.0 if half == self._slow else 0.1
        return self._now


@pytest.mark.usefixtures("every_epoch")
@pytest.mark.parametrize("recipe", RESUMED)
def test_a_stopped_training_goes_on_to_the_very_weights_it_would_have_had(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    monkeypatch.setattr(blur_module, "time", _Clock(True))
    expected = train(tiny, whole, tmp_path / "at-once", recipe)
    epochs: list[int] = []
    for stop_after in (1, 3):
        monkeypatch.setattr(blur_module, "time", _Clock(stop_after == 1))
        with pytest.raises(Stopped):
            train(
                tiny,
                whole,
                tmp_path / "pieces",
                recipe,
                on_epoch=lambda report: epochs.append(report.epoch),
                is_stopped=lambda: len(epochs) >= stop_after,  # noqa: B023 - called within the loop
            )
    found = train(tiny, whole, tmp_path / "pieces", recipe, on_epoch=lambda report: epochs.append(report.epoch))
    assert epochs == [1, 2, 3, 4], "no epoch was trained twice"
    assert found.losses == expected.losses
    assert_same(found.weights, expected.weights)


@pytest.mark.usefixtures("every_epoch")
def test_a_killed_training_goes_on_from_its_last_checkpoint_to_the_same_weights(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = short(3, 3, learning_rate=1e-2, averaging=0.3)
    expected = train(tiny, whole, tmp_path / "at-once", recipe)
    original, done = _Run._step, []

    def killed(run: _Run, batch: Any) -> Any:
        done.append(1)
        if len(done) == 5:
            raise KeyboardInterrupt
        return original(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, whole, tmp_path / "killed", recipe)
    epochs: list[int] = []
    found = train(tiny, whole, tmp_path / "killed", recipe, on_epoch=lambda report: epochs.append(report.epoch))
    assert epochs == [2, 3]
    assert found.losses == expected.losses
    assert_same(found.weights, expected.weights)


@pytest.mark.usefixtures("every_epoch")
def test_stopping_within_an_epoch_keeps_the_checkpoint_of_the_one_before(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = spied(monkeypatch, "_step", lambda *_: 1)
    kept: list[bytes] = []
    checkpoint = tmp_path / "work" / "fold_0.pt"
    with pytest.raises(Stopped):
        train(
            tiny,
            whole,
            tmp_path / "work",
            short(3, 4),
            on_epoch=lambda _: kept.append(checkpoint.read_bytes()),
            is_stopped=lambda: len(steps) >= 6,
        )
    assert len(steps) == 6, "the step after the question is not taken"
    assert len(kept) == 1
    assert checkpoint.read_bytes() == kept[0]
    assert [path.name for path in (tmp_path / "work").glob("*.p*t")] == ["fold_0.pt"]


def test_a_stop_between_two_epochs_saves_however_young_the_last_checkpoint_is(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path
) -> None:
    epochs: list[int] = []

    def note(report: EpochReport) -> None:
        epochs.append(report.epoch)

    with pytest.raises(Stopped):
        train(tiny, whole, tmp_path / "work", short(3, 2), on_epoch=note, is_stopped=lambda: bool(epochs))
    train(tiny, whole, tmp_path / "work", short(3, 2), on_epoch=note)
    assert epochs == [1, 2, 3]


def test_a_finished_fold_is_not_trained_again(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(tiny, whole, tmp_path / "work", short(2, 2))
    steps = spied(monkeypatch, "_step", lambda *_: 1)
    found = train(tiny, whole, tmp_path / "work", short(2, 2))
    assert steps == []
    assert found.losses == expected.losses
    assert_same(found.weights, expected.weights)


def test_folds_of_one_training_do_not_share_a_checkpoint(whole: TrainingSet, tmp_path: Path) -> None:
    model = ModelFolder.open(make_model_folder(tmp_path / "model", folds=("0", "1"), **TINY))
    fits = [train(model, whole, tmp_path / "work", SHORT, fold) for fold in model.folds]
    assert fits[0].losses != fits[1].losses
    assert far(fits[1].weights, parent_weights(model, "1")) < 0.1 < far(fits[1].weights, fits[0].weights)


# -- what nobody looked at ----------------------------------------------------------------------------------------


def test_ignored_voxels_have_no_gradient(tiny: ModelFolder, partial: TrainingSet, tmp_path: Path) -> None:
    trainer = source(tiny, partial, tmp_path / "work")
    generator = torch.Generator().manual_seed(3)
    shapes = [(8, 16, 16), (4, 8, 8)]
    targets = [torch.randint(0, 4, (2, 1, *shape), generator=generator).short() for shape in shapes]
    outputs = [torch.randn((2, 3, *shape), generator=generator).requires_grad_() for shape in shapes]
    trainer.loss(outputs, targets).backward()
    gradient, ignored = outputs[0].grad, targets[0][:, 0] == 3
    assert gradient is not None
    assert trainer.ignore_value == 3
    assert 0.2 < ignored.float().mean() < 0.3
    assert gradient.abs().sum(1)[ignored].max() == 0
    assert gradient.abs().sum(1)[~ignored].min() > 0


def test_the_loss_of_a_step_is_cross_entropy_minus_dice_over_the_voxels_that_were_reviewed(
    tiny: ModelFolder, partial: TrainingSet, tmp_path: Path
) -> None:
    run = _Run(tiny, "0", partial, short(), CPU, tmp_path, Setting(2, (8, 16, 16)))
    with run._trainer.batches((0, "0"), 0) as batches:
        batch = next(batches)
    with torch.no_grad():
        output = run._network(batch["data"])[0].double().numpy()
    loss, _, _ = run._step(batch)
    target = batch["target"][0][:, 0].long().numpy()
    known, chance, log = target != 3, softmax(output, axis=1), log_softmax(output, axis=1)
    assert 0.1 < known.mean() < 0.9
    entropy = -np.mean(np.take_along_axis(log, np.where(known, target, 0)[:, None], 1)[:, 0][known])
    dice = []
    for sample, structure in np.ndindex(2, 2):
        found = chance[sample, structure + 1] * known[sample]
        there = (target[sample] == structure + 1) & known[sample]
        dice.append((2 * np.sum(found * there) + 1e-5) / (np.sum(found) + np.sum(there) + 1e-5))
    assert loss == pytest.approx(entropy - np.mean(dice), rel=1e-5)


def test_labels_that_differ_only_where_nobody_reviewed_make_the_same_weights(tiny: ModelFolder, tmp_path: Path) -> None:
    case = make_case(tmp_path, "one", reviewed=["liver"])
    label = nib.load(case.label)
    drawn = np.asarray(label.dataobj).copy()
    drawn[drawn == 2] = np.arange(np.sum(drawn == 2)) % 2 * 2  # half of the spleen, which nobody looked at, is gone
    nib.save(nib.Nifti1Image(drawn, label.affine, label.header), tmp_path / "other.nii")
    other = make_case(tmp_path / "other", "one", reviewed=["liver"])
    other = ReviewedCase(**{**vars(other), "label": tmp_path / "other.nii"})
    assert other.digest != case.digest
    fits = []
    for name, one in (("a", case), ("b", other)):
        found = prepare(tiny, [one], tmp_path / name, None, lambda _: None)
        fits.append(train(tiny, found, tmp_path / f"{name}-work"))
    assert_same(fits[0].weights, fits[1].weights)


def test_distillation_keeps_what_nobody_reviewed(tiny: ModelFolder, partial: TrainingSet, tmp_path: Path) -> None:
    """The spleen, which nobody looked at, stays where the parent has it; without a guard it drifts."""
    kept = {}
    for guard, weight in (("none", 0.0), ("distil", 10.0)):
        recipe = short(2, 12, optimiser="adam", learning_rate=3e-3, guard=guard, distillation=weight)
        candidate = written(tiny, train(tiny, partial, tmp_path / guard, recipe), tmp_path / f"{guard}-model")
        agreement = []
        for case in partial.cases.values():
            before, after = predicted(tiny, case), predicted(candidate, case)
            spleen = (before == 2) & (array_of(case.label) != 1)
            agreement.append(np.mean(after[spleen] == 2))
        kept[guard] = np.mean(agreement)
    assert kept["distil"] > kept["none"] + 0.15


# -- the distance to the parent -----------------------------------------------------------------------------------


def logits(seed: int, classes: int, *space: int) -> torch.Tensor:
    return 2 * torch.randn((2, classes, *space), generator=torch.Generator().manual_seed(seed))


def test_the_distance_of_a_softmax_model_is_taken_where_the_label_is_the_parents_answer_or_unknown(
    tiny: ModelFolder, partial: TrainingSet, tmp_path: Path
) -> None:
    output, taught = logits(1, 3, 3, 4, 5), logits(2, 3, 3, 4, 5)
    target = torch.randint(0, 4, (2, 1, 3, 4, 5), generator=torch.Generator().manual_seed(4)).short()
    total, held = 0.0, 0
    for batch, x, y, z in np.ndindex(2, 3, 4, 5):
        one, other = output[batch, :, x, y, z].double().numpy(), taught[batch, :, x, y, z].double().numpy()
        label = int(target[batch, 0, x, y, z])
        if label in (3, int(np.argmax(other))):
            total -= float(np.sum(softmax(other) * log_softmax(one)))
            held += 1
    assert 30 < held < 90, "some are held, some are not"
    found = source(tiny, partial, tmp_path / "work").distance(output, taught, target)
    assert float(found) == pytest.approx(total / held, rel=1e-5)


def test_the_distance_of_a_region_model_is_taken_region_by_region(tmp_path: Path) -> None:
    model = ModelFolder.open(make_model_folder(tmp_path / "model", **TINY, **REGIONS))
    values = {"whole": 1, "core": 2}
    found = prepare(model, [make_case(tmp_path, "case", values=values)], tmp_path / "set", None, lambda _: None)
    output, taught = logits(1, 2, 3, 4, 5), logits(2, 2, 3, 4, 5)
    target = torch.randint(0, 2, (2, 2, 3, 4, 5), generator=torch.Generator().manual_seed(4)).bool()
    one, other = output.double().numpy(), taught.double().numpy()
    each = -(expit(other) * np.log(expit(one)) + (1 - expit(other)) * np.log(1 - expit(one)))
    held = (other > 0) == target.numpy()
    assert 0.3 < held.mean() < 0.7
    trainer = source(model, found, tmp_path / "work")
    assert float(trainer.distance(output, taught, target)) == pytest.approx(float(each[held].mean()), rel=1e-5)


def test_corrected_voxels_are_not_held(tiny: ModelFolder, whole: TrainingSet, tmp_path: Path) -> None:
    trainer = source(tiny, whole, tmp_path / "work")
    taught = logits(2, 3, 3, 4, 5)
    answer = taught.argmax(1, keepdim=True)
    output = logits(1, 3, 3, 4, 5).requires_grad_()
    assert trainer.ignore_value == -1
    assert float(trainer.distance(output, taught, (answer + 1) % 3).detach()) == 0
    corrected = answer.clone()
    corrected[0, 0, 0] = (corrected[0, 0, 0] + 1) % 3
    trainer.distance(output, taught, corrected).backward()
    moved = output.grad.abs().sum(1) > 0  # type: ignore[union-attr]
    np.testing.assert_array_equal(moved, (corrected == answer)[:, 0])


def test_the_parent_itself_has_the_least_distance(tiny: ModelFolder, whole: TrainingSet, tmp_path: Path) -> None:
    trainer, taught = source(tiny, whole, tmp_path / "work"), logits(2, 3, 3, 4, 5)
    same = taught.clone().requires_grad_()
    trainer.distance(same, taught, taught.argmax(1, keepdim=True)).backward()
    assert float(same.grad.abs().max()) < 1e-6  # type: ignore[union-attr]


def test_the_dice_of_a_patch_leaves_unknown_voxels_out(tiny: ModelFolder, partial: TrainingSet, tmp_path: Path) -> None:
    target = torch.tensor([0, 1, 1, 2, 2, 3, 3]).reshape(1, 1, 1, 1, 7)
    answer = torch.tensor([1, 1, 0, 2, 1, 2, 0]).reshape(1, 1, 1, 7)
    output = torch.nn.functional.one_hot(answer, 3).movedim(-1, 1).float()
    counts = source(tiny, partial, tmp_path / "work").overlap(output, target)
    assert counts.tolist() == [2, 4, 4]


def test_the_dice_of_regions_counts_each_region(tmp_path: Path) -> None:
    model = ModelFolder.open(make_model_folder(tmp_path / "model", **TINY, **REGIONS))
    case = make_case(tmp_path, "case", values={"whole": 1, "core": 2})
    found = prepare(model, [case], tmp_path / "set", None, lambda _: None)
    target = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).reshape(1, 2, 1, 1, 4)
    output = torch.tensor([[2.0, -1, 3, -1], [1, 1, -1, -1]]).reshape(1, 2, 1, 1, 4)
    assert source(model, found, tmp_path / "work").overlap(output, target).tolist() == [2, 4, 3]


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "strides", "after"),
    [
        ((8, (128, 128, 96)), (32, 32, 32), (4, (128, 128, 96))),
        ((3, (128, 128, 96)), (32, 32, 32), (1, (128, 128, 96))),
        ((1, (128, 128, 96)), (32, 32, 32), (1, (96, 128, 96))),
        ((1, (96, 128, 96)), (32, 32, 32), (1, (96, 96, 96))),
        ((1, (20, 320, 256)), (4, 64, 64), (1, (12, 320, 256))),
        ((1, (12, 320, 256)), (4, 64, 64), (1, (12, 192, 256))),
        ((1, (96, 64, 64)), (32, 32, 32), (1, (64, 64, 64))),
        ((1, (512, 384)), (64, 64), (1, (384, 384))),
    ],
)
def test_the_next_smaller_setting(before: Any, strides: tuple[int, ...], after: Any) -> None:
    smaller = Setting(*before).smaller(strides)
    assert smaller == Setting(*after)
    assert all(size % stride == 0 for size, stride in zip(smaller.patch_size, strides, strict=True))


@pytest.mark.parametrize(("patch", "strides"), [((64, 64, 64), (32, 32, 32)), ((16, 64), (16, 32))])
def test_the_smallest_setting_cannot_be_made_smaller(patch: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(TrainingError, match=r"ran out of memory.*Train on a device with more memory"):
        Setting(1, patch).smaller(strides)


CUDA_OOM = torch.OutOfMemoryError("CUDA out of memory.")
CPU_OOM = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to")


def scarce(
    monkeypatch: pytest.MonkeyPatch, enough: Callable[[Sequence[int]], bool], error: RuntimeError = CUDA_OOM
) -> list[tuple[int, ...]]:
    """Let steps run out of memory whose batch is not small enough; returns the shapes of all that are tried."""
    original, tried = _Run._step, []

    def step(run: _Run, batch: Any) -> Any:
        tried.append(tuple(batch["data"].shape))
        if not enough(tried[-1]):
            raise error
        return original(run, batch)

    monkeypatch.setattr(_Run, "_step", step)
    return tried


@pytest.mark.parametrize("error", [CUDA_OOM, CPU_OOM, RuntimeError("CUDA error: out of memory")])
def test_out_of_memory_is_tried_again_with_a_smaller_batch(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    tried = scarce(monkeypatch, lambda shape: shape[0] == 1, error)
    fit = train(tiny, whole, tmp_path / "work", short(1, 1, batch_size=4))
    assert [shape[0] for shape in tried] == [4, 2, 1]
    assert (fit.batch_size, fit.patch_size) == (1, (8, 16, 16))


def test_then_patches_get_smaller_and_stay_divisible_by_the_strides(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = scarce(monkeypatch, lambda shape: np.prod(shape) <= 8 * 12 * 12)
    fit = train(tiny, whole, tmp_path / "work", short(2, 1))
    assert [shape[2:] for shape in tried if shape[0] == 1] == [(8, 16, 16), (8, 12, 16), *[(8, 12, 12)] * 2]
    assert (fit.batch_size, fit.patch_size) == (1, (8, 12, 12))


def test_a_device_too_small_for_anything_is_an_error(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = scarce(monkeypatch, lambda _: False)
    with pytest.raises(TrainingError, match=r"out of memory with batches of one patch of \(8, 8, 8\)"):
        train(tiny, whole, tmp_path / "work")
    assert len(tried) == len(set(tried)) == 6


def test_other_errors_of_torch_are_not_taken_for_a_lack_of_memory(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = scarce(monkeypatch, lambda _: False, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train(tiny, whole, tmp_path / "work")
    assert len(tried) == 1


@pytest.mark.usefixtures("every_epoch")
def test_epochs_done_before_memory_ran_out_are_kept_and_a_resumed_training_stays_small(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, ...]] = []
    epochs: list[int] = []
    tried = scarce(monkeypatch, lambda shape: len(tried) <= 2 or shape[0] == 1)
    with pytest.raises(Stopped):
        train(
            tiny,
            whole,
            tmp_path / "work",
            short(4, 2),
            on_epoch=lambda report: epochs.append(report.epoch),
            is_stopped=lambda: len(epochs) >= 2,
        )
    assert [shape[0] for shape in tried] == [2, 2, 2, 1, 1]
    tried.clear()
    monkeypatch.undo()
    monkeypatch.setattr(trainer_module, "CHECKPOINT_EVERY_S", 0.0)
    tried = scarce(monkeypatch, lambda shape: shape[0] == 1)
    fit = train(tiny, whole, tmp_path / "work", short(4, 2), on_epoch=lambda report: epochs.append(report.epoch))
    assert [shape[0] for shape in tried] == [1, 1, 1, 1]
    assert epochs == [1, 2, 3, 4]
    assert fit.batch_size == 1


# -- what is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "case_options"),
    [({"mirror_axes": (0, 2)}, {}), ({"mirror_axes": None, **REGIONS}, {"values": {"whole": 1, "core": 2}})],
)
def test_stock_nnunet_predicts_with_what_is_written(
    tmp_path: Path, options: dict[str, Any], case_options: dict[str, Any]
) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    parent = ModelFolder.open(make_model_folder(tmp_path / "parent", **{**TINY, **options}))
    cases = make_cases(tmp_path, 2, **case_options)
    found = prepare(parent, cases, tmp_path / "set", None, lambda _: None)
    candidate = written(parent, train(parent, found, tmp_path / "work", short(1, 2)), tmp_path / "candidate")
    assert candidate.mirror_axes == parent.mirror_axes
    stock = nnUNetPredictor(use_mirroring=True, perform_everything_on_device=False, device=CPU, allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(candidate.path), ("0",), candidate.checkpoint_name)
    (tmp_path / "stock").mkdir()
    stock.predict_from_files_sequential([[str(cases[0].images[0])]], [str(tmp_path / "stock" / "case")])
    ours = NNUNetPredictor(candidate, NetworkCache()).predict(cases[0].images, PredictOptions(device="cpu"))
    expected = array_of(tmp_path / "stock" / "case.nii.gz")
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(ours.labels.array_xyz, expected)


def test_nnunets_log_and_folders_stay_in_the_work_folder(
    tiny: ModelFolder, whole: TrainingSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny, whole, tmp_path / "work", short(1, 1))
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"fold_0.pt", "nnunet"}
    assert capsys.readouterr().out == ""
