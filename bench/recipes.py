"""Which recipe learns most in a round's few steps: one fine-tuning per recipe, on real images.

    python bench/learning_curve.py --data DIR --ours-only     # trains the base model, among other things
    python bench/recipes.py --data DIR

Fine-tunes on those of the first 20 corrected cases that a loop would train on, and scores on the last 22 of the pool,
without mirroring. None of the cases that bench/learning_curve.py judges by is used.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from forgetting import dice, fine_tuned
from learning_curve import reviewed_case, split_cases
from mshub.cases import ReviewedCase
from mshub.holdout import HoldOut
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.training_set import prepare
from mshub.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES: tuple[dict[str, Any], ...] = (
    {"guard": "none", "optimiser": "sgd", "learning_rate": 1e-2},
    {"guard": "none", "learning_rate": 1e-3},
    {"guard": "none", "learning_rate": 2e-3},
    {"guard": "none", "learning_rate": 3e-3},
    {"guard": "distil", "learning_rate": 2e-3},
    {"guard": "interpolate", "learning_rate": 2e-3},
    {"guard": "interpolate", "learning_rate": 3e-3},
    {"guard": "both", "learning_rate": 1e-3},
    {"guard": "both", "learning_rate": 2e-3},
    {"guard": "both", "learning_rate": 3e-3},
)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Compare fine-tuning recipes.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "hippocampus")
    parser.add_argument("--model", type=Path, default=ROOT / "bench" / "out" / "learning-curve" / "base-0")
    parser.add_argument("--base-cases", type=int, default=5, help="how many cases the model was trained on")
    parser.add_argument("--recipes", type=json.loads, default=RECIPES, help="JSON list of recipe options")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pool: list[ReviewedCase] = [
        reviewed_case(arguments.data, name) for name in split_cases(arguments.data, 0, arguments.base_cases, 50)["pool"]
    ]
    model = ModelFolder.open(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        training, _ = HoldOut(folder / "holdout.json").split(pool[:20])
        tested = pool[28:]
        prepared = prepare(model, training, folder / "preprocessed", None, lambda _: None)
        print(f"| recipe | Dice on {len(tested)} |\n|---|---|\n| (before) | {dice(model, tested):.4f} |", flush=True)
        for number, options in enumerate(arguments.recipes):
            recipe = Recipe.from_options({"epochs": 3, "iterations": 25, **options})
            after = fine_tuned(model, prepared, recipe, folder / str(number))
            print(f"| {json.dumps(options)} | {dice(after, tested):.4f} |", flush=True)


if __name__ == "__main__":
    main()
