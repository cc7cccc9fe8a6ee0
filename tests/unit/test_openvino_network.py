"""A network run by OpenVINO: torch's own outputs within rounding, or a refusal; what is kept is never another's."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from factories import make_model_folder
from mshub.bundled import sample_data
from mshub.errors import PredictionError
from mshub.nnunet import openvino_network as module
from mshub.nnunet.engine import load_network
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.measures import Heads, Measures
from mshub.nnunet.network_agreement import (
    LARGEST_DIFFERENCE,
    LARGEST_FEATURE_DIFFERENCE,
    MOST_DECISIONS,
    Agreement,
    agreement,
    synthetic_probe,
)
from mshub.nnunet.openvino_library import core, is_installed
from mshub.nnunet.openvino_network import OpenVINONetwork, prepared
from mshub.nnunet.window_sums import classes_first

needs_openvino = pytest.mark.skipif(not is_installed(), reason="OpenVINO is an extra and is not installed here")

SHAPE = (1, 16, 24, 32)
UNET = "dynamic_network_architectures.architectures.unet"
RESIDUAL = {
    "network_class_name": f"{UNET}.ResidualEncoderUNet",
    "n_conv_per_stage": None,
    "n_blocks_per_stage": [1, 2, 1],
}


def network_of(folder: Path) -> torch.nn.Module:
    model = ModelFolder.open(folder)
    return load_network(model, model.checkpoint(model.folds[0])["network_weights"]).eval()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """A torch network for inputs of `SHAPE`; not to be changed."""
    return network_of(make_model_folder(tmp_path_factory.mktemp("model"), patch=SHAPE[1:]))


@pytest.fixture(scope="module")
def converted(network: torch.nn.Module) -> OpenVINONetwork:
    return OpenVINONetwork.converted(network, SHAPE)


def noise(shape: Sequence[int] = (1, *SHAPE), seed: int = 0) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def outputs(network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return network(x)


def changed(network: torch.nn.Module, name: str, by: float) -> torch.nn.Module:
    """Return a copy with one weight changed."""
    other = deepcopy(network)
    with torch.no_grad():
        other.get_parameter(name).flatten()[0] += by
    return other


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


# -- the same outputs as torch ----------------------------------------------------------------------------------------


def norm(kind: str, dimension: int) -> dict[str, Any]:
    return {"norm_op": f"torch.nn.modules.{kind.lower()}.{kind}{dimension}d".replace("norm.", "norm.", 1)}


@needs_openvino
@pytest.mark.parametrize("patch", [(16, 24, 32), (48, 40)], ids=["3d", "2d"])
@pytest.mark.parametrize("kind", ["InstanceNorm", "BatchNorm"])
@pytest.mark.parametrize("architecture", [{}, RESIDUAL], ids=["plain", "residual"])
def test_every_kind_of_network_computes_what_torch_does(
    tmp_path: Path, architecture: dict[str, Any], kind: str, patch: tuple[int, ...]
) -> None:
    folder = make_model_folder(
        tmp_path / "model", channels=("T1w", "T2w"), patch=patch, architecture=architecture | norm(kind, len(patch))
    )
    network = network_of(folder)
    assert any(type(layer).__name__.startswith(kind) for layer in network.modules())
    found = OpenVINONetwork.converted(network, (2, *patch))
    assert found.shape == (2, *patch)
    x = noise((1, 2, *patch))
    assert outputs(found, x).shape == outputs(network, x).shape
    assert relative(outputs(found, x), outputs(network, x)) < 1e-4
    reached = agreement(network, found)
    assert reached.difference < 1e-4
    assert reached.features < 1e-4
    assert not reached.refused


@needs_openvino
def test_the_starter_model_finds_the_same_structures() -> None:
    folder = ModelFolder.open(sample_data() / "starter-model")
    network = load_network(folder, folder.checkpoint("0")["network_weights"])
    shape = (len(folder.channels), *folder.configuration_manager.patch_size)
    reached = agreement(network, OpenVINONetwork.converted(network, shape))
    assert reached.decisions == 0
    assert reached.difference < 1e-4


class Normalised(torch.nn.Module):
    """Instance normalisation of a patch so large, and so full of air, that naive sums in float32 are off."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv3d(1, 16, 3, padding=1), torch.nn.InstanceNorm3d(16, affine=True), torch.nn.LeakyReLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@needs_openvino
