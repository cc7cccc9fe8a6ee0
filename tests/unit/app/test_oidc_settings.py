"""What an operator says of single sign-on: what is read from it, and what is refused before the server starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.conf import Config
from lib.oidc_settings import KEYS, OidcSettings, is_safe
from mshub.errors import ConfigError

NEEDED = {"oidc_issuer": "https://login.clinic/realms/clinic", "oidc_client_id": "mshub"}


def test_without_options_there_is_none(home: Path) -> None:
    assert Config.parse({}, {}).oidc is None
    assert Config.parse(dict.fromkeys(KEYS, ""), {}).oidc is None


def test_options_and_environment_are_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush\n")
    environment = {"MSHUB_OIDC_ISSUER": NEEDED["oidc_issuer"], "MSHUB_OIDC_CLIENT_SECRET_FILE": str(secret)}
    conf = {"oidc_client_id": "mshub", "oidc_role_claim": "roles", "oidc_roles": " admin=it ,viewer=a b,viewer=/c,"}
    settings = Config.parse(conf, environment).oidc
    assert settings is not None
    assert settings.roles == (("admin", "it"), ("viewer", "a b"), ("viewer", "/c"))
    assert (settings.role_claim, settings.name_claim, settings.provider) == (
        "roles",
        "preferred_username",
        "login.clinic",
    )
    assert settings.secret() == "hush"
    assert "hush" not in repr(settings)


def test_a_public_client_has_no_secret() -> None:
    settings = OidcSettings.parse({**NEEDED, "oidc_label": "the clinic"})
    assert settings is not None
    assert (settings.secret(), settings.roles, settings.role_claim) == (None, (), "groups")
    assert settings.provider == "the clinic"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"oidc_client_id": ""}, "Single sign-on lacks oidc_client_id"),
        ({"oidc_issuer": " "}, "Single sign-on lacks oidc_issuer"),
        ({"oidc_issuer": "http://login.clinic"}, "oidc_issuer is .http://login.clinic.; expected https"),
        ({"oidc_issuer": "login.clinic"}, "oidc_issuer is"),
        ({"oidc_public_url": "http://mshub.clinic"}, "oidc_public_url is"),
        ({"oidc_role_claim": "groups"}, "of no use without oidc_roles"),
        ({"oidc_roles": "admins=it"}, "oidc_roles says .admins=it.; expected ROLE=GROUP"),
        ({"oidc_roles": "viewer=all,admin="}, "oidc_roles says .admin=.;"),
        ({"oidc_roles": "admin"}, "oidc_roles says .admin=.;"),
        ({"oidc_name_claim": "name"}, "oidc_name_claim is .name.; expected preferred_username or email"),
        ({"oidc_client_secret_file": "no-such-file"}, "no-such-file cannot be read .FileNotFoundError"),
        ({"oidc_isuer": "x"}, "Did you mean oidc_issuer"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.parse({**NEEDED, **changes}, {})


def test_an_empty_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        OidcSettings.parse({**NEEDED, "oidc_client_secret_file": str(tmp_path / "secret")})


@pytest.mark.parametrize(
    ("address", "safe"),
    [
        ("https://login.clinic/x", True),
        ("http://localhost:8080", True),
        ("http://127.0.0.1/x", True),
        ("http://[::1]:1", True),
        ("http://login.clinic", False),
        ("http://127.0.0.1.evil.example", False),
        ("https://", False),
        ("ftp://localhost", False),
        ("http://[", False),
        ("", False),
        (None, False),
        (1, False),
    ],
)
def test_addresses_are_encrypted_or_this_machine(address: object, safe: bool) -> None:
    assert is_safe(address) is safe
