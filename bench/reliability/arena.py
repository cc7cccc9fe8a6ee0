"""What the scripts of this folder share: a server on a folder of phantoms, its memory, what it leaves, and figures."""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps" / "mshub"))

from factories import make_image, make_model_folder
from live import LiveServer
from mshub.install import add_model
from mshub.store import ModelStore
from mshub.users import user_file

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "bench" / "out" / "reliability"
SHAPE = (19, 23, 17)
MODEL = "tiny"
CASES = ("case01", "case02")
MIB = 2**20


class Arena:
    """A server of its own, with `CASES` and one tiny model, whose temporary files go to a folder of their own.

    Parameters
    ----------
    folder : Path
        Everything is in it.
    has_users : bool
        Somebody has to log in; `token` is an admin's.
    threads : int
        Of the computing; 0: as many as the server takes of itself.
    """

    def __init__(self, folder: Path, *, has_users: bool = False, threads: int = 1) -> None:
        self.folder, self.home, self.studies = folder, folder / "home", folder / "studies"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        for number, case in enumerate(CASES):
            make_image(self.studies / f"{case}.nii.gz", SHAPE, seed=number)
        add_model(ModelStore(self.home), MODEL, make_model_folder(folder / "model"))
        self.token = self._add_admin() if has_users else ""
        environment = {"TMPDIR": str(self.temporary), "MSHUB_ENGINE": "torch"}
        with environment_of({**environment, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}):
            self.server = LiveServer(self.home, ["--studies", str(self.studies)], folder, probe="/health/live")
        self.process = psutil.Process(self.server._process.pid)

    def _add_admin(self) -> str:
        users = user_file(self.home)
        users.add("bench", secrets.token_urlsafe(), "admin")
        return users.create_token("bench", "reliability", 1)

    def forget_peak(self) -> int:
        """Begin to look for the most memory anew; returns what the server has just now, in bytes."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return int(self.process.memory_info().rss)

    def peak(self) -> int:
        """Return the most memory the server had since `forget_peak`, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    def left_over(self) -> set[str]:
        """Return the temporary files there are: uploads, sessions, results, files that were being written."""
        places = (self.temporary, self.home / "sessions")
        found = {path for place in places for path in place.rglob("*") if path.is_file()}
        found |= {*self.studies.rglob("*.part"), *self.home.rglob("*.part")}
        return {str(path.relative_to(self.folder)) for path in found}


@contextmanager
def environment_of(variables: Mapping[str, str]) -> Iterator[None]:
    """Have some environment variables set for as long as the block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def arena(*, has_users: bool = False, threads: int = 1) -> Iterator[Arena]:
    """Yield an `Arena` in a temporary folder; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mshub-bench-") as folder:
        opened = Arena(Path(folder), has_users=has_users, threads=threads)
        try:
            yield opened
        finally:
            opened.server.stop()


def keep(name: str, figures: dict[str, Any]) -> Path:
    """Write figures to ``bench/out/reliability/NAME.json``."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.json"
    facts = {"when": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": " ".join(sys.argv)}
    path.write_text(json.dumps({**facts, **figures}, indent=2, default=str) + "\n")
    return path


def conclude(name: str, figures: dict[str, Any], report: str, *, held: bool) -> NoReturn:
    """Keep and print the figures of people at work, and what went ``wrong``; end with 1 unless all `held`."""
    path = keep(name, figures)
    print(report)
    for what, times in figures["wrong"].items():
        print(f"WRONG {times} x {what}")
    print(f"figures: {path}")
    sys.exit(0 if held else 1)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
