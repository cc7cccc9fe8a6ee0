"""A U-Net's decoder that lets go of what it has used: the same operations in the same order, in less memory.

`UNetDecoder.forward` holds every skip connection until it returns, and the input of a stage until the stage has ended.
At full resolution, where the arrays are large, that is a third of what a pass takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder


def let_go(network: torch.nn.Module) -> None:
    """Let the decoder of a network, for inference, free what it has used; one that is built otherwise stays as it is.

    Parameters
    ----------
    network : Module
        Its ``encoder`` returns a list of skip connections that nobody else needs.
    """
    decoder: Any = getattr(network, "decoder", None)
    if type(decoder) is UNetDecoder and not decoder.deep_supervision and all(map(_is_known, decoder.stages)):
        decoder.forward = partial(_forward, decoder)


def _is_known(stage: torch.nn.Module) -> bool:
    return type(stage) is StackedConvBlocks and all(type(block) is ConvDropoutNormReLU for block in stage.convs)


def _forward(decoder: Any, skips: list[torch.Tensor]) -> torch.Tensor:
    """Do what `UNetDecoder.forward` does; `skips` is empty afterwards."""
    x = skips.pop()
    for up, stage in zip(decoder.transpconvs, decoder.stages, strict=True):
        x = torch.cat((up(x), skips.pop()), 1)
        for layer in _layers(stage):
            x = layer(x)
    logits: torch.Tensor = decoder.seg_layers[-1](x)
    return logits


def _layers(stage: Any) -> Iterator[torch.nn.Module]:
    for block in stage.convs:
        yield from block.all_modules
