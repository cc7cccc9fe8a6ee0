"""The network of one model folder on one device: nnU-Net's own pipeline, stage by stage.

Nothing here is safe to call from two threads at once; `mshub.nnunet.network_cache` holds the lock of the device.
"""

from __future__ import annotations

import logging
import pydoc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from mshub.errors import ModelFolderError, PredictionError
from mshub.nnunet.cuda_network import CUDANetwork
from mshub.nnunet.export import Export
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.lean_decoder import let_go
from mshub.nnunet.measures import Heads, Measures
from mshub.nnunet.openvino_library import is_installed
from mshub.nnunet.openvino_network import OpenVINONetwork, prepared
from mshub.nnunet.postprocessing import keep_largest
from mshub.nnunet.preprocessing import preprocess
from mshub.nnunet.sliding_window import Check, ProbabilityWindow, Progress, SlidingWindow
from mshub.uncertainty import Uncertainty

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

RUNTIMES = ("auto", "torch", "openvino")
NETWORKS = "dynamic_network_architectures."
_NORMALISATIONS = ("instancenorm", "batchnorm", "normalization", "linear")  # of `linear`, Identity
LAYERS = {  # what the plans may name for an argument: layers that keep the size of an image
    "conv_op": ("torch.nn.modules.conv",),
    "norm_op": tuple(f"torch.nn.modules.{name}" for name in _NORMALISATIONS),
    "dropout_op": ("torch.nn.modules.dropout",),
    "nonlin": ("torch.nn.modules.activation",),
}


