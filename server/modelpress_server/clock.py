"""Time as the code sees it that waits for clients and workers; tests hand in a clock that they move themselves."""

from __future__ import annotations

import asyncio
import time
from typing import Any

Waited = set[asyncio.Future[Any]]


class Clock:
    """The machine's own."""

    def now_s(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        return time.monotonic()

    def wall_us(self) -> int:
        """Microseconds since the epoch, as the machine believes; may be set forward and back."""
        return time.time_ns() // 1000

    async def sleep(self, duration_s: float) -> None:
        """Returns when the time is over."""
        await asyncio.sleep(duration_s)

    async def wait(self, waited: Waited, timeout_s: float | None) -> Waited:
        """Those that are done, as soon as one is; none when the time is over before. None: no limit."""
        done, _ = await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return done
