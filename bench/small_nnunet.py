"""Train a small, real nnU-Net v2 on a CPU in minutes.

    python bench/small_nnunet.py RAW_DATASET_DIR OUT_DIR --iterations 800

Everything that decides what a model is comes from nnunetv2 itself: fingerprint, planner, preprocessor, data loader,
augmentation, network, loss. Changed are the width of the network, the patch, the optimiser (Adam learns in hundreds of
iterations what nnU-Net's SGD learns in thousands) and the length of the training.

The result is an ordinary trained-model folder (``dataset.json``, ``plans.json``, ``dataset_fingerprint.json``,
``fold_0/checkpoint_final.pth``) that stock ``nnUNetv2_predict_from_modelfolder`` takes. The checkpoint holds weights
and plain Python values only, so ``torch.load(..., weights_only=True)`` opens it.

nnunetv2 starts its preprocessing workers with *spawn*: call `train` from below an ``if __name__ == "__main__"`` guard.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

CONFIGURATION = "3d_fullres"
PLANS_NAME = "nnUNetPlans"
MIN_FEATURE_MAP_EDGE = 4  # nnU-Net's own lower limit of the bottleneck
ITERATIONS_PER_EPOCH = 40
VALIDATION_EVERY_NTH_CASE = 10

Json = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What to train.

    Attributes
    ----------
    iterations
        Optimiser steps, rounded up to whole epochs of `ITERATIONS_PER_EPOCH`.
    learning_rate
        Of Adam, at the start; decays with nnU-Net's polynomial schedule.
    patch_zyx
        Patch size in voxels, in the plans' (transposed) axis order; made divisible by the network's strides.
    target_spacing_zyx_mm
        Voxel size to train at, in the reader's axis order; None keeps what nnU-Net plans.
    min_features, max_features
        Channels of the first stage, doubled per stage up to the last number.
    max_pools
        Most halvings of any axis.
    mirror_axes
        Patch axes that are flipped in training and may be flipped in prediction; empty where left and right have
        labels of their own.
    """

    iterations: int = 800
    learning_rate: float = 2e-3
    batch_size: int = 2
    patch_zyx: tuple[int, int, int] = (40, 56, 40)
    target_spacing_zyx_mm: tuple[float, float, float] | None = None
    min_features: int = 8
    max_features: int = 64
    max_pools: int = 5
    mirror_axes: tuple[int, ...] = ()
    seed: int = 12345


class SmallTrainer(nnUNetTrainer):  # type: ignore[misc]
    """`nnUNetTrainer` with Adam, few iterations, a cheap validation and no checkpoints on the way."""

    recipe = Recipe()

    def follow(self, recipe: Recipe) -> None:
        """Take over the numbers of `recipe`; call before ``initialize``."""
        self.recipe = recipe
        self.initial_lr = recipe.learning_rate
        self.num_epochs = math.ceil(recipe.iterations / ITERATIONS_PER_EPOCH)
        self.num_iterations_per_epoch = ITERATIONS_PER_EPOCH
        self.num_val_iterations_per_epoch = 2
        self.disable_checkpointing = True

    def initialize(self) -> None:
        """Build the network and lay its weights out channels last: CPU convolutions then take half the time."""
        super().initialize()
        self.network.to(memory_format=torch.channels_last_3d)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Return Adam and nnU-Net's polynomial schedule."""
        optimizer = torch.optim.Adam(self.network.parameters(), self.initial_lr)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(  # noqa: N802 - nnU-Net's name
        self,
    ) -> tuple[Any, bool, Any, tuple[int, ...] | None]:
        """Return nnU-Net's augmentation settings with the recipe's mirror axes."""
        rotation, dummy_2d, initial_patch, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = self.recipe.mirror_axes or None
        return rotation, dummy_2d, initial_patch, self.recipe.mirror_axes or None

    def get_dataloaders(self) -> tuple[Iterable[Json], Iterable[Json]]:
        """Return loaders that run in this process, so that one seed decides the whole training."""
        os.environ.update(nnUNet_n_proc_DA="0")  # planning crashes on 0, so it is 1 until here
        return super().get_dataloaders()  # type: ignore[no-any-return]

    def plot_network_architecture(self) -> None:
        """Skip the PDF of the network."""

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """Write to the log file; of nnU-Net's console lines only the score per epoch is shown."""
        show = bool(args) and args[0] in ("Pseudo dice", "train_loss")
        super().print_to_log_file(*args, also_print_to_console=show, add_timestamp=add_timestamp)


def prepare_workspace(raw: Path, work: Path) -> str:
    """Lay out nnU-Net's three folders below `work`, link the dataset in, and return its nnU-Net name."""
    name = raw.name if raw.name.startswith("Dataset") else f"Dataset001_{raw.name}"
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (work / variable).mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(work / variable)
    os.environ.update(nnUNet_n_proc_DA="1")
    (work / "nnUNet_raw" / name).symlink_to(raw.resolve(), target_is_directory=True)
    return name


