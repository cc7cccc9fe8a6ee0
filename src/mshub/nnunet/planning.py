"""A new model for a lab's own labels, planned by nnU-Net itself."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mshub.card_tables import AS_STORED, InputRules
from mshub.cases import ReviewedCase
from mshub.dataset_json import read_labels
from mshub.errors import MSHubError, TrainingError
from mshub.geometry import Volume
from mshub.label_rules import IGNORE
from mshub.nnunet.model_writing import write_model_folder
from mshub.nnunet.reading import read_channels
from mshub.training_labels import read_reviewed_label, training_dataset, training_labels
from mshub.volume_io import write_nifti

logger = logging.getLogger(__name__)

ENDING = ".nii.gz"
NAME = "Dataset001_MSHub"
_SIDED = re.compile(r"left|right|(^|[^a-z])[lr]([^a-z]|$)", re.IGNORECASE)


def plan_model(
    dataset: dict[str, Any],
    cases: Sequence[ReviewedCase],
    work: Path,
    seed: int,
    rules: InputRules = AS_STORED,
) -> Path:
    """Let nnU-Net look at the cases and plan a network; returns a model folder with random weights.

    Parameters
    ----------
    dataset : dict
        ``channel_names`` and ``labels`` as in nnU-Net's ``dataset.json``.
    cases : sequence of ReviewedCase
        The training cases. Those that can be read and of which every structure was reviewed are planned on.
    work : Path
        For nnU-Net's own folders.
    seed : int
        Of the weights.
    rules : InputRules
        What is done to every image before nnU-Net sees it, as the model's card says.

    Raises
    ------
    TrainingError
        No case that can be read has all its structures reviewed: nothing would say what background is.
    """
    structures = list(read_labels(dataset).predicted)
    whole = [case for case in cases if len(case.structures(structures)) == len(structures)]
    if not whole:
        raise TrainingError(
            f"None of the {len(cases)} cases has all structures reviewed ({', '.join(structures)}), so nothing says "
            "what background is. Review all of them in at least one case."
        )
    written = _write_raw_dataset(dataset, whole, work / "raw" / NAME, rules)
    folders = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results"}
    with _environment({variable: str(work / folder) for variable, folder in folders.items()}, nnUNet_n_proc_DA="1"):
        plans = _plan(written)
    configuration = "3d_fullres" if "3d_fullres" in plans["configurations"] else "2d"
    axes = _mirror_axes(structures, plans["configurations"][configuration]["patch_size"])
    weights = _random_weights(dataset, plans, configuration, seed)
    part, target = work / "planned.part", work / "planned"
    for stale in (part, target):
        shutil.rmtree(stale, ignore_errors=True)
    write_model_folder(part, dataset, plans, configuration, "nnUNetTrainer", axes, {"0": weights})
    part.replace(target)  # a job that is killed finds all of it, or nothing
    shutil.rmtree(work / "raw")
    return target


@contextlib.contextmanager
def _environment(variables: Mapping[str, str], **more: str) -> Iterator[None]:
    """Set variables for nnU-Net's planning only: its number of processes is not that of the training to come."""
    before = {name: os.environ.get(name) for name in (*variables, *more)}
    os.environ.update(variables, **more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _plan(cases: int) -> dict[str, Any]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            DatasetFingerprintExtractor(NAME, max(1, min(cases, (os.cpu_count() or 2) // 2))).run(True)
            plans: dict[str, Any] = ExperimentPlanner(NAME).plan_experiment()
    except Exception as error:
        raise TrainingError(
            f"nnU-Net could not plan a network for these cases ({type(error).__name__}: {error}). Expected volumes of "
            "at least some ten voxels along two axes, all of one modality."
        ) from error
    return plans


def _write_raw_dataset(dataset: dict[str, Any], cases: Sequence[ReviewedCase], raw: Path, rules: InputRules) -> int:
    """Write nnU-Net's raw dataset; returns how many of the cases are in it: not those that cannot be read."""
    shutil.rmtree(raw, ignore_errors=True)
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    refusals = []
    for number, case in enumerate(cases):
        try:
            _write_raw_case(dataset, case, raw, f"case{number:05d}", rules)
        except MSHubError as error:  # the training leaves it out too, and says so
            logger.warning("%s is not planned with: %s", case.case_id, error)
            refusals.append(f"{case.case_id}: {error}")
    written = len(cases) - len(refusals)
    if not written:
        raise TrainingError(f"None of the completely reviewed cases can be read. {' '.join(refusals[:3])}")
    content = {**dataset, "numTraining": written, "file_ending": ENDING}
    (raw / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return written


def _write_raw_case(dataset: dict[str, Any], case: ReviewedCase, raw: Path, name: str, rules: InputRules) -> None:
    """Write one case: any readable format becomes NIfTI, labels become the integers of `dataset`."""
    trained = training_dataset(dataset)
    targets, ignore = read_labels(trained).predicted, trained["labels"][IGNORE]
    volumes = read_channels(case.images, [str(name) for name in dataset["channel_names"].values()])
    label = read_reviewed_label(case, volumes[0].grid)
    array = training_labels(label, case.values, case.reviewed, targets, ignore)
    for channel, volume in enumerate(volumes):
        array_xyz = volume.array_xyz if rules.clip is None else np.clip(volume.array_xyz, *rules.clip)
        _write_turned(raw / "imagesTr" / f"{name}_{channel:04d}{ENDING}", Volume(array_xyz, volume.grid), rules)
    _write_turned(raw / "labelsTr" / f"{name}{ENDING}", Volume(array, volumes[0].grid), rules)


def _write_turned(path: Path, volume: Volume, rules: InputRules) -> None:
    turned = volume.turned(rules.orientation)
    write_nifti(path, turned.array_xyz, turned.grid)


def _mirror_axes(structures: Sequence[str], patch: Sequence[int]) -> tuple[int, ...] | None:
    """Return nnU-Net's mirror axes; none where structures are told apart by their side, which a flip would swap."""
    return None if any(map(_SIDED.search, structures)) else tuple(range(len(patch)))


def _random_weights(
    dataset: dict[str, Any], plans: dict[str, Any], configuration: str, seed: int
) -> dict[str, torch.Tensor]:
    manager = PlansManager(plans)
    chosen = manager.get_configuration(configuration)
    torch.manual_seed(seed)
    network = get_network_from_plans(
        chosen.network_arch_class_name,
        chosen.network_arch_init_kwargs,
        chosen.network_arch_init_kwargs_req_import,
        determine_num_input_channels(manager, chosen, dataset),
        manager.get_label_manager(dataset).num_segmentation_heads,
        deep_supervision=False,
    )
    return dict(network.state_dict())
