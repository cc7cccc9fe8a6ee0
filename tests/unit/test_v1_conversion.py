"""nnU-Net v1 models as v2 folders: nnU-Net v1's own logits and label maps; what has no twin is refused by name."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from mshub.errors import ModelFolderError
from mshub.nnunet.engine import check_weights, load_network
from mshub.nnunet.folder import V1_INFERENCE, ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, PredictOptions
from mshub.nnunet.preprocessing import preprocessor_of
from mshub.nnunet.v1_conversion import convert_v1_folder
from mshub.nnunet.v1_files import read_v1_folder
from mshub.nnunet.v1_network import infer_architecture
from v1_models import MODELS, V1Model, v1_checkpoint, v1_patch, v1_weights, write_v1_folder, write_v1_images

ANISOTROPIC = MODELS["anisotropic"]
CPU = PredictOptions(device="cpu")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """What nnU-Net v1 itself computed with the same folders and images: see ``make_v1_golden.py``."""
    return dict(np.load(Path(__file__).parents[1] / "recorded" / "v1_golden.npz"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    """Every model of `MODELS`, converted."""
    home = tmp_path_factory.mktemp("v1")
    return {name: convert(home / name, model) for name, model in MODELS.items()}


def convert(path: Path, model: V1Model, **options: Any) -> ModelFolder:
    """Write a v1 folder at ``path/v1`` and open what it is converted to."""
    convert_v1_folder(write_v1_folder(path / "v1", model), path / "v2", **options)
    return ModelFolder.open(path / "v2")


def refusal(path: Path, model: V1Model, **options: Any) -> str:
    with pytest.raises(ModelFolderError) as caught:
        convert(path, model, **options)
    assert not (path / "v2").exists()
    return str(caught.value)


def refusal_of_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    """Return why a folder with changed weights is refused."""
    write_v1_folder(path / "v1", ANISOTROPIC)
    content = v1_checkpoint(ANISOTROPIC)
    change(content["state_dict"])
    torch.save(content, path / "v1" / "fold_0" / "model_final_checkpoint.model")
    with pytest.raises(ModelFolderError) as caught:
        convert_v1_folder(path / "v1", path / "v2")
    return str(caught.value)


# -- equal to nnU-Net v1 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_network_computes_what_v1s_computes(
    name: str, golden: dict[str, np.ndarray], converted: dict[str, ModelFolder]
) -> None:
    folder = converted[name]
    network = load_network(folder, folder.checkpoint(folder.folds[0])["network_weights"]).eval()
    with torch.inference_mode():
        logits = network(v1_patch(MODELS[name]))[0].numpy()
    assert np.ptp(golden[f"{name}_logits"]) > 1
    np.testing.assert_allclose(logits, golden[f"{name}_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_case_is_labelled_as_v1_labels_it(
    name: str, golden: dict[str, np.ndarray], converted: dict[str, ModelFolder], tmp_path: Path
) -> None:
    expected = golden[f"{name}_labels"]
    images = write_v1_images(tmp_path, name, MODELS[name])
    prediction = NNUNetPredictor(converted[name], NetworkCache()).predict(images, CPU)
    assert len(np.unique(expected)) == MODELS[name].classes + 1
    # Random weights put label borders everywhere: another processor may round a voxel the other way.
    assert np.count_nonzero(prediction.labels.array_xyz != expected) <= 2
    assert prediction.provenance["inference"] == "nnU-Net v1"


@pytest.mark.parametrize("name", MODELS)
def test_v2s_rule_gives_other_labels(
    name: str, golden: dict[str, np.ndarray], converted: dict[str, ModelFolder], tmp_path: Path
) -> None:
    folder = converted[name]
    as_v2 = replace(folder, plans={key: value for key, value in folder.plans.items() if key != V1_INFERENCE})
    images = write_v1_images(tmp_path, name, MODELS[name])
    labels = NNUNetPredictor(as_v2, NetworkCache()).predict(images, CPU).labels.array_xyz
    assert np.count_nonzero(labels != golden[f"{name}_labels"]) > labels.size // 200


def test_the_fast_profile_leaves_mirroring_out(converted: dict[str, ModelFolder], tmp_path: Path) -> None:
    images, ticks = write_v1_images(tmp_path, "anisotropic", ANISOTROPIC), []
    predictor = NNUNetPredictor(converted["anisotropic"], NetworkCache())
    accurate = predictor.predict(images, CPU).labels.array_xyz
    fast = predictor.predict(images, replace(CPU, profile=PROFILES["balanced"]), lambda *tick: ticks.append(tick))
    assert 0 < np.count_nonzero(fast.labels.array_xyz != accurate) < accurate.size // 2
    assert ticks == [(number, len(ticks)) for number in range(1, len(ticks) + 1)]


def test_stock_nnunet_opens_and_runs_the_folder(converted: dict[str, ModelFolder], tmp_path: Path) -> None:
    folder = converted["anisotropic"]
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder.path), use_folds=(0,))
    data, properties = folder.plans_manager.image_reader_writer_class().read_images(
        [str(path) for path in write_v1_images(tmp_path, "anisotropic", ANISOTROPIC)]
    )
    labels = predictor.predict_single_npy_array(data, properties)
    assert set(np.unique(labels)) == {0, 1, 2}


# -- what is written ------------------------------------------------------------------------------------------------


def test_a_folder_is_converted_with_its_folds_and_mirror_axes(converted: dict[str, ModelFolder]) -> None:
    assert [folder.folds for folder in converted.values()] == [("0",), ("0", "1"), ("all",), ("0",)]
    assert converted["sagittal"].mirror_axes == (0, 1, 2)
    assert converted["slices"].mirror_axes is None
    assert [folder.configuration for folder in converted.values()] == ["3d_fullres", "3d_fullres", "2d", "3d_fullres"]


def test_the_plans_are_those_of_the_trained_stage(converted: dict[str, ModelFolder]) -> None:
    folder = converted["anisotropic"]
    configuration = folder.configuration_manager
    assert (configuration.patch_size, configuration.spacing) == ([6, 16, 16], [4.0, 0.9, 0.9])
    assert configuration.normalization_schemes == ["ZScoreNormalization"] * 2
    assert configuration.use_mask_for_norm == [True, False]
    assert converted["slices"].configuration_manager.spacing == [1.1, 1.0]
    assert converted["sagittal"].plans["transpose_backward"] == [1, 2, 0]
    statistics = converted["sagittal"].plans["foreground_intensity_properties_per_channel"]["0"]
    assert (statistics["mean"], statistics["std"], statistics["max"]) == (60.0, 150.0, 2000.0)


def test_a_kernel_holds_the_encoders_and_the_decoders(converted: dict[str, ModelFolder]) -> None:
    arguments = converted["batch-norm"].configuration_manager.network_arch_init_kwargs
    assert arguments["kernel_sizes"] == [[3, 3, 3], [3, 3, 3], [1, 3, 3]]
    assert arguments["strides"] == [[1, 1, 1], [1, 1, 2], [2, 2, 2]]
    assert arguments["n_conv_per_stage"] == [3, 3, 3]
    assert arguments["norm_op"].endswith("BatchNorm3d")


@pytest.mark.parametrize(("stage", "name"), [(0, "3d_lowres"), (1, "3d_fullres")])
def test_the_lower_of_two_stages_is_3d_lowres(tmp_path: Path, stage: int, name: str) -> None:
    folder = convert(tmp_path, replace(ANISOTROPIC, stage=stage, stages=2))
    assert folder.configuration == name
    check_weights(folder)


def test_names_come_from_the_card_and_else_from_the_plans(tmp_path: Path) -> None:
    named = convert(tmp_path / "named", ANISOTROPIC, labels=("tumour", "node"), channels=("T1w", "T2w"))
    assert (named.labels.names, named.channels) == (("tumour", "node"), ("T1w", "T2w"))
    unnamed = convert(tmp_path / "unnamed", ANISOTROPIC)
    assert (unnamed.labels.names, unnamed.channels) == (("class 1", "class 2"), ("MRI", "MRI"))


def test_nothing_of_the_training_cases_is_left_in_the_folder(converted: dict[str, ModelFolder]) -> None:
    files = [path for folder in converted.values() for path in folder.path.rglob("*") if path.is_file()]
    assert len(files) == 13
    assert not [path for path in files if any(word in path.read_bytes() for word in (b"Smith", b"Elsewhere", b"/v1"))]


def test_the_same_files_are_converted_to_the_same_bytes(converted: dict[str, ModelFolder], tmp_path: Path) -> None:
    again, first = convert(tmp_path, MODELS["sagittal"]).path, converted["sagittal"].path
    for path in [path for path in first.rglob("*") if path.is_file()]:
        assert (again / path.relative_to(first)).read_bytes() == path.read_bytes()


def test_export_parameters_of_the_plans_are_kept(tmp_path: Path) -> None:
    export = {"force_separate_z": False, "interpolation_order": 3, "interpolation_order_z": 1}
    folder = convert(tmp_path, replace(ANISOTROPIC, plans={"segmentation_export_params": export}))
    kept = folder.plans["configurations"]["3d_fullres"]["resampling_fn_probabilities_kwargs"]
    assert kept == {"is_seg": False, "order": 3, "order_z": 1, "force_separate_z": False}


def test_old_plans_without_kernels_transposition_and_preprocessor_are_read(tmp_path: Path) -> None:
    write_v1_folder(tmp_path / "v1", MODELS["sagittal"])
    for path in (tmp_path / "v1").rglob("*.model.pkl"):
        info = pickle.loads(path.read_bytes())
        for key in ("transpose_forward", "transpose_backward", "preprocessor_name", "conv_per_stage"):
            del info["plans"][key]
        for key in ("pool_op_kernel_sizes", "conv_kernel_sizes"):
            del info["plans"]["plans_per_stage"][0][key]
        path.write_bytes(pickle.dumps(info))
    convert_v1_folder(tmp_path / "v1", tmp_path / "v2")
    folder = ModelFolder.open(tmp_path / "v2")
    assert folder.plans["transpose_forward"] == [0, 1, 2]
    check_weights(folder)


def test_a_card_can_vouch_for_a_trainer_of_the_makers_own(tmp_path: Path) -> None:
    model = replace(ANISOTROPIC, trainer="nnUNetTrainerV2_StElsewhere")
    assert "trainer = 'nnUNetTrainerV2_StElsewhere'" in refusal(tmp_path / "1", model)
    check_weights(convert(tmp_path / "2", model, trusted_trainer="nnUNetTrainerV2_StElsewhere"))


@pytest.mark.parametrize(
    ("trainer", "mirrored"),
    [
        ("nnUNetTrainer", True),
        ("nnUNetTrainerNoDA", False),
        ("nnUNetTrainerV2_DA5", True),
        ("nnUNetTrainerV2_Loss_DiceCE_noSmooth", True),
        ("nnUNetTrainerV2_Ranger_lr3en4", True),
        ("nnUNetTrainerV2_momentum09in2D", True),
        ("nnUNetTrainerV2_noDataAugmentation", False),
    ],
)
def test_trainers_that_change_neither_network_nor_inference_are_known(
    tmp_path: Path, trainer: str, mirrored: bool
) -> None:
    folder = convert(tmp_path, replace(ANISOTROPIC, trainer=trainer))
    assert folder.mirror_axes == ((0, 1, 2) if mirrored else None)


# -- v1's preprocessing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_training_sees_what_a_prediction_sees(name: str, converted: dict[str, ModelFolder], tmp_path: Path) -> None:
    folder = converted[name]
    reader = folder.plans_manager.image_reader_writer_class()
    data, properties = reader.read_images([str(path) for path in write_v1_images(tmp_path, name, MODELS[name])])
    configuration, manager = folder.configuration_manager, folder.plans_manager
    label = np.zeros((1, *data.shape[1:]), np.int8)
    label[:, 3:5, 8:15, 8:15] = 1
    arguments = (manager, configuration, folder.dataset)
    predicted, _, _ = preprocessor_of(folder).run_case_npy(data, None, dict(properties), *arguments)
    trained, segmentation, _ = preprocessor_of(folder).run_case_npy(data, label, dict(properties), *arguments)
    np.testing.assert_array_equal(trained, predicted)
    assert {0, 1} <= set(np.unique(segmentation)) <= {-1, 0, 1}


def test_what_lies_outside_the_mask_is_zero_and_the_rest_standard(
    converted: dict[str, ModelFolder], tmp_path: Path
) -> None:
    folder = converted["anisotropic"]
    reader = folder.plans_manager.image_reader_writer_class()
    images = [str(path) for path in write_v1_images(tmp_path, "anisotropic", ANISOTROPIC)]
    data, mask, _ = preprocessor_of(folder).run_case_npy(
        *(reader.read_images(images)[0], None, dict(reader.read_images(images)[1])),
        *(folder.plans_manager, folder.configuration_manager, folder.dataset),
    )
    outside = mask[0] < 0
    assert outside.any()
    assert not data[0][outside].any()
    assert data[1][outside].any()
    np.testing.assert_allclose([data[0][~outside].mean(), data[0][~outside].std()], [0, 1], atol=1e-4)
    np.testing.assert_allclose([data[1].mean(), data[1].std()], [0, 1], atol=1e-4)


# -- what has no twin -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ("nnUNetTrainerV2CascadeFullRes", "second stage of a cascade"),
        ("nnUNetTrainerCascadeFullRes", "second stage of a cascade"),
        ("nnUNetTrainerV2_ResencUNet_DA3", "residual encoder"),
        ("nnUNetTrainerV2_GN", "normalises by group"),
        ("nnUNetTrainerV2_FRN", "filter response"),
        ("nnUNetTrainerV2_NoNormalization", "no normalisation layers"),
        ("nnUNetTrainerV2_ReLU", "another activation"),
        ("nnUNetTrainerV2_LReLU_slope_2en1", "another activation"),
        ("nnUNetTrainerV2_lReLU_convReLUIN", "another activation"),
        ("nnUNetTrainerV2_GeLU", "another activation"),
        ("nnUNetTrainerV2_Mish", "another activation"),
        ("nnUNetTrainerV2BraTSRegions_DA3", "overlapping regions"),
        ("nnUNetTrainerV2_MMS", "not one of nnU-Net v1's own"),
    ],
)
def test_a_trainer_that_changes_the_network_is_refused_by_name(tmp_path: Path, trainer: str, reason: str) -> None:
    message = refusal(tmp_path, replace(ANISOTROPIC, trainer=trainer))
    assert trainer in message
    assert reason in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schemes": ("CT2", "nonCT")}, "normalised by CT2"),
        ({"plans": {"preprocessor_name": "Preprocessor3DBetterResampling"}}, "Preprocessor3DBetterResampling"),
        ({"plans": {"num_classes": 5}}, "num_classes gives 6, the weights show 3"),
        ({"plans": {"num_modalities": 1}}, "normalization_schemes in the plans has 2 entries for 1 channels"),
        ({"plans": {"base_num_features": 30}}, "base_num_features gives 30"),
        ({"plans": {"all_classes": [1, 3]}}, "classes of this model are 1, 3"),
        ({"plans": {"num_classes": None}}, "num_classes is missing"),
        ({"plans": {"num_classes": "many"}}, "not as nnU-Net v1 writes them"),
        ({"patch": (16, 16)}, "PreprocessorFor2D|patch_size gives 2"),
    ],
)
def test_plans_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    model = replace(ANISOTROPIC, **change)
    write_v1_folder(tmp_path / "v1", model)
    torch.save(v1_checkpoint(ANISOTROPIC), tmp_path / "v1" / "fold_0" / "model_final_checkpoint.model")
    with pytest.raises(ModelFolderError, match=reason):
        convert_v1_folder(tmp_path / "v1", tmp_path / "v2")


@pytest.mark.parametrize("key", ["pools", "kernels"])
def test_plans_of_another_network_are_refused(tmp_path: Path, key: str) -> None:
    other = {"pools": ((2, 2, 2), (2, 2, 2)), "kernels": ((3, 3, 3), (3, 3, 3), (3, 3, 3))}
    write_v1_folder(tmp_path / "v1", replace(ANISOTROPIC, **{key: other[key]}))
    torch.save(v1_checkpoint(ANISOTROPIC), tmp_path / "v1" / "fold_0" / "model_final_checkpoint.model")
    with pytest.raises(ModelFolderError, match=r"different models: (pool_op|conv)_kernel_sizes gives"):
        convert_v1_folder(tmp_path / "v1", tmp_path / "v2")


def test_ct_without_its_statistics_is_refused(tmp_path: Path) -> None:
    plans = {"dataset_properties": {"intensityproperties": {0: {"mean": 1.0}}}}
    assert "lack sd, percentile_00_5" in refusal(tmp_path, replace(MODELS["sagittal"], plans=plans))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"labels": ("tumour",)}, "names 1 labels .tumour.; this model has 2"), ({"channels": ["a"] * 3}, "3 channels")],
)
def test_a_card_for_another_number_of_names_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFolderError, match=message):
        convert(tmp_path, ANISOTROPIC, **options)


def test_upsampling_that_is_not_learnt_is_refused(tmp_path: Path) -> None:
    message = refusal_of_weights(
        tmp_path, lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("tu.")]
    )
    assert "convolutional_upsampling=False" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"conv_blocks_context.0.blocks.0.instnorm.tau": torch.ones(4)}), "instnorm.tau"),
        (lambda w: w.update({"attention.0.weight": torch.ones(4)}), "parts that .* not have: attention.0.weight"),
        (lambda w: w.pop("conv_blocks_context.1.blocks.0.instnorm.weight"), "without normalisation"),
        (lambda w: w.pop("conv_blocks_context.1.blocks.0.conv.weight"), "convolutions; nnU-Net v1 has the same"),
        (lambda w: w.pop("seg_outputs.1.weight"), "not as nnU-Net v1 writes them"),
        (lambda w: w.pop("tu.1.weight"), "1 transposed convolutions"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    assert re.search(message, refusal_of_weights(tmp_path, change))


def test_a_bias_of_the_last_layer_is_kept(tmp_path: Path) -> None:
    weights = v1_weights(ANISOTROPIC) | {f"seg_outputs.{up}.bias": torch.tensor([1.0, 2.0, 3.0]) for up in (0, 1)}
    write_v1_folder(tmp_path / "v1", ANISOTROPIC)
    content = {**v1_checkpoint(ANISOTROPIC), "state_dict": weights}
    torch.save(content, tmp_path / "v1" / "fold_0" / "model_final_checkpoint.model")
    convert_v1_folder(tmp_path / "v1", tmp_path / "v2")
    converted = ModelFolder.open(tmp_path / "v2").checkpoint("0")["network_weights"]
    assert converted["decoder.seg_layers.1.bias"].tolist() == [1.0, 2.0, 3.0]
    assert converted["decoder.transpconvs.0.bias"].tolist() == [0.0] * 8


def test_the_network_is_inferred_from_its_weights(tmp_path: Path) -> None:
    architecture = infer_architecture(read_v1_folder(write_v1_folder(tmp_path, MODELS["batch-norm"]))[0].weights())
    assert (architecture.channels, architecture.heads, architecture.features) == (1, 3, (4, 8, 16))
    assert architecture.encoder_kernels == ((3, 1, 3), (3, 3, 3), (1, 3, 3))
    assert architecture.decoder_kernels == ((3, 3, 3), (1, 3, 3))
    assert architecture.batch_norm


def test_the_setting_is_in_the_plans(converted: dict[str, ModelFolder], liver_spleen: Path) -> None:
    plans = json.loads((converted["slices"].path / "plans.json").read_text())
    assert plans[V1_INFERENCE] is True
    assert not ModelFolder.open(liver_spleen).predicts_as_v1
