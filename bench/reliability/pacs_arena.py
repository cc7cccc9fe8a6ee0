"""What the scripts about a PACS share: a server on one that can be told to misbehave, and what came of it."""

from __future__ import annotations

import gzip
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np

from arena import MODEL
from factories import make_model_folder
from live import LiveServer
from mshub.install import add_model
from mshub.store import ModelStore
from wrong_pacs import WrongPacs

SILENCE_S = 2.0
"""The time limit of the server in this run (``MSHUB_PACS_TIMEOUT``)."""
WELL_S = 20.0
"""Within so long after the PACS is well again, the server has the series."""


class Hospital:
    """A server on a PACS that can be told to misbehave.

    Parameters
    ----------
    folder : Path
        Everything is in it.
    """

    def __init__(self, folder: Path) -> None:
        self.home, self.temporary = folder / "home", folder / "tmp"
        self.temporary.mkdir(parents=True)
        add_model(ModelStore(self.home), MODEL, make_model_folder(folder / "model"))
        self.pacs = WrongPacs()
        settings = {"TMPDIR": str(self.temporary), "MSHUB_PACS_TIMEOUT": str(SILENCE_S), "MSHUB_IDLE_MINUTES": "0"}
        settings |= {"MSHUB_ENGINE": "torch", "OMP_NUM_THREADS": "1"}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            self.server = LiveServer(self.home, ["--studies", self.pacs.url], folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self.client = httpx.Client(base_url=self.server.url, timeout=120)

    def close(self) -> None:
        """Stop both."""
        self.pacs.close()
        self.server.stop()

    def image(self, series: str) -> httpx.Response:
        """Ask for the volume of a series."""
        return self.client.get("/datastore/image", params={"image": series})

    def copies(self, series: str) -> list[str]:
        """Return what the server keeps of a series."""
        return [path.name for path in (self.home / "pacs").rglob(f"{series}*")]

    def left_over(self) -> list[str]:
        """Return unfinished and temporary files."""
        places = (self.temporary, *(self.home / "pacs").glob("*.pending"))
        found = [path for place in places for path in place.rglob("*") if path.is_file()]
        return [path.name for path in (*found, *self.home.rglob("*.part"))]


@contextmanager
def hospital() -> Iterator[Hospital]:
    """Yield a `Hospital` in a temporary folder; all of it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mshub-bench-") as folder:
        opened = Hospital(Path(folder))
        try:
            yield opened
        finally:
            opened.close()


@dataclass
class Outcome:
    """What came of the cases of one group.

    Attributes
    ----------
    cases, whole, refused : int
    wrong : list of str
        What should not be.
    codes : set of str
        Statuses and codes of what was refused.
    slowest_info_s : float
        ``/info`` while an answer stalled.
    """

    cases: int = 0
    whole: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    codes: set[str] = field(default_factory=set)
    slowest_info_s: float = 0.0


def voxels_of(answer: httpx.Response) -> np.ndarray:
    """Return the voxels of a NIfTI file that was answered."""
    return np.asanyarray(nib.Nifti1Image.from_bytes(unzipped(answer.content)).dataobj)


def unzipped(content: bytes) -> bytes:
    """Return a file without its compression, if it has one."""
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def patiently(ask: Callable[[], httpx.Response], enough: Callable[[httpx.Response], bool]) -> httpx.Response:
    """Ask until the answer is enough, for `WELL_S` at most; returns the last answer."""
    deadline = time.monotonic() + WELL_S
    while True:
        answer = ask()
        if enough(answer) or time.monotonic() > deadline:
            return answer
        time.sleep(0.2)
