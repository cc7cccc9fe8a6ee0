"""Does a training ever wait for its batches? Time per step, and how much of it goes by before the batch is there.

    python bench/training_wait.py                      # the starter model's size, on a GPU or the CPU
    python bench/training_wait.py --features 32 --patch 128 128 128 --classes 44 --steps 60    # nnU-Net's default size

Cases and model are made here; what runs is `mshub.nnunet.trainer.train_fold` itself, watched where it asks for a batch.
Of a GPU, a step ends when its loss is known. The first steps, in which loops are compiled and processes start, are
left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from mshub.cases import ReviewedCase  # noqa: E402
from mshub.nnunet import trainer  # noqa: E402
from mshub.nnunet.folder import ModelFolder  # noqa: E402
from mshub.nnunet.training_set import prepare  # noqa: E402
from mshub.recipe import Recipe  # noqa: E402
from speed_phantoms import Geometry, synthetic_ct  # noqa: E402
from uncertainty_cost import SPACING_MM, write_model  # noqa: E402

CASES, MARGIN = 4, 1.25
WARM_UP = 10


@contextmanager
def watched() -> Iterator[list[tuple[float, float]]]:
    """Yield a list that gets, for every batch asked for in the block, when it was asked for and when it was there."""
    moments: list[tuple[float, float]] = []
    plain = trainer._Batches.__next__

    def timed(batches: Any) -> dict[str, Any]:
        asked = time.perf_counter()
        batch = plain(batches)
        moments.append((asked, time.perf_counter()))
        return batch

    trainer._Batches.__next__ = timed  # type: ignore[method-assign]
    try:
        yield moments
    finally:
        trainer._Batches.__next__ = plain  # type: ignore[method-assign]


def write_case(folder: Path, number: int, edges: tuple[int, int, int], classes: int) -> ReviewedCase:
    """Write an image with a label in which boxes stand for structures."""
    spacing = (SPACING_MM,) * 3
    image = synthetic_ct(Geometry(edges, spacing, spacing)) + np.random.default_rng(number).normal(0, 20, edges)
    label = np.zeros(edges, np.uint8)
    for value in range(1, classes):
        corner = np.random.default_rng([number, value]).integers(0, [edge * 3 // 4 for edge in edges])
        label[tuple(slice(start, start + edge // 6) for start, edge in zip(corner, edges, strict=True))] = value
    paths = [folder / f"case{number}{ending}.nii.gz" for ending in ("", "_label")]
    for path, voxels in zip(paths, (image.astype(np.int16), label), strict=True):
        nib.save(nib.Nifti1Image(voxels.T, np.diag([SPACING_MM] * 3 + [1.0])), path)
    names = {f"structure_{value}": value for value in range(1, classes)}
    return ReviewedCase(f"case{number}", (paths[0],), paths[1], names, tuple(names), f"patient{number}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the medians of the step and of the wait in it."""
    device = torch.device(arguments.device)
    patch = tuple(arguments.patch)
    edges = tuple(int(edge * MARGIN) for edge in patch)
    recipe = Recipe(epochs=1, iterations=arguments.steps + WARM_UP)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = ModelFolder.open(write_model(folder / "model", arguments.classes, patch, arguments.features))
        cases = [write_case(folder, number, edges, arguments.classes) for number in range(CASES)]
        training_set = prepare(model, cases, folder / "prepared", None, lambda _: None)
        with watched() as moments:
            trainer.train_fold(model, "0", training_set, recipe, device, folder / "work", lambda _: None, lambda: False)
    asked, there = (np.array(column[WARM_UP:]) for column in zip(*moments, strict=True))
    waits, steps = there - asked, np.diff(asked)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "features": arguments.features, "patch": list(patch), "classes": arguments.classes,
        "step_s": statistics.median(steps), "wait_s": statistics.median(waits),
        "waiting": float(waits[:-1].sum() / steps.sum()),
    }  # fmt: skip


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Does a training ever wait for its batches?")
    parser.add_argument("--features", type=int, default=16, help="of the first stage (default: 16)")
    parser.add_argument("--patch", type=int, nargs=3, default=[64, 64, 64], help="a multiple of 32")
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40, help="steps that count")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found = measure(parser.parse_args())
    print(json.dumps(found))
    print(f"{found['step_s']:.3f} s a step, {100 * found['waiting']:.1f} % of the time waiting for batches")


if __name__ == "__main__":
    main()
