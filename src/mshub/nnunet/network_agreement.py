"""Does another engine compute what torch does? Both get the same input, and their outputs may differ by rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mshub.nnunet.deepest_features import noted_features
from mshub.nnunet.openvino_library import explained

LARGEST_DIFFERENCE = 1e-3
"""How far a logit may be from torch's, in standard deviations of torch's logits.

Rounding alone, measured over networks of 2 to 7 stages in two and three dimensions, random and trained: 3e-6 to 8e-5.
Torch differs as much from itself where it takes another algorithm, and by 3e-4 in a random network whose deepest stage
has two voxels. OpenVINO's own instance normalisation gives 1e-3 to 4e-2, bfloat16 2e-1.
"""
LARGEST_FEATURE_DIFFERENCE = 1e-2
"""The same of the encoder's deepest features.

Measured: 1e-6 to 5e-5, and up to 2e-3 where the deepest stage has two voxels and normalising them magnifies rounding.
"""
MOST_DECISIONS = 1e-3
"""What share of the voxels may get another label: those that are undecided within the rounding.

Measured: none in trained networks, up to 7e-6 in random ones, whose label borders run everywhere; 2e-3 to 3e-2 in
bfloat16. The bound is a few voxels of the smallest patches.
"""
PROBE_SEED, PROBE_KNOTS, PROBE_AIR = 7, 5, -1.2
TINY = 1e-12


@dataclass(frozen=True)
class Agreement:
    """How far OpenVINO's outputs are from torch's, for one input.

    Attributes
    ----------
    difference : float
        The largest difference of a logit, in standard deviations of torch's logits.
    features : float
        The same of the encoder's deepest features; 0 for a network that shows none.
    decisions : float
        Share of the voxels whose label differs.
    """

    difference: float
    features: float
    decisions: float

    @property
    def refused(self) -> str:
        """Why OpenVINO must not run this network, as a sentence; empty if it may."""
        bounds = (LARGEST_DIFFERENCE, LARGEST_FEATURE_DIFFERENCE, MOST_DECISIONS)
        found = (self.difference, self.features, self.decisions)
        if all(value <= bound for value, bound in zip(found, bounds, strict=True)):  # NaN is not
            return ""
        return (
            f"OpenVINO computes something else than torch: {self}; rounding explains {Agreement(*bounds)}. Let torch "
            "run this network."
        )

    def __str__(self) -> str:
        return (
            f"logits differ by {self.difference:.1e} and features by {self.features:.1e} of their spread, labels in "
            f"{self.decisions:.1e} of the voxels"
        )


class OtherNetwork(Protocol):
    """What computes the network in torch's place."""

    shape: tuple[int, ...]
    """(channel, *patch)."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits; hand features to a module ``encoder`` if there is one."""


def agreement(
    torch_network: torch.nn.Module,
    other_network: OtherNetwork,
    probe: torch.Tensor | None = None,
    *,
    has_regions: bool = False,
) -> Agreement:
    """Compare what torch and another engine make of an input.

    Parameters
    ----------
    torch_network : torch.nn.Module
        Is set to evaluation.
    other_network : OtherNetwork
    probe : Tensor, float32, axes (batch, channel, *patch), optional
        By default `synthetic_probe`.
    has_regions : bool
        Each channel of the output decides by itself, where it is positive; otherwise the largest channel does.

    Raises
    ------
    PredictionError
        One of them failed.
    """
    probe = synthetic_probe(other_network.shape) if probe is None else probe
    with explained("compare"), torch.inference_mode():
        expected, expected_features = _watched(torch_network.eval(), probe)
        found, found_features = _watched(other_network, probe)
        features = 0.0
        if expected_features is not None and found_features is not None:
            features = _difference(expected_features, found_features)
        differ = _decisions(expected, has_regions) != _decisions(found, has_regions)
        share = differ.flatten(2).any(1).double().mean()
        return Agreement(_difference(expected, found), features, float(share))


def synthetic_probe(shape: Sequence[int]) -> torch.Tensor:
    """Return smooth structures and noise in normalised units, beside a third of air that is the same everywhere.

    Long runs of one value are in every scan, and are what OpenVINO's sums get wrong.

    Parameters
    ----------
    shape : sequence of int
        (channel, *patch).

    Returns
    -------
    Tensor, float32, axes (1, channel, *patch)
        Always the same for the same shape.
    """
    channels, *patch = shape
    generator = torch.Generator().manual_seed(PROBE_SEED)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(patch)]
    coarse = torch.randn((1, channels, *[PROBE_KNOTS] * len(patch)), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=tuple(patch), mode=mode, align_corners=True)
    probe = 1.5 * smooth + 0.2 * torch.randn((1, channels, *patch), generator=generator)
    probe[..., : patch[-1] // 3] = PROBE_AIR
    return probe


def _watched(network: Any, probe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a network's logits and the deepest features of its encoder, if it has one."""
    seen: list[torch.Tensor] = []
    with noted_features(network, seen.append):
        logits = network(probe)
    return logits, seen[-1] if seen else None


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the largest difference in standard deviations of `expected`; NaN if one of them is not finite."""
    spread = expected.double().std(correction=0).clamp_min(TINY)
    return float((found - expected).abs().max() / spread)


def _decisions(logits: torch.Tensor, has_regions: bool) -> torch.Tensor:
    return logits > 0 if has_regions else logits.max(1, keepdim=True).indices
