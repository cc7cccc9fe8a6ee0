"""nnU-Net model folders: real ones open, damaged and dangerous ones are refused, and nobody's code runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from factories import make_model_folder
from mshub.errors import LabelError, ModelFolderError
from mshub.nnunet.checkpoints import load_checkpoint
from mshub.nnunet.engine import Engine
from mshub.nnunet.folder import ModelFolder

CPU = torch.device("cpu")


@pytest.fixture
def folder(liver_spleen: Path, tmp_path: Path) -> Path:
    """A copy of a good folder, to be damaged."""
    return Path(shutil.copytree(liver_spleen, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_checkpoint(folder: Path, change: Callable[[dict[str, Any]], Any], *, legacy: bool = False) -> Path:
    """Change the checkpoint of fold 0 in place, trusting it."""
    path = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    change(checkpoint)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    return path


def configuration(plans: dict[str, Any]) -> dict[str, Any]:
    return dict.__getitem__(plans["configurations"], "3d_fullres")


def arguments(plans: dict[str, Any]) -> dict[str, Any]:
    return dict.__getitem__(configuration(plans)["architecture"], "arch_kwargs")


# -- what opens -----------------------------------------------------------------------------------------------------


def test_a_folder_opens_with_everything_a_server_needs_to_know(two_channels: Path) -> None:
    folder = ModelFolder.open(two_channels)
    assert folder.channels == ("T1w", "T2w")
    assert folder.labels.published == {"whole tumour": 1, "core": 2}
    assert folder.labels.has_regions
    assert (folder.configuration, folder.trainer, folder.reader) == ("3d_fullres", "nnUNetTrainer", "SimpleITKIO")
    assert (folder.folds, folder.checkpoint_name) == (("0",), "checkpoint_final.pth")
    assert folder.mirror_axes == (0, 1, 2)


def test_channels_are_ordered_by_number_not_by_text(folder: Path) -> None:
    names = {str(number): f"channel {number}" for number in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    edit(folder / "dataset.json", lambda dataset: dataset.update(channel_names=names))
    assert ModelFolder.open(folder).channels == tuple(f"channel {number}" for number in range(11))


def test_numbered_folds_are_ensembled_and_fold_all_is_left_out(tmp_path: Path) -> None:
    make_model_folder(tmp_path, folds=("10", "2", "0", "all"))
    assert ModelFolder.open(tmp_path).folds == ("0", "2", "10")


def test_fold_all_is_taken_where_there_is_no_other(tmp_path: Path) -> None:
    make_model_folder(tmp_path, folds=("all",))
    assert ModelFolder.open(tmp_path).folds == ("all",)


def test_the_best_checkpoint_stands_in_where_no_fold_has_a_final_one(tmp_path: Path) -> None:
    make_model_folder(tmp_path, folds=("0", "1"), checkpoint_name="checkpoint_best.pth")
    folder = ModelFolder.open(tmp_path)
    assert (folder.checkpoint_name, folder.folds) == ("checkpoint_best.pth", ("0", "1"))
    assert "network_weights" in folder.checkpoint("1")


def test_a_fold_with_a_final_checkpoint_wins_over_one_with_the_best_only(tmp_path: Path) -> None:
    make_model_folder(tmp_path, folds=("0",), checkpoint_name="checkpoint_best.pth")
    make_model_folder(tmp_path, folds=("1",))
    folder = ModelFolder.open(tmp_path)
    assert (folder.checkpoint_name, folder.folds) == ("checkpoint_final.pth", ("1",))


def test_other_folders_beside_the_folds_do_no_harm(folder: Path) -> None:
    for name in ("fold_0_backup", "fold_x", "crossval_results_folds_0"):
        shutil.copytree(folder / "fold_0", folder / name)
    assert ModelFolder.open(folder).folds == ("0",)


def test_a_configuration_may_inherit_from_another(folder: Path, liver_spleen: Path) -> None:
    def split(plans: dict[str, Any]) -> None:
        base = configuration(plans)
        child = {"inherits_from": "base", "patch_size": base.pop("patch_size")}
        plans["configurations"] = {"base": base, "3d_fullres": child}

    edit(folder / "plans.json", split)
    opened = ModelFolder.open(folder)
    assert opened.configuration_manager.patch_size == [16, 24, 24]
    assert opened.configuration_manager.spacing == ModelFolder.open(liver_spleen).configuration_manager.spacing
    assert Engine(opened, opened.folds, CPU).nbytes > 0


# -- what does not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("dataset.json", r"dataset\.json is missing"),
        ("plans.json", r"plans\.json is missing"),
        ("fold_0/checkpoint_final.pth", "holds no weights"),
        ("fold_0", "holds no weights"),
    ],
)
def test_a_missing_file_is_named(folder: Path, missing: str, message: str) -> None:
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelFolderError, match=message):
        ModelFolder.open(folder)


@pytest.mark.parametrize("name", ["dataset.json", "plans.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'"text"', b"\xff\xfe"])
def test_a_damaged_json_file_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFolderError, match=name.replace(".", r"\.")):
        ModelFolder.open(folder)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused_and_called_an_incomplete_download(
    folder: Path, kept: float, legacy: bool
) -> None:
    path = edit_checkpoint(folder, lambda checkpoint: None, legacy=legacy)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ModelFolderError, match=r"checkpoint_final\.pth"):
        ModelFolder.open(folder)


def test_garbage_in_place_of_a_checkpoint_never_escapes_as_a_bare_error(folder: Path) -> None:
    path = edit_checkpoint(folder, lambda checkpoint: None, legacy=True)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for position in generator.integers(0, 3000, size=5):
            damaged[position] = int(generator.integers(0, 256))
        path.write_bytes(bytes(damaged))
        try:
            load_checkpoint(path)
        except ModelFolderError:
            refused += 1
    assert refused > 100


def test_a_truncated_second_fold_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    make_model_folder(tmp_path, folds=("0", "1"))
    path = tmp_path / "fold_1" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:-2000])
    folder = ModelFolder.open(tmp_path)
    with pytest.raises(ModelFolderError, match="incomplete"):
        Engine(folder, folder.folds, CPU)


@pytest.mark.parametrize("key", ["network_weights", "init_args", "trainer_name"])
def test_a_checkpoint_of_something_else_is_refused(folder: Path, key: str) -> None:
    edit_checkpoint(folder, lambda checkpoint: checkpoint.pop(key))
    with pytest.raises(ModelFolderError, match=f"no nnU-Net v2 checkpoint: {key}"):
        ModelFolder.open(folder)


def test_a_checkpoint_that_is_a_bare_tensor_is_refused(folder: Path) -> None:
    torch.save(torch.zeros(3), folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(ModelFolderError, match="no nnU-Net v2 checkpoint"):
        ModelFolder.open(folder)


def test_plans_and_weights_of_different_models_are_told_apart(folder: Path) -> None:
    edit_checkpoint(folder, lambda checkpoint: checkpoint["init_args"].update(configuration="2d"))
    with pytest.raises(
        ModelFolderError, match=r"configuration 2d, which plans\.json does not have \(it has 3d_fullres"
    ):
        ModelFolder.open(folder)


def test_the_second_stage_of_a_cascade_is_refused(folder: Path) -> None:
    edit(folder / "plans.json", lambda plans: configuration(plans).update(previous_stage="3d_lowres"))
    with pytest.raises(ModelFolderError, match="cascade"):
        ModelFolder.open(folder)


@pytest.mark.parametrize("reader", ["NaturalImage2DIO", "Tiff3DIO", "LabsOwnIO", "os"])
def test_a_reader_that_does_not_read_volumes_is_refused(folder: Path, reader: str) -> None:
    edit(folder / "plans.json", lambda plans: plans.update(image_reader_writer=reader))
    with pytest.raises(ModelFolderError, match=f"image reader {reader}"):
        ModelFolder.open(folder)


def test_a_model_without_a_structure_is_refused(folder: Path) -> None:
    edit(folder / "dataset.json", lambda dataset: dataset.update(labels={"background": 0}))
    with pytest.raises(LabelError, match="no structure"):
        ModelFolder.open(folder)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("dataset.json", {"channel_names": {}}),
        ("dataset.json", {"channel_names": ["CT"]}),
        ("dataset.json", {"channel_names": {"first": "CT"}}),
        ("dataset.json", {"channel_names": 7}),
        ("plans.json", {"configurations": 7}),
        ("plans.json", {"configurations": {"3d_fullres": None}}),
        ("plans.json", {"configurations": {"3d_fullres": {}}}),
        ("plans.json", {"configurations": {"3d_fullres": {"inherits_from": "nothing"}}}),
        ("plans.json", {"configurations": {"3d_fullres": {"inherits_from": "3d_fullres"}}}),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans format")
def test_keys_of_another_type_than_nnunet_writes_are_refused(folder: Path, file: str, change: dict[str, Any]) -> None:
    edit(folder / file, lambda content: content.update(change))
    with pytest.raises(ModelFolderError):
        ModelFolder.open(folder)


@pytest.mark.parametrize("change", [{"init_args": None}, {"inference_allowed_mirroring_axes": 3}])
def test_a_checkpoint_with_odd_entries_is_refused(folder: Path, change: dict[str, Any]) -> None:
    edit_checkpoint(folder, lambda checkpoint: checkpoint.update(change))
    with pytest.raises(ModelFolderError, match="not as nnU-Net v2 writes it"):
        ModelFolder.open(folder)


# -- whose code runs ------------------------------------------------------------------------------------------------


class Malicious:
    """Pickles as a call of ``os.system``."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_checkpoint_that_would_run_a_command_is_refused_and_nothing_ran(
    folder: Path, tmp_path: Path, legacy: bool
) -> None:
    canary = tmp_path / "canary"
    path = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["logging"] = Malicious(f"touch {canary}")
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelFolderError, match="holds more than weights"):
        ModelFolder.open(folder)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists(), "the trap itself must work, or this test proves nothing"


