"""The road from nnU-Net v2's predictor to what nnU-Net v1 itself predicts, step by step, with trained v1 networks.

    make v1-golden DATA=DIR && python bench/v1_parity.py --data DIR

The first command trains the networks and lets v1 predict (``tests/train_v1.py``); this one predicts the same cases with
the converted networks in four ways and prints the share of voxels that agree with v1, as a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mshub.install import add_model
from mshub.nnunet import engine as engine_module
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import NNUNetPredictor, PredictOptions
from mshub.nnunet.preprocessing import V1Preprocessor, preprocess
from mshub.nnunet.sliding_window import ProbabilityWindow, SlidingWindow
from mshub.scores import dice
from mshub.store import ModelStore

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from v1_trained import case_files  # noqa: E402

WHOLE_MAPS = ROOT / "bench" / "out" / "v1"


class HalfProbabilityWindow(ProbabilityWindow):
    """v1's rule with tiles rounded to half precision before they are added, as v2 stores them."""

    def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
        return super()._internal_maybe_mirror_and_predict(x).half().float()


def preprocessing_by(preprocessor_of: Callable[[ModelFolder], Any]) -> Callable[..., Any]:
    """Return a stand-in for `mshub.nnunet.preprocessing.preprocess` that one of nnU-Net's preprocessors does."""

    def preprocess(folder: ModelFolder, data: np.ndarray, properties: dict[str, Any], **_: Any) -> Any:
        facts = (folder.plans_manager, folder.configuration_manager, folder.dataset)
        prepared, _, properties = preprocessor_of(folder).run_case_npy(data, None, dict(properties), *facts)
        return prepared, properties

    return preprocess


as_v2 = preprocessing_by(lambda folder: folder.configuration_manager.preprocessor_class(verbose=False))
as_v1 = preprocessing_by(lambda _: V1Preprocessor(verbose=False))


STEPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "converted weights in nnU-Net v2's predictor": (SlidingWindow, as_v2),
    "+ v1's order of preprocessing": (SlidingWindow, as_v1),
    "+ probabilities averaged, not logits; tiles in half precision": (HalfProbabilityWindow, preprocess),
    "+ float32 (what MSHub does)": (ProbabilityWindow, preprocess),
}


class SteppedCache(NetworkCache):
    """Engines that predict by one of `STEPS`."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.window, self.preprocess = STEPS[step]

    def engine(
        self, folder: ModelFolder, folds: tuple[str, ...], *devices: torch.device, runtime: str = "torch"
    ) -> Any:
        """Return an engine with the step's sliding window and preprocessing."""
        engine_module.ProbabilityWindow, engine_module.preprocess = self.window, self.preprocess
        return super().engine(folder, folds, *devices, runtime=runtime)


def mean_dice(one: np.ndarray, two: np.ndarray) -> float:
    """Return the mean Dice over the classes of `two`."""
    return float(np.mean([dice(one == value, two == value) for value in range(1, int(two.max()) + 1)]))


def rows(data: Path, scratch: Path) -> Iterator[list[str]]:
    """Yield a row of the table per case and step."""
    store = ModelStore(scratch / "home")
    for name in ("hippocampus", "brain"):
        version = add_model(store, name, ROOT / "tests" / "recorded" / f"v1_{name}.zip")
        folder = ModelFolder.open(version.model_path)
        for case, images in case_files(name, data, scratch / "cases").items():
            expected = np.load(WHOLE_MAPS / f"{name}_{case}.npz")["label"]
            for step in STEPS:
                predictor = NNUNetPredictor(folder, SteppedCache(step))
                label = predictor.predict(images, PredictOptions(device="cpu")).labels.array_xyz
                same = np.mean(label == expected)
                yield [
                    case,
                    step,
                    f"{same:.4%}",
                    str(int((label != expected).sum())),
                    f"{mean_dice(label, expected):.4f}",
                ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    arguments = parser.parse_args()
    print("| case | how it is predicted | same voxels | others | Dice of the two |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(arguments.data, Path(scratch)):
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
