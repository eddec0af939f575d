"""Signing in at an OpenID provider: the authorization code flow (OpenID Connect Core 1.0, section 3.1) with PKCE
(RFC 7636).

What a browser brings back counts only in the browser that was sent out: a cookie there holds a key, and what was asked
under it is kept here, once and for ten minutes. The ID token becomes the token of the session, and is checked again at
each look as every web token is: when it expires, so has the session.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import secrets
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import jwt

from modelpress_server.clock import Clock
from modelpress_server.config import Settings, SettingsError
from modelpress_server.console.sessions import CALLBACK, PENDING_S
from modelpress_server.errors import UnauthenticatedError
from modelpress_server.identity.jwt import FETCH_TIMEOUT_S, MAX_KEYS_BYTES, MAX_TOKEN_CHARS, discover, require_tls
from modelpress_server.identity.tokens import digest

logger = logging.getLogger(__name__)

MAX_PENDING = 1000


@dataclass(frozen=True)
class _Asked:
    """What a browser was sent out with; `target`: the page to come back to."""

    state: str
    nonce: str
    verifier: str
    target: str
    began_s: float


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The code and the secret are for the token endpoint alone."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Provider:
    """The provider of `--jwt-issuer`, as a client with `--console-client-id`."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        """Raises SettingsError for a secret that cannot be read."""
        self._issuer = settings.jwt_issuer or ""
        self._client_id = settings.console_client_id or ""
        self._redirect_uri = (settings.console_url or "").rstrip("/") + CALLBACK
        self._clock = clock
        self._asked: OrderedDict[bytes, _Asked] = OrderedDict()
        self._secret = ""
        require_tls("jwt_issuer", self._issuer)
        if settings.console_client_secret is not None:
            try:
                self._secret = settings.console_client_secret.read_text("utf-8").strip()
            except (OSError, UnicodeError) as error:
                raise SettingsError(f"console_client_secret: it cannot be read: {error}.") from error

    async def begin(self, target: str) -> tuple[str, str]:
        """Where to send a browser that wants to see `target`, and the key for its cookie.

        Raises UnauthenticatedError.
        """
        where = (await self._endpoints())["authorization_endpoint"]
        key, state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(4))
        self._asked[digest(key)] = _Asked(state, nonce, verifier, target, self._clock.now_s())
        while len(self._asked) > MAX_PENDING:
            self._asked.popitem(last=False)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        query = urlencode({
            "response_type": "code",
            "client_id": self._client_id,
            "redirect_uri": self._redirect_uri,
            "scope": "openid",
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        })  # fmt: skip
        return f"{where}{'&' if '?' in where else '?'}{query}", key

    async def finish(self, key: str, answer: Mapping[str, str]) -> tuple[str, str]:
        """The ID token and the page to go to, for the query that a browser with this key came back with.

        The token's signature, issuer, audience and time are still to be checked. Raises UnauthenticatedError.
        """
        asked = self._asked.pop(digest(key), None)  # once, however it ends
        if asked is None or self._clock.now_s() - asked.began_s > PENDING_S:
            raise UnauthenticatedError("This sign-in was not begun in this browser, or too long ago. Begin again.")
        if not hmac.compare_digest(answer.get("state", "").encode(), asked.state.encode()):
            raise UnauthenticatedError("The provider's answer is not to this sign-in. Begin again.")
        if answer.get("iss", self._issuer) != self._issuer:  # RFC 9207
            raise UnauthenticatedError("The answer is that of another provider.")
        if not answer.get("code"):
            raise UnauthenticatedError(f"The provider did not sign you in: {answer.get('error', 'no code')[:100]}.")
        token = await self._exchange(answer["code"], asked.verifier)
        self._check_is_ours(token, asked.nonce)
        return token, asked.target

    async def _endpoints(self) -> Mapping[str, str]:
        try:
            document = await asyncio.to_thread(discover, self._issuer)
            found = {name: str(document[name]) for name in ("authorization_endpoint", "token_endpoint")}
            for where in found.values():
                require_tls("jwt_issuer", where)
        except (OSError, KeyError, SettingsError) as error:
            raise _unreachable(error) from error
        return found

    async def _exchange(self, code: str, verifier: str) -> str:
        where = (await self._endpoints())["token_endpoint"]
        fields = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._redirect_uri,
            "client_id": self._client_id,
            "code_verifier": verifier,
        }
        try:
            answer = json.loads(await asyncio.to_thread(self._post, where, fields))
            token = answer["id_token"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise _unreachable(error) from error
        if not isinstance(token, str) or len(token) > MAX_TOKEN_CHARS:
            raise UnauthenticatedError("The provider sent no ID token that can be used here.")
        return token

    def _post(self, where: str, fields: Mapping[str, str]) -> bytes:
        request = urllib.request.Request(where, urlencode(fields).encode())  # noqa: S310  # the scheme was checked
        request.add_header("Accept", "application/json")
        if self._secret:  # RFC 6749, section 2.3.1
            pair = f"{quote(self._client_id, safe='')}:{quote(self._secret, safe='')}"
            request.add_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=FETCH_TIMEOUT_S) as response:
            return bytes(response.read(MAX_KEYS_BYTES))

    def _check_is_ours(self, token: str, nonce: str) -> None:
        """Raises UnauthenticatedError where it was not made for this client and this sign-in (Core, 3.1.3.7)."""
        try:
            claims = jwt.decode(token, options={"verify_signature": False})
        except jwt.InvalidTokenError as error:
            raise UnauthenticatedError("The provider sent no ID token that can be used here.") from error
        audience, party = claims.get("aud"), claims.get("azp", self._client_id)
        audiences = audience if isinstance(audience, list) else [audience]
        sent = claims.get("nonce")
        fits = isinstance(sent, str) and hmac.compare_digest(sent.encode(), nonce.encode())
        if self._client_id not in audiences or party != self._client_id or not fits:
            raise UnauthenticatedError("The provider's ID token is not for this sign-in. Begin again.")


def _unreachable(error: Exception) -> UnauthenticatedError:
    """What was sent is in no message: the log says which kind of fault it was."""
    code = error.code if isinstance(error, urllib.error.HTTPError) else ""
    logger.warning("the OpenID provider did not answer as it should: %s %s", type(error).__name__, code)
    return UnauthenticatedError("The OpenID provider did not answer as it should. Try again, or use a token.")
