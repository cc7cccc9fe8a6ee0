"""The preprocessing of a model's images: nnU-Net v2's, or for a model of nnU-Net v1 that of v1.

v2 crops, normalises and resamples; v1 cropped, resampled and normalised, and set what lies outside the mask to zero.
Which of the two a model needs is written in its ``plans.json``, so that trainings that continue it keep to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from mshub.errors import ModelFolderError
from mshub.geometry import Array
from mshub.nnunet.folder import ModelFolder

_STD_FLOOR = 1e-8  # v1 adds it, v2 takes the maximum


class V1Preprocessor(DefaultPreprocessor):  # type: ignore[misc]
    """nnU-Net v1's preprocessing, in the interface of v2's."""

    def run_case_npy(
        self,
        data: Array,
        seg: Array | None,
        properties: dict[str, Any],
        plans_manager: Any,
        configuration_manager: Any,
        dataset_json: Any,
    ) -> tuple[Array, Array, dict[str, Any]]:
        """Transpose, crop, resample and normalise one case; see nnU-Net v2's `DefaultPreprocessor`.

        Parameters
        ----------
        data : ndarray, float32, axes (channel, z, y, x)
        seg : ndarray or None, axes (1, z, y, x)
        properties : dict
            Needs ``spacing`` (z, y, x in mm).

        Returns
        -------
        data : ndarray, float32, axes (channel, *network axes)
        seg : ndarray, axes (1, *network axes)
            -1 outside the nonzero region.
        properties : dict
        """
        data, seg, properties = super().run_case_npy(
            data, seg, properties, plans_manager, configuration_manager, dataset_json
        )
        statistics = plans_manager.foreground_intensity_properties_per_channel
        for number, scheme in enumerate(configuration_manager.normalization_schemes):
            inside = seg[0] >= 0 if configuration_manager.use_mask_for_norm[number] else None
            _normalise(data[number], scheme, inside, statistics[str(number)])
        return data, seg, properties

    def _normalize(self, data: Array, *_: Any) -> Array:
        """Leave the intensities as they are: v1 normalises what is resampled already."""
        return data


def preprocessor_of(folder: ModelFolder) -> DefaultPreprocessor:
    """Return what preprocesses the images of a model, for predictions and for trainings that continue it."""
    if folder.predicts_as_v1:
        return V1Preprocessor(verbose=False)
    return folder.configuration_manager.preprocessor_class(verbose=False)


def _normalise(channel: Array, scheme: str, inside: Array | None, statistics: dict[str, float]) -> None:
    """Normalise a resampled channel in place.

    Parameters
    ----------
    channel : ndarray, float32
    scheme : str
        Name of nnU-Net v2's class.
    inside : ndarray of bool, or None
        Where the image counts; the rest becomes 0.
    statistics : dict
        Of the training images' foreground.
    """
    if scheme == "NoNormalization":
        return
    if scheme == "CTNormalization":
        np.clip(channel, statistics["percentile_00_5"], statistics["percentile_99_5"], out=channel)
        channel -= statistics["mean"]
        channel /= statistics["std"]
    elif scheme == "ZScoreNormalization":
        counted = channel if inside is None else channel[inside]
        mean, spread = counted.mean(), counted.std()
        channel -= mean
        channel /= spread + _STD_FLOOR
    else:
        raise ModelFolderError(f"Models of nnU-Net v1 are not normalised by {scheme}. Copy the model folder again.")
    if inside is not None:
        channel[~inside] = 0