def test_sums_over_a_large_patch_are_as_exact_as_those_of_torch() -> None:
    torch.manual_seed(1)
    network, shape = Normalised().eval(), (1, 96, 128, 112)
    x = synthetic_probe(shape)
    exact = outputs(deepcopy(network).double(), x.double())
    assert relative(outputs(OpenVINONetwork.converted(network, shape), x), exact) < 1e-5


@needs_openvino
def test_a_signal_is_heard_after_networks_have_come_and_gone() -> None:
    """Each of OpenVINO's cores registers a stack for signals, and unmaps it when it is deleted."""
    program = """
import os, signal, torch
from mshub.nnunet.openvino_network import OpenVINONetwork

signal.signal(signal.SIGTERM, lambda *_: print("heard"))
networks = [OpenVINONetwork.converted(torch.nn.Conv3d(1, 2, 3, padding=1), (1, 8, 8, 8)) for _ in range(3)]
while networks:
    networks.pop(0)
    os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "heard\n" * 3), done.stderr


@needs_openvino
def test_float32_is_asked_for_and_bfloat16_would_be_refused(
    network: torch.nn.Module, converted: OpenVINONetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    assert setting(converted, "INFERENCE_PRECISION_HINT") == openvino.Type.f32
    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    monkeypatch.setattr(module, "PRECISION", "bf16")
    rough = agreement(network, OpenVINONetwork.converted(network, SHAPE))
    assert rough.difference > 5 * LARGEST_DIFFERENCE
    assert rough.refused


def setting(network: OpenVINONetwork, name: str) -> Any:
    return network._request.get_compiled_model().get_property(name)


@pytest.fixture
def threads() -> Iterator[int]:
    """How many threads torch has; given back after the test."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@needs_openvino
def test_it_has_as_many_threads_as_torch(threads: int, network: torch.nn.Module) -> None:
    torch.set_num_threads(1)
    assert setting(OpenVINONetwork.converted(network, SHAPE), "INFERENCE_NUM_THREADS") == 1


# -- one call and the next --------------------------------------------------------------------------------------------


@needs_openvino
def test_what_is_made_of_a_result_does_not_change_the_next(converted: OpenVINONetwork) -> None:
    before = converted(noise(seed=1)).clone()
    second = converted(noise(seed=2))
    assert not torch.equal(second, before)
    second += 7
    assert torch.equal(converted(noise(seed=1)), before)


@needs_openvino
def test_a_result_is_float32_with_the_classes_last_in_memory(converted: OpenVINONetwork) -> None:
    found = converted(noise())
    assert found.dtype == torch.float32
    assert found.stride(1) == 1
    assert torch.equal(classes_first(found), found)
    assert classes_first(found).is_contiguous()


@needs_openvino
def test_memory_can_be_given_back_between_passes(converted: OpenVINONetwork) -> None:
    before = converted(noise()).clone()
    converted.release()
    assert torch.equal(converted(noise()), before)


@needs_openvino
def test_mirrored_and_half_precision_inputs_are_taken(network: torch.nn.Module, converted: OpenVINONetwork) -> None:
    x = noise()
    assert relative(converted(x.flip(2, 4)), outputs(network, x.flip(2, 4))) < 1e-4
    turned = noise((1, 1, *reversed(SHAPE[1:]))).permute(0, 1, 4, 3, 2)  # not contiguous
    assert relative(converted(turned), outputs(network, turned)) < 1e-4
    rounded = converted(x.half()).clone()
    assert torch.equal(rounded, converted(x.half().float()))


