"""A server that others can reach, over HTTPS, as its users meet it."""

from __future__ import annotations

import ipaddress
import json
import stat
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from factories import make_image, make_model_folder
from lib.server.access import COOKIE
from live import LiveServer, Site
from mshub.install import add_model
from mshub.store import ModelStore
from mshub.users import user_file

PASSWORD = "a password for tests"


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Write a certificate for this machine and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = folder / "cert.pem", folder / "key.pem"
    cert_path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key_path.write_bytes(key.private_bytes(*plain))
    return cert_path, key_path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("https")
    studies, home = folder / "studies", folder / "home"
    make_image(studies / "case.nii.gz", (21, 25, 18), seed=1)
    add_model(ModelStore(home), "tiny", make_model_folder(folder / "models" / "tiny"))
    user_file(home).add("ada", PASSWORD, "admin")
    cert, key = self_signed(folder)
    tls = ["--tls-cert", str(cert), "--tls-key", str(key)]
    server = LiveServer(
        home,
        ["--studies", str(studies), "--host", "0.0.0.0", "--log-format", "json", *tls],
        folder,
        probe="/health/live",
        certificate=cert,
    )
    yield Site(server, studies, home)
    server.stop()


def test_a_browser_logs_in_and_its_cookie_never_travels_unencrypted(site: Site) -> None:
    with httpx.Client(base_url=site.server.url, verify=site.server.trust) as browser:
        form = {"username": "ada", "password": PASSWORD, "next": "/mshub/status"}
        answer = browser.post("/login", data=form, headers={"Origin": site.server.url})
        assert (answer.status_code, answer.headers["location"]) == (303, "/mshub/status")
        assert "; secure" in answer.headers["set-cookie"].lower()
        assert browser.get("/mshub/status").status_code == 200
        run = browser.post("/infer/tiny?image=case", headers={"Origin": site.server.url}, timeout=120)
        assert run.status_code == 200
        plain = browser.post("/infer/tiny?image=case", headers={"Origin": f"http://127.0.0.1:{site.server.port}x"})
        assert plain.status_code == 403
        assert COOKIE in browser.cookies


def test_without_encryption_there_is_no_answer(site: Site) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{site.server.port}/health/live", timeout=10)


def test_what_the_server_writes_is_not_for_everybody_on_the_machine(site: Site) -> None:
    files = [site.home / name for name in ("logs/server.log", "logs/audit.jsonl", "logins.json", "users.json")]
    files += [*(site.home / "cases").iterdir(), site.studies / "datastore_v2.json"]
    assert not [path.name for path in files if stat.S_IMODE(path.stat().st_mode) & 0o007]


def test_the_log_is_for_programs_where_that_is_wanted(site: Site) -> None:
    lines = [json.loads(line) for line in (site.home / "logs" / "server.log").read_text().splitlines()]
    assert {"lib.app", "uvicorn.error"} <= {line["logger"] for line in lines}