def test_the_training_log_as_nnunet_writes_it_is_accepted(folder: Path) -> None:
    def log(checkpoint: dict[str, Any]) -> None:
        checkpoint["logging"] = {
            "mean_fg_dice": [np.float64(0.5), np.mean([0.25, 0.75])],
            "dice_per_class_or_region": [[np.float32(0.5), np.nan]],
            "train_losses": [np.mean(np.array([1, 2], dtype=np.float32))],
            "lrs": [0.01],
            "epoch_start_timestamps": [1.7e9],
            "steps": [np.int64(250), np.int32(3), np.bool_(True)],
        }
        checkpoint["init_args"].update(device=torch.device("cpu"), dataset_json={"labels": {"background": 0}})
        checkpoint.update(current_epoch=1000, _best_ema=np.float64(0.7), grad_scaler_state=None)
        checkpoint["optimizer_state"] = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1).state_dict()

    for legacy in (False, True):
        path = edit_checkpoint(folder, log, legacy=legacy)
        assert load_checkpoint(path)["_best_ema"] == 0.7
        assert ModelFolder.open(folder).labels.names == ("liver", "spleen")


def test_what_nnunets_own_logger_saves_is_accepted(folder: Path) -> None:
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    def log(checkpoint: dict[str, Any]) -> None:
        logger = LocalLogger()
        for key in ("mean_fg_dice", "train_losses", "val_losses", "lrs"):
            logger.log(key, np.float64(0.5), 0)
        checkpoint["logging"] = logger.get_checkpoint()

    edit_checkpoint(folder, log)
    assert ModelFolder.open(folder).trainer == "nnUNetTrainer"


