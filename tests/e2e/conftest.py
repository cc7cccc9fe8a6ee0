from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lib.server.viewer import OHIF_VERSION, viewer_folder
from mshub.store import default_home
from ohif_browser import CHROMIUM
from orthanc import Orthanc, OrthancMissing, find_orthanc

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
REQUIRED = os.environ.get("E2E_TOOLS") == "required"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real images, which is not part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real images are not here: {SHARED_DATA.name}/ beside the checkout is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def orthanc() -> Iterator[Callable[..., Orthanc]]:
    """Return a function that starts a PACS in a folder; skipped where Orthanc is not installed."""
    started: list[Orthanc] = []

    def start(folder: Path, **options: Any) -> Orthanc:
        started.append(Orthanc(folder, **options))
        return started[-1]

    try:
        find_orthanc()
    except OrthancMissing as error:
        if REQUIRED:
            raise
        pytest.skip(f"no PACS to test with: {error}")
    yield start
    for pacs in started:
        pacs.stop()


@pytest.fixture(scope="session")
def viewer() -> Path:
    """OHIF's build; skipped where it or a browser is not installed."""
    folder = viewer_folder(default_home())
    missing = [
        *([] if folder else [f"OHIF {OHIF_VERSION} (make viewer)"]),
        *([] if Path(CHROMIUM).exists() else ["Chromium (make pacs-tools)"]),
    ]
    if folder is None or missing:
        reason = f"not installed: {', '.join(missing)}"
        pytest.fail(reason) if REQUIRED else pytest.skip(reason)
    return folder
