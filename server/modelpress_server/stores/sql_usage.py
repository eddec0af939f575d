"""What projects have used, and what of theirs has had its time, in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modelpress_protos.v1 import model_service_pb2, upload_service_pb2
from sqlalchemy import ColumnElement, Connection, Table, delete, exists, func, select, update

from modelpress_server.names import first_id_at
from modelpress_server.stores import records
from modelpress_server.stores.database import Database, hold, insert_missing
from modelpress_server.stores.jobs import ENDED_STATES
from modelpress_server.stores.tables import jobs, labels, models, uploads, usage
from modelpress_server.stores.usage import UsageRecord

# So labelled, a job or a model stays; unless the label says "false".
PIN = "pin"
BATCH = 500


class SqlUsage:
    """UsageStore and Retention on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, project: str, *, runs: int, cpu_s: float, run_s: float) -> None:
        def work(connection: Connection) -> None:
            insert_missing(connection, usage, {"project": project, "jobs": 0, "cpu_s": 0.0, "run_s": 0.0})
            connection.execute(
                update(usage)
                .where(usage.c.project == project)
                .values(jobs=usage.c.jobs + runs, cpu_s=usage.c.cpu_s + cpu_s, run_s=usage.c.run_s + run_s)
            )

        await self._database.write(work)

    async def of(self, project: str) -> UsageRecord:
        def work(connection: Connection) -> UsageRecord:
            used = connection.execute(select(usage).where(usage.c.project == project)).first()
            blobs, stored_bytes = records.stored(connection, project)
            by_state = select(jobs.c.state, func.count()).where(jobs.c.project == project).group_by(jobs.c.state)
            active = uploads.c.state == upload_service_pb2.Upload.STATE_ACTIVE
            return UsageRecord(
                stored_bytes=stored_bytes,
                blobs=blobs,
                models=_count(connection, models, models.c.project == project),
                uploads=_count(connection, uploads, (uploads.c.project == project) & active),
                jobs={int(state): int(count) for state, count in connection.execute(by_state)},
                runs=int(used.jobs) if used is not None else 0,
                cpu_s=float(used.cpu_s) if used is not None else 0.0,
                run_s=float(used.run_s) if used is not None else 0.0,
            )

        return await self._database.read(work)

    async def projects(self) -> list[str]:
        def work(connection: Connection) -> list[str]:
            return sorted({*connection.execute(select(jobs.c.project).distinct()).scalars(),
                           *connection.execute(select(models.c.project).distinct()).scalars()})  # fmt: skip

        return await self._database.read(work)

    async def expire_jobs(self, project: str, ended_before_us: int) -> int:
        def work(connection: Connection) -> int:
            hold(connection, project)
            old = select(jobs.c.id).where(
                jobs.c.project == project,
                jobs.c.state.in_(ENDED_STATES),
                jobs.c.end_time_us < ended_before_us,
                ~_pinned(jobs),
            )
            ids = connection.execute(old.order_by(jobs.c.id).limit(BATCH)).scalars().all()
            return _delete(connection, jobs, ids)

        return await self._database.write(work, must=True)

    async def expire_models(self, project: str, unused_since_us: int) -> int:
        def work(connection: Connection) -> int:
            hold(connection, project)
            boundary = first_id_at(unused_since_us)
            in_use = (jobs.c.model_id == models.c.id) & (
                (jobs.c.id >= boundary) | jobs.c.state.not_in(ENDED_STATES) | (jobs.c.end_time_us >= unused_since_us)
            )
            old = select(models.c.id, models.c.message).where(
                models.c.project == project,
                models.c.id < boundary,
                models.c.state != model_service_pb2.Model.STATE_PROCESSING,
                ~exists().where(in_use),
                ~_pinned(models),
            )
            ids = [
                row.id
                for row in connection.execute(old.order_by(models.c.id).limit(BATCH))
                if model_service_pb2.Model.FromString(row.message).update_time.ToMicroseconds() < unused_since_us
            ]
            return _delete(connection, models, ids)

        return await self._database.write(work, must=True)


def _pinned(table: Table) -> ColumnElement[bool]:
    return exists().where(labels.c.owner == table.c.id, labels.c.key == PIN, labels.c.value != "false")


def _delete(connection: Connection, table: Table, ids: Sequence[str]) -> int:
    connection.execute(delete(table).where(table.c.id.in_(ids)))
    for owner in ids:
        records.forget_owner(connection, owner)
    return len(ids)


def _count(connection: Connection, table: Table, condition: Any) -> int:
    return int(connection.execute(select(func.count()).select_from(table).where(condition)).scalar_one())
