"""Who is signed in to the console.

A cookie holds a random number, and the server remembers which token that stands for: so the browser keeps no token, and
whoever gets hold of the cookie (it goes to every port of a host) may look, and no more. The token is checked again with
each request. Sessions end with the server.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass, replace

from modelpress_server.clock import Clock
from modelpress_server.identity.tokens import digest

MAX_SESSIONS = 1000
IDLE_S = 8 * 3600.0
LIFE_S = 24 * 3600.0
# Where a browser comes back to from an OpenID provider, and how long it may take.
CALLBACK = "/console/signed-in"
PENDING_S = 600.0


@dataclass(frozen=True)
class _Session:
    token: str
    began_s: float
    used_s: float


class Sessions:
    """Random keys that stand for tokens. The hash of a key is kept, as of tokens."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()

    def begin(self, token: str) -> str:
        """A key for a token that was found right; the session that was idle longest gives way where there are many."""
        key, now_s = secrets.token_urlsafe(32), self._clock.now_s()
        self._sessions[digest(key)] = _Session(token, now_s, now_s)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return key

    def token(self, key: str) -> str:
        """The token that a key stands for; empty: none, or none any more."""
        name, now_s = digest(key), self._clock.now_s()
        session = self._sessions.get(name)
        if session is None:
            return ""
        if now_s - session.used_s > IDLE_S or now_s - session.began_s > LIFE_S:
            del self._sessions[name]
            return ""
        self._sessions[name] = replace(session, used_s=now_s)
        self._sessions.move_to_end(name)
        return session.token

    def end(self, key: str) -> None:
        """The key stands for nothing any more."""
        self._sessions.pop(digest(key), None)
