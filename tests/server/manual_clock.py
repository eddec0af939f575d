"""A clock that stands still until a test moves it: limits run out when the test says so, and never before."""

from __future__ import annotations

import asyncio

from modelpress_server.clock import Clock, Waited


class ManualClock(Clock):
    """Starts at 0 s. `sleeping`: when each of those who sleep on wakes, in seconds.

    `set_forward_s`: by how much the machine's idea of the time of day was set forward.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        self._began_us = super().wall_us()
        self.set_forward_s = 0.0
        self._sleepers: dict[asyncio.Future[None], float] = {}

    @property
    def sleeping(self) -> list[float]:
        return sorted(wakes_s for sleeper, wakes_s in self._sleepers.items() if not sleeper.done())

    def now_s(self) -> float:
        return self._now_s

    def wall_us(self) -> int:
        return self._began_us + round((self._now_s + self.set_forward_s) * 1e6)

    def advance(self, duration_s: float) -> None:
        """Moves the time on and wakes those whose time has come."""
        self._now_s += duration_s
        for sleeper, wakes_s in self._sleepers.items():
            if wakes_s <= self._now_s and not sleeper.done():
                sleeper.set_result(None)

    async def sleep(self, duration_s: float) -> None:
        if duration_s <= 0:
            await asyncio.sleep(0)
            return
        sleeper = asyncio.get_running_loop().create_future()
        self._sleepers[sleeper] = self._now_s + duration_s
        try:
            await sleeper
        finally:
            del self._sleepers[sleeper]

    async def wait(self, waited: Waited, timeout_s: float | None) -> Waited:
        if timeout_s is None:
            return await super().wait(waited, None)
        timer = asyncio.ensure_future(self.sleep(timeout_s))
        try:
            return await super().wait({*waited, timer}, None) - {timer}
        finally:
            timer.cancel()
