"""Starting the server: the command, its environment, and a clear word where MONAI Label is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mshub import serve
from mshub.bundled import app_folder, copy_samples, sample_data
from mshub.errors import ConfigError, StoreError
from mshub.serve import check_address, check_tls, run_server, server_command, server_environment, write_log_config

ROOT = Path(__file__).resolve().parents[2]


def test_the_server_is_monailabels_own_with_our_app(tmp_path: Path) -> None:
    conf = {"device": "cpu", "models": "a,b"}
    command = server_command(str(tmp_path / "my studies"), "0.0.0.0", 8123, conf, tmp_path / "logging.json")
    assert command[:4] == [sys.executable, "-m", "lib.server.launch", "start_server"]
    options = dict(zip(command[4::2], command[5::2], strict=False))
    assert options["--app"] == str(app_folder())
    assert options["--studies"] == str(tmp_path / "my studies")
    assert (options["--host"], options["--port"]) == ("0.0.0.0", "8123")
    assert options["--uvicorn_app"] == "lib.server.asgi:app"
    assert command[-6:] == ["--conf", "device", "cpu", "--conf", "models", "a,b"]


def test_an_address_where_nobody_can_listen_is_refused_before_all_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        other.listen()
        with pytest.raises(ConfigError, match=f"--port {port}: another program listens there"):
            check_address("127.0.0.1", port)
    check_address("localhost", port)
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1 .* Expected an address of this machine"):
        check_address("192.0.2.1", 8000)
    with pytest.raises(ConfigError, match=r"--host no host .* Expected an address of this machine"):
        check_address("no host", 8000)


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a function that gives the certificate, key or encrypted key of a machine."""
    folder = tmp_path_factory.mktemp("pem")

    def made(machine: str, kind: str) -> Path:
        key = folder / f"{machine}.key"
        if not key.exists():
            options = ["-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={machine}"]
            openssl("req", "-x509", *options, "-keyout", str(key), "-out", str(folder / f"{machine}.cert"))
            openssl("pkey", "-in", str(key), "-aes256", "-passout", "pass:x", "-out", str(folder / f"{machine}.secret"))
        return folder / f"{machine}.{kind}"

    return made


