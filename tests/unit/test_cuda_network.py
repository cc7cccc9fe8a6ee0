"""The road of a GPU: the network in another layout. What needs no GPU runs on the CPU, the rest where there is one."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from factories import make_model_folder
from mshub.errors import PredictionError
from mshub.nnunet import cuda_network
from mshub.nnunet.cuda_network import CUDANetwork, instance_norms_as_batch_norms
from mshub.nnunet.engine import Engine, load_network
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.measures import Heads, Measures
from mshub.nnunet.window_sums import SumsOnCPU, SumsOnDevice

CPU = torch.device("cpu")
LABELS = {"background": 0, **{f"s{value}": value for value in range(1, 6)}}
RESIDUAL = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "n_conv_per_stage": None,
    "n_blocks_per_stage": [1, 2, 1],
}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture(params=["3d", "2d", "residual"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> ModelFolder:
    options: dict[str, Any] = {
        "3d": {"folds": ("0", "1")},
        "2d": {"patch": (24, 32), "spacing_zyx_mm": (1.5, 1.5), "mirror_axes": (0, 1)},
        "residual": {"architecture": RESIDUAL},
    }[request.param]
    return ModelFolder.open(make_model_folder(tmp_path / "model", labels=LABELS, channels=("CT", "PET"), **options))


def network_of(folder: ModelFolder, fold: str = "0") -> torch.nn.Module:
    return load_network(folder, folder.checkpoint(fold)["network_weights"]).eval()


def shape_of(folder: ModelFolder) -> tuple[int, ...]:
    return (len(folder.channels), *folder.configuration_manager.patch_size)


def a_tile(folder: ModelFolder, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(1, *shape_of(folder))).astype(np.float32))


@torch.inference_mode()
def test_another_layout_computes_the_same(folder: ModelFolder) -> None:
    network, tile = network_of(folder), a_tile(folder)
    expected = network(tile)
    names = list(network.state_dict())
    turned = CUDANetwork(deepcopy(network), shape_of(folder), CPU)
    output = turned(tile)
    assert torch.allclose(output, expected, atol=1e-4 * float(expected.std()))
    norms = (torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d)
    assert any(isinstance(layer, norms) for layer in network.modules())
    assert not any(isinstance(layer, norms) for layer in turned._network.modules())
    dropped = set(names) - set(turned._network.state_dict())
    assert dropped
    assert all(name.endswith("conv.bias") or name.endswith("all_modules.0.bias") for name in dropped)
    layout = torch.channels_last_3d if tile.ndim == 5 else torch.channels_last
    kernels = [weights for weights in turned._network.parameters() if weights.ndim == tile.ndim]
    assert all(weights.is_contiguous(memory_format=layout) for weights in kernels)


@torch.inference_mode()
def test_the_encoders_features_are_handed_over(folder: ModelFolder) -> None:
    network, tile = network_of(folder), a_tile(folder)
    expected, seen = network.encoder(tile)[-1], []
    turned = CUDANetwork(deepcopy(network), shape_of(folder), CPU)
    assert turned.encoder is not None
    turned.encoder.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    turned(tile)
    (features,) = seen
    assert torch.allclose(features, expected, atol=1e-4 * float(expected.std()))


def test_batches_are_not_normalised_together() -> None:
    layer = instance_norms_as_batch_norms(torch.nn.Sequential(torch.nn.InstanceNorm3d(2)))
    with pytest.raises(ValueError, match="found 3"):
        layer(torch.zeros(3, 2, 4, 4, 4))


def test_a_bias_that_nothing_cancels_stays() -> None:
    convolutions = [torch.nn.Conv3d(2, 2, 3) for _ in range(4)]
    first, second, third, last = convolutions
    norm = partial(torch.nn.InstanceNorm3d, 2)
    layers = [first, norm(), second, torch.nn.ReLU(), norm(), third, torch.nn.Dropout3d(), norm(), last]
    instance_norms_as_batch_norms(torch.nn.Sequential(*layers))
    assert [layer.bias is None for layer in convolutions] == [True, False, True, False]


def test_running_statistics_stay() -> None:
    network = torch.nn.Sequential(torch.nn.InstanceNorm3d(2, track_running_stats=True), torch.nn.BatchNorm3d(2))
    assert [type(layer) for layer in instance_norms_as_batch_norms(network)] == [
        torch.nn.InstanceNorm3d,
        torch.nn.BatchNorm3d,
    ]


@pytest.mark.parametrize("is_2d", [False, True])
def test_sums_on_a_device_are_those_of_the_cpu_within_rounding(is_2d: bool) -> None:
    rng, shape, patch = np.random.default_rng(0), (7, 20, 24), (16, 20) if is_2d else (4, 16, 20)
    both = SumsOnCPU(3, shape, patch), SumsOnDevice(3, shape, patch, CPU)
    for _ in range(40):
        corner = [int(rng.integers(0, 1 + edge - size)) for edge, size in zip(shape[-len(patch) :], patch, strict=True)]
        slicer = [slice(begin, begin + size) for begin, size in zip(corner, patch, strict=True)]
        place = (slice(None), *([int(rng.integers(7))] if is_2d else []), *slicer)
        total = torch.from_numpy(rng.normal(size=(1, 3, *patch)).astype(np.float32))
        for sums in both:
            sums.add(total.half(), 2, place)
    seen = both[0]._weights > 0
    cpu, device = (torch.nan_to_num(sums._sums / sums._weights) for sums in both)
    assert seen.float().mean() > 0.5
    assert torch.allclose(device.float(), cpu.float(), atol=4e-3)
    assert float(cpu.abs().max()) > 0.5


def test_sums_that_are_not_finite_are_an_error() -> None:
    sums = SumsOnDevice(2, (4, 4, 4), (4, 4, 4), CPU)
    total = torch.ones(1, 2, 4, 4, 4)
    total[0, 1, 2, 3, 1] = torch.nan
    sums.add(total, 1, (slice(None), *[slice(0, 4)] * 3))
    with pytest.raises(PredictionError, match="not finite"):
        sums.mean()


# -- where there is a GPU ---------------------------------------------------------------------------------------------


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return whether logits are the same but for what half precision rounds on the way.

    In the corners of an image the Gaussian is so small that half precision has few digits left.
    """
    ours, theirs = ours.float(), theirs.to(ours.device).float()
    off = (ours - theirs).abs() / theirs.std()
    return bool(off.mean() < 0.01) and bool((off > 0.05).float().mean() < 0.02)


