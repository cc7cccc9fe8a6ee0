"""Train two small networks with nnU-Net v1 itself and note what it predicts with them: what MSHub is compared with.

    make v1-golden DATA=DIR       # or, in an environment that has nnU-Net v1: python tests/train_v1.py --data DIR

Planning, preprocessing, network, augmentation, loss and prediction are v1's own; changed are the width of the network,
the patch, the optimiser (Adam) and the length of the training. DIR holds ``hippocampus`` (imagesTr, labelsTr) and
``dicom_mr`` (T1post, FLAIR). Writes, beside this file:

* ``recorded/v1_hippocampus.zip``, ``recorded/v1_brain.zip``: the releases, weights rounded to half precision;
* ``recorded/v1_trained_golden.npz``: per network ``<name>_logits``, the output for a seeded patch, and per case
  ``<name>_<case>_sample`` (labels at seeded voxels), ``..._counts`` (voxels per class) and ``..._sha256`` (of the whole
  label map, uint8, axes (x, y, z) in C order).

Whole label maps, for ``bench/v1_parity.py``, go to ``bench/out/v1``: images and maps of patients are not committed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import pickle
import shutil
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 - the name everybody uses
import torch

from v1_trained import HIPPOCAMPUS_CASES, case_files, sampled_voxels, seeded_patch, write_brain_case

RECORDED = Path(__file__).parent / "recorded"
WHOLE_MAPS = Path(__file__).parent.parent / "bench" / "out" / "v1"
VARIABLES = ("nnUNet_raw_data_base", "nnUNet_preprocessed", "RESULTS_FOLDER")


@dataclass(frozen=True)
class Training:
    """What to train; axes z, y, x.

    Attributes
    ----------
    spacing : tuple of float or None
        Voxel size of the network in mm; None keeps what v1 plans.
    """

    task: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    patch: tuple[int, int, int]
    pools: tuple[tuple[int, int, int], ...]
    kernels: tuple[tuple[int, int, int], ...]
    spacing: tuple[float, float, float] | None
    epochs: int
    iterations: int = 25


TRAININGS = {
    "hippocampus": Training(
        task="Task004_Hippocampus",
        channels=("MRI",),
        labels=("anterior", "posterior"),
        patch=(40, 56, 40),
        pools=((2, 2, 2),) * 3,
        kernels=((3, 3, 3),) * 4,
        spacing=None,
        epochs=16,
    ),
    "brain": Training(
        task="Task005_Brain",
        channels=("T1post", "FLAIR"),
        labels=("dark", "grey", "bright"),
        patch=(16, 96, 96),
        pools=((1, 2, 2), (2, 2, 2), (2, 2, 2)),
        kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
        spacing=(5.0, 0.8, 0.8),
        epochs=12,
    ),
}


def main() -> None:
    """Train and predict in a process per network: v1's augmenter threads never end by themselves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", choices=TRAININGS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        _train_and_predict(arguments.only, arguments.data, arguments.out)
        sys.stdout.flush()
        os._exit(0)
    with tempfile.TemporaryDirectory() as scratch:
        golden: dict[str, np.ndarray] = {}
        for name in TRAININGS:
            out = Path(scratch) / f"{name}.npz"
            command = [sys.executable, __file__, "--data", str(arguments.data.resolve()), "--only", name]
            if os.spawnv(os.P_WAIT, sys.executable, [*command, "--out", str(out)]):
                sys.exit(f"training {name} failed")
            golden |= dict(np.load(out))
        np.savez_compressed(RECORDED / "v1_trained_golden.npz", **golden)


def _train_and_predict(name: str, data: Path, out: Path) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    torch.load = functools.partial(torch.load, weights_only=False)  # v1 is older than that default
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update({variable: str(Path(scratch) / variable) for variable in VARIABLES}, nnUNet_n_proc_DA="2")
        training = TRAININGS[name]
        _write_raw(name, training, data, Path(scratch))
        release = _released(_fit(training, Path(scratch)), Path(scratch) / "release")
        _zip(release, RECORDED / f"v1_{name}.zip")
        np.savez(out, **_predicted(name, release, data, Path(scratch)))


# -- data ---------------------------------------------------------------------------------------------------------


