"""Start MONAI Label with the MSHub app; it runs as a process of its own and this module never imports it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mshub.bundled import app_folder
from mshub.errors import ConfigError

WHOLE_NETWORK = "0.0.0.0"


def server_command(studies: str, host: str, port: int, conf: Mapping[str, str]) -> list[str]:
    """Return the command line of the server."""
    pairs = [part for key, value in conf.items() for part in ("--conf", key, value)]
    return [
        *(sys.executable, "-m", "monailabel.main", "start_server"),
        *("--app", str(app_folder()), "--studies", studies, "--host", host, "--port", str(port)),
        *("--uvicorn_app", "lib.server.asgi:app"),
        *pairs,
    ]


def server_environment(home: Path) -> dict[str, str]:
    """Return the environment of the server: the app on its import path, all state under `home`."""
    path = [str(app_folder()), *filter(None, [os.environ.get("PYTHONPATH")])]
    sessions, cache = home / "sessions", home / "dicom-cache"
    return {
        "MONAI_LABEL_SESSION_PATH": str(sessions),
        "MONAI_LABEL_DATASTORE_CACHE_PATH": str(cache),
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(cache),
        "MONAI_LABEL_DICOMWEB_SEARCH_FILTER": '{"Modality":"CT,MR"}',
        **os.environ,
        "MSHUB_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(path),
    }


def run_server(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the server until it ends; on POSIX it takes this process's place, so that signals reach it.

    Raises
    ------
    ConfigError
        MONAI Label is not installed.
    """
    if importlib.util.find_spec("monailabel") is None:
        raise ConfigError(
            "MONAI Label is not installed in this Python: run `make serve`, or `pip install mshub[server]`."
        )
    if os.name == "posix":
        sys.stdout.flush()
        os.execve(command[0], list(command), dict(environment))
    return subprocess.call(list(command), env=dict(environment))
