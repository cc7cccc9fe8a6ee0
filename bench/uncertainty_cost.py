"""What it costs to measure how sure a model is, beside the same prediction without it.

    python bench/uncertainty_cost.py                        # 44 classes, nnU-Net's own network of 31 M parameters
    python bench/uncertainty_cost.py --device cuda --shape 512 512 300 --profiles accurate balanced

A network of nnU-Net's default size with random, symmetric weights predicts one image with and without measuring, in
turn, in one process. Random weights find structures everywhere; the background's bias is raised until structures have
the share of the voxels that they have in a scan (``--foreground``), because only what is found, and its surface, is
looked at. Prints a Markdown table of the shortest times, and fails if a single voxel differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mshub.nnunet.engine import load_network
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, Prediction, PredictOptions
from mshub.nnunet.reading import read_as_nnunet, read_channels

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from factories import make_image, make_model_folder  # noqa: E402

STAGES, MOST_FEATURES = 6, 320
SPACING_MM = 1.5
OUTPUT_BIAS = "decoder.seg_layers.{last}.bias"


def write_model(path: Path, classes: int, patch: tuple[int, ...], features: int) -> Path:
    """Write a model folder with a network of nnU-Net's default size."""
    architecture = {
        "n_stages": STAGES,
        "features_per_stage": [min(MOST_FEATURES, features * 2**stage) for stage in range(STAGES)],
        "kernel_sizes": [[3] * 3] * STAGES,
        "strides": [[1] * 3, *[[2] * 3] * (STAGES - 1)],
        "n_conv_per_stage": [2] * STAGES,
        "n_conv_per_stage_decoder": [2] * (STAGES - 1),
    }
    labels = {"background": 0, **{f"structure_{value}": value for value in range(1, classes)}}
    spacing = (SPACING_MM,) * 3
    make_model_folder(path, labels=labels, spacing_zyx_mm=spacing, patch=patch, architecture=architecture)
    even_out(path / "fold_0" / "checkpoint_final.pth")
    return path


def even_out(file: Path) -> None:
    """Make every kernel its own mirror image, so that mirrored copies nearly agree, as a trained network's do."""
    checkpoint = torch.load(file, weights_only=True)
    for name, weights in checkpoint["network_weights"].items():
        if weights.ndim == 5:
            for axis in (2, 3, 4):
                weights = (weights + weights.flip(axis)) / 2
            checkpoint["network_weights"][name] = weights
    torch.save(checkpoint, file)


def favour_background(path: Path, image: Path, device: str, foreground: float) -> None:
    """Raise the background's bias until structures win only a share of the voxels."""
    file = path / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    name = OUTPUT_BIAS.format(last=STAGES - 2)
    low, high = 0.0, 20.0
    network = _Margins(path, image, device)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if network.share(middle) > foreground else (low, middle)
    checkpoint["network_weights"][name][0] += high
    torch.save(checkpoint, file)


class _Margins:
    """By how much the strongest structure beats the background, in one tile of the image."""

    def __init__(self, path: Path, image: Path, device: str) -> None:
        folder = ModelFolder.open(path)
        volumes = read_channels([image], folder.channels)
        reader = folder.plans_manager.image_reader_writer_class()
        data, _ = read_as_nnunet([image], volumes, reader, PredictOptions().rules)
        patch = folder.configuration_manager.patch_size
        tile = torch.from_numpy(data[(None, slice(None), *(slice(0, edge) for edge in patch))]).float()
        tile = (tile - tile.mean()) / tile.std()
        network = load_network(folder, folder.checkpoint("0")["network_weights"]).eval().to(device)
        with torch.inference_mode():
            logits = network(tile.to(device))[0].float()
        self._margins = (logits[1:].amax(0) - logits[0]).cpu().numpy()

    def share(self, bias: float) -> float:
        return float(np.mean(self._margins > bias))


def timed(predictor: NNUNetPredictor, image: Path, options: PredictOptions) -> tuple[float, float, Prediction]:
    """Return wall seconds, CPU seconds and the prediction."""
    wall, cpu = time.perf_counter(), time.process_time()
    prediction = predictor.predict([image], options)
    return time.perf_counter() - wall, time.process_time() - cpu, prediction


def compare(model: Path, image: Path, profile: str, device: str, repeats: int) -> str:
    """Return a row of the table."""
    predictor = NNUNetPredictor(ModelFolder.open(model), NetworkCache())
    seconds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    labels: dict[bool, Prediction] = {}
    timed(predictor, image, PredictOptions(PROFILES["balanced"], device=device))  # loads the network
    for _ in range(repeats):
        for measure in (False, True):
            wall, cpu, labels[measure] = timed(
                predictor, image, PredictOptions(PROFILES[profile], device=device, measure=measure)
            )
            seconds[measure].append((wall, cpu))
    if not np.array_equal(labels[False].labels.array_xyz, labels[True].labels.array_xyz):
        raise RuntimeError("measuring changed the label")
    (wall, cpu), (wall_with, cpu_with) = (np.min(seconds[measure], axis=0) for measure in (False, True))
    share = np.count_nonzero(labels[True].labels.array_xyz) / labels[True].labels.array_xyz.size
    measured = labels[True].uncertainty
    agreement = f"{measured.mirror_dice:.2f}" if measured and measured.mirror_dice is not None else ""
    walls = f"{wall:.1f} | {wall_with:.1f} | {wall_with / wall - 1:+.1%}"
    cpus = f"{cpu:.1f} | {cpu_with:.1f} | {cpu_with / cpu - 1:+.1%}"
    return f"| {profile} | {share:.0%} | {agreement} | {walls} | {cpus} |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="The cost of measuring how sure a model is.")
    parser.add_argument("--classes", type=int, default=44, help="background included")
    parser.add_argument("--shape", type=int, nargs=3, default=(128, 128, 160), metavar=("X", "Y", "Z"))
    parser.add_argument("--patch", type=int, nargs=3, default=(96, 96, 96), metavar=("Z", "Y", "X"))
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--foreground", type=float, default=0.15, help="share of the voxels structures have")
    parser.add_argument("--profiles", nargs="+", choices=list(PROFILES), default=list(PROFILES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model", arguments.classes, tuple(arguments.patch), arguments.features)
        image = make_image(Path(scratch) / "image.nii.gz", arguments.shape, np.diag([SPACING_MM] * 3 + [1.0]))
        favour_background(model, image, arguments.device, arguments.foreground)
        print(f"{arguments.classes} classes, image {arguments.shape}, tile {arguments.patch}, {arguments.device}")
        head = "| profile | foreground | mirror Dice | wall s | with measures | | CPU s | with measures | |"
        print(f"{head}\n" + "|---" * 9 + "|")
        for profile in arguments.profiles:
            print(compare(model, image, profile, arguments.device, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