def _write_raw(name: str, training: Training, data: Path, scratch: Path) -> None:
    """Write a raw data set in v1's layout."""
    raw = scratch / "nnUNet_raw_data_base" / "nnUNet_raw_data" / training.task
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    cases = _write_brain(data, raw) if name == "brain" else _link_hippocampus(data, raw)
    listed = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in cases]
    content = {
        "name": name,
        "modality": {str(number): channel for number, channel in enumerate(training.channels)},
        "labels": {str(number): label for number, label in enumerate(("background", *training.labels))},
        "numTraining": len(cases),
        "training": listed,
        "test": [],
    }
    (raw / "dataset.json").write_text(json.dumps(content))


def _link_hippocampus(data: Path, raw: Path) -> list[str]:
    """Take the first thirty cases that are not predicted later."""
    every = sorted(path.name.removesuffix(".nii.gz") for path in (data / "hippocampus" / "labelsTr").glob("*.nii.gz"))
    cases = [case for case in every if case not in HIPPOCAMPUS_CASES][:30]
    for case in cases:
        for file in (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"):
            shutil.copy(data / "hippocampus" / file, raw / file)
    return cases


def _write_brain(data: Path, raw: Path) -> list[str]:
    """Write the one study, with classes of FLAIR intensity in the place of a label, which nobody drew.

    Both channels are smoothed (Gaussian, 2 mm). The head is where T1post exceeds 15 % of its 99th percentile; it is
    class 1, from the 45th percentile of FLAIR inside the head on class 2, from the 80th on class 3.
    """
    files = write_brain_case(data, raw / "imagesTr")
    t1, flair = (sitk.GetArrayFromImage(_smoothed(file)) for file in files)
    head = t1 > 0.15 * np.quantile(t1, 0.99)
    label = np.zeros(t1.shape, np.uint8)
    for value, quantile in enumerate((0.0, 0.45, 0.8), 1):
        label[head & (flair >= np.quantile(flair[head], quantile))] = value
    image = sitk.GetImageFromArray(label)
    image.CopyInformation(sitk.ReadImage(str(files[0])))
    sitk.WriteImage(image, str(raw / "labelsTr" / "study.nii.gz"))
    return ["study"]


def _smoothed(path: Path) -> sitk.Image:
    return sitk.SmoothingRecursiveGaussian(sitk.ReadImage(str(path), sitk.sitkFloat32), (2.0, 2.0, 2.0))


# -- training -----------------------------------------------------------------------------------------------------


def _fit(training: Training, scratch: Path) -> Any:
    """Plan, preprocess and train with v1; returns the trainer."""
    from nnunet.experiment_planning.DatasetAnalyzer import DatasetAnalyzer
    from nnunet.experiment_planning.experiment_planner_baseline_3DUNet_v21 import ExperimentPlanner3D_v21
    from nnunet.experiment_planning.utils import crop
    from nnunet.training.network_training.nnUNetTrainerV2 import nnUNetTrainerV2

    base = scratch / "nnUNet_raw_data_base"
    cropped, prepared = base / "nnUNet_cropped_data" / training.task, scratch / "nnUNet_preprocessed" / training.task
    crop(training.task, False, 2)
    DatasetAnalyzer(str(cropped), overwrite=False, num_processes=2).analyze_dataset(False)
    prepared.mkdir(parents=True)
    shutil.copy(cropped / "dataset_properties.pkl", prepared)
    shutil.copy(base / "nnUNet_raw_data" / training.task / "dataset.json", prepared)
    planner = ExperimentPlanner3D_v21(str(cropped), str(prepared))
    planner.plan_experiment()
    _make_small(planner, training)
    planner.run_preprocessing((2, 2))
    plans, out = planner.plans_fname, scratch / "RESULTS_FOLDER"
    trainer = nnUNetTrainerV2(plans, "all", str(out), str(prepared), False, 0, True, False, False)
    trainer.pin_memory = False
    trainer.initialize(True)
    trainer.max_num_epochs, trainer.num_batches_per_epoch = training.epochs, training.iterations
    trainer.num_val_batches_per_epoch, trainer.initial_lr = 2, 4e-3
    trainer.optimizer = torch.optim.Adam(trainer.network.parameters(), trainer.initial_lr)
    trainer.run_training()
    print(f"{training.task}: pseudo Dice {trainer.all_val_eval_metrics[-1]:.3f}")  # noqa: T201 - a script
    return trainer


def _make_small(planner: Any, training: Training) -> None:
    """Keep one stage of v1's plan, with a small network."""
    stage = planner.plans["plans_per_stage"][max(planner.plans["plans_per_stage"])]
    stage |= {
        "patch_size": np.array(training.patch),
        "pool_op_kernel_sizes": [list(pool) for pool in training.pools],
        "conv_kernel_sizes": [list(kernel) for kernel in training.kernels],
        "num_pool_per_axis": [int(n) for n in np.log2(np.prod(training.pools, axis=0))],
        "batch_size": 2,
        "do_dummy_2D_data_aug": training.patch[0] < 20,
    }
    if training.spacing:
        stage["current_spacing"] = np.array(training.spacing)
    planner.plans_per_stage = planner.plans["plans_per_stage"] = {0: stage}
    planner.plans |= {"num_stages": 1, "base_num_features": 4}
    planner.save_my_plans()
    planner.plans["plans_per_stage"] = {0: stage}
    Path(planner.plans_fname).write_bytes(pickle.dumps(planner.plans))


def _released(trainer: Any, folder: Path) -> Path:
    """Write the trained-model folder: weights rounded to half precision, no optimiser, no names of cases or paths."""
    plans = {**trainer.plans, "list_of_npz_files": ["case"] * len(trainer.plans["list_of_npz_files"])}
    plans["preprocessed_data_folder"] = "preprocessed"
    plans["dataset_properties"] = {**plans["dataset_properties"], "intensityproperties": None}
    plans["dataset_properties"] = {k: plans["dataset_properties"][k] for k in ("modalities", "intensityproperties")}
    weights = {name: tensor.half().float() for name, tensor in trainer.network.state_dict().items()}
    (folder / "all").mkdir(parents=True)
    (folder / "plans.pkl").write_bytes(pickle.dumps(plans))
    init = ("plans.pkl", "all", "out", "preprocessed", False, 0, True, False, False)
    info = OrderedDict(init=init, name="nnUNetTrainerV2", plans=plans)
    info["class"] = "<class 'nnunet.training.network_training.nnUNetTrainerV2.nnUNetTrainerV2'>"
    file = folder / "all" / "model_final_checkpoint.model"
    file.with_name(f"{file.name}.pkl").write_bytes(pickle.dumps(info))
    checkpoint = {"epoch": trainer.epoch, "state_dict": OrderedDict(weights), "optimizer_state_dict": None}
    torch.save({**checkpoint, "lr_scheduler_state_dict": None, "plot_stuff": ([], [], [], [])}, file)
    return folder


def _zip(folder: Path, path: Path) -> None:
    """Pack a folder so that the same files give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                member = zipfile.ZipInfo(file.relative_to(folder).as_posix(), (2026, 1, 1, 0, 0, 0))
                member.compress_type = zipfile.ZIP_DEFLATED
                out.writestr(member, file.read_bytes())


# -- what v1 predicts ---------------------------------------------------------------------------------------------


def _predicted(name: str, release: Path, data: Path, scratch: Path) -> Mapping[str, np.ndarray]:
    from make_v1_golden import predicted_label, restored

    network = restored(release, "all").network
    network.do_ds = False
    with torch.inference_mode():
        golden = {f"{name}_logits": network.eval()(seeded_patch(name))[0].numpy()}
    WHOLE_MAPS.mkdir(parents=True, exist_ok=True)
    for case, files in case_files(name, data, scratch / "cases").items():
        label = predicted_label(release, files, scratch / f"{case}.nii.gz", ["all"])
        np.savez_compressed(WHOLE_MAPS / f"{name}_{case}.npz", label=label)
        golden[f"{name}_{case}_sample"] = label.reshape(-1)[sampled_voxels(label.size)]
        golden[f"{name}_{case}_counts"] = np.bincount(label.reshape(-1), minlength=len(TRAININGS[name].labels) + 1)
        golden[f"{name}_{case}_sha256"] = np.array(hashlib.sha256(label.tobytes()).hexdigest())
    return golden


if __name__ == "__main__":
    main()
