"""Convert a trained-model folder of nnU-Net v1 to one of v2: the same function of the image, in v2's terms.

The network is inferred from the weights (`mshub.nnunet.v1_network`) and checked against the plans. What has no twin in
v2 is refused by name.

Trainers of v1 build their networks in code that is not imported here. Group normalisation or another activation
leave no trace in the weights, so only trainers known to keep nnU-Net's own network are accepted, or those whose card
says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from mshub.errors import ModelFolderError
from mshub.label_rules import listed
from mshub.nnunet.folder import V1_INFERENCE, first_line
from mshub.nnunet.model_writing import write_model_folder
from mshub.nnunet.v1_files import V1Checkpoint, read_v1_folder
from mshub.nnunet.v1_network import Architecture, Shape, architecture_plan, convert_weights, infer_architecture

TRAINER = "nnUNetTrainer"

# Change the loss, the optimiser, the augmentation or what the weights themselves show; never network or inference.
_HARMLESS = (
    r"\d+epochs|3ConvPerStage(?:SameFilters)?|Adam|allConv3x3|BN|copy\d+|cycleAtEnd2?|DA[235]|DDP|DP|fixedSchedule2?|"
    r"focalLoss|ForceBD|ForceSD|fp16|fp32|fullEvals|graduallyTransitionFromCEToDice|independentScalePerAxis|insaneDA|"
    r"Loss_[A-Za-z0-9]+|lr[a-z0-9]*|\d+en\d+|momentum\d+(?:in2D)?|noDataAugmentation|noDeepSupervision|noMirroring|"
    r"noSmooth|Ranger|reduceMomentumDuringTraining|ReduceOnPlateau|SGD|softDeepSupervision|squared|warmup"
)
_KNOWN_TRAINER = re.compile(rf"nnUNetTrainer(?:CE|NoDA)?|nnUNetTrainerV2(?:_(?:{_HARMLESS}))*")
_UNSUPPORTED = {
    "cascade": "is the second stage of a cascade and needs the segmentation of the first; add 3d_lowres or 2d",
    "resenc": "has a residual encoder, which is no PlainConvUNet",
    "_gn": "normalises by group, which PlainConvUNet does not",
    "_frn": "uses filter response normalisation, which PlainConvUNet does not",
    "nonormalization": "has no normalisation layers",
    "relu": "has another activation than nnU-Net's own",
    "gelu": "has another activation than nnU-Net's own",
    "mish": "has another activation than nnU-Net's own",
    "regions": "predicts overlapping regions",
}
_WITHOUT_MIRRORING = ("nomirror", "nodataaugmentation", "noda")

_SCHEMES = {"CT": "CTNormalization", "nonCT": "ZScoreNormalization", "noNorm": "NoNormalization"}
_PREPROCESSORS = {2: "PreprocessorFor2D", 3: "GenericPreprocessor"}
_STATISTICS = {
    "max": "mx",
    "mean": "mean",
    "median": "median",
    "min": "mn",
    "percentile_00_5": "percentile_00_5",
    "percentile_99_5": "percentile_99_5",
    "std": "sd",
}


def convert_v1_folder(
    source: Path,
    target: Path,
    *,
    labels: Sequence[str] = (),
    channels: Sequence[str] = (),
    trusted_trainer: str | None = None,
) -> None:
    """Write the v2 folder of a v1 model.

    Names of training cases and paths, which v1's plans hold, are left behind.

    Parameters
    ----------
    source : Path
        Trained-model folder of nnU-Net v1: see `mshub.nnunet.v1_files.read_v1_folder`.
    target : Path
        Made if needed.
    labels : sequence of str
        Structures in ascending order of value, without background; ``class 1``, ``class 2``... where empty.
    channels : sequence of str
        Input channels in order; the modalities of v1's plans where empty.
    trusted_trainer : str, optional
        Name of a trainer class of the makers' own that keeps nnU-Net's network, softmax and preprocessing.

    Raises
    ------
    ModelFolderError
        The folder is damaged or dangerous, or the model has no equal in nnU-Net v2; the message names what.
    """
    with _explained():
        _convert(read_v1_folder(source), target, labels, channels, trusted_trainer)


def _convert(
    checkpoints: list[V1Checkpoint], target: Path, labels: Sequence[str], channels: Sequence[str], trusted: str | None
) -> None:
    first = checkpoints[0]
    _refuse_trainer(first.trainer, trusted)
    weights = {checkpoint.fold: checkpoint.weights() for checkpoint in checkpoints}
    architectures = {fold: infer_architecture(state) for fold, state in weights.items()}
    architecture = architectures[first.fold]
    if odd := [fold for fold, other in architectures.items() if other != architecture]:
        raise ModelFolderError(f"Fold {odd[0]} has another network than fold {first.fold}: add folds of one model.")
    with_plans = _Plans(first)
    with_plans.check(architecture)
    write_model_folder(
        target,
        with_plans.dataset(labels, channels),
        with_plans.v2(architecture),
        with_plans.configuration_name,
        TRAINER,
        _mirror_axes(first.trainer, len(architecture.strides[0])),
        {fold: convert_weights(state, architecture) for fold, state in weights.items()},
    )


@contextmanager
def _explained() -> Iterator[None]:
    """Say in a sentence that values are of another type or shape than nnU-Net v1 writes."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ModelFolderError(
            f"The plans or the weights are not as nnU-Net v1 writes them ({type(error).__name__}: "
            f"{first_line(error)}). Copy the model folder again."
        ) from error


