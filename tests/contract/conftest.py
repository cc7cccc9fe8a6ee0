from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factories import make_image, make_model_folder
from live import LiveServer, Site
from mshub.install import add_model
from mshub.store import ModelStore

RECORDED = Path(__file__).parent / "recorded"
OBLIQUE = np.array([[1.6, -0.4, 0.2, -20], [0.5, 1.2, 0.1, 15], [-0.3, 0.1, 3.0, 8], [0, 0, 0, 1]])


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    studies, home = folder / "studies", folder / "home"
    make_image(studies / "case01.nii.gz", (21, 25, 18), _orthogonal(OBLIQUE), seed=1)
    make_image(studies / "case02.nii.gz", (24, 19, 17), np.diag([-1.4, -1.4, 3.2, 1.0]), seed=2)
    make_image(studies / "pair_0000.nii.gz", (20, 22, 17), seed=3)
    make_image(studies / "pair_0001.nii.gz", (20, 22, 17), seed=4)
    make_image(studies / "half_0000.nii.gz", (20, 22, 17), seed=5)
    for model, options in {
        "tiny": {"folds": ("0", "1")},
        "two-channels": {"channels": ("T1", "T2"), "labels": {"background": 0, "tumour": 1}},
    }.items():
        add_model(ModelStore(home), model, make_model_folder(folder / "models" / model, **options))
    server = LiveServer(home, ["--studies", str(studies)], folder)
    yield Site(server, studies, home)
    server.stop()


@pytest.fixture
def recorded() -> Any:
    """Return a function that reads a recorded request, with ``{image}`` filled in."""

    def read(name: str, image: str = "") -> dict[str, Any]:
        content: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text())
        return {**content, "query": content.get("query", "").replace("{image}", image)}

    return read


def _orthogonal(affine: np.ndarray) -> np.ndarray:
    """Return `affine` with its axes made orthogonal, spacings kept."""
    columns, spacing = affine[:3, :3], np.linalg.norm(affine[:3, :3], axis=0)
    directions, _ = np.linalg.qr(columns)
    directions *= np.sign(np.sum(directions * columns, axis=0))
    result = affine.copy()
    result[:3, :3] = directions * spacing
    return result
