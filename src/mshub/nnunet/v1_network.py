"""The network of nnU-Net v1, inferred from its weights, and those weights under v2's names.

v1's ``Generic_UNet`` with strided and transposed convolutions is a ``PlainConvUNet`` of
``dynamic_network_architectures`` up to three things: its transposed convolutions and segmentation layers have no
biases (zeros are written), its decoder at resolution s has the kernels of resolution s + 1 (the smaller of the two is
embedded in zeros, which changes nothing under 'same' padding), and its blocks have other names. What has no twin is
refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from mshub.errors import ModelFolderError
from mshub.label_rules import listed

Weights = Mapping[str, torch.Tensor]
Shape = tuple[int, ...]

_BLOCK = re.compile(
    r"conv_blocks_(?P<part>context|localization)\.(?P<level>\d+)\.(?:(?P<inner>\d)\.)?blocks\.(?P<block>\d+)\."
    r"(?P<layer>conv|instnorm)\.(?P<tensor>weight|bias|running_mean|running_var|num_batches_tracked)"
)
_OTHER = re.compile(r"(?P<layer>tu|seg_outputs)\.(?P<level>\d+)\.(?P<tensor>weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """A network as its weights show it; levels from the full resolution down to the bottleneck.

    Attributes
    ----------
    channels, heads : int
        Input channels; output channels, background included.
    features : tuple of int
        Feature maps per level.
    strides, encoder_kernels : tuple of tuple of int
        Per level, in network-axis order.
    decoder_kernels : tuple of tuple of int
        Per level above the bottleneck.
    convolutions : int
        Convolutions per level.
    batch_norm : bool
        Normalised by batch rather than by instance.
    """

    channels: int
    heads: int
    features: tuple[int, ...]
    strides: tuple[Shape, ...]
    encoder_kernels: tuple[Shape, ...]
    decoder_kernels: tuple[Shape, ...]
    convolutions: int
    batch_norm: bool

    @property
    def kernels(self) -> tuple[Shape, ...]:
        """Kernel per level that holds the encoder's and the decoder's."""
        largest = [
            tuple(map(max, encoder, decoder))
            for encoder, decoder in zip(self.encoder_kernels, self.decoder_kernels, strict=False)
        ]
        return (*largest, self.encoder_kernels[-1])


def infer_architecture(weights: Weights) -> Architecture:
    """Return the network a v1 state dict belongs to.

    Raises
    ------
    ModelFolderError
        It is not v1's network of strided and transposed convolutions; names the tensors that tell.
    """
    _refuse_leftovers(weights)
    encoder, decoder = _blocks(weights, "context"), _blocks(weights, "localization")
    ups = [name for name in weights if name.startswith("tu.")]
    if not ups and decoder:
        raise ModelFolderError(
            "This nnU-Net v1 network has no transposed convolutions (tu.*): it was built with "
            "convolutional_upsampling=False, which is no PlainConvUNet. MSHub cannot import it."
        )
    if not encoder or not decoder or len(decoder) != len(encoder) - 1 or len(ups) != len(decoder):
        raise ModelFolderError(
            f"The weights show {len(encoder)} levels of the encoder, {len(decoder)} of the decoder and {len(ups)} "
            "transposed convolutions. Expected one more level in the encoder: copy the model again."
        )
    counts = {len(blocks) for blocks in (*encoder, *decoder)}
    if len(counts) != 1:
        raise ModelFolderError(
            f"The levels have {listed(sorted(counts))} convolutions; nnU-Net v1 has the same number in all of them."
        )
    if any(f"{block}.instnorm.weight" not in weights for blocks in (*encoder, *decoder) for block in blocks):
        raise ModelFolderError("The network has convolutions without normalisation, which MSHub cannot import.")
    heads = weights[f"seg_outputs.{len(decoder) - 1}.weight"]
    transposed = [tuple(weights[f"tu.{number}.weight"].shape[2:]) for number in range(len(ups))]
    return Architecture(
        channels=weights[f"{encoder[0][0]}.conv.weight"].shape[1],
        heads=heads.shape[0],
        features=tuple(weights[f"{blocks[-1]}.conv.weight"].shape[0] for blocks in encoder),
        strides=((1,) * len(transposed[0]), *reversed(transposed)),
        encoder_kernels=tuple(_kernel(weights, blocks) for blocks in encoder),
        decoder_kernels=tuple(_kernel(weights, blocks) for blocks in reversed(decoder)),
        convolutions=counts.pop(),
        batch_norm=f"{encoder[0][0]}.instnorm.running_mean" in weights,
    )


def convert_weights(weights: Weights, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Return a v1 state dict as the state dict of v2's ``PlainConvUNet``.

    Parameters
    ----------
    weights : mapping
        Of v1, without ``module.``.
    architecture : Architecture
        As `infer_architecture` returns it.

    Returns
    -------
    dict of str to Tensor
        Every tensor under all the names v2 has for it.
    """
    converted: dict[str, torch.Tensor] = {}
    kernels = architecture.kernels
    for level, blocks in enumerate(_blocks(weights, "context")):
        for number, block in enumerate(blocks):
            tensors = _block_tensors(weights, block, f"stages.{level}.0.convs.{number}", kernels[level])
            for part in ("encoder", "decoder.encoder"):
                converted |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
    depth = len(architecture.features) - 1
    for up, blocks in enumerate(_blocks(weights, "localization")):
        for number, block in enumerate(blocks):
            converted |= _block_tensors(weights, block, f"decoder.stages.{up}.convs.{number}", kernels[depth - 1 - up])
        converted |= _with_bias(weights, f"tu.{up}", f"decoder.transpconvs.{up}", outputs_axis=1)
        head = f"seg_outputs.{up}.weight"
        heads = weights if head in weights else {head: _no_head(architecture, depth - 1 - up, weights)}
        converted |= _with_bias(heads, f"seg_outputs.{up}", f"decoder.seg_layers.{up}", outputs_axis=0)
    return converted


