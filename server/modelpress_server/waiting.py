"""Waiting in asyncio: for news of a job, for an event, and for work that must not be cut short."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def uninterrupted(work: Coroutine[Any, Any, Result]) -> Result:
    """Runs `work` to its end even when the caller is cancelled meanwhile; the cancellation is raised after it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # marks it as seen
        raise


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
        for event in self._waiting.get(key, ()):
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