def refused_network(folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """Return why the network of the folder with changed plans is not built."""
    edit(folder / "plans.json", change)
    opened = ModelFolder.open(folder)
    with pytest.raises(ModelFolderError) as caught:
        Engine(opened, opened.folds, CPU)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "torch.hub.load",
        "builtins.eval",
        "labs_own.networks.UNet",
        "torch.nn.Identity",
        "torch.nn.modules.conv.Conv3d",
        "torch.nn.modules.module.functools.partial",
        "dynamic_network_architectures.architectures.unet.torch.os.system",
        "dynamic_network_architectures.architectures.unet.torch.nn.Identity",
        "dynamic_network_architectures.architectures.unet.deepcopy",
        "dynamic_network_architectures.building_blocks.helper.convert_dim_to_conv_op",
        "dynamic_network_architectures.nothing.of.that.Name",
        "dynamic_network_architectures_evil.UNet",
        "",
    ],
)
def test_a_network_class_that_is_not_nnunets_own_is_refused(folder: Path, name: str) -> None:
    why = refused_network(folder, lambda plans: configuration(plans)["architecture"].update(network_class_name=name))
    assert f"custom architecture {name}" in why


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "torch.hub.load",
        "torch.nn.modules.conv.torch.os.system",
        "torch.nn.functional.relu",
        "torch.nn.modules.module.functools.partial",
        "torch.nn.NoSuchLayer",
        ["torch.nn.ReLU"],
    ],
)
def test_a_layer_that_is_no_layer_is_refused_and_never_called(folder: Path, tmp_path: Path, name: Any) -> None:
    canary = tmp_path / "canary"

    def poison(plans: dict[str, Any]) -> None:
        arguments(plans).update(nonlin=name, nonlin_kwargs={"command": f"touch {canary}"})

    assert str(name) in refused_network(folder, poison)
    assert not canary.exists()


