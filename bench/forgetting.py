"""What a model forgets when it is fine-tuned, with and without the guards of the recipe.

    python bench/forgetting.py --data DIR --model bench/out/hippocampus     # the model of bench/train_hippocampus.py

Cases the model never saw are shifted as another scanner would shift them (contrast by a gamma curve that is not
monotone, thick slices, noise). The model is fine-tuned on some of them, and scored on others, shifted and as they were.

    python bench/forgetting.py --structure ...

The shifted cases had only one of the two structures reviewed: what becomes of the other one?
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from learning_curve import STRUCTURES, reviewed_case, scores_of
from mshub.cases import ReviewedCase
from mshub.evaluation import Evaluator
from mshub.geometry import Array
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.model_writing import write_trained
from mshub.nnunet.predictor import PROFILES, PredictOptions
from mshub.nnunet.trainer import train_fold
from mshub.nnunet.training_set import TrainingSet, prepare
from mshub.recipe import Recipe
from mshub.scores import dice_by_structure, mean_dice

ROOT = Path(__file__).resolve().parent.parent
GUARDS: dict[str, dict[str, Any]] = {
    "none": {"guard": "none"},
    "distil": {"guard": "distil"},
    "distil, weight 5": {"guard": "distil", "distillation": 5.0},
    "interpolate": {"guard": "interpolate"},
    "interpolate 0.5": {"guard": "interpolate", "interpolation": 0.5},
    "both": {"guard": "both"},
}


def shifted(case: ReviewedCase, folder: Path, seed: int) -> ReviewedCase:
    """Write a case as another scanner might have seen it; the label stays."""
    image = nib.load(case.images[0])
    array = np.asarray(image.dataobj, dtype=np.float32)
    low, high = np.percentile(array, (1, 99))
    unit = np.clip((array - low) / (high - low), 0, 1)
    unit = np.abs(unit - 0.35) ** 0.8  # dark and bright tissue trade places: no normalisation undoes it
    unit = ndimage.uniform_filter1d(unit, 3, axis=2)  # slices three times as thick
    unit += np.random.default_rng(seed).normal(0, 0.03, unit.shape)
    path = folder / f"{case.case_id}_0000.nii.gz"
    nib.save(nib.Nifti1Image((unit * 1000).astype(np.float32), image.affine), path)
    return replace(case, case_id=f"{case.case_id}-shifted", images=(path,))


def fine_tuned(model: ModelFolder, training: TrainingSet, recipe: Recipe, work: Path) -> ModelFolder:
    """Fine-tune the first fold of a model in this process, on the CPU."""
    fold = model.folds[0]
    fit = train_fold(model, fold, training, recipe, torch.device("cpu"), work, lambda _: None, lambda: False)
    write_trained(work / "model", model, {fold: fit.weights})
    return ModelFolder.open(work / "model")


def dice(model: ModelFolder, cases: list[ReviewedCase]) -> float:
    """Return the mean Dice without mirroring."""
    return mean_dice(scores_of(model, cases))


def row(name: str, model: ModelFolder, original: list[ReviewedCase], moved: list[ReviewedCase]) -> str:
    """Return a row of the table: Dice per structure, as the cases were and shifted."""
    found = [dice_by_structure(scores_of(model, cases)) for cases in (original, moved)]
    return f"| {name:20} | " + " | ".join(f"{dice[name]:.3f}" for dice in found for name in STRUCTURES) + " |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Forgetting after a fine-tune on a shifted domain.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "hippocampus")
    parser.add_argument("--model", type=Path, default=ROOT / "bench" / "out" / "hippocampus")
    parser.add_argument("--train", type=int, default=12, help="shifted cases to fine-tune on")
    parser.add_argument("--test", type=int, default=30, help="cases to score on, shifted and as they were")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--structure", choices=list(STRUCTURES), help="the only one reviewed; default: both were")
    parser.add_argument("--guards", nargs="+", choices=list(GUARDS), default=list(GUARDS))
    parser.add_argument("--recipe", type=json.loads, default={}, help="JSON of further recipe options")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    unseen = json.loads((arguments.model / "cases.json").read_text(encoding="utf-8"))["unseen"]
    model = ModelFolder.open(arguments.model)
    parent = Evaluator(model, PredictOptions(PROFILES["balanced"], device="cpu"))

    def predict(case: ReviewedCase) -> tuple[Array, dict[str, int]]:
        prediction = parent.predict(case)
        return prediction.labels.array_xyz, prediction.names

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cases = [reviewed_case(arguments.data, case) for case in unseen[: arguments.train + arguments.test]]
        moved = [shifted(case, folder, seed) for seed, case in enumerate(cases)]
        original, tested = cases[arguments.train :], moved[arguments.train :]
        reviewed = (arguments.structure,) if arguments.structure else tuple(STRUCTURES)
        trained = [replace(case, reviewed=reviewed) for case in moved[: arguments.train]]
        training = prepare(model, trained, folder / "preprocessed", predict, lambda _: None)
        print(f"| fine-tuned with | {' | '.join([*STRUCTURES, *(f'{name}, shifted' for name in STRUCTURES)])} |")
        print("|---" * (1 + 2 * len(STRUCTURES)) + "|\n" + row("(before)", model, original, tested), flush=True)
        for number, name in enumerate(arguments.guards):
            options = {"epochs": arguments.epochs, "iterations": 25, **arguments.recipe, **GUARDS[name]}
            after = fine_tuned(model, training, Recipe.from_options(options), folder / str(number))
            print(row(name, after, original, tested), flush=True)


if __name__ == "__main__":
    main()
