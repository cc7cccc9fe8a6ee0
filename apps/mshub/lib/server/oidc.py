"""Single sign-on: the authorization code flow of OpenID Connect, with PKCE, as Authlib does it.

Authlib asks the provider and checks what it sends; what is decided here is which provider, which signatures, whose
browser, and who may enter as what. No code or token gets into a log or an error, nor a claim but the name.
"""

from __future__ import annotations

import logging
import secrets
import ssl
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, NamedTuple

import anyio
import httpx
from authlib.integrations.starlette_client import OAuthError, StarletteOAuth2App
from fastapi import HTTPException
from joserfc.errors import ClaimError, JoseError
from starlette.requests import Request

from lib.oidc_settings import OidcSettings, is_safe
from lib.server.access import LOCAL_NAMES, host_name, network_of
from mshub.errors import ConfigError, legible
from mshub.users import ROLES, User, UserFile

logger = logging.getLogger(__name__)

BEGIN = "/login/oidc"
CALLBACK = f"{BEGIN}/callback"
PENDING_S = 600
"""So long somebody may take at the provider."""
MOST_PENDING = 10_000
MOST_PENDING_OF_ONE = 200
"""Of one address, which a whole clinic can share: a stranger who begins on and on pushes out nobody elsewhere."""
TIMEOUT_S = 10.0
"""For all that is asked of the provider in one step."""
FRESH_S = 3600.0
"""Addresses and keys of the provider are read again after so long."""
AGAIN_S = 5.0
"""So long a provider that was of no use is not asked where its addresses are: each time somebody may wait for it."""
LEEWAY_S = 60
"""Clocks may differ by so much."""
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures that are taken. Never ``none``, nor those by a secret that both sides know, whatever the provider says."""
ENDPOINTS = ("authorization_endpoint", "token_endpoint", "jwks_uri")
LOG_OUT = "end_session_endpoint"
"""Not every provider has one (OpenID Connect RP-Initiated Logout 1.0)."""
USER_INFO = "userinfo_endpoint"
"""Where a provider says who somebody is whose id token says no more than that it is the same one (Core 1.0, 5.4)."""
GUEST_PREFIX = "oidc:"
"""Before the names of people who are no users here; no user's name can begin with it."""
LONGEST_NAME = 64


class Begun(NamedTuple):
    """A sign-on that was begun: what the provider has to answer with, and where to go afterwards."""

    state: str
    nonce: str
    code_verifier: str
    redirect_uri: str
    next: str
    deadline: float
    address: str


