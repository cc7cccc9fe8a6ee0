"""A network run by OpenVINO on the CPU in place of torch: the same weights, the same float32, in less time.

`prepared` is what an engine calls; when it raises, or where OpenVINO is not installed, torch runs the network.

Three things are not as OpenVINO does them by itself, and each of them changes labels:

- the precision is asked for, because OpenVINO otherwise computes in bfloat16 where a CPU can;
- sums over a whole patch are split by axis (see `openvino_conversion`), because OpenVINO adds the voxels of a channel
  one by one in float32: where a third of a patch was air, logits were off by up to 4 % of their spread;
- a network is compared with torch before it is used (see `network_agreement`).

A network belongs to one thread at a time; `mshub.nnunet.network_cache` holds the lock of the device.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mshub.atomic_file import replacing
from mshub.errors import PredictionError
from mshub.nnunet.network_agreement import agreement
from mshub.nnunet.openvino_conversion import converted_model
from mshub.nnunet.openvino_library import core, explained, library

logger = logging.getLogger(__name__)

SUFFIX = ".openvino"
CONVERSION = 1
"""Counted up when the same network would be converted otherwise: what is kept on disk is then made anew."""
PRECISION = "f32"
_CONVERTERS = ("torch", "dynamic_network_architectures")


class OpenVINONetwork:
    """A network with the weights of one fold, for inputs of one shape.

    One tile at a time: batches were not faster, and a model that takes any size of batch was half as slow again.

    Parameters
    ----------
    model : openvino.Model
        As `converted_model` makes it: the logits with the classes last, and the encoder's deepest features if any.

    Attributes
    ----------
    shape : tuple of int
        (channel, *patch), the only shape of an input.
    encoder : torch.nn.Identity or None
        Every pass hands the deepest features of the encoder, float32, axes (1, feature, *deepest grid), to this
        module, so that a forward hook sees them as it does in the torch network. None for a network that has no
        ``encoder``.
    nbytes : int
        Size of the weights. OpenVINO holds them twice, and after the first pass also the memory of a pass: see
        `release`.
    """

    def __init__(self, model: Any) -> None:
        with explained("run"):
            compiled = core().compile_model(model, "CPU", _settings())
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
        return cls(converted_model(network, tuple(shape)))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of `x`.

        Parameters
        ----------
        x : Tensor, float32 on the CPU, axes (1, channel, *patch)

        Returns
        -------
        Tensor, float32, axes (1, class, *patch)
            The next pass overwrites it. Classes lie last in memory, as OpenVINO computes them.

        Raises
        ------
        PredictionError
            The shape is another one, or OpenVINO failed.
        """
        if tuple(x.shape) != (1, *self.shape):
            raise PredictionError(
                f"The network was converted for inputs of shape (1, {', '.join(map(str, self.shape))}); this one "
                f"has {tuple(x.shape)}. Convert it for that shape, or let torch run it."
            )
        with explained("run"):
            given = {0: x.detach().float().contiguous().numpy()}
            found = self._request.infer(given, share_inputs=True, share_outputs=True)
        if self.encoder is not None:
            self.encoder(torch.from_numpy(found[1]))
        return torch.from_numpy(found[0]).movedim(-1, 1)

    def release(self) -> None:
        """Give back the memory of what lies between input and output: most of it; the next pass takes it again."""
        self._request.get_compiled_model().release_memory()


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
        See `network_agreement.agreement`.

    Raises
    ------
    PredictionError
        OpenVINO is missing, cannot run this network, or computes something else than torch. Let torch run it.
    """
    shape = tuple(shape)
    kept = _Kept(cache, _key(network, shape)) if cache is not None else None
    if kept is not None and (found := kept.network()) is not None:
        return found
    model = converted_model(network, shape)
    fresh = OpenVINONetwork(model)
    reached = agreement(network, fresh, has_regions=has_regions)
    if reached.refused:
        raise PredictionError(reached.refused)
    logger.info("OpenVINO agrees with torch: %s", reached)
    if kept is not None:
        kept.write(model)
    return fresh


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


def _weights_nbytes(model: Any) -> int:
    """Return the size of a model's constants."""
    return sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")


# -- keeping ----------------------------------------------------------------------------------------------------------


def _key(network: torch.nn.Module, shape: tuple[int, ...]) -> str:
    """Return the sha256 of everything that what is kept depends on: weights, architecture, shape, versions, CPU."""
    with explained("identify"):
        digest = hashlib.sha256(repr((CONVERSION, PRECISION, shape, _versions(), _cpu())).encode())
        digest.update(f"{type(network).__module__}.{network!r}".encode())
        for name, tensor in network.state_dict().items():
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def _versions() -> list[str]:
    return [library().get_version(), *map(_version, _CONVERTERS)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu() -> str:
    """Return what OpenVINO knows of the CPU: what is kept was compared with torch on that one."""
    name, capabilities = (core().get_property("CPU", key) for key in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES"))
    return " ".join([name, *map(str, capabilities)])


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
        with explained("read"):
            openvino = library()
            end = 8 + int.from_bytes(rest[:8], "little")
            weights = openvino.Tensor(np.frombuffer(rest[end:], np.uint8))
            return OpenVINONetwork(core().read_model(bytes(rest[8:end]), weights))

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
            library().save_model(model, file, compress_to_fp16=False)
            return file.read_bytes(), file.with_suffix(".bin").read_bytes()

    def _digest(self, rest: memoryview) -> bytes:
        digest = hashlib.sha256(self._key.encode())
        digest.update(rest)
        return digest.digest()
