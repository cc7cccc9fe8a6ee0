"""nnU-Net releases in the shapes they are found in: tiny, made here, with the files and the names of the real ones.

`RELEASES` is the table; docs/releases.md has a line for each. What a shape holds follows public releases and nnU-Net's
own exporters; the weights are random.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from factories import make_model_folder
from v1_models import MODELS, v1_checkpoint, write_v1_folder

UNET = "dynamic_network_architectures.architectures.unet"
RESENC = {
    "network_class_name": f"{UNET}.ResidualEncoderUNet",
    "n_conv_per_stage": None,
    "n_blocks_per_stage": [1, 2, 2],
}
BATCH_NORM = {"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}
NESTED = "Dataset017_Abdomen/nnUNetTrainer__nnUNetPlans__3d_fullres"
CARD = """id = "{id}"
title = "t"
site = "s"
modality = "MR"
target = "t"
status = "local"
generation = {generation}
{more}
"""
PLAN = """[plan]
labels = ["GTVp", "node"]
channels = ["T1w", "T2w"]
features = 4
patch_size = [6, 16, 16]
spacing = [4.0, 0.9, 0.9]
resampling_order = 1
separate_z = true
mirroring = false
pools = [[1, 2, 2], [2, 2, 2]]
kernels = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
"""


class OfTheirOwn:
    """A class of a model's makers, as a checkpoint may hold one beside its weights."""


@dataclass(frozen=True)
class Release:
    """One shape.

    Attributes
    ----------
    build : callable
        Writes it into a folder and returns the path to add.
    refusal : str or None
        Pattern of the message by which it is refused; None where it is imported, predicts and is fine-tuned.
    card : str
        Lines of a card to add it with, if any; ``generation`` of that card.
    options : mapping
        More arguments of ``mshub add``.
    stock : bool
        Today's nnunetv2 opens the folder as it is, to be compared with.
    """

    build: Callable[[Path], Path]
    refusal: str | None = None
    card: str = ""
    generation: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
    stock: bool = False


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _edit_checkpoints(folder: Path, change: Callable[[dict[str, Any]], Any], **options: Any) -> Path:
    for path in folder.glob("fold_*/checkpoint_*.pth"):
        checkpoint = torch.load(path, weights_only=False)
        change(checkpoint)
        torch.save(checkpoint, path, **options)
    return folder


