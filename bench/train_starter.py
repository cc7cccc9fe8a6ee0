"""Train the starter model that ships in ``sample-data/starter-model`` and measure it on the sample phantoms.

    python bench/train_starter.py                # about fifteen CPU minutes of training
    python bench/train_starter.py --score-only   # measure the committed model again

The model learns from phantoms of other seeds than the samples', so ``metrics.json`` holds Dice on unseen cases.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from small_nnunet import Recipe, predict, score, train, write_json

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "sample-data"
MODEL = SAMPLES / "starter-model"
RAW = ROOT / "bench" / "out" / "starter-raw" / "Dataset900_Phantom"

# Left and right kidney have labels of their own, so no axis is mirrored; that also keeps prediction at one pass.
# A patch of 40x48x64 voxels at this spacing holds nearly the whole trunk, which tells the organs' sides apart.
RECIPE = Recipe(
    iterations=1000,
    learning_rate=3e-3,
    patch_zyx=(40, 48, 64),
    target_spacing_zyx_mm=(4.4, 3.6, 3.6),
    min_features=8,
    max_features=64,
)


def load_generator() -> ModuleType:
    """Import ``sample-data/generate.py``, which lies outside any package."""
    spec = importlib.util.spec_from_file_location("sample_data_generate", SAMPLES / "generate.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {SAMPLES / 'generate.py'}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def measure(model: Path) -> dict[str, object]:
    """Predict the sample phantoms with stock nnU-Net and score them against their reference labels."""
    labels = json.loads((model / "dataset.json").read_text(encoding="utf-8"))["labels"]
    with tempfile.TemporaryDirectory() as scratch:
        seconds = predict(model, sorted((SAMPLES / "images").glob("*.nii.gz")), Path(scratch))
        dice = score(Path(scratch), (SAMPLES / "labels").glob("*.nii.gz"), labels)
    return {"dice": dice, "seconds_per_case_cpu": seconds}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train and measure the starter model.")
    parser.add_argument("--cases", type=int, default=50, help="training phantoms")
    parser.add_argument("--out", type=Path, default=MODEL, help="model folder to write")
    parser.add_argument("--score-only", action="store_true", help="measure the model in --out, train nothing")
    arguments = parser.parse_args()
    metrics_file = arguments.out / "metrics.json"
    if arguments.score_only:
        training = json.loads(metrics_file.read_text(encoding="utf-8"))["training"]
    else:
        load_generator().write_training_dataset(RAW, arguments.cases)
        training = {"cases": arguments.cases, **vars(RECIPE), **train(RAW, arguments.out, RECIPE)}
    checkpoint = arguments.out / "fold_0" / "checkpoint_final.pth"
    metrics = {
        "command": "python bench/train_starter.py",
        "measured_with": "nnunetv2 nnUNetPredictor, CPU, step 0.5, no mirroring, on sample-data/images",
        **measure(arguments.out),
        "training": training,
        "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
    }
    write_json(metrics_file, metrics)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