class Provider(StarletteOAuth2App):  # type: ignore[misc]
    """Authlib's client of one provider, held to what the operator said.

    Parameters
    ----------
    settings : OidcSettings
    """

    def __init__(self, settings: OidcSettings) -> None:
        options = {
            "scope": "openid profile email",
            "code_challenge_method": "S256",
            "timeout": TIMEOUT_S,
            "verify": ssl.create_default_context(),  # by default each client reads all certificates of the machine
        }
        super().__init__(None, client_id=settings.client_id, client_secret=settings.secret(), client_kwargs=options)
        self._issuer = settings.issuer
        self._stale_at, self._again_at = 0.0, 0.0
        self._turn = anyio.Lock()

    async def load_server_metadata(self) -> dict[str, Any]:
        """Return the provider's addresses from its discovery document; Authlib asks for them before each step."""
        async with self._turn:
            if time.monotonic() >= self._stale_at:
                await self._discover()
        return dict(self.server_metadata)

    async def _discover(self) -> None:
        """Read the discovery document, unless that failed just now."""
        if time.monotonic() < self._again_at:
            raise ConfigError("it was asked just now")
        try:
            async with self._get_session() as session:
                address = f"{self._issuer.rstrip('/')}/.well-known/openid-configuration"
                answer = await session.request("GET", address, withhold_token=True)
            answer.raise_for_status()
            self.server_metadata = self._checked(answer.json())
        except BaseException:  # that it took too long, too
            self._again_at = time.monotonic() + AGAIN_S
            raise
        self._stale_at = time.monotonic() + FRESH_S

    def _checked(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return what is used of a discovery document: Authlib would take options of the connection from it, too."""
        if found["issuer"] != self._issuer:
            raise ConfigError(f"the provider calls itself {found['issuer']!r}; oidc_issuer has to be the same")
        unsafe = [name for name in ENDPOINTS if not is_safe(found[name])]
        if unsafe:
            raise ConfigError(f"the provider's {', '.join(unsafe)} begins with no https://")
        kept = {name: found[name] for name in ("issuer", *ENDPOINTS)}
        kept |= {name: found[name] for name in (LOG_OUT, USER_INFO) if is_safe(found.get(name))}
        return {**kept, "id_token_signing_alg_values_supported": list(ALGORITHMS)}


class SignOn:
    """Single sign-on as the login page uses it.

    Parameters
    ----------
    settings : OidcSettings

    Each method raises an `HTTPException` whose sentence is for the person at the browser. Used in the event loop only:
    a provider that does not answer keeps no thread.
    """

    def __init__(self, settings: OidcSettings) -> None:
        self.settings = settings
        self._provider = Provider(settings)
        self._begun: OrderedDict[str, Begun] = OrderedDict()

    async def begin(self, request: Request, next: str) -> tuple[str, str]:
        """Return where to send a browser, and the cookie by which it is known when it comes back."""
        redirect_uri = self._redirect_uri(request)
        with self._asking():
            told = await self._provider.create_authorization_url(redirect_uri)
        cookie, deadline = secrets.token_urlsafe(32), time.monotonic() + PENDING_S
        kept = told["state"], told["nonce"], told["code_verifier"]
        self._keep(cookie, Begun(*kept, redirect_uri, next, deadline, network_of(request)))
        return told["url"], cookie

    async def finish(self, cookie: str, state: str, code: str) -> tuple[dict[str, Any], str]:
        """Return what the provider says of the person, and where to go; each beginning is good for one ending."""
        begun = self._begun.pop(cookie, None)
        if begun is None or begun.deadline < time.monotonic() or not _is_same(begun.state, state):
            raise HTTPException(401, "This sign-in was not begun in this browser, or too long ago. Please try again.")
        if not code:
            raise HTTPException(401, f"{self.settings.provider} did not let you in.")
        with self._asking():
            token = await self._provider.fetch_access_token(
                begun.redirect_uri, code=code, code_verifier=begun.code_verifier
            )
            claims = await self._checked_claims(token, begun.nonce)
            return await self._with_user_info(claims, token), begun.next

    async def end(self) -> str:
        """Return where somebody logs out of the provider, which asks them first; empty if it has no such address."""
        with self._asking():
            address = (await self._provider.load_server_metadata()).get(LOG_OUT, "")
        return str(httpx.URL(address).copy_merge_params({"client_id": self.settings.client_id})) if address else ""

    def user_of(self, claims: dict[str, Any], users: UserFile) -> tuple[User, bool]:
        """Return who somebody is here, and whether as a guest, whose role comes from the provider."""
        name = self._name(claims)
        if not self.settings.roles:
            user = users.user(name)
            if user is None:
                raise self._not_here("are no user", "mshub users add NAME, with the name you have there")
            return user, False
        groups = claims.get(self.settings.role_claim)
        if not isinstance(groups, list):  # of a text, each part would be a group
            groups = []
        roles = [role for role, group in self.settings.roles if group in groups]
        if not roles:
            raise self._not_here("have no role", "a group that oidc_roles names")
        return User(GUEST_PREFIX + name, max(roles, key=ROLES.index), datetime.now(timezone.utc)), True

    def _keep(self, cookie: str, begun: Begun) -> None:
        """Keep what was begun; where that is too much, the oldest gives way, of the same address first."""
        same = [other for other, one in self._begun.items() if one.address == begun.address]
        if len(same) >= MOST_PENDING_OF_ONE:
            del self._begun[same[0]]
        self._begun[cookie] = begun
        if len(self._begun) > MOST_PENDING:
            self._begun.popitem(last=False)

    async def _checked_claims(self, token: dict[str, Any], nonce: str) -> dict[str, Any]:
        """Return what the id token says, once its signature, issuer, audience, times and nonce were checked."""
        expected = {
            name: {"essential": True, "value": value}
            for name, value in (("iss", self.settings.issuer), ("aud", self.settings.client_id))
        }
        claims = await self._provider.parse_id_token(token, nonce, claims_options=expected, leeway=LEEWAY_S)
        if claims is None:
            raise OAuthError("no id token")
        return dict(claims)

    async def _with_user_info(self, claims: dict[str, Any], token: dict[str, Any]) -> dict[str, Any]:
        """Return claims, with what the provider says elsewhere of the person if name or groups are not among them."""
        wanted = [self.settings.name_claim, *([self.settings.role_claim] if self.settings.roles else [])]
        has_more = USER_INFO in await self._provider.load_server_metadata()
        if not has_more or all(name in claims for name in wanted):
            return claims
        told = dict(await self._provider.userinfo(token=token))
        if told.get("sub") != claims["sub"]:
            raise OAuthError("user info of another person")
        return {**told, **claims} if self.settings.name_claim in claims else {**claims, **told}

    def _name(self, claims: dict[str, Any]) -> str:
        """Return what somebody is called; an address of e-mail only if the provider has seen that it is theirs."""
        claim = self.settings.name_claim
        name = claims.get(claim)
        is_theirs = claim != "email" or claims.get("email_verified") is True
        if not is_theirs or not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            wanted = f"{claim} that is verified" if claim == "email" else claim
            raise HTTPException(
                403, f"{self.settings.provider} does not say who you are. Ask its admin for the claim {wanted}."
            )
        return name

    def _not_here(self, what: str, remedy: str) -> HTTPException:
        return HTTPException(
            403, f"{self.settings.provider} knows you, but you {what} here. Ask the admin of this server for {remedy}."
        )

    def _redirect_uri(self, request: Request) -> str:
        """Return where the provider sends browsers: where the operator says, or else this machine."""
        host = request.headers.get("host", "")
        if not self.settings.public_url and host_name(host) not in LOCAL_NAMES:
            raise HTTPException(
                503, "Single sign-on is not set up for this address: the admin has to set oidc_public_url."
            )
        return (self.settings.public_url.rstrip("/") or f"{request.url.scheme}://{host}") + CALLBACK

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn whatever an answer of the provider leads to into a sentence; the log is told only what kind it was."""
        try:
            with anyio.fail_after(TIMEOUT_S):
                yield
        except (JoseError, OAuthError) as error:
            logger.warning("single sign-on: refused an answer of the provider (%s)", _kind(error))
            reason = (
                f"The answer of {self.settings.provider} was refused. The server's log says what kind of fault it has."
            )
            raise HTTPException(401, reason) from None
        except Exception as error:
            logger.warning("single sign-on: the provider is of no use (%s)", _kind(error))
            reason = f"{self.settings.provider} cannot be reached or is not set up. Use a password, or try again later."
            raise HTTPException(503, reason) from None


def _is_same(expected: str, found: str) -> bool:
    return secrets.compare_digest(expected.encode(), found.encode("utf-8", "surrogatepass"))


def _kind(error: Exception) -> str:
    """Return what may be told of an error: messages of others can hold what the provider sent."""
    if isinstance(error, ConfigError):
        return str(error)
    told = error.error if isinstance(error, JoseError | OAuthError) else type(error).__name__
    claim = f" {error.claim}" if isinstance(error, ClaimError) else ""
    return legible(f"{told}{claim}"[:80])
