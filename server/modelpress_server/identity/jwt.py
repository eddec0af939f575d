"""JSON web tokens of an OpenID provider: RFC 7519, keys as of RFC 7517.

Signature, issuer, audience and time are checked by PyJWT; only signatures with key pairs are taken, so that nobody who
can read the keys can sign. The keys come from a file, an URL, or where the provider's discovery document says, and are
looked up again when a token names a new one.

    "modelpress": {"team-a": "submitter"}           the claim that holds the grants (--jwt-claim), as a table
    "modelpress": ["team-a:submitter", "team-b"]    or as a list, as of --grant
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

import jwt

from modelpress_server.clock import Clock
from modelpress_server.config import LOOPBACK_HOSTS, Settings, SettingsError
from modelpress_server.identity.roles import Caller, Role, parse_grant
from modelpress_server.identity.tokens import digest
from modelpress_server.watched_file import WatchedFile

logger = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
LEEWAY_S = 30.0
KEYS_FRESH_S = 300.0
# A token may name any key: for an unknown one the provider is asked no more often than this.
REFETCH_S = 30.0
FETCH_TIMEOUT_S = 5.0
DISCOVERY_PATH = "/.well-known/openid-configuration"
MAX_KEYS_BYTES = 1024 * 1024
MAX_TOKEN_CHARS = 16 * 1024
CACHED = 1000

Keys = Mapping[str | None, jwt.PyJWK]


class KeySource:
    """The provider's keys by id: of a file, of an URL, or where the provider's own document says that they are.

    `location`: file or URL; None: as of OpenID Connect Discovery 1.0, section 4.
    """

    def __init__(self, location: str | None, issuer: str, clock: Clock) -> None:
        """Raises SettingsError for a file that cannot be read and for an URL without TLS."""
        self._clock = clock
        self._issuer = issuer
        self._url = location if location is not None and "://" in location else ""
        self._file: WatchedFile[Keys] | None = None
        if location is None:
            require_tls("jwt_issuer", issuer)
        elif self._url:
            require_tls("jwt_keys", self._url)
        else:
            self._file = WatchedFile(Path(location), lambda path: _parse(path.read_bytes()), "jwt_keys")
        self._fetched: Keys = {}
        self._fetched_at_s = float("-inf")
        self._tried_at_s = float("-inf")
        self._fetching = asyncio.Lock()

    async def key(self, key_id: str | None) -> jwt.PyJWK | None:
        """The key with an id; None: there is none."""
        if self._file is not None:
            return self._file.get().get(key_id)
        async with self._fetching:
            now_s = self._clock.now_s()
            wanted = key_id not in self._fetched or now_s - self._fetched_at_s > KEYS_FRESH_S
            if wanted and now_s - self._tried_at_s > REFETCH_S:
                self._tried_at_s = now_s
                await self._fetch()
        return self._fetched.get(key_id)

    async def _fetch(self) -> None:
        try:
            self._fetched = _parse(await asyncio.to_thread(self._download_keys))
            self._fetched_at_s = self._clock.now_s()
        except (OSError, SettingsError) as error:
            where = self._url or self._issuer
            logger.error("jwt_keys: %s cannot be read; the keys that are known hold: %s", where, error)

    def _download_keys(self) -> bytes:
        # Asked for each time: the provider may move its keys.
        return _download(self._url or _keys_url(self._issuer))


class JwtVerifier:
    """Turns a web token into a caller."""

    def __init__(self, settings: Settings, keys: KeySource) -> None:
        self._issuer = settings.jwt_issuer
        named = (settings.jwt_audience, settings.console_client_id)
        self._audiences = [name for name in named if name is not None]
        self._claim = settings.jwt_claim
        self._keys = keys
        self._seen: OrderedDict[bytes, tuple[Caller, float]] = OrderedDict()

    def remembered(self, token: str, now_s: float) -> Caller | None:
        """Whom a token names that was verified not long ago and has not expired."""
        caller, until_s = self._seen.get(digest(token), (None, 0.0))
        return caller if now_s < until_s else None

    def knows(self, token: str) -> bool:
        """Whether a token was right once: it is no guess."""
        return digest(token) in self._seen

    async def verify(self, token: str) -> Caller | None:
        """Whom it names; None: it is not of this provider, for this server, and valid now."""
        if len(token) > MAX_TOKEN_CHARS:
            return None
        try:
            key = await self._keys.key(jwt.get_unverified_header(token).get("kid"))
            if key is None:
                return None
            claims = jwt.decode(
                token,
                key,
                algorithms=list(ALGORITHMS),
                issuer=self._issuer,
                audience=self._audiences,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
            caller = Caller(f"jwt:{claims['sub']}", _grants(claims.get(self._claim)))
        except (jwt.InvalidTokenError, ValueError, TypeError, NotImplementedError) as error:
            logger.debug("a web token was refused: %s", error)
            return None
        # Not for longer than keys are: a key that the provider takes back takes its tokens along.
        self._remember(digest(token), caller, min(float(claims["exp"]), time.time() + KEYS_FRESH_S))
        return caller

    def _remember(self, key: bytes, caller: Caller, until_s: float) -> None:
        self._seen[key] = caller, until_s
        while len(self._seen) > CACHED:
            self._seen.popitem(last=False)


def _grants(claim: Any) -> Mapping[str, Role]:
    """Raises ValueError for a claim that says something else; none: no project."""
    if claim is None:
        return {}
    texts = [f"{project}:{role}" for project, role in claim.items()] if isinstance(claim, dict) else claim
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("the claim with the grants is neither a table nor a list of texts")
    return dict(map(parse_grant, texts))


def require_tls(setting: str, url: str) -> None:
    """Raises SettingsError where somebody between could exchange what is fetched."""
    parsed = urlparse(url)
    if parsed.scheme != "https" and (parsed.scheme != "http" or parsed.hostname not in LOOPBACK_HOSTS):
        raise SettingsError(f"{setting}: {url}: keys are fetched over https only.")


def discover(issuer: str) -> Mapping[str, Any]:
    """How a provider describes itself. Raises SettingsError, OSError."""
    url = issuer.rstrip("/") + DISCOVERY_PATH
    try:
        document = json.loads(_download(url))
        named = document["issuer"]
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"jwt_issuer: {url} is no description of an OpenID provider: {error!r}.") from error
    if named != issuer:
        raise SettingsError(f"jwt_issuer: {url} describes {named!r}, not {issuer!r}; spell it as the provider does.")
    return cast(Mapping[str, Any], document)


def _keys_url(issuer: str) -> str:
    """Where a provider says that its keys are. Raises SettingsError, OSError."""
    try:
        keys = str(discover(issuer)["jwks_uri"])
    except KeyError as error:
        raise SettingsError(f"jwt_issuer: {issuer} does not say where its keys are.") from error
    require_tls("jwt_issuer", keys)
    return keys


def _parse(document: bytes) -> Keys:
    try:
        found = jwt.PyJWKSet.from_json(document.decode())
    except (ValueError, TypeError, KeyError, AttributeError, jwt.PyJWTError, json.JSONDecodeError) as error:
        raise SettingsError(f"jwt_keys: it is no set of keys (RFC 7517): {error}") from error
    # A shared secret would let everybody sign who can read the keys.
    return {key.key_id: key for key in found.keys if key.key_type != "oct"}


def _download(url: str) -> bytes:
    # The scheme was checked when the server started; a redirect to another one is refused by urllib for files.
    with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_S) as response:  # noqa: S310
        return bytes(response.read(MAX_KEYS_BYTES))
