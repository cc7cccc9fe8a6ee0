"""The parts of nnU-Net a ``plans.json`` names, beside the network: nnU-Net's own and no other.

nnU-Net looks such names up among everything its modules hold and calls what it finds. Plans come from strangers: a name
that is not listed here is refused when a model is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mshub.errors import ModelFolderError

READERS = ("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient")
PREPROCESSORS = ("DefaultPreprocessor",)
_NORMALISATION = "CT", "ZScore", "No", "RescaleTo01", "RGBTo01"
NORMALISATIONS = tuple(f"{kind}Normalization" for kind in _NORMALISATION)
RESAMPLINGS = "resample_data_or_seg_to_shape", "resample_torch_fornnunet", "resample_torch_simple", "no_resampling_hack"
LABEL_MANAGERS = ("LabelManager",)
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
    resamplings = [configuration[f"resampling_fn_{what}"] for what in ("data", "seg", "probabilities")]
    asked = {
        "image reader": ([plans.get("image_reader_writer", READERS[0])], READERS),
        "label manager": ([plans.get("label_manager", LABEL_MANAGERS[0])], LABEL_MANAGERS),
        "preprocessor": ([configuration["preprocessor_name"]], PREPROCESSORS),
        "normalisation": (list(configuration["normalization_schemes"]), NORMALISATIONS),
        "resampling": (resamplings, RESAMPLINGS),
    }
    for what, (names, known) in asked.items():
        for name in names:
            if name not in known:
                raise ModelFolderError(
                    f"The model was trained with the {what} {name}, which is not nnU-Net's own; MSHub serves models "
                    f"with {', '.join(known)}. Ask its makers for a model without code of their own."
                )
