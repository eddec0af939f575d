"""What every OutboxStore does, tried on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest
from modelpress_server.stores.database import Database
from modelpress_server.stores.records import now_us
from modelpress_server.stores.sql_outbox import SqlOutbox
from store_rows import Stores, succeeded

LATER_US = 2**62


def wanting(project: str, state: str) -> Sequence[str]:
    return ("one", "two") if (project, state) == ("p", "SUCCEEDED") else ()


@pytest.fixture
async def stores(database: Database) -> Stores:
    database.subscribers = wanting
    made = Stores(database)
    await made.live()
    return made


async def ended_job(stores: Stores, *, cancelled: bool = False) -> str:
    model = await stores.model()
    created = await stores.job(model, skip_cache=True)
    if cancelled:
        await stores.jobs.request_cancel("p", created.id)
        return created.id
    job = await stores.claimed()
    await stores.jobs.finish(job.lease, succeeded(b"small"))
    return job.id


async def test_an_end_is_stored_for_each_place_that_wants_it(database: Database, stores: Stores) -> None:
    """One event, the same for all; nothing for an end that nobody asked for."""
    outbox = SqlOutbox(database)
    job_id = await ended_job(stores)
    await ended_job(stores, cancelled=True)
    events = [await outbox.lend_events(name, now_us(), LATER_US, 10) for name in ("one", "two", "three")]
    assert [len(found) for found in events] == [1, 1, 0]
    assert events[0] == events[1]
    assert json.loads(events[0][0].body)["subject"] == f"projects/p/jobs/{job_id}"


async def test_what_is_lent_is_lent_once(database: Database, stores: Stores) -> None:
    """By those who ask at the same time; it comes back when its time is over, and is gone once it was removed."""
    outbox = SqlOutbox(database)
    for _ in range(6):
        await ended_job(stores)
    now = now_us()
    lent = await asyncio.gather(*(outbox.lend_events("one", now, LATER_US, 2) for _ in range(5)))
    ids = [event.id for events in lent for event in events]
    assert len(ids) == len(set(ids)) == 6
    assert await outbox.next_event_us("one") == LATER_US
    await outbox.postpone_event("one", ids[0], now)
    (again,) = await outbox.lend_events("one", now, LATER_US, 2)
    assert (again.id, again.attempts) == (ids[0], 1)
    for event_id in ids:
        await outbox.remove_event("one", event_id)
    assert await outbox.next_event_us("one") is None
    assert await outbox.drop_events(now - 10**9) == 0
    assert await outbox.drop_events(LATER_US) == 6  # those of the other place
