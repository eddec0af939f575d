"""Counts over all projects, in SQL."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from modelpress_protos.v1 import job_service_pb2, model_service_pb2
from sqlalchemy import Connection, Table, func, select

from modelpress_server.names import time_of_id_us
from modelpress_server.stores.database import Database
from modelpress_server.stores.overview import Queue, StoreFigures
from modelpress_server.stores.records import job_state_name, model_state_name, now_us
from modelpress_server.stores.tables import jobs, models, project_blobs


class SqlOverview:
    """StoreOverview on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def ping(self) -> None:
        await self._database.read(lambda connection: connection.execute(select(1)).scalar_one())

    async def figures(self) -> StoreFigures:
        return await self._database.read(_figures)

    async def jobs_by_project(self) -> Mapping[str, Mapping[str, int]]:
        def work(connection: Connection) -> Mapping[str, Mapping[str, int]]:
            counted = select(jobs.c.project, jobs.c.state, func.count()).group_by(jobs.c.project, jobs.c.state)
            found: dict[str, dict[str, int]] = defaultdict(dict)
            for project, state, count in connection.execute(counted):
                found[project][job_state_name(state)] = int(count)
            return found

        return await self._database.read(work)


def _figures(connection: Connection) -> StoreFigures:
    job_counts, model_counts = _by_state(connection, jobs), _by_state(connection, models)
    files = select(project_blobs.c.sha256, project_blobs.c.size_bytes).distinct().subquery()
    return StoreFigures(
        jobs={job_state_name(state): job_counts.get(state, 0) for state in _states(job_service_pb2.JobState)},
        models={
            model_state_name(state): model_counts.get(state, 0) for state in _states(model_service_pb2.Model.State)
        },
        queues=_queues(connection),
        stored_bytes=int(connection.execute(select(func.coalesce(func.sum(files.c.size_bytes), 0))).scalar_one()),
    )


def _states(kind: Any) -> list[int]:
    return [number for number in kind.values() if number]


def _by_state(connection: Connection, table: Table) -> dict[int, int]:
    rows = connection.execute(select(table.c.state, func.count()).group_by(table.c.state))
    return {int(state): int(count) for state, count in rows}


def _queues(connection: Connection) -> dict[str, Queue]:
    """An id says when it was made, so that the smallest is the oldest."""
    queued = jobs.c.state == job_service_pb2.JOB_STATE_QUEUED
    statement = select(jobs.c.project, func.count(), func.min(jobs.c.id)).where(queued).group_by(jobs.c.project)
    now = now_us()
    return {
        project: Queue(int(count), max(now - time_of_id_us(oldest), 0) / 1e6)
        for project, count, oldest in connection.execute(statement)
    }
