"""The preprocessing of a model's images: nnU-Net v2's, or for a model of nnU-Net v1 that of v1.

v2 crops, normalises and resamples; v1 cropped, resampled and normalised, and set what lies outside the mask to zero.
Which of the two a model needs is written in its ``plans.json``, so that trainings that continue it keep to it.

`preprocess` does for predictions what `preprocessor_of` has nnU-Net's own classes do, in less time and memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.preprocessing.normalization.default_normalization_schemes import (
    CTNormalization,
    ImageNormalization,
    NoNormalization,
    RescaleTo01Normalization,
    RGBTo01Normalization,
    ZScoreNormalization,
)
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.preprocessing.resampling.default_resampling import (
    compute_new_shape,
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from scipy.ndimage import binary_fill_holes

from mshub.errors import ModelFolderError
from mshub.geometry import Array
from mshub.nnunet.body import Box, body_box
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.resampling import resample

_STD_FLOOR = 1e-8  # v1 adds it, v2 takes the maximum
_VOXELWISE = CTNormalization, NoNormalization  # and never reverse the order of two values
_NORMALISATIONS = {
    scheme.__name__: scheme
    for scheme in (*_VOXELWISE, RescaleTo01Normalization, RGBTo01Normalization, ZScoreNormalization)
}
_CUBIC = {"is_seg": False, "order": 3, "order_z": 0}  # what `mshub.nnunet.resampling` can do; nnU-Net's default
_SEPARATION = {"force_separate_z": False, "separate_z_anisotropy_threshold": ANISO_THRESHOLD}


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


def preprocess(
    folder: ModelFolder, data: Array, properties: dict[str, Any], *, body_only: bool = False
) -> tuple[Array, dict[str, Any]]:
    """Prepare an image for a prediction; what `preprocessor_of` gives, to the rounding of float32.

    Parameters
    ----------
    folder : ModelFolder
    data : ndarray, axes (channel, z, y, x)
        As nnU-Net's reader returns it. It is not changed.
    properties : dict
        nnU-Net's properties; needs ``spacing`` (z, y, x in mm).
    body_only : bool
        Leave out what is not the body, where the model is for CT; nnU-Net itself only leaves out zeros.

    Returns
    -------
    data : ndarray, float32, axes (channel, *network axes)
    properties : dict
        With what nnU-Net's export needs: shapes in network axes before and after cropping, and the bounding box.
    """
    data = data.astype(np.float32, copy=False)
    frame = _Frame.of(folder, data, properties["spacing"], body_only) if _is_stock(folder) else None
    if frame is None or 0 in frame.shape:
        prepared, _, properties = preprocessor_of(folder).run_case_npy(
            data, None, dict(properties), folder.plans_manager, folder.configuration_manager, folder.dataset
        )
        return prepared, properties
    prepared = np.empty((len(data), *frame.shape), np.float32)
    prepare = _prepare_as_v1 if folder.predicts_as_v1 else _prepare
    prepare(folder, frame, data, prepared)
    return prepared, {**properties, **frame.properties(data)}


@dataclass(frozen=True)
class _Frame:
    """How an image gets from its own grid to the network's: axes are permuted, air is cropped, the rest resampled.

    Attributes
    ----------
    forward : list of int
        The network's axes, as axes (z, y, x).
    box : list of [start, stop]
        Of the nonzero voxels, network axes.
    spacing, target_spacing : list of float
        Before and after resampling, network axes, mm.
    shape : tuple of int
        After resampling.
    separate_axis : int or None
        Network axis along which the slices are too thick for splines.
    """

    forward: list[int]
    box: list[list[int]]
    spacing: list[float]
    target_spacing: list[float]
    shape: tuple[int, ...]
    separate_axis: int | None

    @classmethod
    def of(cls, folder: ModelFolder, data: Array, spacing_zyx: list[float], body_only: bool = False) -> _Frame:
        forward, configuration = folder.plans_manager.transpose_forward, folder.configuration_manager
        box_zyx = _nonzero_box(data)
        if body_only:
            box_zyx = _common(box_zyx, _body_box(folder, data, spacing_zyx))
        box, spacing = [box_zyx[axis] for axis in forward], [spacing_zyx[axis] for axis in forward]
        target = [*spacing[: 3 - len(configuration.spacing)], *configuration.spacing]  # a 2d network takes any slices
        shape = compute_new_shape([stop - start for start, stop in box], spacing, target)
        separation = {**_SEPARATION, **configuration.resampling_fn_data.keywords}
        _, axis = determine_do_sep_z_and_axis(
            *(separation["force_separate_z"], spacing, target, separation["separate_z_anisotropy_threshold"])
        )
        return cls(forward, box, spacing, target, tuple(shape.tolist()), axis)

    def view(self, channel: Array) -> Array:
        """Return the part of a channel that is resampled, in network axes."""
        return channel.transpose(self.forward)[tuple(slice(*edges) for edges in self.box)]

    def copy(self, channel: Array) -> Array:
        """Return a copy of the same, as far apart in memory as nnU-Net has it: means are rounded accordingly."""
        copied = self.view(np.empty_like(channel))
        copied[...] = self.view(channel)
        return copied

    def properties(self, data: Array) -> dict[str, Any]:
        return {
            "shape_before_cropping": tuple(data.shape[1 + axis] for axis in self.forward),
            "bbox_used_for_cropping": self.box,
            "shape_after_cropping_and_before_resampling": self.view(data[0]).shape,
        }

    def outside(self, data: Array) -> Array:
        """Return -1 where every channel is zero and no hole, else 0, as nnU-Net marks it; int8, network axes."""
        filled = binary_fill_holes(self.view(data.any(axis=0)))  # what the box leaves out cannot be a hole
        return np.where(filled, np.int8(0), np.int8(-1))


def _is_stock(folder: ModelFolder) -> bool:
    """Whether the model is preprocessed by classes and functions this module knows."""
    configuration = folder.configuration_manager
    resampling = configuration.resampling_fn_data
    return (
        type(preprocessor_of(folder)) in (DefaultPreprocessor, V1Preprocessor)
        and set(configuration.normalization_schemes) <= set(_NORMALISATIONS)
        and resampling.func is resample_data_or_seg_to_shape
        and {**_CUBIC, **resampling.keywords}.items() >= _CUBIC.items()
        and set(resampling.keywords) <= {*_CUBIC, *_SEPARATION}
    )


def _nonzero_box(data: Array) -> list[list[int]]:
    """Return [start, stop] along each axis of the voxels that are not zero in every channel; of all if none is."""
    box: list[list[int]] = []
    for axis, size in enumerate(data.shape[1:], 1):
        planes = np.moveaxis(data[(slice(None), *(slice(*edges) for edges in box))], axis, 0)
        start = next((place for place in range(size) if planes[place].any()), None)
        if start is None:
            return [[0, size] for size in data.shape[1:]]
        stop = next(place for place in range(size, start, -1) if planes[place - 1].any())
        box.append([start, stop])
    return box


def _body_box(folder: ModelFolder, data: Array, spacing_zyx: list[float]) -> Box | None:
    """Return where the body is in a CT image; None without one, or where other voxels decide how it is normalised."""
    schemes = folder.configuration_manager.normalization_schemes
    if CTNormalization.__name__ not in schemes or not {scheme.__name__ for scheme in _VOXELWISE} >= set(schemes):
        return None
    return body_box(data[schemes.index(CTNormalization.__name__)], spacing_zyx)


def _common(box: Box, other: Box | None) -> Box:
    """Return what two boxes have in common; the first if they do not meet, or there is no other."""
    common = [[max(one[0], two[0]), min(one[1], two[1])] for one, two in zip(box, other or box, strict=True)]
    return common if all(start < stop for start, stop in common) else box


def _prepare(folder: ModelFolder, frame: _Frame, data: Array, prepared: Array) -> None:
    """Normalise and resample the channels of `data` into `prepared`, as v2 does."""
    normalisers = [_normaliser(folder, number) for number in range(len(data))]
    uses_outside = any(type(each) is ZScoreNormalization and each.use_mask_for_norm for each in normalisers)
    outside = frame.outside(data) if uses_outside else None
    for channel, normaliser, result in zip(data, normalisers, prepared, strict=True):
        if isinstance(normaliser, _VOXELWISE):
            resample(frame.view(channel), frame.shape, frame.separate_axis, prepare=normaliser.run, out=result)
        else:
            normalised = normaliser.run(frame.copy(channel), outside)
            resample(normalised, frame.shape, frame.separate_axis, out=result)


def _normaliser(folder: ModelFolder, number: int) -> ImageNormalization:
    configuration = folder.configuration_manager
    return _NORMALISATIONS[configuration.normalization_schemes[number]](
        use_mask_for_norm=configuration.use_mask_for_norm[number],
        intensityproperties=folder.plans_manager.foreground_intensity_properties_per_channel[str(number)],
    )


def _prepare_as_v1(folder: ModelFolder, frame: _Frame, data: Array, prepared: Array) -> None:
    """Resample and normalise the channels of `data` into `prepared`, as v1 did."""
    configuration = folder.configuration_manager
    statistics = folder.plans_manager.foreground_intensity_properties_per_channel
    uses_mask = configuration.use_mask_for_norm
    inside = _resampled_inside(folder, frame, data) if any(uses_mask) else None
    for number, (channel, result) in enumerate(zip(data, prepared, strict=True)):
        if frame.view(channel).shape == frame.shape:
            resampled = frame.copy(channel)
        else:
            resampled = resample(frame.view(channel), frame.shape, frame.separate_axis, out=result)
        scheme = configuration.normalization_schemes[number]
        _normalise(resampled, scheme, inside if uses_mask[number] else None, statistics[str(number)])
        if resampled is not result:
            result[...] = resampled


def _resampled_inside(folder: ModelFolder, frame: _Frame, data: Array) -> Array:
    """Return where the resampled image counts; bool, network axes."""
    outside = frame.outside(data)[None]
    resampled = folder.configuration_manager.resampling_fn_seg(
        outside, frame.shape, frame.spacing, frame.target_spacing
    )
    inside: Array = resampled[0] >= 0
    return inside


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
