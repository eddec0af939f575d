"""What every list does with a filter, tried on SQLite and on PostgreSQL."""

from __future__ import annotations

import pytest
from modelpress_server.names import time_of_id_us
from modelpress_server.stores.database import Database
from modelpress_server.stores.queries import ListQuery, Term
from modelpress_server.stores.records import now_us
from modelpress_server.stores.sql_overview import SqlOverview
from store_rows import Stores, succeeded


@pytest.fixture
async def stores(database: Database) -> Stores:
    made = Stores(database)
    await made.live()
    return made


async def test_terms_and_clauses(stores: Stores) -> None:
    """Each operator, alternatives within a clause, clauses together, some projects and all."""
    jobs = []
    for project in ("a", "b", "c"):
        job = await stores.job(await stores.model(project=project), skip_cache=True)
        await stores.jobs.set_labels(project, job.id, "", {"n": project, project: "x"})
        jobs.append(job.id)
    claimed = await stores.claimed()
    before_us = now_us()
    await stores.jobs.finish(claimed.lease, succeeded(b"small"))
    ended = claimed.id
    waiting = [job for job in jobs if job != ended]

    async def found(*where: tuple[Term, ...], projects: tuple[str, ...] | None = None) -> list[str]:
        page = await stores.jobs.list_page(ListQuery(projects, 10, None, where))
        return sorted(record.id for record in page.items)

    assert await found() == jobs
    assert await found(projects=("a", "c")) == [jobs[0], jobs[2]]
    assert await found(projects=()) == []
    assert await found((Term("state", "=", 4),)) == [ended]
    assert await found((Term("state", "!=", 4),)) == waiting
    assert await found((Term("label", "=", "a", "n"), Term("label", "=", "b", "n"))) == jobs[:2]
    assert await found((Term("label", "!=", "x", "a"),)) == jobs[1:]
    assert await found((Term("label", ":", "*", "c"),)) == jobs[2:]
    assert await found((Term("label", ":", "*", "n"),), (Term("state", "=", 4),)) == [ended]
    middle_us = time_of_id_us(jobs[1])
    same = [job for job in jobs if time_of_id_us(job) == middle_us]
    assert await found((Term("create_time", "=", middle_us),)) == same
    assert await found((Term("create_time", ">=", middle_us),)) == sorted({*same, jobs[1], jobs[2]})
    assert await found((Term("create_time", "<", middle_us),)) == [job for job in jobs[:1] if job not in same]
    assert await found((Term("end_time", ">=", before_us),)) == [ended]
    assert await found((Term("end_time", "<", before_us),)) == []


async def test_jobs_are_counted_by_project(database: Database, stores: Stores) -> None:
    """Of each project with jobs, by the names of their states."""
    for project in ("a", "a", "b"):
        await stores.job(await stores.model(project=project), skip_cache=True)
    await stores.claimed()
    counted = await SqlOverview(database).jobs_by_project()
    assert {project: sum(states.values()) for project, states in counted.items()} == {"a": 2, "b": 1}
    assert sum(states.get("RUNNING", 0) for states in counted.values()) == 1
