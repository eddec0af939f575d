"""From an authorization header to a caller."""

from __future__ import annotations

import time
from typing import Any

from modelpress_server import errors
from modelpress_server.clock import Clock
from modelpress_server.config import Settings
from modelpress_server.identity.roles import ALL_PROJECTS, ANYBODY, Caller, Role
from modelpress_server.identity.throttle import Throttle
from modelpress_server.identity.tokens import Tokens

# Wrong tokens of one address: so many at once, then so many a second.
WRONG_BURST = 20.0
WRONG_PER_S = 0.2


class Authenticator:
    """Knows tokens and, where there is a provider, web tokens."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        """Raises SettingsError."""
        self._clock = clock
        # Whether callers may have certificates: reading them takes a twentieth of a small call.
        self.reads_certificates = settings.tls_client_ca is not None
        self._tokens = Tokens(settings)
        self._wrong = Throttle()
        self._jwt: Any = None
        if settings.jwt_issuer is not None:
            from modelpress_server.identity.jwt import JwtVerifier, KeySource

            self._jwt = JwtVerifier(settings, KeySource(settings.jwt_keys, settings.jwt_issuer, clock))

    async def caller(self, authorization: str, peer: str, certificate_name: str = "", *, known: bool = False) -> Caller:
        """Who calls from the address `peer`. Raises UnauthenticatedError, TooManyAttemptsError.

        `known`: it was right when the call began: one that is right no longer is no guess, and is not counted as one.

        Where the server asks for no token, whoever has got so far may do everything: TLS has checked the certificate.
        """
        if self._jwt is None and not self._tokens.any:
            name = f"certificate:{certificate_name}" if certificate_name else ANYBODY.name
            return Caller(name, {ALL_PROJECTS: Role.ADMIN})
        scheme, _, token = authorization.partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        found = await self._find(token, peer, known) if token else None
        if found is None:
            if token and not known:
                self._wrong.take(_host(peer), self._clock.now_s(), WRONG_BURST, WRONG_PER_S)
            raise errors.UnauthenticatedError(
                "This server asks for a token, and none that it knows was sent. Set --token or COMPRESS_TOKEN."
            )
        return found

    async def _find(self, token: str, peer: str, known: bool) -> Caller | None:
        now_s = time.time()
        # What costs a hash alone is always answered: nobody can shut out those who share his address.
        found = self._tokens.find(token, now_s)
        if found is None and self._jwt is not None:
            found = self._jwt.remembered(token, now_s)
            known = known or self._jwt.knows(token)
        if found is not None:
            return found
        wait_s = self._wrong.wait_s(_host(peer), self._clock.now_s(), WRONG_BURST, WRONG_PER_S)
        if wait_s > 0 and not known:
            raise errors.TooManyAttemptsError(
                "Too many wrong tokens came from this address. Wait, then send the right one.", retry_after_s=wait_s
            )
        if self._jwt is None or token.count(".") != 2:
            return None
        verified: Caller | None = await self._jwt.verify(token)
        return verified


def _host(peer: str) -> str:
    """gRPC's `ipv4:127.0.0.1:4711` without the port."""
    return peer.rpartition(":")[0] or peer
