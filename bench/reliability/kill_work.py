"""What kill.py interrupts: the server's own code that stores something, and how one sees afterwards that it is there.

Each kind of work is a class with the same four methods: `prepare` once, `do` again and again (it returns what a client
would have been told), `restart` as a server does when it starts, `check` that what was told is so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import nibabel as nib
import numpy as np

from arena import make_image, make_model_folder  # first: it tells Python where the tests and the app are
from dicom_series_factory import SeriesMaker
from fake_pacs import FakePacs
from lib import index_journal
from lib.datastore import StudiesFolder
from lib.index_file import INDEX
from lib.janitor import ANYTHING, folders_below, remove_abandoned, unfinished
from lib.pacs_images import SeriesFiles
from lib.sessions import UploadSessions
from mshub.store import ModelStore
from mshub.volume_io import read_volume

CASES, SHAPE = ("a", "b", "c"), (12, 11, 10)
short_journals = partial(patch.object, index_journal, "LEAST_BYTES", 20_000)
"""Around a function: the index is written whole as often as it is killed."""
LONG_AGO_S = 2 * 24 * 3600.0
Told = dict[str, Any]


class Work(Protocol):
    """One kind of work in a folder of its own; what clients send comes from `scratch`."""

    def __init__(self, folder: Path, scratch: Path) -> None: ...

    def prepare(self) -> None:
        """Make what it needs."""

    def restart(self) -> None:
        """Open it as a server does that starts."""

    def do(self, number: int) -> Told:
        """Do it once; returns what a client is told."""

    def check(self, told: list[Told]) -> list[str]:
        """Return what is wrong with what was told."""

    def sweep(self) -> list[str]:
        """Let the janitor sweep, as if long after; returns what is left of unfinished work."""


class _InFolder:
    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self.scratch = folder, scratch

    def places(self) -> list[Path]:
        """Return the folders of which everything in them is unfinished work."""
        return []

    def sweep(self) -> list[str]:
        _make_old(self.folder)
        for place in self.places():
            remove_abandoned(place, names=ANYTHING)
        unfinished(lambda: folders_below(self.folder))
        left = list(self.folder.rglob(".*.part"))
        left += [path for place in self.places() if place.is_dir() for path in place.iterdir()]
        return [str(path.relative_to(self.folder)) for path in left]


def _make_old(folder: Path) -> None:
    """Let what is unfinished look as it does two days later."""
    then = time.time() - LONG_AGO_S
    for path in folder.rglob("*"):
        if path.name.endswith(".part") or {"staging", "pacs.pending"} & set(path.parts):
            os.utime(path, (then, then), follow_symlinks=False)


def sha256(content: bytes) -> str:
    """Return the digest of bytes."""
    return hashlib.sha256(content).hexdigest()


class _Studies(_InFolder):
    """A studies folder with `CASES`."""

    store: StudiesFolder

    def prepare(self) -> None:
        for number, case in enumerate(CASES):
            make_image(self.folder / "studies" / f"{case}.nii.gz", SHAPE, seed=number)

    def restart(self) -> None:
        index = self.folder / "studies" / INDEX
        if index.exists():
            json.loads(index.read_text(encoding="utf-8"))
        self.store = StudiesFolder(str(self.folder / "studies"), lambda: ("liver", "spleen"), self.folder / "refused")


class Labels(_Studies):
    """Labels are submitted; segments are numbered the other way round every other time."""

    def do(self, number: int) -> Told:
        case = CASES[number % len(CASES)]
        names = {"liver": 1, "spleen": 2} if number % 2 else {"liver": 2, "spleen": 1}
        path = self.scratch / f"label-{os.getpid()}.nii.gz"
        array = np.zeros(SHAPE, np.uint8)
        bits = np.unpackbits(np.frombuffer(np.int64(number).tobytes() + os.urandom(16), np.uint8))
        array.reshape(-1)[: len(bits)] = bits + 1
        nib.save(nib.Nifti1Image(array, nib.load(self.store.get_image_uri(case)).affine), path)
        told = {"case": case, "names": names, "sha256": sha256(path.read_bytes())}
        info = [{"name": name, "idx": value} for name, value in names.items()]
        try:
            self.store.save_label(case, str(path), "final", {"label_info": info, "n": number})
        finally:
            path.unlink()
        return told

    def check(self, told: list[Told]) -> list[str]:
        known = {case: dict(self._known(case)) for case in CASES}
        wrong = []
        for one in told:
            found = known[one["case"]].get(one["sha256"])
            if found is None:
                wrong.append(f"a label of {one['case']} is gone")
            elif found != one["names"]:
                wrong.append(f"a label of {one['case']} has the names {found}, expected {one['names']}")
        return wrong

    def _known(self, case: str) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield digest and names of every label of a case that the index knows."""
        for tag in self.store.get_labels_by_image_id(case):
            info = self.store.get_label_info(case, tag)
            path = Path(self.store.get_label_uri(case, tag))
            names = {segment["name"]: segment["idx"] for segment in info.get("label_info", [])}
            yield sha256(path.read_bytes()) if path.is_file() else "", names


