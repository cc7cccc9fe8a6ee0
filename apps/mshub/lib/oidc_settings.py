"""What an operator says of single sign-on through OpenID Connect: ``--conf oidc_...`` and ``MSHUB_OIDC_...``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

from mshub.errors import ConfigError
from mshub.serve import is_loopback
from mshub.users import ROLES

PREFIX = "oidc_"
NAME_CLAIMS = ("preferred_username", "email")
_NEEDED = ("issuer", "client_id")


@dataclass(frozen=True)
class OidcSettings:
    """One provider, and who of its people may enter as what.

    Attributes
    ----------
    issuer : str
        The provider, exactly as it names itself.
    client_id : str
        What this server is called there.
    client_secret_file : str
        File that holds what this server proves it with; empty for a public client.
    public_url : str
        This server's own address, as browsers see it; empty where they are on this machine.
    label : str
        What the button says after "Sign in with"; empty: the provider's host.
    name_claim : str
        What people are called by, one of `NAME_CLAIMS`.
    role_claim : str
        Where the provider lists somebody's groups.
    roles : tuple of (str, str)
        Role and group, in pairs; empty: users of MSHub only, with the roles they have there.
    """

    issuer: str
    client_id: str
    client_secret_file: str = ""
    public_url: str = ""
    label: str = ""
    name_claim: str = NAME_CLAIMS[0]
    role_claim: str = "groups"
    roles: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, chosen: Mapping[str, str]) -> OidcSettings | None:
        """Return what the options say; None if none of them is about single sign-on.

        Raises
        ------
        ConfigError
            Something is missing, or cannot be.
        """
        said = {name: chosen.get(PREFIX + name, "").strip() for name in _NAMES}
        said = {name: text for name, text in said.items() if text}
        if not said:
            return None
        if missing := [PREFIX + name for name in _NEEDED if name not in said]:
            raise ConfigError(f"Single sign-on lacks {' and '.join(missing)}: it needs a provider and a name there.")
        if "role_claim" in said and "roles" not in said:
            raise ConfigError("oidc_role_claim is of no use without oidc_roles, which says what its groups may.")
        roles = _roles(said.pop("roles", ""))
        settings = cls(**said, roles=roles)
        settings._check()
        return settings

    @property
    def provider(self) -> str:
        """What the provider is called on the page."""
        return self.label or (urlsplit(self.issuer).hostname or self.issuer)

    def secret(self) -> str | None:
        """Return what `client_secret_file` holds; None without one."""
        if not self.client_secret_file:
            return None
        try:
            secret = Path(self.client_secret_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"oidc_client_secret_file {self.client_secret_file} cannot be read ({type(error).__name__})."
            ) from error
        if not secret:
            raise ConfigError(f"oidc_client_secret_file {self.client_secret_file} is empty; expected the secret.")
        return secret

    def _check(self) -> None:
        for name in ("issuer", "public_url"):
            address = getattr(self, name)
            if address and not is_safe(address):
                raise ConfigError(f"oidc_{name} is {address!r}; expected https://..., or http://localhost.")
        if self.name_claim not in NAME_CLAIMS:
            raise ConfigError(f"oidc_name_claim is {self.name_claim!r}; expected {' or '.join(NAME_CLAIMS)}.")
        self.secret()


_NAMES = tuple(field.name for field in fields(OidcSettings))
KEYS = tuple(PREFIX + name for name in _NAMES)


def is_safe(address: object) -> bool:
    """Return whether nobody on the way can read or change what is asked at an address: HTTPS, or this machine."""
    try:
        parts = urlsplit(address if isinstance(address, str) else "")
        host = parts.hostname or ""
    except ValueError:
        return False
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host)))


def _roles(text: str) -> tuple[tuple[str, str], ...]:
    """Return the pairs in ``admin=GROUP,viewer=GROUP``; a role may have several groups."""
    pairs = [tuple(part.strip() for part in one.partition("=")[::2]) for one in text.split(",") if one.strip()]
    for role, group in pairs:
        if role not in ROLES or not group:
            raise ConfigError(
                f"oidc_roles says {f'{role}={group}'!r}; expected ROLE=GROUP,ROLE=GROUP, each role one of "
                f"{', '.join(ROLES)}."
            )
    return tuple((role, group) for role, group in pairs)
