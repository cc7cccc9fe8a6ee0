"""A network run by OpenVINO on the CPU in place of torch: the same weights, the same float32, in less time.

OpenVINO is an extra: without it this module can be imported and `is_installed` is false. `prepared` is what an engine
calls; when it raises, torch still runs the network.

Three things are not as OpenVINO does them by itself, and each of them changes labels:

- the precision is asked for, because OpenVINO otherwise computes in bfloat16 where a CPU can;
- sums over a whole patch are split by axis (see `_exact_normalisation`), because OpenVINO adds the voxels of a channel
  one by one in float32: where a third of a patch was air, logits were off by up to 4 % of their spread;
- a network is compared with torch before it is used (`agreement`).

A network belongs to one thread at a time; `mshub.nnunet.network_cache` holds the lock of the device.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mshub.atomic_file import replacing
from mshub.errors import PredictionError

logger = logging.getLogger(__name__)

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
SUFFIX = ".openvino"
CONVERSION = 1
"""Counted up when the same network would be converted otherwise: what is kept on disk is then made anew."""
PRECISION = "f32"
PROBE_SEED, PROBE_KNOTS, PROBE_AIR = 7, 5, -1.2
TINY = 1e-12
_CONVERTERS = ("torch", "dynamic_network_architectures")


def is_installed() -> bool:
    """Return whether OpenVINO can be imported here; it is not imported to find out."""
    return importlib.util.find_spec("openvino") is not None


class OpenVINONetwork:
    """A network with the weights of one fold, for inputs of one shape.

    A batch is computed sample by sample: larger batches were not faster, and a model that takes any size of batch was
    half as slow again.

    Parameters
    ----------
    model : openvino.Model
        As `converted` makes it: the logits with the classes last, and the encoder's deepest features if it has any.

    Attributes
    ----------
    shape : tuple of int
        (channel, *patch), the only shape of an input.
    encoder : torch.nn.Identity or None
        Every pass hands the deepest features of the encoder, float32, axes (batch, feature, *deepest grid), to this
        module, so that a forward hook sees them as it does in the torch network. None for a network that has no
        ``encoder``.
    nbytes : int
        Size of the weights. OpenVINO holds them twice, and after the first pass also the memory of a pass: see
        `release`.
    """

    def __init__(self, model: Any) -> None:
        with _explained("run"):
            compiled = _core().compile_model(model, "CPU", _settings())
            self.shape = tuple(int(edge) for edge in compiled.input(0).shape)[1:]
            self.encoder = torch.nn.Identity() if len(compiled.outputs) > 1 else None
            self.nbytes = _weights_nbytes(model)
            self._request = compiled.create_infer_request()

    @classmethod
    def converted(cls, network: torch.nn.Module, shape: Sequence[int]) -> OpenVINONetwork:
        """Convert `network`; takes about as long as one pass of it.

        Parameters
        ----------
        network : torch.nn.Module
            On the CPU, in float32; is set to evaluation.
        shape : sequence of int
            (channel, *patch).

        Raises
        ------
        PredictionError
            OpenVINO is missing or cannot run this network, or memory was short.
        """
        return cls(_converted(network, tuple(shape)))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of `x`.

        Parameters
        ----------
        x : Tensor, float32 on the CPU, axes (batch, channel, *patch)

        Returns
        -------
        Tensor, float32, axes (batch, class, *patch)
            Contiguous, and the caller's own: the next pass does not touch it.

        Raises
        ------
        PredictionError
            The shape is another one, or OpenVINO failed.
        """
        if tuple(x.shape[1:]) != self.shape or not len(x):
            raise PredictionError(
                f"The network was converted for inputs of shape (batch, {', '.join(map(str, self.shape))}); this one "
                f"has {tuple(x.shape)}. Convert it for that shape, or let torch run it."
            )
        with _explained("run"):
            logits, features = zip(*(self._pass(sample) for sample in x.float().split(1)), strict=True)
        if self.encoder is not None:
            self.encoder(torch.cat(features) if len(features) > 1 else features[0])
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def release(self) -> None:
        """Give back the memory of what lies between input and output: most of it; the next pass takes it again."""
        self._request.get_compiled_model().release_memory()

    def _pass(self, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits and deepest features of one sample, copied out of the memory of the next pass."""
        found = self._request.infer({0: sample.detach().contiguous().numpy()}, share_inputs=True, share_outputs=True)
        features = None if self.encoder is None else torch.from_numpy(found[1]).clone()
        return _classes_first(torch.from_numpy(found[0])), features


def prepared(
    network: torch.nn.Module, shape: Sequence[int], *, cache: Path | None = None, has_regions: bool = False
) -> OpenVINONetwork:
    """Return `network` for OpenVINO, compared with torch: from `cache` if it was prepared on this CPU before.

    Parameters
    ----------
    network : torch.nn.Module
        On the CPU, in float32, with the weights of one fold loaded; is set to evaluation.
    shape : sequence of int
        (channel, *patch).
    cache : Path, optional
        A folder, made if needed, that the caller deletes with the weights: one file of about their size for every
        fold, shape, CPU and version of OpenVINO. Only what passed the comparison is kept. As with a checkpoint,
        whoever can write there decides what is computed. A damaged file is replaced; a folder that cannot be written
        only costs the time.
    has_regions : bool
        See `agreement`.

    Raises
    ------
    PredictionError
        OpenVINO is missing, cannot run this network, or computes something else than torch. Let torch run it.
    """
    shape = tuple(shape)
    kept = _Kept(cache, _key(network, shape)) if cache is not None else None
    if kept is not None and (found := kept.network()) is not None:
        return found
    model = _converted(network, shape)
    fresh = OpenVINONetwork(model)
    reached = agreement(network, fresh, has_regions=has_regions)
    if reached.refused:
        raise PredictionError(reached.refused)
    logger.info("OpenVINO agrees with torch: %s", reached)
    if kept is not None:
        kept.write(model)
    return fresh


# -- comparing --------------------------------------------------------------------------------------------------------


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


def agreement(
    torch_network: torch.nn.Module,
    openvino_network: OpenVINONetwork,
    probe: torch.Tensor | None = None,
    *,
    has_regions: bool = False,
) -> Agreement:
    """Compare what torch and OpenVINO make of an input.

    Parameters
    ----------
    torch_network : torch.nn.Module
        Is set to evaluation.
    openvino_network : OpenVINONetwork
    probe : Tensor, float32, axes (batch, channel, *patch), optional
        By default `synthetic_probe`.
    has_regions : bool
        Each channel of the output decides by itself, where it is positive; otherwise the largest channel does.

    Raises
    ------
    PredictionError
        One of them failed.
    """
    probe = synthetic_probe(openvino_network.shape) if probe is None else probe
    with _explained("compare"), torch.inference_mode():
        expected, expected_features = _watched(torch_network.eval(), probe)
        found, found_features = _watched(openvino_network, probe)
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
    with _deepest_features(network, seen):
        logits = network(probe)
    return logits, seen[-1] if seen else None


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the largest difference in standard deviations of `expected`; NaN if one of them is not finite."""
    spread = expected.double().std(correction=0).clamp_min(TINY)
    return float((found - expected).abs().max() / spread)


def _decisions(logits: torch.Tensor, has_regions: bool) -> torch.Tensor:
    return logits > 0 if has_regions else logits.max(1, keepdim=True).indices


# -- converting -------------------------------------------------------------------------------------------------------


def _openvino() -> Any:
    """Import OpenVINO, which reports its use to its makers unless the package that sends the reports is missing."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@cache
def _core() -> Any:
    """Return the one core of this process.

    A core gives the thread it is made in a stack for signals, and takes the memory away when it is deleted: after a
    few of them the next signal, SIGTERM say, would be answered on memory that is gone, and end the process.
    """
    return _openvino().Core()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say in a sentence what failed; OpenVINO, torch and numpy raise nearly anything."""
    try:
        yield
    except PredictionError:
        raise
    except ModuleNotFoundError as error:
        raise PredictionError(
            f"OpenVINO is not installed ({error}). Install the package openvino, or let torch run the network."
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise PredictionError(
            f"OpenVINO could not {what} the network ({type(error).__name__}: {reason}). Let torch run it."
        ) from error


def _settings() -> dict[str, Any]:
    """Return the settings of a compiled model: as exact as torch, and with as many threads as torch has now.

    Not pinned to cores: two processes of one machine would be pinned to the same ones.
    """
    return {
        "INFERENCE_PRECISION_HINT": PRECISION,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,
    }


def _converted(network: torch.nn.Module, shape: tuple[int, ...]) -> Any:
    """Return the OpenVINO model of a network for one sample of `shape`."""
    with _explained("convert"):
        openvino = _openvino()
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
        with _deepest_features(self.network, seen):
            logits = self.network(x)
        return (logits.movedim(1, -1), *seen)


@contextmanager
def _deepest_features(network: Any, seen: list[torch.Tensor]) -> Iterator[None]:
    """Note what the encoder returns last, while the block runs."""

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append(output[-1] if isinstance(output, (list, tuple)) else output)

    encoder = getattr(network, "encoder", None)
    if encoder is None:
        yield
        return
    hook = encoder.register_forward_hook(note)
    try:
        yield
    finally:
        hook.remove()


def _classes_first(logits: torch.Tensor) -> torch.Tensor:
    """Return a copy with the axes (1, class, *spatial) of one with (1, *spatial, class).

    Through two axes only: torch copies those in blocks, three times as fast as five.
    """
    _, *spatial, classes = logits.shape
    return logits.reshape(-1, classes).t().clone(memory_format=torch.contiguous_format).reshape(1, classes, *spatial)


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


def _weights_nbytes(model: Any) -> int:
    """Return the size of a model's constants."""
    return sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")


# -- keeping ----------------------------------------------------------------------------------------------------------


def _key(network: torch.nn.Module, shape: tuple[int, ...]) -> str:
    """Return the sha256 of everything that what is kept depends on: weights, architecture, shape, versions, CPU."""
    with _explained("identify"):
        digest = hashlib.sha256(repr((CONVERSION, PRECISION, shape, _versions(), _cpu())).encode())
        digest.update(f"{type(network).__module__}.{network!r}".encode())
        for name, tensor in network.state_dict().items():
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def _versions() -> list[str]:
    return [_openvino().get_version(), *map(_version, _CONVERTERS)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu() -> str:
    """Return what OpenVINO knows of the CPU: what is kept was compared with torch on that one."""
    core = _core()
    known = chain([core.get_property("CPU", "FULL_DEVICE_NAME")], core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return " ".join(map(str, known))


class _Kept:
    """A converted network on disk: sha256 of key and content, size of the description, description, weights.

    OpenVINO's own format, not the compiled one: compiling takes a fifth of a second, and the format does not depend on
    the CPU.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._path, self._key = folder / f"{key}{SUFFIX}", key

    def network(self) -> OpenVINONetwork | None:
        """Return what is kept; None if nothing is, or it is damaged."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s cannot be read (%s); the network is converted again", self._path, error.strerror)
            return None
        try:
            return self._opened(memoryview(content))
        except PredictionError as error:
            logger.warning("%s is damaged and is replaced: %s", self._path, error)
            return None

    def _opened(self, content: memoryview) -> OpenVINONetwork:
        digest, rest = bytes(content[:32]), content[32:]
        if digest != self._digest(rest):
            raise PredictionError("Its checksum is another one.")
        with _explained("read"):
            openvino = _openvino()
            end = 8 + int.from_bytes(rest[:8], "little")
            weights = openvino.Tensor(np.frombuffer(rest[end:], np.uint8))
            return OpenVINONetwork(_core().read_model(bytes(rest[8:end]), weights))

    def write(self, model: Any) -> None:
        """Keep a model; that it cannot be kept is logged, no more."""
        try:
            description, weights = self._serialised(model)
            rest = len(description).to_bytes(8, "little") + description + weights
            with replacing(self._path) as stream:
                stream.write(self._digest(memoryview(rest)))
                stream.write(rest)
        except (OSError, RuntimeError, MemoryError) as error:
            logger.warning("the converted network is not kept in %s: %s", self._path.parent, error)

    def _serialised(self, model: Any) -> tuple[bytes, bytes]:
        """Return description and weights; OpenVINO writes only to files, and halves the precision if not told."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._path.parent, prefix=".", suffix=".part") as scratch:
            file = Path(scratch) / "model.xml"
            _openvino().save_model(model, file, compress_to_fp16=False)
            return file.read_bytes(), file.with_suffix(".bin").read_bytes()

    def _digest(self, rest: memoryview) -> bytes:
        digest = hashlib.sha256(self._key.encode())
        digest.update(rest)
        return digest.digest()
