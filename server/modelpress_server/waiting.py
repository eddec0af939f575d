"""Waiting in asyncio: for news of a job, for an event, and for work that must not be cut short."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from modelpress_server.clock import Clock

Result = TypeVar("Result")


async def ended(task: asyncio.Task[Any]) -> None:
    """Returns when the task has ended, however it ended."""
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # marks it as seen


async def uninterrupted(work: Coroutine[Any, Any, Result]) -> Result:
    """Runs `work` to its end even when the caller is cancelled meanwhile; the cancellation is raised after it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await ended(task)
        raise


class SharedLook(Generic[Result]):
    """One look at a time for all who ask: who comes while one is under way shares the next, so that none is stale.

    `version`: another number whenever there is something else to see. While it stays, nobody looks again.
    """

    def __init__(self, look: Callable[[], Awaitable[Result]], version: Callable[[], int | None] = lambda: None) -> None:
        self._look = look
        self._version = version
        self._seen: int | None = None  # the version when the last look began
        self._current: asyncio.Task[Result] | None = None
        self._next: asyncio.Task[Result] | None = None
        self._last: tuple[float, Result] | None = None  # when it began, by the loop's clock, and what it found

    async def __call__(self) -> Result:
        """What a look finds that begins after this call, or would find. Raises what the look raises."""
        if self._last is not None and self._seen is not None and self._seen == self._version():
            return self._last[1]
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._current))
            # Whoever asked may be gone when it fails.
            self._next.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._next)

    async def since(self, time_s: float) -> Result:
        """What the last look found, if it began at this time of the loop's clock or later; else as a call."""
        if self._last is not None and self._last[0] >= time_s:
            return self._last[1]
        return await self()

    async def _after(self, previous: asyncio.Task[Result] | None) -> Result:
        if previous is not None:
            await ended(previous)
        self._current, self._next = self._next, None
        began_s, version = asyncio.get_running_loop().time(), self._version()
        found = await self._look()
        self._last, self._seen = (began_s, found), version
        return found


# The key of those who wait for news of any job.
ANY_NEWS = ""
# How often those who show a place in the queue are told that it is another one: each change concerns all in the queue.
QUEUE_NEWS_S = 1.0
# They are told in turns, so many in each: what all answer at once would hold up every other call.
TOLD_IN_A_TURN, TURN_S = 10, 0.1


class Ticket(asyncio.Event):
    """Set when there is news. `own`: of the job itself, not of the queue alone."""

    own = True

    def take(self) -> bool:
        """Clears it; whether there was news of the job itself."""
        own, self.own = self.own, False
        self.clear()
        return own


class Notifier:
    """Wakes those who wait for news of a job.

    Take a ticket, read what is stored, then wait on the ticket: news between the reading and the waiting is not lost.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, set[Ticket]] = defaultdict(set)
        # When the queue was as its watchers are told now, by the loop's clock.
        self.queue_told_s = -math.inf
        self._queue_changed = False
        self._untold: list[Ticket] = []
        self._next_turn: asyncio.TimerHandle | None = None
        self.closed = False

    def ticket(self, key: str) -> Ticket:
        """An event that is set when there is news of `key`."""
        event = Ticket()
        if self.closed:
            event.set()
        self._waiting[key].add(event)
        return event

    def drop(self, key: str, event: Ticket) -> None:
        """Gives a ticket back."""
        self._waiting[key].discard(event)
        if not self._waiting[key]:
            del self._waiting[key]

    def notify(self, key: str) -> None:
        """There is news of `key`."""
        for event in (*self._waiting.get(key, ()), *self._waiting.get(ANY_NEWS, ())):
            event.own = True
            event.set()

    def notify_queue(self) -> None:
        """Jobs have other places in the queue: told soon, together with what else happens to it until then."""
        self._queue_changed = True
        if self._next_turn is None and not self.closed:
            self._plan_round()

    def notify_all(self) -> None:
        """There may be news of every job."""
        for events in self._waiting.values():
            for event in events:
                event.own = True
                event.set()

    def _plan_round(self) -> None:
        loop = asyncio.get_running_loop()
        self._next_turn = loop.call_at(max(self.queue_told_s + QUEUE_NEWS_S, loop.time()), self._begin_round)

    def _begin_round(self) -> None:
        self._queue_changed, self.queue_told_s = False, asyncio.get_running_loop().time()
        self._untold = [event for events in self._waiting.values() for event in events]
        self._take_turn()

    def _take_turn(self) -> None:
        for event in self._untold[:TOLD_IN_A_TURN]:
            event.set()
        del self._untold[:TOLD_IN_A_TURN]
        self._next_turn = None
        if self._untold:
            self._next_turn = asyncio.get_running_loop().call_later(TURN_S, self._take_turn)
        elif self._queue_changed:
            self._plan_round()

    def close(self) -> None:
        """Wakes everybody: the server shuts down."""
        self.closed = True
        if self._next_turn is not None:
            self._next_turn.cancel()
        self.notify_all()


async def wait_until(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether the event was set within the time."""
    try:
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the event.
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


@dataclass(frozen=True)
class Wait:
    """How often something was put off, until when (s), and how many times the usual room it needs."""

    times: int = 0
    until_s: float = 0.0
    growth: int = 1


class Waits:
    """Jobs and models that were put off, each for longer than the time before."""

    FIRST_S = 2.0
    MAX_S = 60.0

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waits: dict[str, Wait] = {}

    def put_off(self, name: str, *, grow: bool = False) -> None:
        """Not now. `grow`: what it was given was too little."""
        before = self._waits.get(name, Wait())
        pause_s = min(self.FIRST_S * 2**before.times, self.MAX_S)
        growth = before.growth * 2 if grow else before.growth
        self._waits[name] = Wait(before.times + 1, self._clock.now_s() + pause_s, growth)

    def ended(self, name: str) -> None:
        """It has ended and left room: the others may try at once."""
        self.forget(name)
        self._waits = {other: replace(wait, until_s=0.0) for other, wait in self._waits.items()}

    def forget(self, name: str) -> None:
        """It waits no longer."""
        self._waits.pop(name, None)

    def knows(self, name: str) -> bool:
        """Whether it was put off before."""
        return name in self._waits

    def growth(self, name: str) -> int:
        """How many times the usual room it needs."""
        return self._waits.get(name, Wait()).growth

    def names(self) -> tuple[str, ...]:
        """What has to wait still."""
        now_s = self._clock.now_s()
        return tuple(name for name, wait in self._waits.items() if wait.until_s > now_s)

    def next_s(self) -> float:
        """When the next of them may try again, in seconds from now; infinity: none waits."""
        now_s = self._clock.now_s()
        return min((wait.until_s - now_s for wait in self._waits.values() if wait.until_s > now_s), default=math.inf)
