"""``monailabel.main start_server --app apps/mshub --studies DIR``: what MONAI Label's users type."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from live import LiveServer, Site
from mshub.bundled import app_folder

COMMAND = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app_folder())]


@pytest.fixture(scope="module")
def server(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    command = [*COMMAND, "--studies", str(site.studies), "--host", "127.0.0.1", "--conf", "models", "tiny"]
    server = LiveServer(site.home, [], tmp_path_factory.mktemp("stock"), command=command, probe="/info/")
    yield server
    server.stop()


def test_it_serves_the_models_asked_for(server: LiveServer) -> None:
    assert set(httpx.get(f"{server.url}/info/").json()["models"]) == {"tiny"}


def test_it_segments(server: LiveServer, tmp_path: Path) -> None:
    _, params = server.client(tmp_path).infer("tiny", "case01", {"profile": "balanced"})
    assert params["label_names"] == {"liver": 1, "spleen": 2}


@pytest.mark.parametrize(
    ("model", "query", "params"),
    [("tiny", "image=nobody", {}), ("nothing", "image=case01", {}), ("tiny", "image=case01", {"profile": "turbo"})],
)
def test_it_refuses_what_is_unknown(server: LiveServer, model: str, query: str, params: dict[str, str]) -> None:
    answer = server.infer(model, query, params)
    assert answer.status_code in (404, 422)
    assert len(answer.json()["detail"]) > 30


def test_a_mistyped_option_ends_the_start_with_a_suggestion(site: Site) -> None:
    command = [*COMMAND, "--studies", str(site.studies), "--port", "1", "--conf", "modles", "tiny"]
    done = subprocess.run(command, env={**os.environ, "MSHUB_HOME": str(site.home)}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Did you mean models?" in done.stdout + done.stderr


def test_the_app_says_in_one_sentence_what_to_install_when_the_library_is_missing() -> None:
    # -S -I: without site-packages, so that mshub cannot be found.
    command = [sys.executable, "-I", "-S", str(app_folder() / "main.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("MSHub's library is not installed in this Python: run `make serve`")
    assert len(done.stderr.splitlines()) == 1