class Index(_Studies):
    """What is known of images is noted."""

    def do(self, number: int) -> Told:
        case = CASES[number % len(CASES)]
        self.store.update_image_info(case, {"counter": number, "text": "x" * 5000})
        return {"case": case, "counter": number}

    def check(self, told: list[Told]) -> list[str]:
        last = {one["case"]: one["counter"] for one in told}
        found = {case: self.store.get_image_info(case).get("counter", -1) for case in last}
        return [f"{case} is at {found[case]}, told {last[case]}" for case in last if found[case] < last[case]]


class Sessions(_InFolder):
    """Images are uploaded for a while, and asked for."""

    def prepare(self) -> None:
        (self.folder / "sessions").mkdir(parents=True)

    def restart(self) -> None:
        self.sessions = UploadSessions(str(self.folder / "sessions"), 3600)

    def do(self, number: int) -> Told:
        content = os.urandom(20_000)
        path = self.scratch / f"upload-{os.getpid()}.nii.gz"
        path.write_bytes(content)
        try:
            name, _ = self.sessions.add_session(str(path))
        finally:
            path.unlink(missing_ok=True)
        for _ in range(5):
            self.sessions.get_session(name)
        return {"session": name, "sha256": sha256(content)}

    def check(self, told: list[Told]) -> list[str]:
        wrong = []
        for one in told:
            found = self.sessions.get_session(one["session"], update_ts=False)
            if found is None or sha256(Path(found.image).read_bytes()) != one["sha256"]:
                wrong.append(f"the session {one['session']} is gone or damaged")
        return wrong

    def sweep(self) -> list[str]:
        left = super().sweep()
        then, folder = time.time() - LONG_AGO_S, self.folder / "sessions"
        for path in folder.iterdir():
            if not (path / "meta.info").exists():
                os.utime(path, (then, then))
        self.sessions.remove_expired()
        return [
            *left,
            *(path.name for path in (self.folder / "sessions").iterdir() if not (path / "meta.info").exists()),
        ]


class Versions(_InFolder):
    """Versions of a model are published and promoted."""

    def prepare(self) -> None:
        make_model_folder(self.folder / "template")

    def places(self) -> list[Path]:
        return [self.folder / "home" / "staging"]

    def restart(self) -> None:
        self.store = ModelStore(self.folder / "home")

    def do(self, number: int) -> Told:
        with self.store.staging() as staging:
            for name in _files_of(self.folder / "template"):
                (staging / "model" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / "template" / name, staging / "model" / name)
            (staging / "model" / "notes.txt").write_text(f"{number} {os.urandom(8).hex()}")
            version = self.store.publish("tiny", staging / "model", {"labels": {}, "channels": [], "card": {}})
        self.store.promote("tiny", version.version, "bench")
        return {"version": version.version, "files": version.record["files"]}

    def check(self, told: list[Told]) -> list[str]:
        wrong = []
        for one in told[-3:]:  # each is as large as a model: those before were looked at after earlier kills
            found = self.store.verify("tiny", one["version"])
            if found.record["files"] != one["files"]:
                wrong.append(f"{one['version']} is another one")
        for version in self.store.versions("tiny"):
            if version.record["files"].keys() != {str(path) for path in _files_of(version.model_path)}:
                wrong.append(f"{version.version} is not whole")
        if told and self.store.current("tiny").number < int(told[-1]["version"][1:]):
            wrong.append(f"{self.store.current('tiny').version} serves, told {told[-1]['version']}")
        self.store.history("tiny")
        return wrong


def _files_of(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]


class Downloads(_InFolder):
    """Series of a PACS are fetched, and dropped again."""

    def prepare(self) -> None:
        self.folder.mkdir(parents=True)

    def places(self) -> list[Path]:
        return [self.folder / "pacs.pending"]

    def restart(self) -> None:
        makers = [SeriesMaker(f"bench{number}", shape=(24, 20, 9), seed=number) for number in range(3)]
        self.facts = [
            {
                "SeriesInstanceUID": maker.uid,
                "StudyInstanceUID": maker.study_uid,
                "NumberOfSeriesRelatedInstances": str(maker.shape[2]),
            }
            for maker in makers
        ]
        (self.folder / "pacs").mkdir(exist_ok=True)
        self.files = SeriesFiles(self.folder / "pacs", FakePacs(*(maker.slices() for maker in makers)))  # type: ignore[arg-type]
        self.expected = [maker.stored() for maker in makers]

    def do(self, number: int) -> Told:
        which = number % len(self.facts)
        self.files.drop(self.facts[which]["SeriesInstanceUID"], -1)
        self.files.fetch(self.facts[which])
        return {"which": which}

    def check(self, told: list[Told]) -> list[str]:
        wrong = []
        for facts, expected in zip(self.facts, self.expected, strict=True):
            series = facts["SeriesInstanceUID"]
            if not self.files.has(series, expected.shape[2]):
                continue  # fetched again when it is asked for
            if not np.array_equal(read_volume(self.files.path(series)).array_xyz, expected):
                wrong.append(f"the copy of {series} is not the series")
            if len(self.files.stack(series).headers) != expected.shape[2]:
                wrong.append(f"headers of {series} are missing")
        return wrong


KINDS: dict[str, Callable[[Path, Path], Work]] = {
    "save_label": Labels,
    "index": Index,
    "session": Sessions,
    "publish": Versions,
    "download": Downloads,
}
