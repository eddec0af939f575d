"""Brings stored events to their places, again and again until they have arrived or are too old.

Each place has a task of its own, so that one that hangs holds up no other. An event that is under way is lent for a
while: another server, or the next one after a kill, takes it when that is over.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from modelpress_server.clock import Clock
from modelpress_server.events.delivery import Answer, post
from modelpress_server.events.endpoints import MAX_ENDPOINTS, Endpoint, Endpoints
from modelpress_server.observation.meter import Meter
from modelpress_server.stores.jobs import ENDED_STATES
from modelpress_server.stores.outbox import OutboxStore, StoredEvent
from modelpress_server.stores.overview import StateChange
from modelpress_server.stores.records import job_state_name, now_us

logger = logging.getLogger(__name__)

LEASE_S = 60.0
LOOK_S = 30.0  # for places that are new, and events that another server has stored
FIRST_RETRY_S = 5.0
MAX_RETRY_S = 3600.0
MAX_AGE_S = 3 * 24 * 3600.0
BATCH = 10
_ENDS = frozenset(map(job_state_name, ENDED_STATES))


class Dispatcher:
    """`start`, and `close` once. Does nothing where no place is named."""

    def __init__(
        self,
        endpoints: Endpoints,
        store: OutboxStore,
        meter: Meter,
        clock: Clock,
        send: Callable[[Endpoint, str, bytes], Answer] = post,
    ) -> None:
        self._endpoints = endpoints
        self._store = store
        self._meter = meter
        self._clock = clock
        self._send = send
        self._wakes: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads = ThreadPoolExecutor(MAX_ENDPOINTS, thread_name_prefix="webhook")

    def start(self) -> None:
        """Begins to send."""
        self._loop = asyncio.get_running_loop()
        self._looking = asyncio.create_task(self._look())

    def note(self, change: StateChange) -> None:
        """A job or a model is in another state; from any thread."""
        if change.kind == "job" and change.state in _ENDS and self._loop is not None and self._endpoints.all():
            self._loop.call_soon_threadsafe(self._wake)

    async def close(self) -> None:
        """Sends nothing more. What is stored is sent by the next server."""
        tasks = [task for task in (self._looking, *self._tasks.values()) if task is not None]
        self._loop = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _wake(self) -> None:
        self._begin()
        for event in self._wakes.values():
            event.set()

    def _begin(self) -> None:
        """A task for each place that has none."""
        for name in self._endpoints.all().keys() - self._tasks.keys():
            self._wakes[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._serve(name))

    async def _look(self) -> None:
        while True:
            self._begin()
            if self._endpoints.all():
                await self._forget_old()
            await self._clock.sleep(LOOK_S)

    async def _forget_old(self) -> None:
        try:
            lost = await self._store.drop_events(now_us() - int(MAX_AGE_S * 1e6))
        except Exception as error:  # noqa: BLE001  # the store has other news of that
            logger.warning("webhooks: the store does not answer: %s", type(error).__name__)
            return
        if lost:
            logger.error("webhooks: %d event(s) could not be brought within three days, and are given up", lost)

    async def _serve(self, name: str) -> None:
        while True:
            wake = self._wakes[name]
            wake.clear()
            pause_s = LOOK_S
            try:
                pause_s = min(await self._send_due(name), LOOK_S)
            except Exception:  # a full disk or a bug must not end the sending
                logger.exception("webhooks: %s: failed; it goes on in %g s", name, LOOK_S)
            waking = asyncio.ensure_future(wake.wait())
            try:
                await self._clock.wait({waking}, pause_s)
            finally:
                waking.cancel()

    async def _send_due(self, name: str) -> float:
        """Sends what is due; returns when to look again, in seconds."""
        while (endpoint := self._endpoints.all().get(name)) is not None:
            now = now_us()
            events = await self._store.lend_events(name, now, now + int(LEASE_S * 1e6), BATCH)
            for event in events:
                await self._bring(endpoint, event)
            if len(events) < BATCH:
                break
        due_us = await self._store.next_event_us(name)
        return LOOK_S if due_us is None else max((due_us - now_us()) / 1e6, 0.05)

    async def _bring(self, endpoint: Endpoint, event: StoredEvent) -> None:
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._threads, self._send, endpoint, event.id, event.body)
        result = "arrived" if answer.arrived else "gone" if answer.gone else "failed"
        self._meter.webhook_sent(result)
        if answer.arrived or answer.gone:
            if answer.gone:
                logger.warning("webhooks: %s says that it is gone; event %s is dropped", endpoint.name, event.id)
            await self._store.remove_event(endpoint.name, event.id)
            return
        wait_s = max(_backoff_s(event.attempts), answer.retry_after_s)
        logger.warning(
            "webhooks: %s: event %s did not arrive (%s); tried again in %.0f s",
            endpoint.name,
            event.id,
            answer.why,
            wait_s,
        )
        await self._store.postpone_event(endpoint.name, event.id, now_us() + int(wait_s * 1e6))


def _backoff_s(attempts: int) -> float:
    """5 s, 20 s, 80 s ... an hour, and up to a fifth more, lest all come at once."""
    pause_s: float = min(FIRST_RETRY_S * 4 ** min(attempts, 10), MAX_RETRY_S)
    return pause_s * random.uniform(1.0, 1.2)  # noqa: S311  # no secret
