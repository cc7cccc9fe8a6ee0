"""Reviewed cases as nnU-Net trains on them: preprocessed by the plans of the model that is continued.

Preprocessed cases are kept between trainings under a name that says all they depend on: a further round preprocesses
only what is new, and after a promotion the cases in which the new version says where unreviewed structures may be.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from mshub.atomic_file import replace_json
from mshub.card_tables import AS_STORED, InputRules
from mshub.cases import ReviewedCase
from mshub.dataset_json import read_labels
from mshub.errors import CaseError, LabelError, MSHubError, TrainingError
from mshub.geometry import Array, Volume
from mshub.label_rules import IGNORE
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.preprocessing import preprocessor_of
from mshub.nnunet.reading import read_as_nnunet, read_channels, read_label_as_nnunet
from mshub.training_labels import (
    read_reviewed_label,
    training_dataset,
    training_labels,
    unsure_region,
    without_ignore,
)

logger = logging.getLogger(__name__)

Predict = Callable[[ReviewedCase], tuple[Array, dict[str, int]]]
"""Returns a model's label map (axes x, y, z, on the case's grid) and its names -> values."""


@dataclass(frozen=True)
class TrainingSet:
    """Preprocessed cases.

    Attributes
    ----------
    folder : Path
        With nnU-Net's ``<identifier>.b2nd``, ``<identifier>_seg.b2nd`` and ``<identifier>.pkl``.
    cases : dict of str to ReviewedCase
        Identifier -> case, for every case that can be trained on.
    left_out : dict of str to str
        Case id -> why it cannot be trained on.
    dataset : dict
        The ``dataset.json`` to train with.
    """

    folder: Path
    cases: dict[str, ReviewedCase]
    left_out: dict[str, str]
    dataset: dict[str, Any]


def prepare(
    model: ModelFolder,
    cases: Sequence[ReviewedCase],
    folder: Path,
    predict: Predict | None,
    on_case: Callable[[int], None],
    rules: InputRules = AS_STORED,
) -> TrainingSet:
    """Preprocess the cases that are not in `folder` yet, and remove those that are no longer needed.

    A case that cannot be used is left out and named in the result.

    Parameters
    ----------
    model : ModelFolder
        Its plans, configuration and labels decide. Its weights are not looked at: its path stands for them where
        `predict` has a say.
    cases : sequence of ReviewedCase
    folder : Path
        Where preprocessed cases are kept.
    predict : callable or None
        Predicts with the version that is continued: tells where structures nobody reviewed may be. None where there is
        none, in a training from scratch.
    on_case : callable
        Called with the number of cases done.
    rules : InputRules
        As for predictions.

    Raises
    ------
    TrainingError
        No case can be trained on, or no voxel of any says anything.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dataset = training_dataset(model.dataset)
    prepared: dict[str, ReviewedCase] = {}
    left_out: dict[str, str] = {}
    for number, case in enumerate(cases):
        try:
            identifier = _identifier(case, model, predict, rules)
            if not (folder / f"{identifier}.json").is_file():
                _preprocess(model, dataset, case, folder, identifier, predict, rules)
            prepared[identifier] = case
        except MSHubError as error:  # one bad case of many must not cost the others
            logger.warning("%s is left out: %s", case.case_id, error)
            left_out[case.case_id] = str(error)
        on_case(number + 1)
    has_unknown = _has_unknown(folder, prepared, left_out)
    _forget_all_but(folder, prepared)
    # nnU-Net samples differently with an ignore label: only where it is needed.
    return TrainingSet(folder, prepared, left_out, dataset if has_unknown else without_ignore(dataset))


def _has_unknown(folder: Path, prepared: Collection[str], left_out: Mapping[str, str]) -> bool:
    """Return whether any voxel is ``ignore``; refuse a set in which all are."""
    facts = [json.loads((folder / f"{identifier}.json").read_text(encoding="utf-8")) for identifier in prepared]
    if not facts:
        reasons = " ".join(f"{case}: {reason}" for case, reason in list(left_out.items())[:3])
        raise TrainingError(f"None of the reviewed cases can be trained on. {reasons}")
    if not any(case["known"] for case in facts):
        raise TrainingError(
            "Nothing can be learned: in every case, every voxel belongs to structures that nobody reviewed. Review all "
            "structures of the model in at least one case."
        )
    return any(case["unknown"] for case in facts)