@needs_openvino
@pytest.mark.parametrize("shape", [(1, 1, 16, 24, 40), (1, 2, 16, 24, 32), (1, 16, 24, 32), (2, 1, 16, 24, 32)])
def test_another_shape_is_refused_in_a_sentence(converted: OpenVINONetwork, shape: tuple[int, ...]) -> None:
    with pytest.raises(PredictionError, match=r"shape \(1, 1, 16, 24, 32\).*let torch run it"):
        converted(noise(shape))


@needs_openvino
def test_the_torch_network_stays_as_it_was(network: torch.nn.Module) -> None:
    before = outputs(network, noise())
    agreement(network, OpenVINONetwork.converted(network, SHAPE))
    assert torch.equal(outputs(network, noise()), before)
    assert not any(layer._forward_hooks for layer in network.modules())


@needs_openvino
def test_the_programs_own_arguments_do_not_make_openvino_talk(
    network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--verbose", "INFO"])
    OpenVINONetwork.converted(network, SHAPE)
    assert capfd.readouterr() == ("", "")
    assert sys.argv == ["program", "--verbose", "INFO"]


class Odd(torch.nn.Module):
    """A network OpenVINO cannot convert."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


@needs_openvino
def test_the_programs_log_is_heard_after_a_conversion_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        with pytest.raises(PredictionError, match="Let torch run it"):
            OpenVINONetwork.converted(Odd(), SHAPE)
        logging.getLogger("elsewhere").info("still here")
    assert "still here" in caplog.text


# -- the encoder's deepest features -----------------------------------------------------------------------------------


def measured(network: Any) -> tuple[float, ...]:
    """Return the embedding that is measured in two passes over two tiles."""
    measures = Measures(Heads(("liver", "spleen")))

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        measures.deepest_features(output[-1] if isinstance(output, list) else output)

    hook = network.encoder.register_forward_hook(note)
    for seed in (1, 2):
        tile = noise(seed=seed)
        measures.one_pass(outputs(network, tile), 2)
        measures.one_pass(outputs(network, tile.flip(2)).flip(2), 2)
        measures.end_of_tile()
    hook.remove()
    whole = outputs(network, noise(seed=3))[0]
    measures.end_of_fold(whole)
    return measures.result(whole, torch.device("cpu"), 1.0).embedding


@needs_openvino
def test_what_is_measured_of_the_encoder_is_what_torch_shows(
    network: torch.nn.Module, converted: OpenVINONetwork
) -> None:
    expected = measured(network)
    assert len(expected) == 2 * 8  # mean and spread of the deepest stage's features
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(measured(converted), expected, atol=1e-4)


@needs_openvino
def test_features_are_handed_over_at_every_pass(converted: OpenVINONetwork) -> None:
    seen: list[torch.Tensor] = []
    assert converted.encoder is not None
    hook = converted.encoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    for seed in (0, 1, 0):
        converted(noise(seed=seed))
    hook.remove()
    assert [tuple(features.shape) for features in seen] == [(1, 8, 4, 6, 8)] * 3
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


@needs_openvino
def test_a_network_without_an_encoder_shows_none() -> None:
    network = torch.nn.Conv2d(1, 2, 3, padding=1)
    found = OpenVINONetwork.converted(network, (1, 12, 20))
    assert found.encoder is None
    reached = agreement(network, found)
    assert (reached.features, reached.refused) == (0, "")


@needs_openvino
def test_it_tells_how_large_its_weights_are(network: torch.nn.Module, converted: OpenVINONetwork) -> None:
    used = sum(parameter.nbytes for name, parameter in network.named_parameters() if "seg_layers.0" not in name)
    assert converted.nbytes == pytest.approx(used, rel=0.1)  # the head of deep supervision is left out


# -- agreement --------------------------------------------------------------------------------------------------------


@needs_openvino
@pytest.mark.parametrize(
    "name",
    ["encoder.stages.0.0.convs.0.conv.weight", "encoder.stages.2.0.convs.0.norm.weight", "decoder.seg_layers.1.bias"],
)
def test_other_weights_are_refused(network: torch.nn.Module, converted: OpenVINONetwork, name: str) -> None:
    reached = agreement(changed(network, name, 0.05), converted)
    assert "Let torch run this network" in reached.refused
    assert f"{reached.difference:.1e}" in reached.refused


@needs_openvino
def test_weights_that_are_not_finite_are_refused(network: torch.nn.Module, converted: OpenVINONetwork) -> None:
    assert agreement(changed(network, "decoder.seg_layers.1.bias", float("nan")), converted).refused


@needs_openvino
def test_a_probe_of_ones_own_is_compared(network: torch.nn.Module, converted: OpenVINONetwork) -> None:
    first, second = (agreement(network, converted, noise(seed=seed)) for seed in (1, 2))
    assert first != second
    assert not first.refused
    assert not second.refused


class Fixed:
    """Stands for a converted network whose logits are given."""

    encoder, shape = None, SHAPE

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def eval(self) -> Fixed:
        return self

    def __call__(self, _probe: torch.Tensor) -> torch.Tensor:
        return self._logits


def compared(expected: torch.Tensor, found: torch.Tensor, **options: Any) -> Agreement:
    return agreement(Fixed(expected), Fixed(found), torch.zeros(1), **options)


def test_differences_are_told_in_units_of_the_spread_and_decisions_voxel_by_voxel() -> None:
    expected = noise((1, 3, 4, 5, 10)) * 7
    expected[0, :, 0, 0, 0] = torch.tensor([3.0, 1.0, 2.0])
    found = expected.clone()
    found[0, 2, 0, 0, 0] = 4.0
    reached = compared(expected, found)
    assert reached.difference == pytest.approx(2 / float(expected.std(correction=0)))
    assert reached.decisions == pytest.approx(1 / 200)
    assert compared(expected, expected) == Agreement(0, 0, 0)


def test_regions_are_decided_each_by_itself() -> None:
    expected = torch.ones(1, 3, 4, 5, 10)
    expected[0, 0] = 2
    found = expected.clone()
    found[0, 1:, 0, 0, :3] = -1  # the largest channel is the same; two regions end in three voxels
    assert compared(expected, found).decisions == 0
    assert compared(expected, found, has_regions=True).decisions == pytest.approx(3 / 200)


@pytest.mark.parametrize("which", range(3))
def test_each_bound_refuses_by_itself(which: int) -> None:
    bounds = [LARGEST_DIFFERENCE, LARGEST_FEATURE_DIFFERENCE, MOST_DECISIONS]
    assert not Agreement(*bounds).refused
    bounds[which] *= 1.01
    assert Agreement(*bounds).refused
    bounds[which] = float("nan")
    assert Agreement(*bounds).refused


@pytest.mark.parametrize("shape", [(2, 12, 20), (1, 8, 12, 20)])
def test_the_probe_is_always_the_same_with_air_and_structures(shape: tuple[int, ...]) -> None:
    probe = synthetic_probe(shape)
    assert tuple(probe.shape) == (1, *shape)
    assert torch.equal(probe, synthetic_probe(shape))
    air, body = probe[..., : shape[-1] // 3], probe[..., shape[-1] // 3 :]
    assert len(air.unique()) == 1
    assert 0.5 < body.std() < 3


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was converted during the test."""
    seen, convert = [], module.converted_model

    def converting(network: torch.nn.Module, shape: tuple[int, ...]) -> Any:
        seen.append(shape)
        return convert(network, shape)

    monkeypatch.setattr(module, "converted_model", converting)
    return seen


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


@needs_openvino
def test_a_kept_network_is_not_converted_again_and_computes_the_same(
    network: torch.nn.Module, tmp_path: Path, conversions: list[Any]
) -> None:
    cache = tmp_path / "made" / "when needed"
    fresh = prepared(network, SHAPE, cache=cache)
    only_file(cache)  # and nothing left over
    kept = prepared(network, list(SHAPE), cache=cache)
    assert conversions == [SHAPE]
    assert (kept.shape, kept.nbytes) == (fresh.shape, fresh.nbytes)
    assert torch.equal(kept(noise()), fresh(noise()))
    np.testing.assert_allclose(measured(kept), measured(fresh), atol=0)


@needs_openvino
def test_other_weights_are_not_taken_from_what_is_kept(
    network: torch.nn.Module, tmp_path: Path, conversions: list[Any]
) -> None:
    other = changed(network, "encoder.stages.0.0.convs.0.conv.bias", 1e-6)  # before normalisation: changes no output
    first = prepared(network, SHAPE, cache=tmp_path)
    prepared(other, SHAPE, cache=tmp_path)
    other = changed(network, "decoder.seg_layers.1.bias", 1.0)
    second = prepared(other, SHAPE, cache=tmp_path)
    assert len(conversions) == 3
    assert relative(second(noise()), outputs(other, noise())) < 1e-4
    assert relative(first(noise()), outputs(network, noise())) < 1e-4


@needs_openvino
def test_what_was_kept_under_another_name_is_not_taken(
    network: torch.nn.Module, tmp_path: Path, conversions: list[Any]
) -> None:
    prepared(network, SHAPE, cache=tmp_path / "one")
    other = changed(network, "decoder.seg_layers.1.bias", 1.0)
    prepared(other, SHAPE, cache=tmp_path / "two")
    only_file(tmp_path / "one").replace(only_file(tmp_path / "two"))
    found = prepared(other, SHAPE, cache=tmp_path / "two")
    assert len(conversions) == 3
    assert relative(found(noise()), outputs(other, noise())) < 1e-4


@needs_openvino
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_versions", lambda: ["2031.1"]),
        ("_cpu", lambda: "another CPU"),
        ("PRECISION", "f16"),
        ("CONVERSION", -1),
    ],
)
def test_another_openvino_cpu_or_precision_has_a_key_of_its_own(
    network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    before = module._key(network, SHAPE)
    assert before == module._key(deepcopy(network), SHAPE)
    monkeypatch.setattr(module, name, value)
    assert module._key(network, SHAPE) != before


@needs_openvino
def test_another_shape_or_architecture_has_a_key_of_its_own(network: torch.nn.Module) -> None:
    steeper = deepcopy(network)
    for layer in steeper.modules():
        if isinstance(layer, torch.nn.LeakyReLU):
            layer.negative_slope = 0.2
    keys = {module._key(network, SHAPE), module._key(network, (1, 16, 24, 40)), module._key(steeper, SHAPE)}
    assert len(keys) == 3


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """Return the content with one bit of a weight changed: OpenVINO would read it."""
    return content[:-100] + bytes([content[-100] ^ 64]) + content[-99:]


@needs_openvino
@pytest.mark.parametrize("damage", [cut, flipped, lambda _: b"", lambda _: b"garbage" * 1000])
def test_a_damaged_file_is_replaced(
    network: torch.nn.Module,
    tmp_path: Path,
    conversions: list[Any],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:
    fresh = prepared(network, SHAPE, cache=tmp_path)
    file = only_file(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert torch.equal(prepared(network, SHAPE, cache=tmp_path)(noise()), fresh(noise()))
    assert "is damaged and is replaced" in caplog.text
    prepared(network, SHAPE, cache=tmp_path)
    assert len(conversions) == 2
    assert len(only_file(tmp_path).read_bytes()) == len(whole)


@needs_openvino
def test_a_folder_that_cannot_be_written_only_means_that_nothing_is_kept(
    network: torch.nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    found = prepared(network, SHAPE, cache=blocked / "cache")
    assert relative(found(noise()), outputs(network, noise())) < 1e-4
    assert "is not kept in" in caplog.text
    assert blocked.read_text() == "no folder"


@needs_openvino
def test_a_full_disk_leaves_nothing_half_written(
    network: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    prepared(network, SHAPE, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "No space left" in caplog.text


@needs_openvino
def test_a_network_that_is_refused_is_not_kept(
    network: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, other = module.converted_model, changed(network, "decoder.seg_layers.1.bias", 1.0)
    monkeypatch.setattr(module, "converted_model", lambda _network, shape: convert(other, shape))
    with pytest.raises(PredictionError, match=r"something else than torch.*Let torch run this network"):
        prepared(network, SHAPE, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_openvino
def test_without_a_cache_nothing_is_written(
    network: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert relative(prepared(network, SHAPE)(noise()), outputs(network, noise())) < 1e-4
    assert list(tmp_path.iterdir()) == []


# -- what fails -------------------------------------------------------------------------------------------------------


class Unknown(torch.nn.Module):
    """Does what OpenVINO cannot."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


@needs_openvino
def test_what_openvino_cannot_convert_is_said_in_a_sentence() -> None:
    with pytest.raises(PredictionError, match=r"OpenVINO could not convert the network \(.*\). Let torch run it"):
        prepared(Unknown(), (1, 12, 20))


@needs_openvino
def test_a_stage_of_one_voxel_fails_as_it_does_in_torch(network: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        outputs(network, noise((1, 1, 4, 4, 4)))
    with pytest.raises(PredictionError, match="more than 1 spatial element"):
        OpenVINONetwork.converted(network, (1, 4, 4, 4))


@needs_openvino
def test_a_stage_of_one_voxel_along_some_axes_is_computed(network: torch.nn.Module) -> None:
    found = OpenVINONetwork.converted(network, (1, 4, 4, 24))
    assert relative(found(noise((1, 1, 4, 4, 24))), outputs(network, noise((1, 1, 4, 4, 24)))) < 1e-3


@needs_openvino
@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("could not create a primitive")])
def test_a_pass_that_fails_is_said_in_a_sentence(network: torch.nn.Module, error: Exception) -> None:
    class Failing:
        def infer(self, *_: Any, **__: Any) -> None:
            raise error

    found = OpenVINONetwork.converted(network, SHAPE)
    found._request = Failing()
    with pytest.raises(PredictionError, match=f"could not run the network.*{error}.*Let torch run it"):
        found(noise())


# -- OpenVINO itself --------------------------------------------------------------------------------------------------

CONVERTS = """
import sys, torch
{before}
from mshub.errors import PredictionError
from mshub.nnunet.openvino_library import is_installed
from mshub.nnunet.openvino_network import OpenVINONetwork, prepared
from mshub.nnunet.window_sums import classes_first
loaded = "openvino" in sys.modules and sys.modules["openvino"] is not None
try:
    prepared(torch.nn.Conv2d(1, 2, 3), (1, 8, 12))
    outcome = "converted"
except PredictionError as error:
    outcome = str(error)
print(is_installed(), loaded, outcome, sep="|")
reporter = sys.modules.get("openvino.tools.ovc.telemetry_utils")
print(reporter and reporter.tm.__name__)
"""


def run(before: str, home: Path) -> list[str]:
    """Convert a network in a process of its own; returns what it printed last."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run(
        [sys.executable, "-c", CONVERTS.format(before=before)],
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-2:]


def test_without_openvino_it_is_imported_and_says_so(tmp_path: Path) -> None:
    said, reporter = run("sys.modules['openvino'] = None", tmp_path)
    assert said.startswith("False|False|OpenVINO is not installed")
    assert "Install the package openvino, or let torch run the network" in said
    assert reporter == "None"


@needs_openvino
def test_openvino_is_imported_when_needed_and_reports_nothing_to_its_makers(tmp_path: Path) -> None:
    said, reporter = run("", tmp_path)
    assert said == "True|False|converted"
    assert reporter == "openvino.tools.ovc.telemetry_stub"
    assert list(tmp_path.glob("intel*")) == []