def plan(name: str, recipe: Recipe, processes: int) -> Json:
    """Let nnU-Net plan the dataset, keep the 3-D full resolution configuration and make it small."""
    DatasetFingerprintExtractor(name, processes).run()
    spacing = recipe.target_spacing_zyx_mm
    planner = ExperimentPlanner(name, plans_name=PLANS_NAME, overwrite_target_spacing=spacing)
    planner.UNet_base_num_features, planner.UNet_max_features_3d = recipe.min_features, recipe.max_features
    plans: Json = planner.plan_experiment()
    shrink(plans["configurations"][CONFIGURATION], recipe)
    plans["configurations"] = {CONFIGURATION: plans["configurations"][CONFIGURATION]}
    write_json(Path(nnUNet_preprocessed) / name / f"{PLANS_NAME}.json", plans)
    return plans


def shrink(configuration: Json, recipe: Recipe) -> None:
    """Give a configuration the recipe's patch and batch, and the network nnU-Net's rules derive from them."""
    _, strides, kernels, patch, _ = get_pool_and_conv_props(
        configuration["spacing"], recipe.patch_zyx, MIN_FEATURE_MAP_EDGE, recipe.max_pools
    )
    stages = len(strides)
    configuration["patch_size"] = [int(edge) for edge in patch]
    configuration["batch_size"] = recipe.batch_size
    configuration["batch_dice"] = True
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=[min(recipe.max_features, recipe.min_features * 2**stage) for stage in range(stages)],
        kernel_sizes=[[int(k) for k in kernel] for kernel in kernels],
        strides=[[int(s) for s in stride] for stride in strides],
        n_conv_per_stage=[2] * stages,
        n_conv_per_stage_decoder=[2] * (stages - 1),
    )


def write_split(raw: Path, name: str) -> None:
    """Write the one split used: every tenth case only validates, unless there are too few to spare any."""
    ending = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
    cases = sorted(path.name.removesuffix(ending) for path in (raw / "labelsTr").glob(f"*{ending}"))
    spared = cases[VALIDATION_EVERY_NTH_CASE - 1 :: VALIDATION_EVERY_NTH_CASE]
    split = {"train": [case for case in cases if case not in spared], "val": spared or cases}
    write_json(Path(nnUNet_preprocessed) / name / "splits_final.json", [split])


def fit(name: str, plans: Json, dataset_json: Json, recipe: Recipe) -> SmallTrainer:
    """Run the training on the preprocessed dataset `name` and return the trainer."""
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)  # batchgenerators draws from the global generator
    torch.manual_seed(recipe.seed)
    trainer = SmallTrainer(
        plans={**plans, "continue_training": False},
        configuration=CONFIGURATION,
        fold=0,
        dataset_json=dataset_json,
        device=torch.device("cpu"),
    )
    trainer.follow(recipe)
    trainer.run_training()
    return trainer