def _identifier(case: ReviewedCase, model: ModelFolder, predict: Predict | None, rules: InputRules) -> str:
    names = model.labels.names
    asked = None if predict is None or len(case.structures(names)) == len(names) else str(model.path)
    facts = [model.plans, model.configuration, model.dataset, astuple(rules), asked]
    return hashlib.sha256((json.dumps(facts, sort_keys=True, default=str) + case.digest).encode()).hexdigest()[:32]


def _preprocess(
    model: ModelFolder,
    dataset: dict[str, Any],
    case: ReviewedCase,
    folder: Path,
    identifier: str,
    predict: Predict | None,
    rules: InputRules,
) -> None:
    """Write one case as nnU-Net's preprocessor does; the small JSON file comes last and says that it is whole."""
    volumes = read_channels(case.images, model.channels)
    reader = model.plans_manager.image_reader_writer_class()
    data, properties = read_as_nnunet(case.images, volumes, reader, rules)
    trained = _trained_labels(model, dataset, case, volumes[0], predict)
    segmentation = read_label_as_nnunet(Volume(trained, volumes[0].grid), reader, rules.orientation)
    try:
        data, segmentation, properties = _preprocessed(model, dataset, data, segmentation, properties)
    except Exception as error:
        raise CaseError(
            f"nnU-Net cannot preprocess {case.case_id} ({type(error).__name__}: {error}). Expected an image like those "
            "the model was made for. How to fix: export the image again, or remove its label."
        ) from error
    patch = tuple(model.configuration_manager.patch_size)
    blocks, chunks = comp_blosc2_params(data.shape, patch, data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(segmentation.shape, patch, segmentation.itemsize)
    for stale in folder.glob(f"{identifier}*"):
        stale.unlink()  # of a training that was killed while it wrote
    nnUNetDatasetBlosc2.save_case(
        data, segmentation, properties, str(folder / identifier),
        chunks=chunks, blocks=blocks, chunks_seg=chunks_seg, blocks_seg=blocks_seg,
    )  # fmt: skip
    ignore = dataset["labels"][IGNORE]
    facts = {"unknown": bool((trained == ignore).any()), "known": bool((trained != ignore).any())}
    replace_json(folder / f"{identifier}.json", facts)


def _preprocessed(
    model: ModelFolder, dataset: dict[str, Any], data: Array, segmentation: Array, properties: dict[str, Any]
) -> tuple[Array, Array, dict[str, Any]]:
    """Return what nnU-Net's preprocessor makes of a case, in the types it is stored in."""
    configuration = model.configuration_manager
    data, segmentation, properties = preprocessor_of(model).run_case_npy(
        data, segmentation, properties, model.plans_manager, configuration, dataset
    )
    return data.astype(np.float32, copy=False), segmentation.astype(np.int16, copy=False), properties


def _trained_labels(
    model: ModelFolder, dataset: dict[str, Any], case: ReviewedCase, image: Volume, predict: Predict | None
) -> Array:
    label = read_reviewed_label(case, image.grid)
    targets = read_labels(dataset).predicted
    reviewed = case.structures(list(targets))
    unknown = [name for name in targets if name not in reviewed]
    if unknown and model.labels.has_regions:
        raise LabelError(
            f"{', '.join(unknown)} was not reviewed. The structures of this model contain each other, so a case "
            "teaches it only when all of them were reviewed. How to fix: review them too."
        )
    unsure = None
    if unknown and predict is not None:
        predicted, values = predict(case)
        unsure = unsure_region(predicted, [values[name] for name in unknown], image.grid.spacing_xyz_mm)
    return training_labels(label, case.values, reviewed, targets, dataset["labels"][IGNORE], unsure)


def _forget_all_but(folder: Path, identifiers: Collection[str]) -> None:
    kept = {f"{name}{ending}" for name in identifiers for ending in (".b2nd", "_seg.b2nd", ".pkl", ".json")}
    for path in folder.iterdir():
        if path.is_file() and path.name not in kept:
            path.unlink()
