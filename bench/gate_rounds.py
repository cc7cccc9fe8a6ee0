"""What the gate says to good and to spoilt corrections, on real images.

    python bench/gate_rounds.py --data DIR --model bench/out/learning-curve/base-0

A weak model gets a first round of good corrections. Four second rounds then start from the same state: more good ones,
corrections whose two structures are swapped, empty corrections, and a learning rate at which training diverges.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from learning_curve import STRUCTURES, reviewed_case
from mshub.cases import ReviewedCase
from mshub.errors import MSHubError
from mshub.install import add_model
from mshub.jobs import JobRequest, Jobs
from mshub.recipe import Recipe
from mshub.rounds import run_round
from mshub.store import ModelStore

ROOT = Path(__file__).resolve().parent.parent
MODEL_ID = "hippocampus-mr"


def spoilt(case: ReviewedCase, folder: Path, how: str) -> ReviewedCase:
    """Return the case with its two structures swapped, or with nothing in its label."""
    label = nib.load(case.label)
    values = np.asarray(label.dataobj)
    changed = np.zeros(values.shape, np.uint8)
    if how == "swapped":
        changed[values == 1], changed[values == 2] = 2, 1
    path = folder / f"{case.case_id}-{how}.nii.gz"
    nib.save(nib.Nifti1Image(changed, label.affine), path)
    return replace(case, label=path)


def play(home: Path, cases: list[ReviewedCase], recipe: Recipe) -> str:
    """Run one round; returns its outcome and reasons as a table's two cells."""
    store = ModelStore(home)
    parent = store.current(MODEL_ID).version
    job = Jobs(home).create(JobRequest(MODEL_ID, parent, tuple(cases), recipe, device="cpu"))
    try:
        run_round(store, job)
    except MSHubError as error:
        return f"{parent} serves | training failed | {error} | {store.current(MODEL_ID).version}"
    progress = job.progress()
    verdict = store.version(MODEL_ID, progress["version"]).record["lineage"]["verdict"]
    reasons = "; ".join(verdict["reasons"])
    return f"{progress['version']} from {parent} | {verdict['outcome']} | {reasons} | {store.current(MODEL_ID).version}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="The gate's verdicts on good and spoilt corrections.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "hippocampus")
    parser.add_argument("--model", type=Path, default=ROOT / "bench" / "out" / "learning-curve" / "base-0")
    parser.add_argument("--first", type=int, default=36)
    parser.add_argument("--second", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--recipe", type=json.loads, default={}, help="JSON of further recipe options")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = sorted(path.name.removesuffix(".nii.gz") for path in (arguments.data / "labelsTr").glob("*.nii.gz"))
    cases = [reviewed_case(arguments.data, name) for name in names[: arguments.first + arguments.second]]
    first, second = cases[: arguments.first], cases[arguments.first :]
    recipe = Recipe.from_options({"epochs": arguments.epochs, "iterations": 25, **arguments.recipe})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        home = folder / "home"
        add_model(ModelStore(home), MODEL_ID, arguments.model)
        print("| corrections | candidate | verdict | reasons | serves |\n|---|---|---|---|---|")
        print(f"| {len(first)} good ones | {play(home, first, recipe)} |", flush=True)
        rounds = {
            f"{len(second)} more good ones": (second, recipe),
            f"{len(second)} with {' and '.join(STRUCTURES)} swapped": (
                [spoilt(case, folder, "swapped") for case in second],
                recipe,
            ),
            f"{len(second)} empty ones": ([spoilt(case, folder, "empty") for case in second], recipe),
            "more good ones, learning rate 10": (second, replace(recipe, learning_rate=10.0)),
        }
        for number, (what, (further, used)) in enumerate(rounds.items()):
            copy = folder / f"home{number}"
            shutil.copytree(home, copy)
            print(f"| {what} | {play(copy, [*first, *further], used)} |", flush=True)


if __name__ == "__main__":
    main()
