"""Models are made ready after a start: as many as fit, and one that fails is in nobody's way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from factories import make_image
from lib.app import MSHubApp
from lib.warm_up import WarmUp
from mshub.errors import ModelFolderError
from mshub.nnunet import network_cache as network_cache_module
from mshub.store import ModelStore


@dataclass
class Memory:
    """The part of the network cache that counts: what is free."""

    free: int = 100

    def free_bytes(self) -> int:
        return self.free


@dataclass
class Model:
    model_id: str
    memory: Memory
    size: int = 0
    fails: Exception | None = None
    warmed: list[str] = field(default_factory=list)

    def warm(self) -> None:
        if self.fails:
            raise self.fails
        self.memory.free -= self.size
        self.warmed.append(self.model_id)


@pytest.fixture
def warm() -> Callable[..., list[str]]:
    """Return a function that warms up models of these sizes (or what they raise), and says which became ready."""

    def run(*sizes: int | Exception) -> list[str]:
        memory, warmed = Memory(), []
        models = []
        for number, size in enumerate(sizes):
            fails = size if isinstance(size, Exception) else None
            models.append(Model(f"m{number}", memory, 0 if fails else int(size), fails, warmed))
        thread = WarmUp(lambda: models, memory)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        assert thread.doing is None
        return warmed

    return run


def test_all_models_that_fit_become_ready(warm: Callable[..., list[str]]) -> None:
    assert warm(30, 30, 30) == ["m0", "m1", "m2"]
    assert warm(40, 40, 40) == ["m0", "m1"], "a third would drop the first"
    assert warm() == []


@pytest.mark.parametrize("error", [ModelFolderError("damaged"), RuntimeError("a kernel failed")])
def test_one_that_fails_is_in_nobodys_way(warm: Callable[..., list[str]], error: Exception) -> None:
    assert warm(30, error, 30) == ["m0", "m2"]


@pytest.mark.usefixtures("monailabel_here")
def test_the_first_request_loads_nothing(
    installed: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(tmp_path / "studies" / "a.nii.gz", (29, 23, 14))
    app = MSHubApp(str(tmp_path / "app"), str(tmp_path / "studies"), {"device": "cpu", "profile": "balanced"})
    assert app.status()["loaded"] == []
    app._warm_up.run()
    assert app.status()["loaded"] == ["models/tiny/v1/model"]
    assert app.status()["warming_up"] is None

    def fail(*_: object) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr(network_cache_module, "Engine", fail)
    Path(app.infer({"model": "tiny", "image": "a"})["file"]).unlink()
