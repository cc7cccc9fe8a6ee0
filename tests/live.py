"""A real MSHub server as a child process, started as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from monailabel.client import MONAILabelClient

START_TIMEOUT_S = 180


class LiveServer:
    """``mshub serve`` on a free port, until `stop`.

    Parameters
    ----------
    home : Path
        `MSHUB_HOME` of the server.
    arguments : sequence of str
        Such as ``["--studies", "DIR"]``.
    folder : Path
        Where its log goes; also its working directory.
    command : sequence of str
        How to start it; ``--port`` is added.
    probe : str
        Path that answers when it is up.
    certificate : Path, optional
        Of a server that speaks HTTPS, to trust it.
    """

    def __init__(
        self,
        home: Path,
        arguments: Sequence[str],
        folder: Path,
        command: Sequence[str] = (sys.executable, "-m", "mshub", "serve"),
        probe: str = "/mshub/status",
        certificate: Path | None = None,
    ) -> None:
        self.port = _free_port()
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.port}"
        self.trust: ssl.SSLContext | bool = ssl.create_default_context(cafile=certificate) if certificate else True
        self.log = folder / "server.log"
        environment = {**os.environ, "MSHUB_HOME": str(home)}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *arguments, "--port", str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
            )
        self._wait(probe)

    def _wait(self, probe: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}:\n{self.log.read_text()[-4000:]}")
            try:
                httpx.get(f"{self.url}{probe}", timeout=5, verify=self.trust).raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.3)
            else:
                return
        raise RuntimeError(f"the server did not answer within {START_TIMEOUT_S} s:\n{self.log.read_text()[-4000:]}")

    def client(self, folder: Path) -> MONAILabelClient:
        """Return MONAI Label's own client, keeping what it downloads in `folder`."""
        return MONAILabelClient(self.url, tmpdir=str(folder), client_id="tester")

    def infer(self, model: str, query: str, params: dict[str, Any] | str | None = None, **files: Any) -> httpx.Response:
        """Post to ``/infer`` as a browser would; `query` such as ``image=case01&output=image``."""
        text = params if isinstance(params, str) else json.dumps(params or {})
        url = f"{self.url}/infer/{quote(model)}?{query}"
        return httpx.post(url, data={"params": text}, files=files or None, timeout=300)

    def kill(self) -> None:
        """End the server without a chance to say goodbye."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End the server as Ctrl+C does."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass
class Site:
    """A small hospital: a server, its studies folder and its model store."""

    server: LiveServer
    studies: Path
    home: Path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
