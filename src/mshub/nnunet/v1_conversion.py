"""Convert a trained-model folder of nnU-Net v1 to one of v2: the same function of the image, in v2's terms.

The network is inferred from the weights (`mshub.nnunet.v1_network`) and checked against the plans. What has no twin in
v2 is refused by name.

Trainers of v1 build their networks in code that is not imported here. Group normalisation or another activation
leave no trace in the weights, so only trainers known to keep nnU-Net's own network are accepted, or those whose card
says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mshub.card_tables import Plan
from mshub.errors import ModelFolderError
from mshub.nnunet.checkpoints import first_line
from mshub.nnunet.model_writing import write_model_folder
from mshub.nnunet.postprocessing import KEEP_LARGEST, read_v1_rules
from mshub.nnunet.v1_files import V1Checkpoint, read_v1_folder
from mshub.nnunet.v1_network import convert_weights, infer_architecture
from mshub.nnunet.v1_plans import V1Plans, plans_of

TRAINER = "nnUNetTrainer"

# Change the loss, the optimiser, the augmentation or what the weights themselves show; never network or inference.
_HARMLESS = (
    r"\d+epochs|3ConvPerStage(?:SameFilters)?|Adam|allConv3x3|BN|copy\d+|cycleAtEnd2?|DA[235]|DDP|DP|fixedSchedule2?|"
    r"focalLoss|ForceBD|ForceSD|fp16|fp32|fullEvals|graduallyTransitionFromCEToDice|independentScalePerAxis|insaneDA|"
    r"Loss_[A-Za-z0-9]+|lr[a-z0-9]*|\d+en\d+|momentum\d+(?:in2D)?|noDataAugmentation|noDeepSupervision|noMirroring|"
    r"noSmooth|Ranger|reduceMomentumDuringTraining|ReduceOnPlateau|SGD|softDeepSupervision|squared|warmup"
)
_KNOWN_TRAINER = re.compile(rf"nnUNetTrainer(?:CE|NoDA)?|nnUNetTrainerV2(?:_(?:{_HARMLESS}))*")
_UNSUPPORTED = {
    "cascade": "is the second stage of a cascade and needs the segmentation of the first; add 3d_lowres or 2d",
    "resenc": "has a residual encoder, which is no PlainConvUNet",
    "_gn": "normalises by group, which PlainConvUNet does not",
    "_frn": "uses filter response normalisation, which PlainConvUNet does not",
    "nonormalization": "has no normalisation layers",
    "relu": "has another activation than nnU-Net's own",
    "gelu": "has another activation than nnU-Net's own",
    "mish": "has another activation than nnU-Net's own",
    "regions": "predicts overlapping regions",
}
_WITHOUT_MIRRORING = ("nomirror", "nodataaugmentation", "noda")


def convert_v1_folder(
    source: Path,
    target: Path,
    *,
    labels: Sequence[str] = (),
    channels: Sequence[str] = (),
    trusted_trainer: str | None = None,
) -> None:
    """Write the v2 folder of a v1 model.

    Names of training cases and paths, which v1's plans hold, are left behind.

    Parameters
    ----------
    source : Path
        Trained-model folder of nnU-Net v1: see `mshub.nnunet.v1_files.read_v1_folder`.
    target : Path
        Made if needed.
    labels : sequence of str
        Structures in ascending order of value, without background; ``class 1``, ``class 2``... where empty.
    channels : sequence of str
        Input channels in order; the modalities of v1's plans where empty.
    trusted_trainer : str, optional
        Name of a trainer class of the makers' own that keeps nnU-Net's network, softmax and preprocessing.

    Raises
    ------
    ModelFolderError
        The folder is damaged or dangerous, or the model has no equal in nnU-Net v2; the message names what.
    """
    with _explained():
        postprocessing = source / "postprocessing.json"
        _convert(
            read_v1_folder(source),
            target,
            labels,
            channels,
            trusted_trainer,
            postprocessing if postprocessing.is_file() else None,
        )


def convert_v1_state(state: Path, target: Path, plan: Plan) -> None:
    """Write the v2 folder of a bare state file, weights of nnU-Net v1 without their plans.

    Parameters
    ----------
    state : Path
        What torch saved: a state dict, by itself or as ``state_dict``.
    target : Path
        Made if needed.
    plan : Plan
        What the model's card says of it.

    Raises
    ------
    ModelFolderError
        The file is damaged or dangerous, or its weights are not of this plan.
    """
    trainer = "nnUNetTrainerV2" if plan.mirroring else "nnUNetTrainerV2_noMirroring"
    with _explained():
        checkpoint = V1Checkpoint("0", state, trainer, plans_of(plan), stage=0, batch_dice=False)
        _convert([checkpoint], target, plan.labels, plan.channels)


def _convert(
    checkpoints: list[V1Checkpoint],
    target: Path,
    labels: Sequence[str],
    channels: Sequence[str],
    trusted: str | None = None,
    postprocessing: Path | None = None,
) -> None:
    first = checkpoints[0]
    _refuse_trainer(first.trainer, trusted)
    weights = {checkpoint.fold: checkpoint.weights() for checkpoint in checkpoints}
    architectures = {fold: infer_architecture(state) for fold, state in weights.items()}
    architecture = architectures[first.fold]
    if odd := [fold for fold, other in architectures.items() if other != architecture]:
        raise ModelFolderError(f"Fold {odd[0]} has another network than fold {first.fold}: add folds of one model.")
    with_plans = V1Plans(first)
    with_plans.check(architecture)
    rules = read_v1_rules(postprocessing, architecture.heads - 1) if postprocessing else []
    write_model_folder(
        target,
        with_plans.dataset(labels, channels),
        with_plans.v2(architecture) | ({KEEP_LARGEST: rules} if rules else {}),
        with_plans.configuration_name,
        TRAINER,
        _mirror_axes(first.trainer, len(architecture.strides[0])),
        {fold: convert_weights(state, architecture) for fold, state in weights.items()},
    )


@contextmanager
def _explained() -> Iterator[None]:
    """Say in a sentence that values are of another type or shape than nnU-Net v1 writes."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ModelFolderError(
            f"The plans or the weights are not as nnU-Net v1 writes them ({type(error).__name__}: "
            f"{first_line(error)}). Copy the model folder again."
        ) from error


def _refuse_trainer(name: str, trusted: str | None) -> None:
    if name == trusted or _KNOWN_TRAINER.fullmatch(name):
        return
    reason = next((reason for mark, reason in _UNSUPPORTED.items() if mark in name.lower()), None)
    if reason:
        raise ModelFolderError(f"This nnU-Net v1 model ({name}) {reason}. MSHub cannot import it.")
    raise ModelFolderError(
        f"The trainer {name} is not one of nnU-Net v1's own: its network or its preprocessing may differ in ways the "
        f"weights do not show. If its makers say that it keeps both, write trainer = {name!r} into the model's card, "
        "and add the model with that card."
    )


def _mirror_axes(trainer: str, dimension: int) -> tuple[int, ...] | None:
    without = any(mark in trainer.lower() for mark in _WITHOUT_MIRRORING)
    return None if without else tuple(range(dimension))
