"""Measuring one at a time: while a worker measures latency, no other worker of the server runs.

    take       waits until nobody measures and no worker is being started, then stops all workers that have a task
    release    lets them go on
    starting   a worker is being started: imports take seconds of a processor, so nobody measures meanwhile, and nobody
               is started while somebody measures or waits to

A turn is what a worker asks for, and workers are not trusted: it ends by itself after MAX_TURN_S, and a task that has
measured for MAX_TASK_S measures beside others from then on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Protocol

from modelpress_server.clock import Clock
from modelpress_server.executors.base import TurnFigures

logger = logging.getLogger(__name__)

MAX_TURN_S = 120.0
MAX_TASK_S = 600.0


class Pausable(Protocol):
    """A worker with a task, as far as turns are concerned."""

    @property
    def pid(self) -> int: ...
    def pause(self) -> None:
        """Stops it where it is."""
        ...

    def resume(self) -> None:
        """Lets it go on."""
        ...


class MeasuringTurns:
    """`running`: the workers that have a task now. `cores`: those that measuring is pinned to; none: wherever."""

    def __init__(self, running: Callable[[], Iterable[Pausable]], clock: Clock, cores: tuple[int, ...] = ()) -> None:
        self.cores = cores
        self._running = running
        self._clock = clock
        self._changed = asyncio.Event()
        self._holder: Pausable | None = None
        self._queue: list[Pausable] = []
        self._paused: list[Pausable] = []
        self._starts = 0
        self._since_s = 0.0
        self._end: asyncio.Task[None] | None = None
        self._used_s: dict[int, float] = {}
        self._so_far = TurnFigures()

    @property
    def taken(self) -> bool:
        """Whether somebody measures, or waits to."""
        return self._holder is not None or bool(self._queue)

    def figures(self) -> TurnFigures:
        """What turns were given so far; the one that goes on counts when it ends."""
        return replace(self._so_far, waiting=len(self._queue))

    async def take(self, worker: Pausable) -> None:
        """Returns when the worker may measure. Cancelling gives the place in the queue up."""
        if self._holder is worker or self._used_s.get(worker.pid, 0.0) >= MAX_TASK_S:
            return
        self._queue.append(worker)
        asked_s = self._clock.now_s()
        try:
            await self._until(lambda: self._holder is None and not self._starts and self._queue[0] is worker)
        finally:
            self._queue.remove(worker)
            self._notify()
        self._holder, self._since_s = worker, self._clock.now_s()
        waited_s = self._so_far.waited_s + self._since_s - asked_s
        self._so_far = replace(self._so_far, given=self._so_far.given + 1, waited_s=waited_s)
        self._end = asyncio.create_task(self._end_overdue(worker))
        # Those in the queue wait already, and do nothing.
        self._paused = [other for other in self._running() if other is not worker and other not in self._queue]
        for other in self._paused:
            other.pause()

    def release(self, worker: Pausable) -> None:
        """The worker has measured, or has ended; without a turn nothing happens."""
        if self._holder is not worker or self._end is None:
            return
        self._end.cancel()
        held_s = self._clock.now_s() - self._since_s
        self._used_s[worker.pid] = self._used_s.get(worker.pid, 0.0) + held_s
        self._so_far = replace(self._so_far, held_s=self._so_far.held_s + held_s)
        for other in self._paused:
            other.resume()
        self._paused, self._holder, self._end = [], None, None
        self._notify()

    def forget(self, worker: Pausable) -> None:
        """The worker has ended; its process number may come again."""
        self.release(worker)
        if worker in self._paused:
            self._paused.remove(worker)
        self._used_s.pop(worker.pid, None)

    async def quiet(self) -> None:
        """Returns when nobody measures: a task that begins would disturb it."""
        await self._until(lambda: self._holder is None)

    @asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """While a worker is being started."""
        await self._until(lambda: self._holder is None and not self._queue)
        self._starts += 1
        try:
            yield
        finally:
            self._starts -= 1
            self._notify()

    async def _end_overdue(self, worker: Pausable) -> None:
        await self._clock.sleep(MAX_TURN_S)
        logger.warning("worker %d has measured for %g s; the others go on", worker.pid, MAX_TURN_S)
        self.release(worker)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self._changed.wait()
