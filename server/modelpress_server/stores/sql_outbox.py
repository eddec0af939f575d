"""Events that are to be brought somewhere, in SQL: stored with what they tell of, forgotten when they have arrived."""

from __future__ import annotations

from sqlalchemy import Connection, delete, func, insert, select, update

from modelpress_server.events.message import cloud_event
from modelpress_server.names import new_id
from modelpress_server.stores.database import Database, subscribers
from modelpress_server.stores.jobs import JobRecord
from modelpress_server.stores.outbox import StoredEvent
from modelpress_server.stores.records import job_state_name, now_us
from modelpress_server.stores.tables import outbox


class SqlOutbox:
    """OutboxStore on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def lend_events(self, endpoint: str, due_us: int, until_us: int, limit: int) -> list[StoredEvent]:
        def work(connection: Connection) -> list[StoredEvent]:
            due = (
                select(outbox)
                .where(outbox.c.endpoint == endpoint, outbox.c.due_us <= due_us)
                .order_by(outbox.c.due_us)
                .limit(limit)
                .with_for_update(skip_locked=True)
            )
            rows = connection.execute(due).all()
            if rows:
                lent = (outbox.c.endpoint == endpoint) & outbox.c.id.in_([row.id for row in rows])
                connection.execute(update(outbox).where(lent).values(due_us=until_us))
            return [StoredEvent(row.id, row.attempts, row.body) for row in rows]

        return await self._database.write(work)

    async def next_event_us(self, endpoint: str) -> int | None:
        statement = select(func.min(outbox.c.due_us)).where(outbox.c.endpoint == endpoint)
        return await self._database.read(lambda connection: connection.execute(statement).scalar())

    async def postpone_event(self, endpoint: str, event_id: str, due_us: int) -> None:
        event = (outbox.c.endpoint == endpoint) & (outbox.c.id == event_id)
        change = update(outbox).where(event).values(due_us=due_us, attempts=outbox.c.attempts + 1)
        await self._database.write(lambda connection: connection.execute(change))

    async def remove_event(self, endpoint: str, event_id: str) -> None:
        event = (outbox.c.endpoint == endpoint) & (outbox.c.id == event_id)
        await self._database.write(lambda connection: connection.execute(delete(outbox).where(event)), must=True)

    async def drop_events(self, before_us: int) -> int:
        def work(connection: Connection) -> int:
            return connection.execute(delete(outbox).where(outbox.c.create_time_us < before_us)).rowcount

        return await self._database.write(work, must=True)


def store_end(connection: Connection, record: JobRecord) -> None:
    """In the transaction that ends a job: an event for each place that is told of it."""
    names = subscribers(connection, record.project, job_state_name(record.message.state))
    if not names:
        return
    event_id, now = new_id(), now_us()
    body = cloud_event(record.message, event_id)
    common = {"id": event_id, "create_time_us": now, "due_us": now, "attempts": 0, "body": body}
    connection.execute(insert(outbox), [{"endpoint": name, **common} for name in names])
