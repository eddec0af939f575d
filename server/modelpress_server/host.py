"""Whether this host can run tasks: when it cannot start workers, it backs off and says so.

Nothing is claimed from the queue meanwhile, so that a broken host costs no job an attempt and no model its acceptance.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from modelpress_server.clock import Clock
from modelpress_server.executors.base import WorkerHost, WorkerUnavailableError

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0

OnChange = Callable[[bool], Awaitable[None]]


class Host:
    """`on_change` is told whenever the host begins or ceases to be able to run tasks."""

    def __init__(self, executor: WorkerHost, clock: Clock, on_change: OnChange) -> None:
        self._executor = executor
        self._clock = clock
        self._on_change = on_change
        self._backoff_s = 0.0
        self._try_at_s = 0.0

    @property
    def able(self) -> bool:
        """Whether workers can be started, as far as is known."""
        return self._backoff_s == 0.0

    async def failed(self) -> None:
        """A worker could not be started."""
        if self.able:
            logger.error("no worker can be started here; jobs and models wait until one can")
            await self._on_change(False)
        self._backoff_s = min(max(self._backoff_s * 2, FIRST_BACKOFF_S), MAX_BACKOFF_S)
        self._try_at_s = self._clock.now_s() + self._backoff_s

    async def recover(self) -> float:
        """Tries to start a worker, if it is time for that; how long to wait before the next try, 0.0: able again."""
        if self._clock.now_s() < self._try_at_s:
            return self._try_at_s - self._clock.now_s()
        try:
            await self._executor.try_start()
        except WorkerUnavailableError:
            await self.failed()
            return self._backoff_s
        self._backoff_s = 0.0
        logger.info("workers can be started again")
        await self._on_change(True)
        return 0.0
