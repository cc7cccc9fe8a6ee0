"""Which recipe learns most in a hundred steps: one fine-tuning per recipe, on real images.

    python bench/train_hippocampus.py --cases 5 --iterations 400 --out bench/out/hippocampus-5
    python bench/recipes.py --data DIR --model bench/out/hippocampus-5

Fine-tunes on 12 cases the model has not seen and scores on 30 others, without mirroring.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from forgetting import dice, fine_tuned
from learning_curve import reviewed_case
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.training_set import prepare
from mshub.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES: dict[str, dict[str, Any]] = {
    "SGD 1e-3": {"optimiser": "sgd", "learning_rate": 1e-3},
    "SGD 5e-3": {"optimiser": "sgd", "learning_rate": 5e-3},
    "AdamW 5e-4": {"learning_rate": 5e-4},
    "AdamW 1e-3": {"learning_rate": 1e-3},
    "AdamW 1e-3, distil": {"learning_rate": 1e-3, "guard": "distil"},
    "AdamW 1e-3, averaged over 0.3": {"learning_rate": 1e-3, "averaging": 0.3},
    "AdamW 2e-3": {"learning_rate": 2e-3},
}
TRAIN, TEST = slice(5, 17), slice(110, 140)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Compare fine-tuning recipes.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "hippocampus")
    parser.add_argument("--model", type=Path, default=ROOT / "bench" / "out" / "hippocampus-5")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = set(json.loads((arguments.model / "cases.json").read_text(encoding="utf-8"))["training"])
    names = sorted(path.name.removesuffix(".nii.gz") for path in (arguments.data / "labelsTr").glob("*.nii.gz"))
    if known & set(names[TRAIN] + names[TEST]):
        raise ValueError("the model has seen cases that are to be trained on or tested: train it on the first 5")
    model = ModelFolder.open(arguments.model)
    training, tested = ([reviewed_case(arguments.data, name) for name in names[part]] for part in (TRAIN, TEST))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepared = prepare(model, training, folder / "preprocessed", None, lambda _: None)
        print(f"| recipe | Dice |\n|---|---|\n| (before) | {dice(model, tested):.4f} |", flush=True)
        for number, (name, options) in enumerate(RECIPES.items()):
            recipe = Recipe.from_options({"epochs": 4, "iterations": 25, "guard": "none", **options})
            after = fine_tuned(model, prepared, recipe, folder / str(number))
            print(f"| {name} | {dice(after, tested):.4f} |", flush=True)


if __name__ == "__main__":
    main()
