"""Draw the README's figure: a sample phantom with the starter model's segmentation, predicted now.

python bench/figure.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import nibabel as nib
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"liver": "#d9a441", "spleen": "#8e5fb8", "kidney_right": "#3f8fd2", "kidney_left": "#2fb5a5",
           "liver_lesion": "#e04a4a"}  # fmt: skip
CT_WINDOW_HU = (-160, 240)
VIEWS = {"axial": 2, "coronal": 1, "sagittal": 0}


def predict(image: Path, target: Path) -> None:
    """Segment `image` with the starter model through the command line."""
    subprocess.run([sys.executable, "-m", "mshub", "fetch", "starter"], check=True)
    subprocess.run([sys.executable, "-m", "mshub", "predict", "starter", str(image), "-o", str(target)], check=True)


def draw(image: Any, label: Any, target: Path) -> None:
    """Draw three planes through the lesion, without and with the label, in radiological orientation."""
    scan, mask = nib.as_closest_canonical(image), nib.as_closest_canonical(label)
    voxels, labels = scan.get_fdata(), np.asarray(mask.dataobj)
    middle = np.round(np.argwhere(labels == len(COLOURS)).mean(axis=0)).astype(int)
    spacing = scan.header.get_zooms()
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.4), facecolor="black", layout="constrained")
    for column, (name, axis) in enumerate(VIEWS.items()):
        plane = [np.take(array, middle[axis], axis).T[::-1] for array in (voxels, labels)]
        plane = [array[:, ::-1] for array in plane] if axis != 0 else plane
        across, along = [spacing[i] for i in range(3) if i != axis]
        for row in range(2):
            axes[row, column].imshow(
                plane[0], "gray", vmin=CT_WINDOW_HU[0], vmax=CT_WINDOW_HU[1], aspect=along / across
            )
            axes[row, column].axis("off")
        colours = mpl.colors.ListedColormap(["none", *COLOURS.values()])
        axes[1, column].imshow(
            plane[1], colours, vmin=0, vmax=len(COLOURS), alpha=0.6, aspect=along / across, interpolation="nearest"
        )
        axes[0, column].set_title(name, color="white", fontsize=10)
    handles = [mpl.patches.Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, labelcolor="white", fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, facecolor="black")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Draw the README's figure.")
    parser.add_argument("--image", type=Path, default=ROOT / "sample-data" / "images" / "phantom_01.nii.gz")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "starter.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        label = Path(scratch) / "label.nii.gz"
        predict(arguments.image, label)
        draw(nib.load(arguments.image), nib.load(label), arguments.out)


if __name__ == "__main__":
    main()
