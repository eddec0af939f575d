"""WatchJobs: the jobs of a project, or of all, as they change."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace

from modelpress_protos.v1 import job_service_pb2

from modelpress_server.clock import Clock
from modelpress_server.stores.jobs import ENDED_STATES, JobRecord, JobStore
from modelpress_server.stores.queries import ListQuery, Term
from modelpress_server.stores.records import now_us
from modelpress_server.waiting import ANY_NEWS, Notifier, wait_until

# The store is asked no more often than this, however much happens.
INTERVAL_S = 1.0
PAGE_SIZE = 500
# A job that another server ended, whose clock is not ours, is not missed.
SLACK_US = 60 * 1_000_000
_ENDED = tuple(Term("state", "=", state) for state in sorted(ENDED_STATES))
_AT_WORK = tuple(
    Term("state", "=", state)
    for state in (
        job_service_pb2.JOB_STATE_QUEUED,
        job_service_pb2.JOB_STATE_RUNNING,
        job_service_pb2.JOB_STATE_CANCELLING,
    )
)

Seen = tuple[int, int, int]  # version, last sequence, place in the queue


class JobsWatch:
    """One watch. `query`: which jobs; its page size and its place in the list are of no matter.

    `positions`: gives the places of all jobs in the queue.
    """

    def __init__(
        self,
        jobs: JobStore,
        positions: Callable[[], Awaitable[Mapping[str, int]]],
        notifier: Notifier,
        clock: Clock,
        query: ListQuery,
        heartbeat_s: float,
    ) -> None:
        self._jobs = jobs
        self._positions = positions
        self._notifier = notifier
        self._clock = clock
        self._query = replace(query, page_size=PAGE_SIZE, before_id=None)
        self._heartbeat_s = heartbeat_s
        self._sent: dict[str, Seen] = {}
        self._ends: dict[str, int] = {}  # of those that were sent for the last time: when they ended
        self._since_us = now_us()

    async def changes(
        self, check: Callable[[], None], shown: Callable[[JobRecord, int], job_service_pb2.Job]
    ) -> AsyncIterator[job_service_pb2.WatchJobsResponse]:
        """What to send. `check` is called before each look, and raises where the caller may no longer."""
        ticket = self._notifier.ticket(ANY_NEWS)
        try:
            first = True
            while not self._notifier.closed:
                ticket.clear()
                check()
                async for record, position in self._look(first):
                    yield job_service_pb2.WatchJobsResponse(job=shown(record, position))
                if first:
                    yield job_service_pb2.WatchJobsResponse(caught_up=True)
                    first = False
                await self._clock.sleep(INTERVAL_S)
                if not await wait_until(ticket, self._heartbeat_s):
                    yield job_service_pb2.WatchJobsResponse(heartbeat=job_service_pb2.Heartbeat())
        finally:
            self._notifier.drop(ANY_NEWS, ticket)

    async def _look(self, first: bool) -> AsyncIterator[tuple[JobRecord, int]]:
        began_us = now_us()
        positions = await self._positions()
        # Those at work first: one that ends meanwhile is among the ended then.
        async for record in self._pages((_AT_WORK,)):
            position = positions.get(record.id, 0)
            if self._is_news(record, position):
                yield record, position
        since = Term("end_time", ">=", self._since_us - (0 if first else SLACK_US))
        async for record in self._pages((_ENDED, (since,))):
            if record.id not in self._ends and self._is_news(record, 0):
                self._ends[record.id] = record.message.end_time.ToMicroseconds()
                yield record, 0
        self._since_us = began_us
        self._forget(began_us - 2 * SLACK_US)

    def _is_news(self, record: JobRecord, position: int) -> bool:
        seen = (record.version, record.last_sequence, position)
        if self._sent.get(record.id) == seen:
            return False
        self._sent[record.id] = seen
        return True

    def _forget(self, before_us: int) -> None:
        for job_id in [job_id for job_id, end_us in self._ends.items() if end_us < before_us]:
            del self._ends[job_id]
            self._sent.pop(job_id, None)

    async def _pages(self, where: tuple[tuple[Term, ...], ...]) -> AsyncIterator[JobRecord]:
        query: ListQuery | None = replace(self._query, where=(*self._query.where, *where))
        while query is not None:
            page = await self._jobs.list_page(query)
            for record in page.items:
                yield record
            query = replace(query, before_id=page.items[-1].id) if page.has_more else None
