"""Workers kept warm: their imports are done before a task comes.

Taking one has the next started, but a little later: its imports would fight the task for the processor just when the
task begins. A task that finds none ready is waited for at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from modelpress_server.clock import Clock
from modelpress_server.executors.child import Worker

logger = logging.getLogger(__name__)

REFILL_DELAY_S = 1.0
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0


class SparePool:
    """Keeps `size` workers ready; `start` makes one."""

    def __init__(self, size: int, start: Callable[[], Coroutine[Any, Any, Worker]], clock: Clock) -> None:
        self._size = size
        self._clock = clock
        self._start = start
        self._ready: list[Worker] = []
        self._starting: set[asyncio.Task[Worker]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._delay_s = 0.0

    def open(self) -> None:
        """Begins to fill."""
        if self._size > 0:
            self._keeper = asyncio.create_task(self._keep())

    @property
    def ready(self) -> int:
        """How many wait for a task."""
        return sum(worker.alive for worker in self._ready)

    async def take(self) -> Worker:
        """A ready worker: a spare, or the one that is being started, or one of its own. Raises StartError, OSError."""
        while self._ready:
            worker = self._ready.pop(0)
            self._refill_after(REFILL_DELAY_S)
            if worker.alive:
                return worker
            await worker.end()
        return await self._claim(next(iter(self._starting)) if self._starting else self._launch())

    async def warm(self) -> None:
        """Has one ready, also in a pool of size 0. Raises StartError, OSError."""
        if not self.ready:
            self._ready.append(await self.take())

    async def close(self) -> None:
        """Ends all of them."""
        if self._keeper is not None:
            self._keeper.cancel()
        for task in self._starting:
            task.cancel()
        started = await asyncio.gather(*self._starting, return_exceptions=True)
        workers = [*self._ready, *(item for item in started if isinstance(item, Worker))]
        await asyncio.gather(*(worker.end() for worker in workers))
        self._ready.clear()
        self._starting.clear()

    def _launch(self) -> asyncio.Task[Worker]:
        task = asyncio.create_task(self._start())
        self._starting.add(task)
        return task

    async def _claim(self, task: asyncio.Task[Worker]) -> Worker:
        """Takes a worker that is being started out of the pool's hands; cancelling the claim ends it."""
        self._starting.discard(task)
        self._refill_after(REFILL_DELAY_S)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            results = await asyncio.gather(task, return_exceptions=True)
            if isinstance(results[0], Worker):
                await results[0].end()
            raise

    def _refill_after(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._wake.set()

    async def _keep(self) -> None:
        backoff_s = 0.0
        while True:
            await self._clock.sleep(max(self._delay_s, backoff_s))
            self._delay_s = 0.0
            self._wake.clear()
            dead = [worker for worker in self._ready if not worker.alive]
            self._ready = [worker for worker in self._ready if worker.alive]
            for worker in dead:
                logger.warning("spare worker %d ended by itself", worker.pid)
                await worker.end()
            if dead:
                backoff_s = _longer(backoff_s)
                continue
            if len(self._ready) + len(self._starting) >= self._size:
                await self._wait_for_need()
                continue
            started = await self._start_spare()
            backoff_s = 0.0 if started else _longer(backoff_s)

    async def _start_spare(self) -> bool:
        """Whether it went well; a task may claim the worker while it starts, and then has to see to it."""
        task = self._launch()
        await asyncio.wait([task])
        if task not in self._starting:
            return True
        self._starting.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.error("%s", error)
            return False
        self._ready.append(task.result())
        return True

    async def _wait_for_need(self) -> None:
        """Until one is taken or ends."""
        ends = [asyncio.ensure_future(worker.wait()) for worker in self._ready]
        wake = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait([wake, *ends], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (wake, *ends):
                task.cancel()


def _longer(backoff_s: float) -> float:
    return min(max(backoff_s * 2, FIRST_BACKOFF_S), MAX_BACKOFF_S)
