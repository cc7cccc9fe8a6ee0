"""A network on a GPU: nnU-Net's own precision, in the layout that matrix units read, without waiting for Python.

Some things differ from calling the network, and none of them by more than half precision rounds anyway:

- channels lie last in memory, as the convolutions' fast kernels want them; nnU-Net's layout is turned before and after
  every one of them;
- instance normalisation is done as batch normalisation of a batch of one, which is the same sum: torch's own turns the
  channels first again, and its kernel takes nearly half of the time of a pass;
- the bias of a convolution whose output is normalised is left out, since the mean that is subtracted holds it; adding
  it is a pass over the memory of its own;
- the kernels of a pass are recorded once, as a CUDA graph, and then started together. A small network takes longer to
  be started kernel by kernel than to be computed.

Batches of mirrored copies are not made: they bring less than the graph does, and take the memory of as many passes.

A network belongs to one thread at a time; `mshub.nnunet.network_cache` holds the lock of the device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch

from mshub.nnunet.deepest_features import noted_features

logger = logging.getLogger(__name__)

PASSES_BEFORE_RECORDING = 2
"""cuDNN chooses its kernels in the first pass, and memory is set aside."""


class CUDANetwork:
    """A network with the weights of one fold, for tiles of one shape.

    Parameters
    ----------
    network : torch.nn.Module
        With its weights; is changed and belongs to this object from now on.
    shape : sequence of int
        (channel, *patch), the only shape of a tile.
    device : torch.device
        A GPU. Any other device works too, without recording.

    Attributes
    ----------
    encoder : torch.nn.Identity or None
        Every pass hands the deepest features of the encoder, axes (1, feature, *deepest grid), to this module, so that
        a forward hook sees them as it does in the torch network. None for a network that has no ``encoder``.
    """

    def __init__(self, network: torch.nn.Module, shape: Sequence[int], device: torch.device) -> None:
        layout = torch.channels_last_3d if len(shape) == 4 else torch.channels_last
        self._network = instance_norms_as_batch_norms(network).to(device, memory_format=layout).eval()
        if device.type == "cuda":
            _halve_convolutions(self._network)
        self._device = device
        self._tile = torch.empty((1, *shape), device=device, memory_format=layout)
        self._features: torch.Tensor | None = None
        self._recorded: tuple[torch.cuda.CUDAGraph, torch.Tensor] | None = None
        self._may_record = device.type == "cuda"
        self._recorded_nbytes = 0
        self.encoder = torch.nn.Identity() if hasattr(network, "encoder") else None

    @property
    def nbytes(self) -> int:
        """Size of the weights, and of what a recorded pass keeps between input and output."""
        weights: int = sum(weights.nbytes for weights in self._network.parameters())
        return weights + self._recorded_nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of a tile.

        Parameters
        ----------
        x : Tensor, on the device, axes (1, channel, *patch)

        Returns
        -------
        Tensor, axes (1, class, *patch)
            The next pass overwrites it. Half precision on a GPU, as nnU-Net computes there.
        """
        self._tile.copy_(x)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            if self._recorded is None and self._may_record:
                self._record()
            if self._recorded is None:
                output = self._pass()
            else:
                graph, output = self._recorded
                graph.replay()
        if self.encoder is not None:
            self.encoder(self._features)
        return output

    def release(self) -> None:
        """Do nothing: the memory of a recorded pass is counted in `nbytes`, and kept with the network."""

    def _pass(self) -> torch.Tensor:
        half = torch.autocast("cuda", cache_enabled=False) if self._device.type == "cuda" else nullcontext()
        with half, noted_features(self._network, self._note_features):
            output: torch.Tensor = self._network(self._tile)
        return output

    def _record(self) -> None:
        """Record a pass; a network that cannot be recorded runs kernel by kernel."""
        self._may_record = False
        before, graph = _reserved(self._device), torch.cuda.CUDAGraph()
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(PASSES_BEFORE_RECORDING):
                    self._pass()
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads use other devices
                output = self._pass()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning("a pass cannot be recorded (%s); it is slower for a small network", error)
            return
        self._recorded = graph, output
        self._recorded_nbytes = max(0, _reserved(self._device) - before)

    def _note_features(self, features: torch.Tensor) -> None:
        self._features = features


def _reserved(device: torch.device) -> int:
    """Return the memory torch holds on a device, without what it could give back."""
    torch.cuda.empty_cache()
    reserved: int = torch.cuda.memory_reserved(device)
    return reserved


class _InstanceNorm(torch.nn.Module):  # type: ignore[misc]
    """Instance normalisation of a batch of one."""

    def __init__(self, norm: torch.nn.InstanceNorm2d | torch.nn.InstanceNorm3d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise by the mean and variance of this very batch."""
        if len(x) != 1:
            raise ValueError(f"One tile at a time can be normalised; found {len(x)}.")
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, cudnn)


def _halve_convolutions(network: torch.nn.Module) -> None:
    """Keep the weights of convolutions in half precision, as autocast would round them in every pass."""
    for module in network.modules():
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            module.half()


def instance_norms_as_batch_norms(network: torch.nn.Module) -> torch.nn.Module:
    """Replace the instance normalisations of a network, in place, and drop the biases they cancel. Returns `network`.

    The names of all other weights stay.
    """
    for module in list(network.modules()):
        if isinstance(module, torch.nn.Sequential):
            _drop_cancelled_biases(module)
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if _normalises_a_tile(layer):
                setattr(module, name, _InstanceNorm(layer))
    return network


def _drop_cancelled_biases(layers: torch.nn.Sequential) -> None:
    """Drop the bias of every convolution that a normalisation follows; dropout between them does nothing here."""
    active = [layer for layer in layers if not isinstance(layer, torch.nn.modules.dropout._DropoutNd)]
    for layer, following in pairwise(active):
        if isinstance(layer, torch.nn.modules.conv._ConvNd) and _normalises_a_tile(following):
            layer.bias = None


def _normalises_a_tile(layer: torch.nn.Module) -> bool:
    norms = (torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d)
    return isinstance(layer, norms) and not layer.track_running_stats
