"""From logits on the network's grid to labels on the image's: nnU-Net's own label, without its arrays.

nnU-Net interpolates the values of *every* class at *every* voxel of the image, rounds them to half precision, and
takes the largest. Nearly everywhere that is not needed, since linear interpolation is a weighted mean:

1. Every voxel of the network's grid gets its class; it is *unsure* of it if the second class is so close that
   rounding could make them equal.
2. A voxel of the image between voxels of one class, all sure, is of that class: a mean of numbers that are larger is
   larger, and by more than rounding takes.
3. All others, at the surfaces of structures, are interpolated as nnU-Net does: the same operations in the same order,
   rounded to half precision, the first of the largest wins.

Why `MARGIN` steps are enough: two numbers are rounded to different ones if they are further apart than the
representable numbers are there. A class 5 steps below the winner is more than 2.5 times that distance below it, as the
distance is at the winner's value, and the distance at a mean of values is less than twice the mean of their distances.

A region is decided by its own value, so voxels that agree are never unsure: a mean of numbers above a threshold is
above it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)

from mshub.errors import PredictionError
from mshub.nnunet.device_export import write_labels_on_device, write_probabilities
from mshub.nnunet.export_kernels import Axis, find_regions, find_winners, write_labels
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.half_precision import bits_of, check_finite, not_finite
from mshub.nnunet.kernels import in_parts

Array = np.ndarray[Any, Any]

LINEAR = {"is_seg": False, "order": 1, "order_z": 0}
FREE = {"force_separate_z", "separate_z_anisotropy_threshold"}
"""Arguments of nnU-Net's resampling: those that are built in here, and those that are asked of nnU-Net."""


