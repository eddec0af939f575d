"""Waiting in asyncio: for news of a job, for an event, and for work that must not be cut short."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

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


# The key of those who wait for news of any job.
ANY_NEWS = ""


class Notifier:
    """Wakes those who wait for news of a job.

    Take a ticket, read what is stored, then wait on the ticket: news between the reading and the waiting is not lost.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)
        self.closed = False

    def ticket(self, key: str) -> asyncio.Event:
        """An event that is set when there is news of `key`."""
        event = asyncio.Event()
        if self.closed:
            event.set()
        self._waiting[key].add(event)
        return event

    def drop(self, key: str, event: asyncio.Event) -> None:
        """Gives a ticket back."""
        self._waiting[key].discard(event)
        if not self._waiting[key]:
            del self._waiting[key]

    def notify(self, key: str) -> None:
        """There is news of `key`."""
        for event in (*self._waiting.get(key, ()), *self._waiting.get(ANY_NEWS, ())):
            event.set()

    def notify_all(self) -> None:
        """There is news of the queue as a whole."""
        for events in self._waiting.values():
            for event in events:
                event.set()

    def close(self) -> None:
        """Wakes everybody: the server shuts down."""
        self.closed = True
        self.notify_all()


async def wait_until(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether the event was set within the time."""
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
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
