"""Orthanc, the reference PACS, as a child process: for the demo and for the tests against a real PACS."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import requests

START_TIMEOUT_S = 60
PLUGINS = (
    Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so"),
    Path("/usr/lib/orthanc/plugins/libOrthancDicomWeb.so"),
    Path("/usr/local/share/orthanc/plugins/libOrthancDicomWeb.so"),
)


class OrthancMissing(RuntimeError):
    """Orthanc, or its DICOMweb plugin, is not installed."""


class Orthanc:
    """A PACS on this machine only, until `stop`; a context manager.

    Parameters
    ----------
    folder : Path
        Where it keeps its objects, its settings and its log.
    port : int, optional
        Of its HTTP server; a free one by default.
    users : mapping of str to str, optional
        User name to password; without, everybody on this machine is let in.

    Attributes
    ----------
    url : str
        Root of its own interface.
    dicomweb : str
        Root of its DICOMweb service.

    Raises
    ------
    OrthancMissing
        Says what to install.
    """

    def __init__(self, folder: Path, port: int | None = None, users: Mapping[str, str] | None = None) -> None:
        self._program, self._plugin = find_orthanc()
        self.folder, self.port = folder, port or free_port()
        self._dicom_port, self._users = free_port(), dict(users or {})
        self.url = f"http://127.0.0.1:{self.port}"
        self.dicomweb = f"{self.url}/dicom-web"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def __enter__(self) -> Orthanc:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def auth(self) -> tuple[str, str] | None:
        """A user that is let in, or None where everybody is."""
        return next(iter(self._users.items()), None)

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = self.folder / "orthanc.json"
        settings.write_text(json.dumps(self._settings(), indent=2))
        with (self.folder / "orthanc.log").open("ab") as log:
            self._process = subprocess.Popen([self._program, str(settings)], stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                requests.get(f"{self.dicomweb}/studies", auth=self.auth, timeout=5).raise_for_status()
                return
            except requests.RequestException:
                time.sleep(0.1)
        self.stop()
        raise RuntimeError(f"Orthanc did not start; see {self.folder / 'orthanc.log'}")

    def stop(self) -> None:
        """End it; what it holds stays in its folder."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def upload(self, files: Iterable[Path]) -> None:
        """Store DICOM files; those it has already change nothing."""
        with requests.Session() as session:
            session.auth = self.auth
            for path in files:
                session.post(f"{self.url}/instances", data=path.read_bytes(), timeout=60).raise_for_status()

    def _settings(self) -> dict[str, object]:
        return {
            "Name": "MSHub demo",
            "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "storage"),
            "HttpPort": self.port,
            "DicomPort": self._dicom_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": bool(self._users),
            "RegisteredUsers": self._users,
            "HttpCompressionEnabled": False,
            "KeepAlive": True,
            "Plugins": [str(self._plugin)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }


def find_orthanc() -> tuple[str, Path]:
    """Return Orthanc's program and its DICOMweb plugin.

    Raises
    ------
    OrthancMissing
        Says what to install.
    """
    search = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    program = shutil.which("Orthanc", path=search)
    plugin = next((path for path in PLUGINS if path.is_file()), None)
    missing = [name for name, found in (("orthanc", program), ("orthanc-dicomweb", plugin)) if not found]
    if program is None or plugin is None:
        raise OrthancMissing(
            f"{' and '.join(missing)} not found. On Debian and Ubuntu: sudo apt-get install -y "
            "--no-install-recommends orthanc orthanc-dicomweb"
        )
    return program, plugin


def free_port() -> int:
    """Return a port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