def by_nnunet(folder: ModelFolder, data: np.ndarray, mirroring: bool) -> torch.Tensor:
    """Return the logits of nnU-Net's own predictor on the GPU."""
    predictor = nnUNetPredictor(0.5, True, mirroring, True, torch.device("cuda"), allow_tqdm=False)
    weights = [folder.checkpoint(fold)["network_weights"] for fold in folder.folds]
    facts = (folder.plans_manager, folder.configuration_manager, weights, folder.dataset, folder.trainer)
    predictor.manual_initialization(load_network(folder, weights[0]), *facts, folder.mirror_axes or None)
    logits: torch.Tensor = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
    return logits


@needs_gpu
@pytest.mark.parametrize("mirroring", [False, True])
def test_logits_are_nnunets_within_half_precision(folder: ModelFolder, mirroring: bool) -> None:
    data = np.random.default_rng(0).normal(size=(2, 17, 40, 50)).astype(np.float32)
    engine = Engine(folder, folder.folds, torch.device("cuda"))
    size = engine.nbytes
    logits = engine.logits(data, mirroring=mirroring, step=0.5)
    assert logits.device.type == "cuda"
    assert agree(logits, by_nnunet(folder, data, mirroring))
    assert all(network._recorded is not None for network in engine._networks)  # type: ignore[union-attr]
    assert engine.nbytes > size
    again = engine.logits(data, mirroring=mirroring, step=0.5)
    assert torch.equal(again, logits)