def openssl(*arguments: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("not installed: openssl")
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def test_a_certificate_and_its_key_are_tried_before_all_is_loaded(pem: Callable[[str, str], Path]) -> None:
    check_tls(pem("one", "cert"), pem("one", "key"))
    with pytest.raises(ConfigError, match=r"two\.key do not go together: the key is that of another certificate"):
        check_tls(pem("one", "cert"), pem("two", "key"))
    with pytest.raises(ConfigError, match="no PEM of the kind that is expected"):
        check_tls(pem("one", "key"), pem("one", "cert"))
    with pytest.raises(ConfigError, match=r"one\.secret is encrypted.*openssl pkey -in one\.secret"):
        check_tls(pem("one", "cert"), pem("one", "secret"))
    with pytest.raises(ConfigError, match="cannot be read"):
        check_tls(pem("one", "cert"), pem("one", "cert").with_name("gone"))


def test_without_options_the_app_gets_none() -> None:
    assert "--conf" not in server_command("studies", "127.0.0.1", 8000, {}, Path("logging.json"))


def test_the_log_keeps_what_mshub_does_and_of_others_only_warnings(tmp_path: Path) -> None:
    configuration = json.loads(write_log_config(tmp_path).read_text())
    script = (
        "import json, logging.config, sys\n"
        "logging.config.dictConfig(json.loads(sys.argv[1]))\n"
        "logging.getLogger('lib.app').info('ours')\n"
        "logging.getLogger('monailabel.endpoints.infer').info('a request with its parameters')\n"
        "logging.getLogger('monailabel.datastore').warning('theirs')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, json.dumps(configuration)], capture_output=True, text=True)
    assert [line[9:] for line in done.stderr.splitlines()] == ["INFO    ours", "WARNING theirs"]
    assert "lib.app: ours" in (tmp_path / "logs" / "server.log").read_text()


def logged(home: Path, log_format: str, script: str) -> list[str]:
    """Return the lines of the log of a process of its own that runs `script`."""
    configuration = write_log_config(home, log_format).read_text()
    start = f"import json, logging.config, sys\nlogging.config.dictConfig(json.loads(sys.argv[1]))\n{script}"
    subprocess.run([sys.executable, "-c", start, configuration], check=True, capture_output=True)
    return (home / "logs" / "server.log").read_text().splitlines()


FAILING = r"""
from mshub.log_lines import hide_with
hide_with(lambda text: text.replace("mueller", "XXX"))
try:
    open("/no/mueller.nii.gz")
except OSError:
    logging.getLogger("lib.app").exception("no %s\nhere", "mueller")
"""


def test_the_log_can_be_json_a_line_per_record(tmp_path: Path) -> None:
    (line,) = logged(tmp_path, "json", FAILING)
    record = json.loads(line)
    assert (record["level"], record["logger"], record["message"]) == ("ERROR", "lib.app", "no XXX\nhere")
    assert datetime.fromisoformat(record["time"]).tzinfo is not None
    assert "FileNotFoundError" in record["trace"]
    assert "mueller" not in line


def test_what_is_hidden_is_hidden_in_traces_too(tmp_path: Path) -> None:
    text = "\n".join(logged(tmp_path, "text", FAILING))
    assert "no XXX" in text
    assert "/no/XXX.nii.gz" in text
    assert "mueller" not in text


def test_an_unknown_format_of_the_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"xml.*text or json"):
        write_log_config(tmp_path, "xml")


def test_everything_the_server_writes_lies_under_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MONAI_LABEL_"):
            monkeypatch.delenv(name)
    environment = server_environment(tmp_path)
    assert environment["MSHUB_HOME"] == str(tmp_path)
    for name in ("SESSION_PATH", "DATASTORE_CACHE_PATH"):
        assert Path(environment[f"MONAI_LABEL_{name}"]).is_relative_to(tmp_path), name


def test_a_pacs_shows_mr_as_well_as_ct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MONAI_LABEL_DICOMWEB_SEARCH_FILTER", raising=False)
    assert json.loads(server_environment(tmp_path)["MONAI_LABEL_DICOMWEB_SEARCH_FILTER"]) == {"Modality": "CT,MR"}


def test_the_operators_own_settings_win_except_for_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    assert server_environment(tmp_path)["MALLOC_ARENA_MAX"] == "2"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    assert server_environment(tmp_path)["MALLOC_ARENA_MAX"] == "8"
    monkeypatch.setenv("MONAI_LABEL_SESSION_PATH", "/elsewhere")
    monkeypatch.setenv("MSHUB_HOME", "/not/this/one")
    environment = server_environment(tmp_path)
    assert environment["MONAI_LABEL_SESSION_PATH"] == "/elsewhere"
    assert environment["MSHUB_HOME"] == str(tmp_path)


def test_an_account_without_a_folder_of_its_own_has_one_for_what_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "NUMBA_CACHE_DIR" not in server_environment(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "nonexistent"))
    environment = server_environment(tmp_path)
    assert all(Path(environment[name]).is_relative_to(tmp_path) for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR"))


def test_the_app_has_the_folders_that_monailabel_would_make() -> None:
    """An account that may not write to the program, as a service should be, could not."""
    assert all((app_folder() / name / ".gitkeep").is_file() for name in ("model", "logs", "bin"))


@pytest.mark.parametrize("before", [None, "/a/b"])
def test_the_app_is_on_the_import_path_of_the_server_and_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before:
        monkeypatch.setenv("PYTHONPATH", before)
    found = server_environment(tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert found == [str(app_folder()), *([before] if before else [])]


def test_this_process_keeps_its_own_environment(tmp_path: Path) -> None:
    before = dict(os.environ)
    server_environment(tmp_path)
    assert dict(os.environ) == before


def test_a_missing_monailabel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"make serve.*pip install monailabel==0.8.5"):
        run_server([sys.executable, "-c", "raise SystemExit(9)"], {})


def test_the_server_takes_this_processes_place_on_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(serve.os, "name", "posix")
    monkeypatch.setattr(serve.os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(serve.subprocess, "call", lambda *_, **__: 0)
    run_server(["python", "-m", "x"], {"A": "1"})
    assert calls == [("python", ["python", "-m", "x"], {"A": "1"})]


def test_elsewhere_the_servers_exit_code_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(serve.os, "name", "nt")
        assert run_server([sys.executable, "-c", "raise SystemExit(9)"], dict(os.environ)) == 9


def test_the_app_and_the_samples_are_found_in_a_checkout() -> None:
    assert app_folder() == ROOT / "apps" / "mshub"
    assert sample_data() == ROOT / "sample-data"


def test_samples_are_copied_once_and_what_is_there_is_kept(tmp_path: Path) -> None:
    copy_samples(tmp_path / "studies")
    copied = sorted((tmp_path / "studies").iterdir())
    assert [path.name for path in copied] == [path.name for path in sorted((sample_data() / "images").glob("*.nii.gz"))]
    copied[0].write_text("changed by the user")
    copied[1].unlink()
    copy_samples(tmp_path / "studies")
    assert copied[0].read_text() == "changed by the user"
    assert copied[1].read_bytes() == (sample_data() / "images" / copied[1].name).read_bytes()


def test_an_incomplete_installation_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mshub.bundled._CHECKOUT", tmp_path)
    monkeypatch.setattr("mshub.bundled._PACKAGE", tmp_path)
    with pytest.raises(StoreError, match="Reinstall MSHub"):
        app_folder()


def test_the_app_says_in_one_sentence_what_to_install_where_mshub_is_missing() -> None:
    program = "import runpy, sys; sys.path.insert(0, {app!r}); runpy.run_path({main!r}, run_name='main')"
    code = program.format(app=str(app_folder()), main=str(app_folder() / "main.py"))
    # -S: no site-packages, so that mshub is not there whatever Python this is
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], capture_output=True, text=True, check=False, cwd=app_folder()
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "pip install -e ." in done.stderr
