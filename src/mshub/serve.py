"""Start MONAI Label with the MSHub app; it runs as a process of its own and this module never imports it."""

from __future__ import annotations

import errno
import importlib.util
import ipaddress
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mshub.bundled import app_folder
from mshub.errors import AccessError, ConfigError
from mshub.log_lines import FORMATS
from mshub.store import writable_folder
from mshub.users import user_file

LOG_BYTES, LOG_FILES = 10 * 2**20, 10


def check_exposure(host: str, home: Path, *, has_sign_on: bool = False) -> None:
    """Refuse to let others reach a server that nobody has to log in to.

    Parameters
    ----------
    host : str
        Where it would listen.
    home : Path
        Where its users are.
    has_sign_on : bool
        People log in by single sign-on, too.

    Raises
    ------
    AccessError
        `host` is not this machine, and there are no users.
    """
    if not is_loopback(host) and not user_file(home) and not has_sign_on:
        raise AccessError(
            f"--host {host} lets other machines reach this server, and it has no users in {home}: anybody could read "
            "the images and change labels. Add a user first, `mshub users add NAME`, or leave --host out."
        )


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's own: to listen on, reached from it only; of a client, the same."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, port: int) -> None:
    """Refuse an address where the server could not listen, before everything is loaded.

    Raises
    ------
    ConfigError
        This machine has no such address, or another program listens there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "another program listens there, perhaps another MSHub. End that one, or choose another --port."
        elif error.errno in (errno.EACCES, errno.EPERM):
            reason = "this user may not listen there. Choose a --port above 1023."
        else:
            reason = f"{error.strerror or error}. Expected an address of this machine, such as 127.0.0.1 or 0.0.0.0."
        raise ConfigError(f"The server cannot listen at --host {host} --port {port}: {reason}") from error


def check_tls(cert: Path, key: Path) -> None:
    """Refuse files with which the server could not speak HTTPS.

    Raises
    ------
    ConfigError
        They are no certificate and key, the key is another certificate's, or it is encrypted.
    """

    def encrypted() -> str:
        raise ConfigError(
            f"The key {key} is encrypted, and nobody is there to type its password. Expected a key without one: "
            f"openssl pkey -in {key.name} -out plain.pem, readable by the server alone."
        )

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, encrypted)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            reason = "the key is that of another certificate"
        else:
            reason = f"one of them is no PEM of the kind that is expected ({error.reason or error})"
        raise ConfigError(
            f"--tls-cert {cert} and --tls-key {key} do not go together: {reason}. Expected the server's certificate, "
            "followed by those of its issuers, and its private key."
        ) from error
    except OSError as error:
        raise ConfigError(f"--tls-cert {cert} or --tls-key {key} cannot be read: {error.strerror}.") from error


def server_command(
    studies: str,
    host: str,
    port: int,
    conf: Mapping[str, str],
    log_config: Path,
    tls: tuple[Path, Path] | None = None,
) -> list[str]:
    """Return the command line of the server.

    Parameters
    ----------
    studies, host, port, conf
        As the user says them.
    log_config : Path
        What `write_log_config` returned.
    tls : tuple of Path, optional
        Files of the certificate (chain) and of its key, in PEM.
    """
    pairs = [part for key, value in conf.items() for part in ("--conf", key, value)]
    files = ["--ssl_certfile", str(tls[0]), "--ssl_keyfile", str(tls[1])] if tls else []
    return [
        *(sys.executable, "-m", "lib.server.launch", "start_server"),
        *("--app", str(app_folder()), "--studies", studies, "--host", host, "--port", str(port)),
        *("--uvicorn_app", "lib.server.asgi:app", "--log_config", str(log_config), "--verbose", "WARNING"),
        *files,
        *pairs,
    ]


def write_log_config(home: Path, log_format: str = "text") -> Path:
    """Write the server's logging configuration and return its path.

    What MSHub and the web server do goes to the screen and, with times, to ``logs/server.log`` under `home`; of MONAI
    Label, which logs every request with its parameters, only warnings do.

    Raises
    ------
    ConfigError
        `log_format` is none of `FORMATS`.
    """
    if log_format not in FORMATS:
        raise ConfigError(f"The format {log_format!r} of the log is unknown; expected {' or '.join(FORMATS)}.")
    lines = f"mshub.log_lines.{'JsonLines' if log_format == 'json' else 'TextLines'}"
    folder = writable_folder(home / "logs")
    both = {"handlers": ["screen", "file"], "propagate": False}
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "short": {"class": lines, "format": "%(asctime)s %(levelname)-7s %(message)s", "datefmt": "%H:%M:%S"},
            "long": {
                "class": lines,
                "format": "%(asctime)s %(levelname)-7s %(process)d %(threadName)s %(name)s: %(message)s",
            },
        },
        "handlers": {
            "screen": {"class": "logging.StreamHandler", "formatter": "short"},
            "file": {
                "class": "logging.handlers.RotatingFileHandler",
                "formatter": "long",
                "filename": str(folder / "server.log"),
                "maxBytes": LOG_BYTES,
                "backupCount": LOG_FILES,
                "encoding": "utf-8",
            },
        },
        "root": {"level": "WARNING", "handlers": ["screen", "file"]},
        "loggers": {name: {"level": "INFO", **both} for name in ("mshub", "lib", "uvicorn")},
    }
    path = folder / "logging.json"
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return path


def server_environment(home: Path) -> dict[str, str]:
    """Return the environment of the server: the app on its import path, all state under `home`."""
    path = [str(app_folder()), *filter(None, [os.environ.get("PYTHONPATH")])]
    sessions, cache = home / "sessions", home / "dicom-cache"
    return {
        "MONAI_LABEL_SESSION_PATH": str(sessions),
        "MONAI_LABEL_DATASTORE_CACHE_PATH": str(cache),
        "MONAI_LABEL_DICOMWEB_SEARCH_FILTER": '{"Modality":"CT,MR"}',
        # The C library's own choice, eight heaps for each core, keeps what a thread gave back from all others.
        "MALLOC_ARENA_MAX": "2",
        **_cache_folders(home),
        **os.environ,
        "MSHUB_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(path),
    }


def _cache_folders(home: Path) -> dict[str, str]:
    """Return where libraries keep what they compile, for an account without a folder of its own, as services have."""
    with suppress(RuntimeError):  # an account nobody knows
        if os.access(Path.home(), os.W_OK):
            return {}
    return {"NUMBA_CACHE_DIR": str(home / "cache" / "numba"), "MPLCONFIGDIR": str(home / "cache" / "matplotlib")}


def run_server(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the server until it ends; on POSIX it takes this process's place, so that signals reach it.

    Raises
    ------
    ConfigError
        MONAI Label is not installed.
    """
    if importlib.util.find_spec("monailabel") is None:
        raise ConfigError(
            "MONAI Label is not installed in this Python: run `make serve`, or `pip install monailabel==0.8.5`."
        )
    if os.name == "posix":
        sys.stdout.flush()
        os.execve(command[0], list(command), dict(environment))
    return subprocess.call(list(command), env=dict(environment))