def _zipped(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                out.write(file, f"{prefix}/{file.relative_to(folder)}" if prefix else file.relative_to(folder))
    return path


def _as_old_plans(folder: Path, network: str) -> Path:
    """Turn the plans into those of nnU-Net 2.0 to 2.3, which describe the network by the planner's numbers."""

    def change(plans: dict[str, Any]) -> None:
        (configuration,) = plans["configurations"].values()
        arguments = configuration.pop("architecture")["arch_kwargs"]
        configuration |= {
            "UNet_class_name": network,
            "UNet_base_num_features": arguments["features_per_stage"][0],
            "unet_max_num_features": max(arguments["features_per_stage"]),
            "n_conv_per_stage_encoder": arguments.get("n_conv_per_stage") or arguments["n_blocks_per_stage"],
            "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
            "num_pool_per_axis": [2, 2, 2],
            "pool_op_kernel_sizes": arguments["strides"],
            "conv_kernel_sizes": arguments["kernel_sizes"],
        }
        statistics = plans.pop("foreground_intensity_properties_per_channel")
        plans["foreground_intensity_properties_by_modality"] = statistics

    _edit(folder / "plans.json", change)
    return folder


def exported_zip(folder: Path) -> Path:
    """A zip as ``nnUNetv2_export_model_to_zip`` writes it, cross-validation results and all."""
    model = make_model_folder(folder / "model", folds=("0", "1"))
    (model / "crossval_results_folds_0_1").mkdir()
    for name in ("postprocessing.pkl", "postprocessing.json", "dataset.json", "plans.json"):
        (model / "crossval_results_folds_0_1" / name).write_bytes(b"{}")
    (model / "fold_0" / "validation").mkdir()
    (model / "fold_0" / "validation" / "summary.json").write_text("{}")
    return _zipped(model, folder / "export.zip", NESTED)


def drive_folder(folder: Path) -> Path:
    """A shared folder with a readme, system files and the model two levels below."""
    make_model_folder(folder / "Liver models (final)" / "v2" / "model", checkpoint_name="checkpoint_final.pth")
    (folder / "Liver models (final)" / "How to use.docx").write_bytes(b"PK")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._plans.json").write_bytes(b"x")
    return folder


def totalsegmentator(folder: Path) -> Path:
    """A part of TotalSegmentator: its own trainer, NibabelIOWithReorient, plans of nnU-Net 2.0, no mirroring."""
    trainer = "nnUNetTrainer_4000epochs_NoMirroring"
    name = "Dataset291_TotalSegmentator_part1_organs_1559subj"
    model = make_model_folder(folder / "model", reader="NibabelIOWithReorient", trainer=trainer, mirror_axes=None)
    _as_old_plans(model, "PlainConvUNet")
    _edit(model / "dataset.json", lambda d: d.update(overwrite_image_reader_writer="NibabelIOWithReorient"))
    _edit(model / "plans.json", lambda p: p.update(dataset_name=name))
    _edit_checkpoints(model, lambda checkpoint: checkpoint.pop("inference_allowed_mirroring_axes"))
    return _zipped(model, folder / "v2.0.0.zip", f"{name}/{trainer}__nnUNetPlans__3d_fullres")


def multitalent(folder: Path) -> Path:
    """Many overlapping structures of many data sets, predicted independently, by a trainer of its own."""
    labels: dict[str, Any] = {"background": 0}
    for number in range(1, 13, 2):
        labels |= {f"organ {number}": [number, number + 1], f"tumour {number}": [number + 1]}
    order = {"regions_class_order": [*range(1, 13)]}
    return make_model_folder(folder / "m", labels=labels, dataset_extra=order, trainer="MultiTalent_trainer_ddp_2000ep")


def batch_norm(folder: Path) -> Path:
    """nnUNetTrainerBN: its plans say instance normalisation, its weights do not."""
    model = make_model_folder(folder / "model", architecture=BATCH_NORM, trainer="nnUNetTrainerBN")
    instance = "torch.nn.modules.instancenorm.InstanceNorm3d"

    def change(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["norm_op"] = instance

    _edit(model / "plans.json", change)
    return model


def torch_resampling(folder: Path) -> Path:
    """Plans of nnU-Net's torch_resampling planners."""
    model = make_model_folder(folder / "model")
    options = {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False}
    names = {f"resampling_fn_{what}": "resample_torch_fornnunet" for what in ("data", "seg", "probabilities")}
    kwargs = {f"{name}_kwargs": {**options, "is_seg": name.endswith("seg")} for name in names}
    _edit(model / "plans.json", lambda plans: plans["configurations"]["3d_fullres"].update(**names, **kwargs))
    return model


def wrapped_weights(folder: Path) -> Path:
    """Names as DistributedDataParallel and torch.compile leave them."""
    model = make_model_folder(folder / "model")

    def change(checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["network_weights"]
        checkpoint["network_weights"] = {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}

    return _edit_checkpoints(model, change)


def old_checkpoint(folder: Path) -> Path:
    """A checkpoint in torch's format before 1.6, with numpy numbers in its training log."""
    model = make_model_folder(folder / "model")
    log = {"mean_fg_dice": [np.float64(0.5)], "ema_fg_dice": [np.float32(0.5)]}
    change = {"logging": log, "_best_ema": np.float64(0.5), "optimizer_state": None}
    return _edit_checkpoints(model, lambda c: c.update(change), _use_new_zipfile_serialization=False)


def several_configurations(folder: Path) -> Path:
    """A results folder of one data set with three configurations."""
    base = folder / "Dataset017_Abdomen"
    for name, patch in (("2d", (16, 24)), ("3d_fullres", (16, 24, 24)), ("3d_lowres", (16, 24, 24))):
        make_model_folder(base / f"nnUNetTrainer__nnUNetPlans__{name}", configuration=name, patch=patch,
                          mirror_axes=tuple(range(len(patch))))  # fmt: skip
    return folder


def inherited_configuration(folder: Path) -> Path:
    """A configuration that a person wrote by inheriting from nnU-Net's, under a name of their own."""
    model = make_model_folder(folder / "model", configuration="3d_fullres_small")

    def change(plans: dict[str, Any]) -> None:
        base = plans["configurations"].pop("3d_fullres_small")
        child = {"inherits_from": "3d_fullres", "batch_size": 1, "patch_size": base.pop("patch_size")}
        plans["configurations"] = {"3d_fullres": base, "3d_fullres_small": child}

    _edit(model / "plans.json", change)
    return model


def with_objects(folder: Path) -> Path:
    """A checkpoint that holds an object of its makers' own."""
    return _edit_checkpoints(make_model_folder(folder / "model"), lambda c: c.update(settings=OfTheirOwn()))


def cascade(folder: Path) -> Path:
    model = make_model_folder(folder / "model", configuration="3d_cascade_fullres")
    _edit(
        model / "plans.json",
        lambda plans: plans["configurations"]["3d_cascade_fullres"].update(previous_stage="3d_lowres"),
    )
    return model


def asking_for(network: str) -> Callable[[Path], Path]:
    """A release whose plans name a network that is not nnU-Net's."""

    def build(folder: Path) -> Path:
        model = make_model_folder(folder / "model")

        def change(plans: dict[str, Any]) -> None:
            plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = network

        _edit(model / "plans.json", change)
        return model

    return build


def stunet(folder: Path) -> Path:
    """Plans of nnU-Net, weights of a network that the trainer builds."""
    model = make_model_folder(folder / "model", trainer="STUNetTrainer_base_ft")

    def change(checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["network_weights"]
        checkpoint["network_weights"] = {f"conv_blocks_context.{name}": tensor for name, tensor in weights.items()}

    return _edit_checkpoints(model, change)


def naming(**plans: Any) -> Callable[[Path], Path]:
    """A release with a piece of its makers' own in its plans."""

    def build(folder: Path) -> Path:
        model = make_model_folder(folder / "model")
        inner = {key: value for key, value in plans.items() if key != "image_reader_writer"}
        _edit(model / "plans.json", lambda p: p["configurations"]["3d_fullres"].update(inner))
        _edit(model / "plans.json", lambda p: p.update({k: v for k, v in plans.items() if k not in inner}))
        return model

    return build


def unfinished(folder: Path) -> Path:
    return make_model_folder(folder / "model", checkpoint_name="checkpoint_latest.pth")


def raw_dataset(folder: Path) -> Path:
    for name in ("imagesTr/case_0000.nii.gz", "labelsTr/case.nii.gz", "dataset.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    return folder


def v1(name: str, **changes: Any) -> Callable[[Path], Path]:
    """A trained-model folder of nnU-Net v1."""
    return lambda folder: write_v1_folder(folder / "model", replace(MODELS[name], **changes))


def v1_zip(folder: Path) -> Path:
    """A zip as ``nnUNet_export_model_to_zip`` writes it."""
    inner = "3d_fullres/Task017_Abdomen/nnUNetTrainerV2__nnUNetPlansv2.1"
    return _zipped(v1("sagittal")(folder), folder / "Task017.zip", inner)


def v1_postprocessed(folder: Path) -> Path:
    """A v1 release whose cross-validation chose to keep the largest component of a structure."""
    model = v1("sagittal")(folder)
    content = {"for_which_classes": [[1, 2], 2], "min_valid_object_sizes": str({(1, 2): 300.0, 2: 40.0})}
    (model / "postprocessing.json").write_text(json.dumps(content))
    return model


def bare_state(folder: Path) -> Path:
    """Weights of v1 by themselves, as the nasopharynx model is published."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": v1_checkpoint(MODELS["anisotropic"])["state_dict"]}, folder / "robustnpc.model")
    return folder / "robustnpc.model"


def bare_state_in_a_zip(folder: Path) -> Path:
    """The same in a zip with a readme."""
    bare_state(folder / "weights")
    (folder / "weights" / "readme.txt").write_text("see the paper")
    return _zipped(folder / "weights", folder / "weights.zip", "RobustNPC")


def _folder(**options: Any) -> Callable[[Path], Path]:
    return lambda folder: make_model_folder(folder / "model", **options)


TRAINERS = {"labels": {"background": 0, "organ": 1, "lesion": 2}, "folds": ("0", "1")}

RELEASES = {
    # -- imported -------------------------------------------------------------------------------------------------
    "v2 results folder": Release(_folder(folds=("0", "1", "2")), stock=True),
    "v2 export zip": Release(exported_zip),
    "v2 shared folder with extra nesting": Release(drive_folder),
    "v2 fold_all": Release(_folder(folds=("all",)), stock=True),
    "v2 checkpoint_best only": Release(_folder(checkpoint_name="checkpoint_best.pth"), stock=True),
    "v2 2d": Release(_folder(patch=(16, 24), mirror_axes=(0, 1)), stock=True),
    "v2 3d_lowres": Release(_folder(configuration="3d_lowres", spacing_zyx_mm=(4, 3, 3)), stock=True),
    "v2 several configurations": Release(
        several_configurations, options={"root": "Dataset017_Abdomen/nnUNetTrainer__nnUNetPlans__2d"}
    ),
    "v2 inherited configuration": Release(inherited_configuration, stock=True),
    "v2 regions": Release(
        _folder(
            labels={"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3},
            dataset_extra={"regions_class_order": [1, 2, 3]},
        ),
        stock=True,
    ),
    "v2 MultiTalent style": Release(multitalent),
    "v2 residual encoder": Release(_folder(architecture=RESENC), stock=True),
    "v2 residual encoder, plans of 2.0": Release(
        lambda folder: _as_old_plans(make_model_folder(folder / "model", architecture=RESENC), "ResidualEncoderUNet"),
    ),
    "v2 TotalSegmentator": Release(totalsegmentator),
    "v2 MRSegmentator": Release(_folder(channels=("MRI",)), card='orientation = "LPS"'),
    "v2 nnUNetTrainerBN": Release(batch_norm),
    "v2 batch normalisation": Release(_folder(architecture=BATCH_NORM), stock=True),
    "v2 trainer of its makers' own": Release(_folder(**TRAINERS, trainer="AutoPET3_Trainer")),
    "v2 torch resampling": Release(torch_resampling, stock=True),
    "v2 weights of a wrapped network": Release(wrapped_weights),
    "v2 checkpoint older than torch 1.6": Release(old_checkpoint),
    "v2 checkpoint with objects, --trust": Release(with_objects, options={"trust": True}),
    "v1 folder": Release(v1("anisotropic"), generation=1),
    "v1 zip, two folds": Release(v1_zip, generation=1),
    "v1 2d, all": Release(v1("slices"), generation=1),
    "v1 batch normalisation": Release(v1("batch-norm"), generation=1),
    "v1 with postprocessing": Release(v1_postprocessed, generation=1),
    "v1 bare state file and a plan": Release(bare_state, card=PLAN, generation=1),
    "v1 bare state file in a zip": Release(bare_state_in_a_zip, card=PLAN, generation=1),
    # -- refused --------------------------------------------------------------------------------------------------
    "v2 cascade": Release(cascade, "3d_cascade_fullres is the second stage of a cascade"),
    "v2 several configurations, none chosen": Release(
        several_configurations, "holds 3 models:.*Choose one with --root"
    ),
    "v2 network of its makers' own": Release(
        asking_for("mamba.UMambaBot"), "asks for the custom architecture mamba.UMambaBot"
    ),
    "v2 Primus": Release(
        asking_for("dynamic_network_architectures.architectures.primus.Primus"), "custom architecture .*primus.Primus"
    ),
    "v2 network built by the trainer": Release(stunet, "STUNetTrainer_base_ft probably builds its own network"),
    "v2 image reader of its own": Release(naming(image_reader_writer="OurIO"), "the image reader OurIO"),
    "v2 preprocessor of its own": Release(naming(preprocessor_name="OurPrep"), "the preprocessor OurPrep"),
    "v2 normalisation of its own": Release(naming(normalization_schemes=["OurNorm"]), "the normalisation OurNorm"),
    "v2 checkpoint with objects": Release(with_objects, "holds more than weights.*mshub add --trust"),
    "v2 unfinished training": Release(unfinished, "neither checkpoint_final.pth nor checkpoint_best.pth"),
    "v2 raw dataset": Release(raw_dataset, "looks like a raw dataset"),
    "v1 cascade": Release(v1("sagittal", trainer="nnUNetTrainerV2CascadeFullRes"), "second stage of a cascade"),
    "v1 residual encoder": Release(v1("sagittal", trainer="nnUNetTrainerV2_ResencUNet"), "has a residual encoder"),
    "v1 group normalisation": Release(v1("sagittal", trainer="nnUNetTrainerV2_GN"), "normalises by group"),
    "v1 trainer of its makers' own": Release(v1("sagittal", trainer="nnUNetTrainerV2_Ours"), "not one of nnU-Net v1's"),
    "v1 normalisation CT2": Release(v1("sagittal", schemes=("CT2",)), "normalised by CT2"),
    "v1 bare state file without a plan": Release(bare_state, r"Pass that folder.*\[plan\]"),
}


def write_release(name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Write a release; returns what to add and with which arguments of `mshub.install.add_model`."""
    release = RELEASES[name]
    (folder / "release").mkdir(parents=True)
    source = release.build(folder / "release")
    options = dict(release.options)
    if release.card:
        options["card_path"] = folder / "card.toml"
        text = CARD.format(id="release", generation=release.generation, more=release.card)
        options["card_path"].write_text(text)
    return source, options
