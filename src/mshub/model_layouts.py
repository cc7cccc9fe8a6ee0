"""How each generation of nnU-Net lays out a trained model on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How one generation of nnU-Net lays out a trained model.

    Attributes
    ----------
    checkpoint, member, fold : re.Pattern
        Match a checkpoint anywhere (``root``); what is copied, relative to the root (``checkpoint``: which of the two
        kinds); the name of a fold's folder.
    required : tuple of str
        Files a root has.
    final, best : str
        Names of the checkpoints, for people.
    """

    checkpoint: re.Pattern[str]
    member: re.Pattern[str]
    fold: re.Pattern[str]
    required: tuple[str, ...]
    final: str
    best: str


V2 = Layout(
    checkpoint=re.compile(r"(?P<root>.*?)/?fold_(?:\d+|all)/checkpoint_[^/]+\.pth"),
    member=re.compile(
        r"(?:dataset|plans|dataset_fingerprint)\.json|(?:LICENSE|README)[^/]*|"
        r"fold_(?:\d+|all)/checkpoint_(?P<checkpoint>final|best)\.pth"
    ),
    fold=re.compile(r"fold_(?:\d+|all)"),
    required=("dataset.json", "plans.json"),
    final="checkpoint_final.pth",
    best="checkpoint_best.pth",
)
V1 = Layout(
    checkpoint=re.compile(r"(?P<root>.*?)/?(?:fold_(?:\d+|all)|(?<![^/])all)/model_[^/]+\.model\.pkl"),
    member=re.compile(
        r"plans\.pkl|postprocessing\.json|(?:LICENSE|README)[^/]*|"
        r"(?:fold_(?:\d+|all)|all)/model_(?P<checkpoint>final_checkpoint|best)\.model(?:\.pkl)?"
    ),
    fold=re.compile(r"fold_(?:\d+|all)|all"),
    required=(),
    final="model_final_checkpoint.model",
    best="model_best.model",
)

#: Ends the name of a file that is weights alone, without the plans.
STATE_SUFFIXES = (".model", ".pth", ".pt")
