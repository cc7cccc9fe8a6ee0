"""The plans of nnU-Net v1 in v2's terms: ``plans.json`` and ``dataset.json`` of a converted model.

What v2 has no equal for is refused by name. A bare state file comes without plans: its card has what they would say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mshub.card_tables import Plan
from mshub.errors import ModelFolderError
from mshub.label_rules import listed
from mshub.nnunet.folder import V1_INFERENCE
from mshub.nnunet.v1_files import V1Checkpoint
from mshub.nnunet.v1_network import Architecture, Shape, architecture_plan

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
_IMAGE_RESAMPLING = "image_resampling"  # v1 has no such key: it always resamples images as `_RESAMPLING` says
_RESAMPLING = {"order": 3, "order_z": 0, "force_separate_z": None}


def plans_of(plan: Plan) -> dict[str, Any]:
    """Return what nnU-Net v1's plans would say, from the plan in a model's card."""
    channels = range(len(plan.channels))
    stage = {
        "batch_size": 2,
        "patch_size": plan.patch_size,
        "current_spacing": plan.spacing,
        "pool_op_kernel_sizes": plan.pools,
        "conv_kernel_sizes": plan.kernels,
    }
    return {
        "num_modalities": len(plan.channels),
        "num_classes": len(plan.labels),
        "base_num_features": plan.features,
        "normalization_schemes": [plan.normalization for _ in channels],
        "use_mask_for_norm": [plan.mask_for_norm for _ in channels],
        "plans_per_stage": {0: stage},
        _IMAGE_RESAMPLING: {
            "order": plan.resampling_order,
            "order_z": plan.resampling_order_z,
            "force_separate_z": plan.separate_z,
        },
    }


class V1Plans:
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
        resampling = {"is_seg": False, **(self._plans.get(_IMAGE_RESAMPLING) or _RESAMPLING)}
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