def plain(value: Any) -> Any:
    """Turn NumPy scalars and arrays inside `value` into Python numbers and lists, recursively."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value


def write_model_folder(trainer: SmallTrainer, plans: Json, dataset_json: Json, fingerprint: Path, out: Path) -> None:
    """Write the trained-model folder, with the stock trainer's name and without optimiser state.

    `fingerprint` is the ``dataset_fingerprint.json`` to copy.
    """
    trainer.network.to(memory_format=torch.contiguous_format)
    checkpoint = {
        "network_weights": trainer.network.state_dict(),
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": plain(trainer.logger.get_checkpoint()),
        "_best_ema": plain(trainer._best_ema),
        "current_epoch": trainer.num_epochs,
        "init_args": {
            "plans": plans,
            "configuration": CONFIGURATION,
            "fold": 0,
            "dataset_json": dataset_json,
            "device": "cpu",
        },
        "trainer_name": nnUNetTrainer.__name__,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
    }
    (out / "fold_0").mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, out / "fold_0" / "checkpoint_final.pth")
    write_json(out / "plans.json", plans)
    write_json(out / "dataset.json", dataset_json)
    shutil.copyfile(fingerprint, out / "dataset_fingerprint.json")


def train(raw: Path, out: Path, recipe: Recipe, *, processes: int = 2) -> Json:
    """Plan, preprocess and train; write the model folder.

    Parameters
    ----------
    raw
        nnU-Net raw dataset: ``imagesTr``, ``labelsTr``, ``dataset.json``.
    out
        Model folder to write; files of the same names are replaced.
    processes
        Preprocessing workers and torch threads.

    Returns
    -------
    dict
        ``parameters`` (count), ``checkpoint_mb``, ``prepare_s``, ``train_s`` (wall) and ``train_cpu_s``.
    """
    torch.set_num_threads(processes)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        name = prepare_workspace(raw, Path(scratch))
        plans = plan(name, recipe, processes)
        preprocessed = Path(nnUNet_preprocessed) / name
        DefaultPreprocessor(verbose=False).run(name, CONFIGURATION, PLANS_NAME, num_processes=processes)
        write_split(raw, name)
        dataset_json: Json = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
        ready, ready_cpu = time.perf_counter(), time.process_time()
        trainer = fit(name, plans, dataset_json, recipe)
        end, end_cpu = time.perf_counter(), time.process_time()
        write_model_folder(trainer, plans, dataset_json, preprocessed / "dataset_fingerprint.json", out)
    return {
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "checkpoint_mb": round((out / "fold_0" / "checkpoint_final.pth").stat().st_size / 1e6, 2),
        "prepare_s": round(ready - begin, 1),
        "train_s": round(end - ready, 1),
        "train_cpu_s": round(end_cpu - ready_cpu, 1),
    }


def predict(model: Path, images: Iterable[Path], out: Path) -> list[float]:
    """Predict single-channel images with stock `nnUNetPredictor` on the CPU, without mirroring.

    Writes ``<case><ending>`` into `out` for each image named ``<case><ending>`` or ``<case>_0000<ending>``.

    Returns
    -------
    list of float
        Seconds per image, model loading not counted.
    """
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    out.mkdir(parents=True, exist_ok=True)
    ending = predictor.dataset_json["file_ending"]
    seconds = []
    for image in images:
        target = out / image.name.removesuffix(ending).removesuffix("_0000")  # nnU-Net adds the ending
        begin = time.perf_counter()
        predictor.predict_from_files_sequential([[str(image)]], [str(target)], False, True, None)
        seconds.append(round(time.perf_counter() - begin, 2))
    return seconds


def dice_per_label(predicted: Path, reference: Path, labels: dict[str, int]) -> dict[str, float]:
    """Return the Dice coefficient of each foreground label of two label files on the same grid.

    Raises
    ------
    ValueError
        When the two files differ in shape or affine.
    """
    found, expected = nib.load(predicted), nib.load(reference)
    if found.shape != expected.shape or not np.allclose(found.affine, expected.affine, atol=1e-3):
        raise ValueError(f"{predicted} and {reference} do not share a grid: {found.shape} and {expected.shape}")
    one, two = np.asarray(found.dataobj), np.asarray(expected.dataobj)
    return {label: _dice(one == value, two == value) for label, value in labels.items() if value > 0}


def _dice(one: np.ndarray, two: np.ndarray) -> float:
    """Return 2 |A and B| / (|A| + |B|), NaN when both are empty."""
    total = int(one.sum()) + int(two.sum())
    return round(2 * int((one & two).sum()) / total, 4) if total else math.nan


def score(predictions: Path, references: Iterable[Path], labels: dict[str, int]) -> Json:
    """Compare predictions with references of the same file names.

    Returns
    -------
    dict
        ``per_case`` (case, then label), ``per_label`` (mean over cases) and ``mean`` (over labels).
    """
    per_case = {
        path.name.split(".")[0]: dice_per_label(predictions / path.name, path, labels) for path in sorted(references)
    }
    names = [label for label, value in labels.items() if value > 0]
    per_label = {label: round(float(np.nanmean([dice[label] for dice in per_case.values()])), 4) for label in names}
    return {"mean": round(float(np.mean(list(per_label.values()))), 4), "per_label": per_label, "per_case": per_case}


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    default = Recipe()
    parser = argparse.ArgumentParser(description="Train a small nnU-Net v2 on the CPU.")
    parser.add_argument("raw", type=Path, help="nnU-Net raw dataset folder")
    parser.add_argument("out", type=Path, help="model folder to write")
    parser.add_argument("--iterations", type=int, default=default.iterations)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--patch", type=int, nargs=3, default=default.patch_zyx, metavar=("Z", "Y", "X"))
    parser.add_argument("--features", type=int, nargs=2, default=(8, 64), metavar=("MIN", "MAX"))
    parser.add_argument("--mirror-axes", type=int, nargs="*", default=(), metavar="AXIS")
    parser.add_argument("--seed", type=int, default=default.seed)
    arguments = parser.parse_args()
    recipe = Recipe(
        iterations=arguments.iterations,
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch_size,
        patch_zyx=tuple(arguments.patch),
        min_features=arguments.features[0],
        max_features=arguments.features[1],
        mirror_axes=tuple(arguments.mirror_axes),
        seed=arguments.seed,
    )
    print(json.dumps(train(arguments.raw, arguments.out, recipe), indent=2))


if __name__ == "__main__":
    main()
