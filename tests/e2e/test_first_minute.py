"""What a newcomer sees: ``mshub serve --sample``, then an automatic segmentation of a phantom."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from live import LiveServer
from mshub.bundled import sample_data

LABELS = sample_data() / "labels"
CASES = sorted(path.name.removesuffix(".nii.gz") for path in LABELS.glob("*.nii.gz"))
ENOUGH_DICE = 0.9


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("first-minute")
    server = LiveServer(folder / "home", ["--sample"], folder)
    yield server
    server.stop()


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Dice similarity coefficient of two masks."""
    return float(2 * (a & b).sum() / max((a.sum() + b.sum()), 1))


@pytest.mark.parametrize("case", CASES)
def test_auto_segmentation_of_a_phantom_is_good(server: LiveServer, case: str, tmp_path: Path) -> None:
    label, params = server.client(tmp_path).infer("starter", case, {})
    found, reference = (np.asarray(nib.load(path).dataobj) for path in (label, LABELS / f"{case}.nii.gz"))
    scores = {name: dice(found == value, reference == value) for name, value in params["label_names"].items()}
    assert np.mean(list(scores.values())) >= ENOUGH_DICE, scores


def test_the_welcome_names_the_addresses_and_a_line_that_works(server: LiveServer) -> None:
    log = server.log.read_text()
    assert server.url in log
    assert "make demo-ohif" in log
    line = next(line for line in log.splitlines() if "in a terminal" in line).split("in a terminal", 1)[1].strip()
    done = subprocess.run(line, shell=True, cwd=server.log.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    target = server.log.parent / shlex.split(line)[-1]
    assert (
        nib.load(target).shape
        == nib.load(
            shlex.split(line)[-3]
            if Path(shlex.split(line)[-3]).is_absolute()
            else server.log.parent / shlex.split(line)[-3]
        ).shape
    )


def test_labels_of_the_samples_are_the_starters(server: LiveServer, tmp_path: Path) -> None:
    manifest = json.loads((sample_data() / "manifest.json").read_text())
    names = server.client(tmp_path).info()["models"]["starter"]["labels"]
    assert manifest["labels"] == {"background": 0, **names} or manifest["labels"] == names
