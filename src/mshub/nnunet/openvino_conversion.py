"""A torch network as a model of OpenVINO's, that computes what torch computes."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mshub.nnunet.deepest_features import noted_features
from mshub.nnunet.network_agreement import synthetic_probe
from mshub.nnunet.openvino_library import explained, library


def converted_model(network: torch.nn.Module, shape: tuple[int, ...]) -> Any:
    """Return the OpenVINO model of a network for one sample of `shape`."""
    with explained("convert"):
        openvino = library()
        traced = _traced(network.eval(), synthetic_probe(shape))
        with _undisturbed_program():
            model = openvino.convert_model(traced, input=[openvino.PartialShape([1, *shape])])
        _exact_normalisation(model)
        return model


@contextmanager
def _undisturbed_program() -> Iterator[None]:
    """Let OpenVINO convert without taking this program's ``--verbose`` for its own, or leaving its log silenced."""
    root, given = logging.getLogger(), sys.argv
    level, filters, handlers = root.level, list(root.filters), list(root.handlers)
    sys.argv = given[:1]
    try:
        yield
    finally:
        sys.argv = given
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers


def _traced(network: torch.nn.Module, probe: torch.Tensor) -> Any:
    """Record one pass; OpenVINO itself would make six, to check what `agreement` checks."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends to export instead, which takes longer and splits more ops
        return torch.jit.trace(_Outputs(network).eval(), probe, check_trace=False)


class _Outputs(torch.nn.Module):  # type: ignore[misc]
    """What a converted network returns: the logits with the classes last, as OpenVINO computes them, and features."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen: list[torch.Tensor] = []
        with noted_features(self.network, seen.append):
            logits = self.network(x)
        return (logits.movedim(1, -1), *seen)


def _exact_normalisation(model: Any) -> None:
    """Replace OpenVINO's instance normalisation by one whose sums run over one axis at a time.

    OpenVINO keeps one float32 sum per channel. Over the millions of voxels of a patch each addition is rounded to a
    fraction of the whole sum, and over many equal voxels (air) always in the same direction. Rows, then columns, then
    slices have a few hundred terms each: as exact as torch, for 4 % more time.
    """
    for node in list(model.get_ordered_ops()):
        if node.get_type_name() != "MVN" or not node.get_attributes()["normalize_variance"]:
            continue
        replacement = _normalised(node.input_value(0), node.get_attributes()["eps"])
        for consumer in node.output(0).get_target_inputs():
            consumer.replace_source_output(replacement.output(0))
    model.validate_nodes_and_infer_types()


def _normalised(value: Any, epsilon: float) -> Any:
    """Return the node of (value - mean) / sqrt(variance + epsilon) over the spatial axes."""
    from openvino import opset8 as op

    centred = op.subtract(value, _mean(value))
    variance = _mean(op.multiply(centred, centred).output(0))
    return op.multiply(centred, op.divide(np.float32(1), op.sqrt(op.add(variance, np.float32(epsilon)))))


def _mean(value: Any) -> Any:
    """Return the node of the mean over the spatial axes, one after the other, the last one first.

    Means and sums in turn, because OpenVINO merges reductions of one kind into one that runs over all axes.
    """
    from openvino import opset8 as op

    shape = value.get_shape()
    for axis in reversed(range(2, len(shape))):
        if (len(shape) - axis) % 2:
            node = op.reduce_mean(value, np.array([axis]), keep_dims=True)
        else:
            total = op.reduce_sum(value, np.array([axis]), keep_dims=True)
            node = op.multiply(total, np.float32(1 / shape[axis]))
        value = node.output(0)
    return node
