"""Dice on hippocampus cases a model never saw, through ``mshub add``, a live server and MONAI Label's client.

    python bench/train_hippocampus.py --data DIR      # once: train on the first 100 cases
    python bench/serve_hippocampus.py --data DIR      # add, serve, predict the others, score

Prints Dice per label, and beside it the Dice of stock nnU-Net predictions for the same files and folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from small_nnunet import score

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from live import LiveServer  # noqa: E402

MODEL_ID = "hippocampus-mr"
ENDING = ".nii.gz"


def serve_and_predict(model: Path, images: list[Path], target: Path, home: Path, profile: str) -> list[float]:
    """Install `model`, serve `images`, write every label to `target`; returns seconds per request."""
    studies = home / "studies"
    studies.mkdir(parents=True)
    for image in images:
        shutil.copyfile(image, studies / image.name)
    subprocess.run([sys.executable, "-m", "mshub", "add", MODEL_ID, str(model)], env=_environment(home), check=True)
    server = LiveServer(home, ["--studies", str(studies)], home)
    try:
        return [_predict(server, image, target, profile) for image in images]
    finally:
        server.stop()


def _environment(home: Path) -> dict[str, str]:
    return {**os.environ, "MSHUB_HOME": str(home)}


def _predict(server: LiveServer, image: Path, target: Path, profile: str) -> float:
    case = image.name.removesuffix(f"_0000{ENDING}")
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        label, params = server.client(Path(scratch)).infer(MODEL_ID, case, {"profile": profile})
        seconds = time.perf_counter() - started
        if list(params["label_names"]) != ["hippocampus_anterior", "hippocampus_posterior"]:
            raise RuntimeError(f"unexpected structures: {params['label_names']}")
        shutil.copyfile(label, target / f"{case}{ENDING}")
    return seconds


def predict_with_nnunet(model: Path, images: list[Path], target: Path) -> None:
    """Predict the same files with ``nnUNetv2_predict_from_modelfolder``."""
    with tempfile.TemporaryDirectory() as scratch:
        for image in images:
            shutil.copyfile(image, Path(scratch) / image.name)
        command = Path(sys.executable).with_name("nnUNetv2_predict_from_modelfolder")
        arguments = ["-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_progress_bar"]
        subprocess.run(
            [command, "-i", scratch, "-o", target, "-m", model, *arguments], check=True, stdout=subprocess.DEVNULL
        )


def differing_voxels(ours: Path, theirs: Path) -> int:
    """Count voxels that differ over all cases in `ours`."""
    pairs = [(path, theirs / path.name) for path in sorted(ours.glob(f"*{ENDING}"))]
    return sum(int((np.asarray(nib.load(a).dataobj) != np.asarray(nib.load(b).dataobj)).sum()) for a, b in pairs)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Dice of the hippocampus model through the server.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "hippocampus")
    parser.add_argument("--model", type=Path, default=ROOT / "bench" / "out" / "hippocampus")
    parser.add_argument("--cases", type=int, default=1000, help="unseen cases at most")
    parser.add_argument("--profile", default="accurate", help="profile of our requests; nnU-Net always mirrors")
    arguments = parser.parse_args()
    unseen = json.loads((arguments.model / "cases.json").read_text(encoding="utf-8"))["unseen"][: arguments.cases]
    images = [arguments.data / "imagesTr" / f"{case}_0000{ENDING}" for case in unseen]
    references = [arguments.data / "labelsTr" / f"{case}{ENDING}" for case in unseen]
    labels = json.loads((arguments.model / "dataset.json").read_text(encoding="utf-8"))["labels"]
    with tempfile.TemporaryDirectory() as scratch:
        ours, theirs = Path(scratch) / "ours", Path(scratch) / "theirs"
        ours.mkdir()
        seconds = serve_and_predict(arguments.model, images, ours, Path(scratch) / "home", arguments.profile)
        predict_with_nnunet(arguments.model, images, theirs)
        report = {
            "unseen_cases": len(unseen),
            "profile": arguments.profile,
            "dice_through_the_server": _summary(score(ours, references, labels)),
            "dice_of_stock_nnunet": _summary(score(theirs, references, labels)),
            "differing_voxels": differing_voxels(ours, theirs),
            "seconds_per_request": {"median": round(float(np.median(seconds)), 2), "first": round(seconds[0], 2)},
        }
    print(json.dumps(report, indent=2))


def _summary(dice: dict[str, object]) -> dict[str, object]:
    return {"mean": dice["mean"], "per_label": dice["per_label"]}


if __name__ == "__main__":
    main()