class Export:
    """Label maps of one model folder's logits.

    Parameters
    ----------
    folder : ModelFolder
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._plans, self._configuration = folder.plans_manager, folder.configuration_manager
        self._labels = self._plans.get_label_manager(folder.dataset)

    def label_map(self, logits: torch.Tensor, properties: Mapping[str, Any]) -> Array:
        """Return the label map on the reader's grid.

        Parameters
        ----------
        logits : Tensor, float16 or float32, axes (class, *network axes)
            On any device; stays there.
        properties : mapping
            nnU-Net's, with what its preprocessing wrote.

        Returns
        -------
        ndarray, uint8, or uint16 from 255 structures on, axes (z, y, x)

        Raises
        ------
        PredictionError
            A value is not finite.
        """
        if not self._is_built_in(logits):
            check_finite(logits)
            return self._as_nnunet(logits, properties)
        whole: Array = np.zeros(properties["shape_before_cropping"], self._dtype())
        cropped = whole[tuple(slice(*edges) for edges in properties["bbox_used_for_cropping"])]
        self._fill(cropped, logits, self._axes(logits.shape[1:], properties))
        return whole.transpose(self._plans.transpose_backward)

    def probabilities(self, logits: torch.Tensor, properties: Mapping[str, Any], channels: Sequence[int]) -> Array:
        """Return the probabilities nnU-Net's export would save, of some channels.

        Parameters
        ----------
        logits, properties
            As for `label_map`. Of float32 logits, which nnU-Net v1 averages, the values are probabilities already.
        channels : sequence of int
            Of `logits`.

        Returns
        -------
        ndarray, float32, axes (channel, z, y, x)
            0 where the image was cropped, for the background's channel 1.

        Raises
        ------
        PredictionError
            The model's resampling is not nnU-Net's default.
        """
        if not self._is_built_in(logits):
            raise PredictionError(
                "Probabilities can be exported of models with nnU-Net's default resampling; this one names another in "
                "its plans.json."
            )
        whole = np.zeros((len(channels), *properties["shape_before_cropping"]), np.float32)
        if not self._labels.has_regions:
            whole[[place for place, channel in enumerate(channels) if channel == 0]] = 1
        box = tuple(slice(*edges) for edges in properties["bbox_used_for_cropping"])
        head = torch.sigmoid if self._labels.has_regions else partial(torch.softmax, dim=0)
        head = head if logits.dtype == torch.float16 else torch.Tensor.float
        write_probabilities(
            logits, head, self._axes(logits.shape[1:], properties), channels, whole[(slice(None), *box)]
        )
        return whole.transpose(0, *[1 + axis for axis in self._plans.transpose_backward])

    def _fill(self, out: Array, logits: torch.Tensor, axes: tuple[Axis, Axis, Axis]) -> None:
        codes = np.array(self._codes(), out.dtype)
        unsure = 255 if len(codes) <= 255 else 65535
        threshold = region_threshold() if self._labels.has_regions else float("nan")
        if logits.device.type != "cpu":
            write_labels_on_device(logits, threshold, axes, codes, unsure, out)
            return
        bits = bits_of(logits.contiguous())
        winners = np.empty(bits.shape[1:], np.uint8 if unsure == 255 else np.uint16)
        find = (
            partial(find_regions, bits, threshold, winners)
            if self._labels.has_regions
            else partial(find_winners, bits, winners, unsure)
        )
        if not all(in_parts(find, len(winners))):
            raise not_finite()
        in_parts(partial(write_labels, bits, winners, unsure, threshold, axes, codes, out), len(out))

    def _codes(self) -> list[int]:
        if self._labels.has_regions:
            return [0, *self._labels.regions_class_order]
        return list(range(self._labels.num_segmentation_heads))

    def _dtype(self) -> type:
        return np.uint8 if len(self._labels.foreground_labels) < 255 else np.uint16

    def _axes(self, shape: torch.Size, properties: Mapping[str, Any]) -> tuple[Axis, Axis, Axis]:
        """Return how the image's grid lies in the network's."""
        target = properties["shape_after_cropping_and_before_resampling"]
        if tuple(shape) == tuple(target):
            first, second, third = (nearest_axis(count, count) for count in target)
            return first, second, third
        keywords = self._configuration.resampling_fn_probabilities.keywords
        spacing = [properties["spacing"][axis] for axis in self._plans.transpose_forward]
        network = list(self._configuration.spacing)
        network = network if len(network) == len(spacing) else [spacing[0], *network]
        anisotropy = keywords.get("separate_z_anisotropy_threshold", ANISO_THRESHOLD)
        apart, apart_axis = determine_do_sep_z_and_axis(
            keywords.get("force_separate_z", False), network, spacing, anisotropy
        )
        first, second, third = (
            (nearest_axis if apart and axis == apart_axis else linear_axis)(source, count)
            for axis, (source, count) in enumerate(zip(shape, target, strict=True))
        )
        return first, second, third

    def _is_built_in(self, logits: torch.Tensor) -> bool:
        """Whether the model's resampling is nnU-Net's default; regions are decided in half precision."""
        resampling = self._configuration.resampling_fn_probabilities
        known = LINEAR.items() <= resampling.keywords.items() and resampling.keywords.keys() <= LINEAR.keys() | FREE
        return (
            known
            and getattr(resampling, "func", None) is resample_data_or_seg_to_shape
            and (logits.dtype == torch.float16 or not self._labels.has_regions)
        )

    def _as_nnunet(self, logits: torch.Tensor, properties: Mapping[str, Any]) -> Array:
        segmentation: Array = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits.cpu().numpy(), self._plans, self._configuration, self._labels, properties
        )
        return segmentation


def linear_axis(source: int, target: int) -> Axis:
    """Return the neighbours of each of `target` places among `source`, as `scipy.ndimage.zoom` has them.

    With ``order=1, mode="nearest", grid_mode=True``.
    """
    place = (np.arange(target) + 0.5) * (np.float64(source) / np.float64(target)) - 0.5
    below = np.floor(place)
    far = place - below
    left = np.maximum(below, 0).astype(np.int64)
    right = np.where(far > 0, np.minimum(below + 1, source - 1), left).astype(np.int64)
    return left, right, 1.0 - far, far


def nearest_axis(source: int, target: int) -> Axis:
    """Return the nearest of `source` places for each of `target`, as nnU-Net's resampling along one axis has it."""
    place = np.float64(source) / target * (np.arange(target) + 0.5) - 0.5
    nearest = np.clip(np.floor(place + 0.5), 0, source - 1).astype(np.int64)
    return nearest, nearest, np.ones(target), np.zeros(target)


@lru_cache(maxsize=1)
def region_threshold() -> float:
    """Return from which logit on nnU-Net counts a voxel to a region.

    The first whose sigmoid is more than one half in single precision; it is just above 0.
    """
    halves = torch.arange(1, 2**10, dtype=torch.int16).view(torch.float16)
    return float(halves[torch.sigmoid(halves.float()) > 0.5][0])
