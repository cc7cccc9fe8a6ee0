"""Train a small nnU-Net on part of the Medical Segmentation Decathlon's hippocampus task (Task04, CC BY-SA 4.0).

    python bench/train_hippocampus.py --data DIR      # DIR holds imagesTr and labelsTr in nnU-Net's file naming

Writes ``bench/out/hippocampus/``: the model folder and ``cases.json``, which names the cases trained on and the ones
never seen, for benchmarks that need a real model with real unseen cases. The data and the model are not part of MSHub.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from small_nnunet import Json, Recipe, predict, score, train, write_json

ROOT = Path(__file__).resolve().parent.parent
LABELS = {"background": 0, "hippocampus_anterior": 1, "hippocampus_posterior": 2}
ENDING = ".nii.gz"
MIN_UNSEEN = 40


def split_cases(data: Path, count: int) -> tuple[list[str], list[str]]:
    """Return the first `count` case ids in sorted order for training, and the rest.

    Raises
    ------
    ValueError
        When fewer than `MIN_UNSEEN` cases would stay unseen.
    """
    cases = sorted(path.name.removesuffix(ENDING) for path in (data / "labelsTr").glob(f"*{ENDING}"))
    if len(cases) - count < MIN_UNSEEN:
        raise ValueError(f"{data} has {len(cases)} cases; --cases {count} leaves fewer than {MIN_UNSEEN} unseen")
    return cases[:count], cases[count:]


def write_raw_dataset(data: Path, cases: list[str], raw: Path) -> None:
    """Build an nnU-Net raw dataset in `raw` from links to the files of `cases`."""
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for case in cases:
        for relative in (f"imagesTr/{case}_0000{ENDING}", f"labelsTr/{case}{ENDING}"):
            (raw / relative).symlink_to((data / relative).resolve())
    dataset = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": len(cases), "file_ending": ENDING}
    write_json(raw / "dataset.json", dataset)


def measure(model: Path, data: Path, cases: list[str]) -> Json:
    """Predict `cases` with stock nnU-Net and score them; the numbers of single cases stay out of the result."""
    with tempfile.TemporaryDirectory() as scratch:
        seconds = predict(model, [data / "imagesTr" / f"{case}_0000{ENDING}" for case in cases], Path(scratch))
        dice = score(Path(scratch), [data / "labelsTr" / f"{case}{ENDING}" for case in cases], LABELS)
    return {
        "cases": len(cases),
        "mean": dice["mean"],
        "per_label": dice["per_label"],
        "seconds": round(sum(seconds), 1),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train a small nnU-Net on hippocampus MR crops.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "hippocampus")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "hippocampus")
    parser.add_argument("--cases", type=int, default=100, help="cases to train on, the first in sorted order")
    parser.add_argument("--iterations", type=int, default=800)
    parser.add_argument("--score", type=int, default=20, help="unseen cases to score afterwards")
    arguments = parser.parse_args()
    # nnU-Net's own choice for this task: every axis may be mirrored.
    recipe = Recipe(iterations=arguments.iterations, patch_zyx=(40, 56, 40), mirror_axes=(0, 1, 2))
    training, unseen = split_cases(arguments.data, arguments.cases)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "Dataset004_Hippocampus"
        write_raw_dataset(arguments.data, training, raw)
        report = train(raw, arguments.out, recipe)
    write_json(arguments.out / "cases.json", {"training": training, "unseen": unseen})
    dice = measure(arguments.out, arguments.data, unseen[: arguments.score])
    metrics = {"unseen_dice_without_mirroring": dice, "training": {**vars(recipe), **report}}
    write_json(arguments.out / "metrics.json", metrics)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
