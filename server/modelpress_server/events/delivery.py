"""One attempt to bring an event to its place, over HTTP.

No redirect is followed: the operator named this place, and it does not name others. Of the answer nothing but its
status and Retry-After is read.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from modelpress_server.events.endpoints import Endpoint
from modelpress_server.events.message import CONTENT_TYPE, signature

TIMEOUT_S = 5.0
MAX_RETRY_AFTER_S = 3600.0


@dataclass(frozen=True)
class Answer:
    """What came of an attempt. `status`: 0 where nobody answered; `why`: for the log, without the address."""

    status: int
    why: str = ""
    retry_after_s: float = 0.0

    @property
    def arrived(self) -> bool:
        """Whether it was taken."""
        return 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        """Whether the place is there no more (410), and no attempt will do."""
        return self.status == http.client.GONE


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def post(endpoint: Endpoint, event_id: str, body: bytes) -> Answer:
    """Sends an event; raises nothing."""
    now_s = int(time.time())
    headers = {
        "Content-Type": CONTENT_TYPE,
        "User-Agent": "modelpress",
        "webhook-id": event_id,
        "webhook-timestamp": str(now_s),
        "webhook-signature": signature(endpoint.secret, event_id, now_s, body),
    }
    # The scheme was checked when the file was read.
    request = urllib.request.Request(endpoint.url, body, headers, method="POST")  # noqa: S310
    try:
        with _opener.open(request, timeout=TIMEOUT_S) as answer:
            return Answer(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, f"HTTP {error.code}", _retry_after_s(error.headers.get("Retry-After", "")))
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)
        return Answer(0, type(cause if isinstance(cause, Exception) else error).__name__)


def _retry_after_s(text: str) -> float:
    return min(float(text), MAX_RETRY_AFTER_S) if text.isascii() and text.isdecimal() else 0.0