@needs_gpu
def test_labels_and_probabilities_are_those_of_the_cpus_export(folder: ModelFolder) -> None:
    image = np.random.default_rng(0).normal(size=(2, 17, 40, 50)).astype(np.float32)
    engine = Engine(folder, folder.folds, torch.device("cuda"))
    data, properties = engine.preprocess(image, {"spacing": [2.0, 1.0, 1.2]})
    logits = engine.logits(data, mirroring=True, step=0.5)
    assert np.array_equal(engine.segmentation(logits, properties), engine.segmentation(logits.cpu(), properties))
    on_gpu, on_cpu = (engine.probabilities(where, properties, ["s2", "s5"]) for where in (logits, logits.cpu()))
    assert all(np.allclose(on_gpu[name], on_cpu[name], atol=1e-5) for name in on_gpu)


@needs_gpu
@torch.inference_mode()
def test_a_recorded_pass_is_the_pass(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    recorded, plain = (CUDANetwork(network_of(folder), shape_of(folder), device) for _ in range(2))
    plain._may_record = False
    for seed in range(3):
        tile = a_tile(folder, seed).to(device)
        assert agree(recorded(tile), plain(tile))
    assert recorded._recorded is not None
    assert plain._recorded is None


@needs_gpu
@torch.inference_mode()
def test_a_network_that_cannot_be_recorded_runs_all_the_same(
    folder: ModelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    class Synchronising(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.amax().cpu())

    network = CUDANetwork(Synchronising(), shape_of(folder), torch.device("cuda"))
    tile = a_tile(folder).cuda()
    for _ in range(2):
        assert torch.allclose(network(tile), tile * tile.amax())
    assert "cannot be recorded" in caplog.text
    assert cuda_network.logger.name in {record.name for record in caplog.records}


@needs_gpu
@pytest.mark.parametrize("measured", [False, True])
def test_without_memory_for_its_output_it_goes_to_main_memory(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    data = np.random.default_rng(0).normal(size=(2, 17, 40, 50)).astype(np.float32)
    engine = Engine(folder, folder.folds, torch.device("cuda"))
    expected = engine.logits(data, mirroring=True, step=0.5)

    def none_left(*_: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr("mshub.nnunet.sliding_window.SumsOnDevice", none_left)
    measures = engine.measures() if measured else None
    logits = engine.logits(data, mirroring=True, step=0.5, measures=measures)
    assert logits.device == CPU
    assert agree(logits, expected)
    if measures is not None:
        assert measures.result(logits, torch.device("cuda"), 1.0).structures


@needs_gpu
@torch.inference_mode()
def test_what_is_measured_there_is_what_is_measured_on_a_cpu() -> None:
    random = torch.Generator().manual_seed(2)
    tiles = torch.randn((3, 4, 1, 6, 8, 12, 10), generator=random)  # tile, pass, batch, class, z, y, x
    features = torch.randn((3, 4, 1, 5, 2, 3, 2), generator=random)
    found = []
    for device in (CPU, torch.device("cuda")):
        measures = Measures(Heads(tuple(LABELS)[1:]))
        for passes, deepest in zip(tiles.to(device), features.to(device), strict=True):
            for number, output in enumerate(passes):
                measures.deepest_features(deepest[number])
                measures.one_pass(output, len(passes))
            measures.end_of_tile()
        measures.end_of_fold(tiles[0, 0, 0].to(device))
        found.append(measures.result(tiles[0, 0, 0].to(device), device, 1.0))
    on_cpu, on_gpu = found
    for name, facts in on_cpu.structures.items():
        assert facts.mirror_dice == on_gpu.structures[name].mirror_dice
        assert facts.mirror_dice is not None
    np.testing.assert_allclose(on_gpu.embedding, on_cpu.embedding, rtol=1e-5)
