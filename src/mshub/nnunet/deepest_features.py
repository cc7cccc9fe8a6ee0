"""What a network's encoder makes of its input in the end: what says how alike two images are to the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def noted_features(network: Any, note: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call `note` with the deepest features of every pass of the network, while the block runs.

    Parameters
    ----------
    network
        A module whose ``encoder``, if it has one, returns its features, the deepest last.
    note : callable
        Gets features, axes (batch, feature, *deepest grid).
    """

    def hear(_module: Any, _inputs: Any, output: Any) -> None:
        note(output[-1] if isinstance(output, (list, tuple)) else output)

    encoder = getattr(network, "encoder", None)
    if encoder is None:
        yield
        return
    hook = encoder.register_forward_hook(hear)
    try:
        yield
    finally:
        hook.remove()
