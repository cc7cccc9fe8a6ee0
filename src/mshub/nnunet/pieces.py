"""The parts of nnU-Net a ``plans.json`` names, beside the network: nnU-Net's own and no other.

nnU-Net looks such names up among everything its modules hold and calls what it finds. Plans come from strangers: a name
that is not listed here is refused when a model is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from mshub.errors import ModelFolderError

READERS = ("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient")
PREPROCESSORS = ("DefaultPreprocessor",)
_NORMALISATION = "CT", "ZScore", "No", "RescaleTo01", "RGBTo01"
NORMALISATIONS = tuple(f"{kind}Normalization" for kind in _NORMALISATION)
RESAMPLINGS = "resample_data_or_seg_to_shape", "resample_torch_fornnunet", "resample_torch_simple", "no_resampling_hack"
LABEL_MANAGERS = ("LabelManager",)
RESAMPLING_ARGUMENTS = {
    *("is_seg", "order", "order_z", "force_separate_z", "separate_z_anisotropy_threshold"),
    *("memefficient_seg_resampling", "mode", "aniso_axis_mode"),
}
MAX_PATCH_VOXELS = 2**28  # 645 voxels cubed; nnU-Net's own have some millions
MIN_SPACING, MAX_SPACING = 1e-3, 1e4  # mm; pictures have 999 between slices
MAX_STAGES, MAX_BLOCKS = 32, 64
OLD_ARCHITECTURES = ("PlainConvUNet", "ResidualEncoderUNet")


def check_architecture(configuration: Mapping[str, Any]) -> None:
    """Refuse a network that plans older than nnU-Net 2.4 name and nnU-Net did not have.

    Raises
    ------
    ModelFolderError
        Names it.
    """
    name = configuration.get("UNet_class_name")
    if name is not None and name not in OLD_ARCHITECTURES:
        raise ModelFolderError(
            f"plans.json asks for the custom architecture {name}. MSHub builds only nnU-Net's own, "
            f"{' and '.join(OLD_ARCHITECTURES)}."
        )


def check_sizes(configuration: Mapping[str, Any]) -> None:
    """Refuse plans by which a network, or an image resampled for it, would fill any memory.

    Raises
    ------
    ModelFolderError
        Says what is asked for, and what is accepted.
    """
    patch, spacing = configuration["patch_size"], configuration["spacing"]
    architecture = configuration.get("architecture")
    arguments = architecture.get("arch_kwargs", {}) if isinstance(architecture, Mapping) else {}
    stages = arguments.get("n_stages", 1)
    counts = [value for key, values in arguments.items() if key.startswith("n_") for value in _flat(values)]
    deepest = max(counts, default=0)
    problems = {
        f"patches of {patch}; at most {MAX_PATCH_VOXELS:,} voxels": not 0 < prod(patch) <= MAX_PATCH_VOXELS,
        f"a spacing of {spacing} mm; from {MIN_SPACING} to {MAX_SPACING:g}": not all(
            MIN_SPACING <= size <= MAX_SPACING for size in spacing
        ),
        f"{stages:,} resolutions; at most {MAX_STAGES}": not 0 < stages <= MAX_STAGES,
        f"{deepest:,} blocks in a row; at most {MAX_BLOCKS}": deepest > MAX_BLOCKS,
    }
    for problem, found in problems.items():
        if found:
            raise ModelFolderError(f"plans.json asks for {problem} are accepted. Copy the model folder again.")


def _flat(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [values]


def check_pieces(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    """Refuse plans whose preprocessing is not nnU-Net's own.

    Parameters
    ----------
    plans : mapping
        Content of ``plans.json``.
    configuration : mapping
        The configuration the weights were trained for, inheritance resolved.

    Raises
    ------
    ModelFolderError
        Names what is unknown, and what is known.
    """
    resamplings = [f"resampling_fn_{what}" for what in ("data", "seg", "probabilities")]
    asked = {
        "image reader": ([plans.get("image_reader_writer", READERS[0])], READERS),
        "label manager": ([plans.get("label_manager", LABEL_MANAGERS[0])], LABEL_MANAGERS),
        "preprocessor": ([configuration["preprocessor_name"]], PREPROCESSORS),
        "normalisation": (list(configuration["normalization_schemes"]), NORMALISATIONS),
        "resampling": ([configuration[key] for key in resamplings], RESAMPLINGS),
    }
    for key in resamplings:
        unknown = sorted(set(configuration.get(f"{key}_kwargs") or ()) - RESAMPLING_ARGUMENTS)
        if unknown:
            raise ModelFolderError(
                f"The model was trained with a resampling that takes {', '.join(unknown)}; MSHub passes on "
                f"{', '.join(sorted(RESAMPLING_ARGUMENTS))}. Ask its makers for a model without code of their own."
            )
    for what, (names, known) in asked.items():
        for name in names:
            if name not in known:
                raise ModelFolderError(
                    f"The model was trained with the {what} {name}, which is not nnU-Net's own; MSHub serves models "
                    f"with {', '.join(known)}. Ask its makers for a model without code of their own."
                )