def test_other_arguments_cannot_be_smuggled_in_as_imports(folder: Path, tmp_path: Path) -> None:
    def poison(plans: dict[str, Any]) -> None:
        arguments(plans)["norm_op_kwargs"] = "torch.nn.modules.conv.torch.os.system"
        configuration(plans)["architecture"]["_kw_requires_import"].append("norm_op_kwargs")

    assert "os.system" in refused_network(folder, poison)


def test_the_layers_nnunet_really_uses_are_accepted(folder: Path) -> None:
    edit(folder / "plans.json", lambda plans: arguments(plans).update(nonlin="torch.nn.modules.activation.LeakyReLU"))
    opened = ModelFolder.open(folder)
    assert Engine(opened, opened.folds, CPU).nbytes == sum(
        tensor.nbytes for tensor in opened.checkpoint("0")["network_weights"].values()
    )


def test_a_network_class_that_moved_is_found_where_nnunet_finds_it(folder: Path) -> None:
    old = "dynamic_network_architectures.architectures.plain_unet.PlainConvUNet"
    edit(folder / "plans.json", lambda plans: configuration(plans)["architecture"].update(network_class_name=old))
    opened = ModelFolder.open(folder)
    assert Engine(opened, opened.folds, CPU).nbytes > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda plans: arguments(plans).update(features_per_stage=[4, 8, 16]),
        lambda plans: arguments(plans).update(n_stages=4),
        lambda plans: arguments(plans).pop("strides"),
    ],
    ids=["other widths", "other depth", "no strides"],
)
def test_weights_of_another_architecture_are_refused(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    assert "do not fit the architecture" in refused_network(folder, change)


@pytest.mark.parametrize("architecture", [None, "unet", [], {}, {"network_class_name": "x"}])
def test_plans_without_a_usable_architecture_are_refused(folder: Path, architecture: Any) -> None:
    why = refused_network(folder, lambda plans: configuration(plans).update(architecture=architecture))
    assert "does not describe the network" in why