def _refuse_trainer(name: str, trusted: str | None) -> None:
    if name == trusted or _KNOWN_TRAINER.fullmatch(name):
        return
    reason = next((reason for mark, reason in _UNSUPPORTED.items() if mark in name.lower()), None)
    if reason:
        raise ModelFolderError(f"This nnU-Net v1 model ({name}) {reason}. MSHub cannot import it.")
    raise ModelFolderError(
        f"The trainer {name} is not one of nnU-Net v1's own: its network or its preprocessing may differ in ways the "
        f"weights do not show. If its makers say that it keeps both, write trainer = {name!r} into the model's card, "
        "and add the model with that card."
    )


def _mirror_axes(trainer: str, dimension: int) -> tuple[int, ...] | None:
    without = any(mark in trainer.lower() for mark in _WITHOUT_MIRRORING)
    return None if without else tuple(range(dimension))


class _Plans:
    """The plans of one v1 checkpoint, in v2's terms."""

    def __init__(self, checkpoint: V1Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._plans, self._stage = checkpoint.plans, checkpoint.stage_plans
        self._patch = [int(size) for size in self._needed(self._stage, "patch_size")]

    @property
    def configuration_name(self) -> str:
        if len(self._patch) == 2:
            return "2d"
        lowest = self._checkpoint.stage == 0 and len(self._plans["plans_per_stage"]) > 1
        return "3d_lowres" if lowest else "3d_fullres"

    def check(self, architecture: Architecture) -> None:
        """Refuse weights that are not of these plans."""
        self._check_preprocessing()
        planned = {
            "num_modalities": (int(self._needed(self._plans, "num_modalities")), architecture.channels),
            "num_classes": (int(self._needed(self._plans, "num_classes")) + 1, architecture.heads),
            "base_num_features": (int(self._needed(self._plans, "base_num_features")), architecture.features[0]),
            "patch_size": (len(self._patch), len(architecture.strides[0])),
            "pool_op_kernel_sizes": (self._shapes("pool_op_kernel_sizes"), architecture.strides[1:]),
            "conv_kernel_sizes": (self._shapes("conv_kernel_sizes"), architecture.encoder_kernels),
        }
        for key, (expected, found) in planned.items():
            if expected is not None and expected != found:
                raise ModelFolderError(
                    f"The plans and the weights are of different models: {key} gives {expected}, the weights show "
                    f"{found}. Expected the files of one training: copy the model again."
                )
        lower = [kernel for _, kernel in pairwise(architecture.encoder_kernels)]
        if architecture.decoder_kernels != tuple(lower):
            raise ModelFolderError(
                f"The decoder has the kernels {architecture.decoder_kernels}; nnU-Net v1's own has those of the level "
                f"below, {tuple(lower)}. MSHub cannot import this network."
            )

    def dataset(self, labels: Sequence[str], channels: Sequence[str]) -> dict[str, Any]:
        """Return the ``dataset.json``."""
        cases = self._plans.get("list_of_npz_files")
        return {
            "channel_names": {str(number): name for number, name in enumerate(self._channel_names(channels))},
            "labels": {"background": 0} | {name: value for value, name in enumerate(self._label_names(labels), 1)},
            "numTraining": len(cases) if isinstance(cases, list) else 0,
            "file_ending": ".nii.gz",
        }

    def v2(self, architecture: Architecture) -> dict[str, Any]:
        """Return the ``plans.json``."""
        forward = [int(axis) for axis in self._plans.get("transpose_forward") or (0, 1, 2)]
        spacing = self._stage.get("original_spacing") or self._needed(self._stage, "current_spacing")
        return {
            "dataset_name": "Dataset001_v1",
            "plans_name": "nnUNetPlans",
            "original_median_spacing_after_transp": _floats(spacing),
            "original_median_shape_after_transp": self._median_shape(),
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": forward,
            "transpose_backward": [forward.index(axis) for axis in range(3)],
            "configurations": {self.configuration_name: self._configuration(architecture)},
            "experiment_planner_used": "ExperimentPlanner",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": self._intensities(),
            V1_INFERENCE: True,
        }

    def _configuration(self, architecture: Architecture) -> dict[str, Any]:
        spacing = _floats(self._needed(self._stage, "current_spacing"))
        resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
        export = self._plans.get("segmentation_export_params") or {}
        return {
            "data_identifier": f"nnUNetPlans_{self.configuration_name}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": int(self._needed(self._stage, "batch_size")),
            "patch_size": self._patch,
            "median_image_size_in_voxels": self._median_shape()[-len(self._patch) :],
            "spacing": spacing[-len(self._patch) :],
            "normalization_schemes": [_SCHEMES[scheme] for scheme in self._schemes()],
            "use_mask_for_norm": self._masks(),
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": resampling,
            "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": {
                "is_seg": False,
                "order": int(export.get("interpolation_order", 1)),
                "order_z": int(export.get("interpolation_order_z", 0)),
                "force_separate_z": export.get("force_separate_z"),
            },
            "architecture": architecture_plan(architecture),
            "batch_dice": self._checkpoint.batch_dice,
        }

    def _check_preprocessing(self) -> None:
        unknown = [str(scheme) for scheme in self._schemes() if scheme not in _SCHEMES]
        if unknown:
            raise ModelFolderError(
                f"The images are normalised by {listed(unknown)}, which nnU-Net v2 does not have; it has "
                f"{listed(list(_SCHEMES))}. MSHub cannot import this model."
            )
        expected = _PREPROCESSORS[len(self._patch)]
        name = self._plans.get("preprocessor_name") or expected
        if name != expected:
            raise ModelFolderError(
                f"The images are preprocessed by {name}; MSHub has nnU-Net v1's {expected} only and cannot import this "
                "model."
            )

    def _schemes(self) -> list[Any]:
        return self._per_channel("normalization_schemes")

    def _masks(self) -> list[bool]:
        return [bool(mask) for mask in self._per_channel("use_mask_for_norm")]

    def _per_channel(self, key: str) -> list[Any]:
        values = self._needed(self._plans, key)
        count = int(self._needed(self._plans, "num_modalities"))
        if len(values) != count:
            raise ModelFolderError(f"{key} in the plans has {len(values)} entries for {count} channels.")
        return [values[number] for number in range(count)]

    def _intensities(self) -> dict[str, dict[str, float]]:
        known = (self._plans.get("dataset_properties") or {}).get("intensityproperties") or {}
        intensities: dict[str, dict[str, float]] = {}
        for number, scheme in enumerate(self._schemes()):
            found = known.get(number) or {}
            missing = [name for name in ("mean", "sd", "percentile_00_5", "percentile_99_5") if name not in found]
            if scheme == "CT" and missing:
                raise ModelFolderError(
                    f"The plans lack {listed(missing)} of channel {number}, without which CT is not normalised. Ask "
                    "the model's makers for the complete plans.pkl."
                )
            intensities[str(number)] = {key: float(found.get(name, 0.0)) for key, name in _STATISTICS.items()}
        return intensities

    def _channel_names(self, given: Sequence[str]) -> list[str]:
        count = int(self._needed(self._plans, "num_modalities"))
        if given and len(given) != count:
            raise ModelFolderError(
                f"The card names {len(given)} channels ({listed(given)}); this model has {count}. Correct the card "
                "or add the model it describes."
            )
        known = self._plans.get("modalities") or (self._plans.get("dataset_properties") or {}).get("modalities") or {}
        return [str(name) for name in given] or [str(known.get(i) or f"channel {i + 1}") for i in range(count)]

    def _label_names(self, given: Sequence[str]) -> list[str]:
        count = int(self._needed(self._plans, "num_classes"))
        values = sorted(int(value) for value in self._plans.get("all_classes") or () if int(value) > 0)
        if values and values != list(range(1, count + 1)):
            raise ModelFolderError(
                f"The classes of this model are {listed(values)}; MSHub imports nnU-Net v1 models whose classes are 1 "
                f"to {count}."
            )
        if given and len(given) != count:
            raise ModelFolderError(
                f"The card names {len(given)} labels ({listed(given)}); this model has {count}. Correct the card "
                "or add the model it describes."
            )
        return list(given) or [f"class {value}" for value in range(1, count + 1)]

    def _median_shape(self) -> list[int]:
        shape = self._stage.get("median_patient_size_in_voxels") or self._patch
        return [round(float(size)) for size in shape]

    def _shapes(self, key: str) -> tuple[Shape, ...] | None:
        shapes = self._stage.get(key)
        return None if shapes is None else tuple(tuple(int(size) for size in shape) for shape in shapes)

    def _needed(self, plans: Mapping[str, Any], key: str) -> Any:
        if plans.get(key) is None:
            raise ModelFolderError(
                f"{key} is missing in the plans. Expected the complete plans of nnU-Net v1: ask the model's makers for "
                "them."
            )
        return plans[key]


def _floats(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values]