def _no_head(architecture: Architecture, level: int, weights: Weights) -> torch.Tensor:
    """Return zeros for a head of a lower resolution that a release left out: only trainings look at those."""
    dimension = len(architecture.strides[0])
    like = next(iter(weights.values()))
    return like.new_zeros((architecture.heads, architecture.features[level], *(1,) * dimension))


def architecture_plan(architecture: Architecture) -> dict[str, Any]:
    """Return a network as v2's ``plans.json`` describes it."""
    dimension = len(architecture.strides[0])
    norm = ("batchnorm.BatchNorm" if architecture.batch_norm else "instancenorm.InstanceNorm") + f"{dimension}d"
    levels = len(architecture.features)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": levels,
            "features_per_stage": list(architecture.features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
            "kernel_sizes": [list(kernel) for kernel in architecture.kernels],
            "strides": [list(stride) for stride in architecture.strides],
            "n_conv_per_stage": [architecture.convolutions] * levels,
            "n_conv_per_stage_decoder": [architecture.convolutions] * (levels - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.{norm}",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _refuse_leftovers(weights: Weights) -> None:
    unknown = [name for name in weights if not _BLOCK.fullmatch(name) and not _OTHER.fullmatch(name)]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ModelFolderError(
            f"The network has parts that nnU-Net v1's own does not have: {listed(unknown[:3])}{more}. MSHub imports "
            "the networks of nnU-Net v1's own trainers only."
        )


def _blocks(weights: Weights, part: str) -> list[list[str]]:
    """Return the names of the blocks of a path through the network, per level, in the order of computation."""
    levels: dict[int, dict[tuple[int, int], str]] = {}
    for name in weights:
        match = _BLOCK.fullmatch(name)
        if match and match["part"] == part and match["tensor"] == "weight" and match["layer"] == "conv":
            place = (int(match["inner"] or 0), int(match["block"]))
            levels.setdefault(int(match["level"]), {})[place] = name.removesuffix(".conv.weight")
    if sorted(levels) != list(range(len(levels))):
        raise ModelFolderError(f"Levels of the network are missing: the weights have {listed(sorted(levels))}.")
    return [[levels[level][place] for place in sorted(levels[level])] for level in range(len(levels))]


def _kernel(weights: Weights, blocks: list[str]) -> Shape:
    sizes = {tuple(weights[f"{block}.conv.weight"].shape[2:]) for block in blocks}
    kernel = sizes.pop()
    if sizes or any(size % 2 == 0 for size in kernel):
        raise ModelFolderError(f"{blocks[0]} has kernels {listed([kernel, *sizes])}; expected one odd size per level.")
    return kernel


def _block_tensors(weights: Weights, block: str, name: str, kernel: Shape) -> dict[str, torch.Tensor]:
    """Return the tensors of one convolution and its normalisation under both names v2 has for each."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, target, position in (("conv", "conv", 0), ("instnorm", "norm", 1)):
        prefix = f"{block}.{layer}."
        for key in [key for key in weights if key.startswith(prefix)]:
            tensor, last = weights[key], key.removeprefix(prefix)
            if (layer, last) == ("conv", "weight"):
                tensor = _embedded(tensor, kernel)
            tensors[f"{name}.{target}.{last}"] = tensors[f"{name}.all_modules.{position}.{last}"] = tensor
    return tensors


def _embedded(weight: torch.Tensor, kernel: Shape) -> torch.Tensor:
    """Return a convolution's weight centred in zeros; axes (out, in, *kernel)."""
    margins = [(wanted - size) // 2 for wanted, size in zip(kernel, weight.shape[2:], strict=True)]
    embedded: torch.Tensor = pad(weight, [margin for margin in reversed(margins) for _ in range(2)])
    return embedded


def _with_bias(weights: Weights, name: str, target: str, *, outputs_axis: int) -> dict[str, torch.Tensor]:
    weight = weights[f"{name}.weight"]
    bias = weights.get(f"{name}.bias")
    zeros = torch.zeros(weight.shape[outputs_axis], dtype=weight.dtype)
    return {f"{target}.weight": weight, f"{target}.bias": zeros if bias is None else bias}