class Engine:
    """The networks of `folds` of one model folder, ready on `device`.

    Parameters
    ----------
    folder : ModelFolder
    folds : tuple of str
    device : torch.device
    runtime : str
        What runs the networks: ``torch``; ``openvino``, on the CPU only; ``auto``, OpenVINO where it is installed and
        agrees with torch.
    kept : Path, optional
        Where what OpenVINO made of a network is kept.

    Attributes
    ----------
    device : torch.device
    runtime : str
        ``torch`` or ``openvino``.
    """

    def __init__(
        self,
        folder: ModelFolder,
        folds: tuple[str, ...],
        device: torch.device,
        runtime: str = "torch",
        kept: Path | None = None,
    ) -> None:
        self._folder, self.device = folder, device
        self._plans, self._configuration = folder.plans_manager, folder.configuration_manager
        parameters = [folder.checkpoint(fold)["network_weights"] for fold in folds]
        self._window = ProbabilityWindow(device) if folder.predicts_as_v1 else SlidingWindow(device)
        is_on_gpu = device.type != "cpu"
        network = torch.nn.Identity() if is_on_gpu else load_network(folder, parameters[0])
        let_go(network)
        self._window.manual_initialization(
            network,
            self._plans,
            self._configuration,
            parameters,
            folder.dataset,
            folder.trainer,
            folder.mirror_axes or None,  # nnU-Net takes the maximum of the axes: an empty tuple must not reach it
        )
        self._export = Export(folder)
        self.runtime = "torch"
        self._networks: Sequence[OpenVINONetwork | CUDANetwork] = ()
        self._weights_nbytes = sum(tensor.nbytes for weights in parameters for tensor in weights.values())
        if is_on_gpu:
            networks = [
                CUDANetwork(load_network(folder, weights), _tile_shape(folder), device) for weights in parameters
            ]
            self._run_by(networks)
        elif runtime == "openvino" or (runtime == "auto" and is_installed()):
            self._take_openvino(parameters, kept, is_demanded=runtime == "openvino")

    @property
    def nbytes(self) -> int:
        """Size of the weights of all folds, and of what a network keeps between passes."""
        return sum(network.nbytes for network in self._networks) or self._weights_nbytes

    def _run_by(self, networks: Sequence[OpenVINONetwork | CUDANetwork]) -> None:
        self._window.run_instead(networks)
        self._networks = networks

    def _take_openvino(self, parameters: Sequence[dict[str, Any]], kept: Path | None, *, is_demanded: bool) -> None:
        """Let OpenVINO run the networks, if it can."""
        try:
            networks = [_by_openvino(self._folder, weights, kept) for weights in parameters]
        except PredictionError as error:
            if is_demanded:
                raise
            logger.warning("torch runs %s, slower: %s", self._folder.path, error)
            return
        self._run_by(networks)
        self.runtime = "openvino"

    def preprocess(
        self, data: Array, properties: dict[str, Any], body_only: bool = False
    ) -> tuple[Array, dict[str, Any]]:
        """Crop, normalise and resample.

        Parameters
        ----------
        data : ndarray, float32, axes (channel, z, y, x)
            As nnU-Net's reader returns it.
        properties : dict
            nnU-Net's properties; needs ``spacing`` (z, y, x in mm).
        body_only : bool
            Of a CT image, leave out the air around the body.

        Returns
        -------
        data : ndarray, float32, axes (channel, *network axes)
        properties : dict
            With what `segmentation` needs to go back.
        """
        return preprocess(self._folder, data, properties, body_only=body_only)

    def warm(self) -> None:
        """Run every stage on one small tile of noise: libraries are imported, loops compiled, memory set aside."""
        shape = (
            len(self._folder.channels),
            *[max(4, edge // 4) for edge in (16, *self._configuration.patch_size)[-3:]],
        )
        noise = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
        data, properties = self.preprocess(noise, {"spacing": [1.1 * edge for edge in self._spacing_zyx_mm()]})
        measures = self.measures()
        logits = self.logits(data, mirroring=False, step=1.0, measures=measures)
        self.uncertainty(measures, logits, properties)
        self.segmentation(logits, properties)

    def _spacing_zyx_mm(self) -> list[float]:
        """Return the spacing of the network's grid, in the order of the reader's axes."""
        spacing = list(self._configuration.spacing)
        spacing = [spacing[0]] * (3 - len(spacing)) + spacing
        return [spacing[axis] for axis in self._plans.transpose_backward]

    def measures(self) -> Measures:
        """Return what `logits` can tell how sure the network is."""
        has_regions = self._window.label_manager.has_regions
        return Measures(Heads(self._structures_of_channels(), has_regions, self._folder.predicts_as_v1))

    def _structures_of_channels(self) -> tuple[str, ...]:
        """Return the structure of each channel of the output, without the background's, which is the first."""
        labels = self._window.label_manager
        names = {value: name for name, value in self._folder.labels.predicted.items()}
        channels = labels.regions_class_order if labels.has_regions else range(1, labels.num_segmentation_heads)
        return tuple(names[value] for value in channels)

    def logits(
        self,
        data: Array,
        *,
        mirroring: bool,
        step: float,
        progress: Progress | None = None,
        check: Check | None = None,
        measures: Measures | None = None,
        sums_in_main_memory: bool = False,
    ) -> torch.Tensor:
        """Run the sliding window over all folds.

        Parameters
        ----------
        data : ndarray
            As `preprocess` returns it.
        mirroring, step
            See `mshub.nnunet.predictor.Profile`.
        progress, check, measures
            See `mshub.nnunet.sliding_window.SlidingWindow.start`.
        sums_in_main_memory : bool
            Leave a GPU to the network alone. Where it has too little memory, that is done unasked.

        Returns
        -------
        Tensor, axes (class, *network axes)
            Half-precision logits; of a model of nnU-Net v1, float32 probabilities, of which the largest decides too.

        Raises
        ------
        PredictionError
            The network's output is not finite.
        """
        self._window.use_mirroring, self._window.tile_step_size = mirroring, step
        self._window.sums_in_main_memory = sums_in_main_memory
        self._window.start(progress, check, measures)
        try:
            logits: torch.Tensor = self._window.predict_logits_from_preprocessed_data(
                torch.from_numpy(data).contiguous().float()
            )
        finally:
            for network in self._networks:
                network.release()
        return logits

    @property
    def summed_in_main_memory(self) -> bool:
        """Whether the last logits were added up in main memory though the network runs on a GPU."""
        return self._window.sums_in_main_memory

    def uncertainty(self, measures: Measures, logits: torch.Tensor, properties: dict[str, Any]) -> Uncertainty:
        """Return what was measured while `logits` were made."""
        before = properties["shape_after_cropping_and_before_resampling"]
        voxel_mm3 = float(np.prod(properties["spacing"]) * np.prod(before) / np.prod(logits.shape[1:]))
        with torch.inference_mode():
            return measures.result(logits, self._window.device, voxel_mm3 / 1000)

    def segmentation(self, logits: torch.Tensor, properties: dict[str, Any]) -> Array:
        """Return the label map in nnU-Net's values on the reader's grid, axes (z, y, x)."""
        segmentation = self._export.label_map(logits, properties)
        return keep_largest(segmentation, self._folder.keeps_largest, float(np.prod(properties["spacing"])))

    def probabilities(
        self, logits: torch.Tensor, properties: dict[str, Any], structures: Sequence[str]
    ) -> dict[str, Array]:
        """Return the probabilities of some structures on the reader's grid: name -> float32, axes (z, y, x)."""
        before = 0 if self._window.label_manager.has_regions else 1
        channels = [before + self._structures_of_channels().index(name) for name in structures]
        maps = self._export.probabilities(logits, properties, channels)
        return dict(zip(structures, maps, strict=True))


def _tile_shape(folder: ModelFolder) -> tuple[int, ...]:
    """Return the shape of a tile, (channel, *patch)."""
    return (len(folder.channels), *folder.configuration_manager.patch_size)


def _by_openvino(folder: ModelFolder, weights: dict[str, Any], kept: Path | None) -> OpenVINONetwork:
    has_regions = folder.plans_manager.get_label_manager(folder.dataset).has_regions
    return prepared(load_network(folder, weights), _tile_shape(folder), cache=kept, has_regions=has_regions)


def prepare_openvino(folder: ModelFolder, kept: Path) -> str:
    """Compare OpenVINO with torch, and keep what it made of the networks: the first request need not wait for that.

    Parameters
    ----------
    folder : ModelFolder
    kept : Path
        As for `Engine`.

    Returns
    -------
    str
        Why torch will run this model, as a sentence; empty if OpenVINO will.
    """
    if not is_installed():
        return "OpenVINO is not installed."
    try:
        for fold in folder.folds:
            _by_openvino(folder, folder.checkpoint(fold)["network_weights"], kept)
    except PredictionError as error:
        return str(error)
    return ""


def check_weights(folder: ModelFolder) -> None:
    """Load the weights of every fold into the network, so that a model that cannot run is refused when it is added.

    Raises
    ------
    ModelFolderError
        A checkpoint is damaged, or its weights do not fit the architecture.
    """
    for fold in folder.folds:
        load_network(folder, folder.checkpoint(fold)["network_weights"])


def load_network(folder: ModelFolder, weights: dict[str, Any], *, deep_supervision: bool = False) -> torch.nn.Module:
    """Build the architecture the plans name and load `weights` into it, every tensor accounted for.

    nnU-Net would ask the trainer class for the network; stock trainers return what the plans say, and importing a
    stranger's trainer is neither safe nor always possible.

    Parameters
    ----------
    folder : ModelFolder
    weights : dict
        ``network_weights`` of a checkpoint, the segmentation head included.
    deep_supervision : bool
        The network returns the outputs of all its resolutions, as training needs them.

    Raises
    ------
    ModelFolderError
        The architecture is not nnU-Net's own, or the weights do not fit it.
    """
    configuration = folder.configuration_manager
    architecture = _checked_architecture(folder)

    def built() -> torch.nn.Module:
        return get_network_from_plans(
            architecture,
            _arguments(configuration, weights),
            configuration.network_arch_init_kwargs_req_import,
            determine_num_input_channels(folder.plans_manager, configuration, folder.dataset),
            folder.plans_manager.get_label_manager(folder.dataset).num_segmentation_heads,
            allow_init=False,
            deep_supervision=deep_supervision,
        )

    try:
        with torch.device("meta"):  # takes no memory, whatever sizes the plans ask for
            built().load_state_dict(weights, assign=True)
        network = built()
        network.load_state_dict(weights)
    except (ImportError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        lines = [line.strip() for line in (str(error) or type(error).__name__).splitlines()[:2]]
        reason = " ".join(lines)[:400]
        raise ModelFolderError(
            f"The weights do not fit the architecture in plans.json ({architecture}): {reason}. The trainer "
            f"{folder.trainer} probably builds its own network, which MSHub does not run."
        ) from error
    return network


def _arguments(configuration: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the network's arguments; weights that keep running statistics belong to nnUNetTrainerBN's network.

    That trainer takes batch normalisation whatever the plans say.
    """
    arguments = dict(configuration.network_arch_init_kwargs)
    if any(name.endswith(".running_mean") for name in weights):
        arguments["norm_op"] = f"torch.nn.modules.batchnorm.BatchNorm{len(configuration.patch_size)}d"
        arguments["norm_op_kwargs"] = {"eps": 1e-5, "affine": True}
    return arguments


def _checked_architecture(folder: ModelFolder) -> str:
    """Return the name of the network class, refusing any that is not nnU-Net's own: the plans name what is *called*."""
    configuration = folder.configuration_manager
    try:
        architecture = str(configuration.network_arch_class_name)
        arguments = configuration.network_arch_init_kwargs
        layers = {key: arguments.get(key) for key in configuration.network_arch_init_kwargs_req_import}
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelFolderError(
            f"plans.json does not describe the network as nnU-Net v2 does ({type(error).__name__}: {error}). Copy the "
            "model folder again."
        ) from error
    network = _network_class(architecture)
    foreign = [str(name) for key, name in layers.items() if name is not None and not _is_layer(key, name)]
    if foreign or network is None:
        raise ModelFolderError(
            f"plans.json asks for the custom architecture {', '.join([architecture, *foreign])}. MSHub builds only the "
            f"networks of {NETWORKS.rstrip('.')}, as nnU-Net itself does by default."
        )
    return f"{network.__module__}.{network.__qualname__}"


def _network_class(name: str) -> type | None:
    """Return the class `name` stands for, also where old plans give the module it was in earlier."""
    moved = f"{NETWORKS}architectures.unet.{name.rpartition('.')[2]}" if name.startswith(NETWORKS) else ""
    return _module_class(name, NETWORKS) or _module_class(moved, NETWORKS)


def _is_layer(key: str, name: Any) -> bool:
    found = _module_class(name, "torch.nn.") or _module_class(name, NETWORKS)
    return found is not None and found.__module__ in LAYERS.get(key, ())


def _module_class(name: Any, packages: str | tuple[str, ...]) -> type | None:
    """Return the `torch.nn.Module` that nnU-Net would find under `name` if one of `packages` defines it.

    The beginning of the name proves nothing: ``torch.nn.modules.conv.torch.os.system`` is found as well.
    """
    if not isinstance(name, str) or not name.startswith(packages):
        return None
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport:
        return None
    if isinstance(found, type) and issubclass(found, torch.nn.Module) and found.__module__.startswith(packages):
        return found
    return None
