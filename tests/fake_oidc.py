"""An OpenID Connect provider on loopback: it signs people in without asking, and answers wrongly when told to."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT_ID, SECRET = "mshub", "the secret of mshub"
Answer = tuple[int, dict[str, str], bytes]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of those who did not wait for an answer."""


class FakeOidc:
    """The provider; a context manager.

    Parameters
    ----------
    host : str
        What it calls its machine: to a browser, ``localhost`` is another site than ``127.0.0.1``.

    Attributes
    ----------
    issuer : str
    person : dict
        Claims of whoever signs in.
    changes : dict
        What its id tokens say instead of what they should; None: nothing.
    user_info : dict
        What it says of people elsewhere, to whoever has an access token.
    sign : callable
        Makes an id token of its claims.
    keys : list of RSAKey
        Those it publishes; the first signs.
    discovery : dict
        What its discovery document says instead of what it should.
    broken : dict
        Path, as in ``token`` -> what is answered instead.
    is_public : bool
        Its client has no secret.
    slow_s : float
        How long each answer takes.
    asked : list of str
        Last parts of the paths of all requests.
    asks : bool
        Whether authorize shows a page with a button, as one shows it to people.
    codes : list of str
        All it gave out; `tokens`: likewise.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.issuer = f"http://{host}:{self._server.server_port}/realms/clinic"
        self.person: dict[str, Any] = {"sub": "1", "preferred_username": "grace"}
        self.user_info: dict[str, Any] = {}
        self.changes, self.discovery, self.broken = dict[str, Any](), dict[str, Any](), dict[str, Answer]()
        self.sign: Callable[[dict[str, Any]], str] = self.signed
        self.keys = [new_key("one")]
        self.slow_s, self.asks, self.is_public = 0.0, False, False
        self.asked, self.codes, self.tokens = list[str](), list[str](), list[str]()
        self._begun: dict[str, dict[str, str]] = {}

    def __enter__(self) -> FakeOidc:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    # -- its addresses ---------------------------------------------------------------------------------------

    def openid_configuration(self, query: dict[str, str]) -> Answer:
        names = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "jwks"}
        found = {"issuer": self.issuer, **{name: f"{self.issuer}/{path}" for name, path in names.items()}}
        return _json({**found, **self.discovery})

    def jwks(self, query: dict[str, str]) -> Answer:
        """Return its keys, among those that sign nothing here, as Keycloak and Entra ID do."""
        for_secrets = {**_encrypts().as_dict(private=False), "use": "enc", "alg": "RSA-OAEP"}
        unknown = {"kty": "AKP", "kid": "newer", "alg": "ML-DSA-44", "pub": "AAAA"}
        own = [{**key.as_dict(private=False), "issuer": self.issuer, "x5c": ["AAAA"]} for key in self.keys]
        return _json({"keys": [for_secrets, unknown, *own]})

    def authorize(self, query: dict[str, str]) -> Answer:
        """Send the browser back with a code; a request as no client of ours should make it gets a page instead."""
        expected = {"response_type": "code", "client_id": CLIENT_ID, "code_challenge_method": "S256"}
        wrong = [name for name, value in expected.items() if query.get(name) != value]
        wrong += [name for name in ("state", "nonce", "code_challenge", "redirect_uri") if not query.get(name)]
        if wrong or "openid" not in query.get("scope", "").split():
            return _json({"error": "invalid_request", "error_description": ", ".join(wrong)}, 400)
        if self.asks and "chosen" not in query:
            page = "<title>Clinic</title><a id=go href='authorize?{}'>Continue as grace</a>"
            return 200, {"Content-Type": "text/html"}, page.format(urlencode({**query, "chosen": 1})).encode()
        self.codes.append(secrets.token_urlsafe(16))
        self._begun[self.codes[-1]] = query
        location = f"{query['redirect_uri']}?{urlencode({'code': self.codes[-1], 'state': query['state']})}"
        return 302, {"Location": location}, b""

    def token(self, form: dict[str, str]) -> Answer:
        """Give tokens for a code, once, to whoever has the secret and what the challenge was made of."""
        secret = "Basic " + base64.b64encode(f"{CLIENT_ID}:{SECRET}".encode()).decode()
        known = form.get("client_id") == CLIENT_ID if self.is_public else form.get("authorization") == secret
        if not known:
            return _json({"error": "invalid_client"}, 401)
        begun = self._begun.pop(form.get("code", ""), {})
        challenge = _base64(hashlib.sha256(form.get("code_verifier", "").encode()).digest())
        if begun.get("redirect_uri") != form.get("redirect_uri") or begun.get("code_challenge") != challenge:
            return _json(
                {"error": "invalid_grant", "error_description": f"{form.get('code')} is good for nothing"}, 400
            )
        self.tokens += [secrets.token_urlsafe(16), self.sign(self._claims(begun["nonce"]))]
        return _json({"token_type": "Bearer", "access_token": self.tokens[-2], "id_token": self.tokens[-1]})

    def logout(self, query: dict[str, str]) -> Answer:
        """Ask whoever comes here whether they want to go; only tests that name it in `discovery` lead anybody here."""
        if query != {"client_id": CLIENT_ID, "authorization": ""}:
            return _json({"error": "invalid_request"}, 400)
        return 200, {"Content-Type": "text/html"}, b"<title>Clinic</title><button>Yes, log me out</button>"

    def userinfo(self, query: dict[str, str]) -> Answer:
        """Say who somebody is; only tests that name it in `discovery` lead anybody here."""
        if query["authorization"] not in [f"Bearer {token}" for token in self.tokens]:
            return _json({"error": "invalid_token"}, 401)
        return _json(self.user_info)

    # -- id tokens ------------------------------------------------------------------------------------------------

    def signed(self, claims: dict[str, Any], key: RSAKey | None = None, **header: str) -> str:
        """Return an id token as it should be, or by another key or with another header."""
        key = key or self.keys[0]
        return jwt.encode({"alg": "RS256", "kid": str(key.kid), **header}, claims, key, algorithms=["RS256"])

    def signed_by_secret(self, claims: dict[str, Any], secret: bytes) -> str:
        """Return an id token that is signed with HS256."""
        text = _unsigned({"alg": "HS256", "kid": str(self.keys[0].kid)}, claims)
        return f"{text}.{_base64(hmac.digest(secret, text.encode(), 'sha256'))}"

    def not_signed(self, claims: dict[str, Any]) -> str:
        """Return an id token that nobody signed, and that says so."""
        return _unsigned({"alg": "none", "kid": str(self.keys[0].kid)}, claims) + "."

    def _claims(self, nonce: str) -> dict[str, Any]:
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": CLIENT_ID, "iat": now, "exp": now + 300, "nonce": nonce, **self.person}
        return {name: value for name, value in {**claims, **self.changes}.items() if value is not None}

    # -- HTTP -----------------------------------------------------------------------------------------------------

    def _answer(self, path: str, said: dict[str, str]) -> Answer:
        name = path.rpartition("/")[2].replace("-", "_")
        self.asked.append(name)
        time.sleep(self.slow_s)
        known = (self.openid_configuration, self.jwks, self.authorize, self.token, self.logout, self.userinfo)
        answers = {answer.__name__: answer for answer in known}
        return self.broken.get(name) or answers[name](said)

    def _handler(fake) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                said = {**_flat(urlsplit(self.path).query), "authorization": self.headers.get("Authorization", "")}
                self._send(fake._answer(urlsplit(self.path).path, said))

            def do_POST(self) -> None:
                form = _flat(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self._send(fake._answer(self.path, {**form, "authorization": self.headers.get("Authorization", "")}))

            def _send(self, answer: Answer) -> None:
                status, headers, body = answer
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@cache
def _encrypts() -> RSAKey:
    return new_key("secrets")


def new_key(kid: str) -> RSAKey:
    """Return a key of two halves."""
    return RSAKey.generate_key(2048, {"kid": kid, "use": "sig", "alg": "RS256"})


def _flat(query: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(query).items()}


def _json(content: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _unsigned(header: dict[str, str], claims: dict[str, Any]) -> str:
    return ".".join(_base64(json.dumps(part).encode()) for part in (header, claims))


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")
