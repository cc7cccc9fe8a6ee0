"""Digests of reviewed cases: computed once, in a thread where somebody only asks, and remembered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lib import digests as digests_module
from lib.app import MSHubApp
from lib.digests import Digests
from mshub import cases as cases_module
from mshub.cases import ReviewedCase
from mshub.checksums import file_sha256
from mshub.errors import StoreError
from waiting import eventually


@pytest.fixture
def cases(tmp_path: Path) -> list[ReviewedCase]:
    found = []
    for name in ("a", "b", "c"):
        image, label = tmp_path / f"{name}.nii.gz", tmp_path / f"{name}-label.nii.gz"
        image.write_text(f"image of {name}")
        label.write_text(f"label of {name}")
        found.append(ReviewedCase(name, (image,), label, {"liver": 1}, ("liver",), name))
    return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read."""
    files: list[str] = []
    monkeypatch.setattr(cases_module, "file_sha256", lambda path: (files.append(path.name), file_sha256(path))[1])
    return files


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files that are read once this is set."""
    go_on = threading.Event()

    def wait(path: Path) -> str:
        assert go_on.wait(30)
        return file_sha256(path)

    monkeypatch.setattr(cases_module, "file_sha256", wait)
    monkeypatch.setattr(digests_module, "PATIENCE_S", 0.05)
    return go_on


def anew(cases: list[ReviewedCase]) -> list[ReviewedCase]:
    """Return the same cases as another request finds them, without digests."""
    return [ReviewedCase.from_dict(case.as_dict()) for case in cases]


def test_a_case_is_read_once_also_after_a_restart(cases: list[ReviewedCase], read: list[str], tmp_path: Path) -> None:
    Digests(tmp_path / "digests.json").prepare(cases)
    assert len(read) == 6
    again = anew(cases)
    assert Digests(tmp_path / "digests.json").prepare_soon(again)
    assert [case.digest for case in again] == [case.digest for case in cases]
    assert len(read) == 6
    cases[1].label.write_text("painted over")
    assert Digests(tmp_path / "digests.json").prepare_soon(anew(cases))
    assert read[6:] == ["b.nii.gz", "b-label.nii.gz"]


def test_who_only_asks_does_not_wait_for_long_and_nobody_waits_for_others(
    cases: list[ReviewedCase], slow: threading.Event, tmp_path: Path
) -> None:
    digests = Digests(tmp_path / "digests.json")
    assert not digests.prepare_soon(anew(cases))
    for _ in range(3):
        started = time.monotonic()
        assert not digests.prepare_soon(anew(cases))
        assert time.monotonic() - started < 5
    assert threading.active_count() >= 2
    assert [thread.name for thread in threading.enumerate()].count("digests") == 1
    slow.set()
    eventually(lambda: digests.prepare_soon(anew(cases)))


def test_a_file_nobody_can_read_is_told(
    cases: list[ReviewedCase], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digests = Digests(tmp_path / "digests.json")

    def refuse(path: Path) -> str:
        raise StoreError(f"{path.name} cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(cases_module, "file_sha256", refuse)
        with pytest.raises(StoreError, match="cannot be read"):
            digests.prepare_soon(anew(cases))
        with pytest.raises(StoreError, match="cannot be read"):
            digests.prepare(anew(cases))
    assert digests.prepare_soon(anew(cases)), "and tried again"


@pytest.mark.usefixtures("fake_worker")
def test_info_says_how_many_cases_are_new_once_it_is_known(
    clinic: MSHubApp, review: Callable[..., None], slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    review("a", "liver")
    trainer = clinic._trainers["tiny"]
    monkeypatch.setattr(trainer, "_last_trained", lambda: clinic.store.current("tiny"))
    assert clinic.info()["trainers"]["tiny"]["mshub"] == {"reviewed_cases": 1}
    slow.set()
    eventually(lambda: clinic.info()["trainers"]["tiny"]["mshub"] == {"reviewed_cases": 1, "new_cases": 1})
