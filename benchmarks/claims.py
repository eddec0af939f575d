"""What a claim costs when many workers claim at the same time and the table of jobs is long.

    python benchmarks/claims.py --jobs 1000000 --workers 1 8 64

Starts a PostgreSQL server of its own, fills the table, and has simulated workers claim and end jobs through the same
code as a server. Besides the time, which says little on a busy machine, it counts the pages that PostgreSQL touched for
each job and the CPU time of all processes: these show whether a claim's cost grows with the table. Last it shows how
PostgreSQL finds the rows for each statement of one claim (EXPLAIN): by which index, and how many pages it touched.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from modelpress_protos.v1 import job_service_pb2, model_service_pb2
from modelpress_server.fairness import FairShare
from modelpress_server.names import first_id_at, new_id
from modelpress_server.recipes import DEFAULT_PRESET, preset
from modelpress_server.stores.database import WRITERS, Database
from modelpress_server.stores.jobs import Outcome
from modelpress_server.stores.records import now_us
from modelpress_server.stores.sql_jobs import SqlJobStore
from modelpress_server.stores.sql_servers import SqlServerStore
from sqlalchemy import Connection, Engine, event, text

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "server"))
from postgres_server import postgres_server
from shared_stores import new_database

LEASE_S = 3600.0
FAILED = job_service_pb2.JOB_STATE_FAILED


@dataclass(frozen=True)
class Cost:
    """Of one run. `pages`: of tables and indexes, for each job claimed and ended; `cpu_ms`: likewise."""

    workers: int
    claims: int
    p50_ms: float
    p99_ms: float
    jobs_per_s: float
    pages: float
    cpu_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=1_000_000, help="rows in the table")
    parser.add_argument("--queued", type=int, default=100_000, help="of them queued, the others have ended")
    parser.add_argument("--projects", type=int, default=20)
    parser.add_argument("--claims", type=int, default=2_000, help="jobs that are claimed and ended in each run")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64])
    given = parser.parse_args()
    with postgres_server() as server:
        asyncio.run(measure(new_database(server), given))


async def measure(url: str, given: argparse.Namespace) -> None:
    database = Database.connect(url)
    await database.write(lambda connection: fill(connection, given.jobs, given.queued, given.projects))
    await database.close()
    print(f"{given.jobs:,} jobs, {given.queued:,} of them queued in {given.projects} projects")
    print("workers  claims  p50 ms  p99 ms  jobs/s  pages/job  CPU ms/job")
    for workers in given.workers:
        cost = await run(url, workers, given.claims)
        print(
            f"{cost.workers:7} {cost.claims:7} {cost.p50_ms:7.1f} {cost.p99_ms:7.1f} {cost.jobs_per_s:7.0f}"
            f" {cost.pages:10.1f} {cost.cpu_ms:11.2f}"
        )
    print("pages  statement of one claim and its end, and what its rows are found by")
    for access, touched, statement in await plans(url):
        print(f"{touched:5}  {statement}\n       {access}")


def fill(connection: Connection, count: int, queued: int, projects: int) -> None:
    """Rows as the server writes them; all jobs are alike but for project, state and id."""
    job = job_service_pb2.Job(name=f"projects/p0/jobs/{new_id()}", spec=job_service_pb2.JobSpec(max_attempts=3))
    job.spec.recipe.CopyFrom(preset(DEFAULT_PRESET))
    values = {"count": count, "ended": count - queued, "projects": projects, "prefix": first_id_at(now_us())[:16]}
    for state, first, last in (
        (job_service_pb2.JOB_STATE_SUCCEEDED, 1, count - queued),
        (job_service_pb2.JOB_STATE_QUEUED, count - queued + 1, count),
    ):
        job.state = state
        connection.execute(
            text(
                "INSERT INTO jobs (id, project, model_id, state, version, cache_key, priority, last_sequence,"
                " compacted_sequence, last_log_sequence, message, manifest, fence)"
                " SELECT :prefix || lpad(n::text, 10, '0'), 'p' || n % :projects, :prefix, :state, 1,"
                " decode(md5(n::text), 'hex'), n % 3, 0, 0, 0, :message, :manifest, 0"
                " FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n"
            ),
            {
                "prefix": values["prefix"], "projects": projects, "state": int(state), "first": first, "last": last,
                "message": job.SerializeToString(), "manifest": model_service_pb2.Model().SerializeToString(),
            },
        )  # fmt: skip
    connection.execute(text("ANALYZE jobs"))


async def run(url: str, workers: int, claims: int) -> Cost:
    """Workers over as many servers as they would have, each with connections and turns of its own."""
    servers = [Database.connect(url) for _ in range(-(-workers // WRITERS))]
    ids = [new_id() for _ in servers]
    for database, server_id in zip(servers, ids, strict=True):
        await SqlServerStore(database).renew(server_id, LEASE_S)
    shares = [FairShare(lambda _: 1.0, lambda _: 0) for _ in servers]
    times_s: list[float] = []
    left = iter(range(claims))

    async def work(number: int) -> None:
        which = number % len(servers)
        store, share = SqlJobStore(servers[which]), shares[which]
        for _ in left:
            began_s = time.perf_counter()
            job = (await store.claim(now_us(), share.rank, ids[which])).job
            times_s.append(time.perf_counter() - began_s)
            if job is None:
                raise AssertionError("the queue is empty")
            share.started(job.project)
            await store.finish(job.lease, Outcome(FAILED))
            share.ended(job.project, 1.0)

    pages_before, cpu_before_s, began_s = await pages(servers[0]), cpu_s(), time.perf_counter()
    await asyncio.gather(*(work(number) for number in range(workers)))
    wall_s, used_s = time.perf_counter() - began_s, cpu_s() - cpu_before_s
    touched = await pages(servers[0]) - pages_before
    for database in servers:
        await database.close()
    times_s.sort()
    return Cost(
        workers, len(times_s), times_s[len(times_s) // 2] * 1e3, times_s[int(len(times_s) * 0.99)] * 1e3,
        len(times_s) / wall_s, touched / len(times_s), used_s / len(times_s) * 1e3,
    )  # fmt: skip


async def plans(url: str) -> list[tuple[str, int, str]]:
    """How PostgreSQL finds the rows, the pages that it touched, and the statement, of all of one claim and its end."""
    database, server_id = Database.connect(url), new_id()
    await SqlServerStore(database).renew(server_id, LEASE_S)
    store, said = SqlJobStore(database), list[tuple[str, Any]]()

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> None:
        said.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        job = (await store.claim(now_us(), FairShare(lambda _: 1.0, lambda _: 0).rank, server_id)).job
        if job is None:
            raise AssertionError("the queue is empty")
        await store.finish(job.lease, Outcome(FAILED))
    finally:
        event.remove(Engine, "before_cursor_execute", note)

    def explain(connection: Connection) -> list[tuple[str, int, str]]:
        return [(*plan(connection, *each), " ".join(each[0].split())[:80]) for each in said if "jobs" in each[0]]

    try:
        return await database.write(explain)
    finally:
        await database.close()


def plan(connection: Connection, statement: str, parameters: Any) -> tuple[str, int]:
    """The indexes and tables that a statement of the driver is answered from, and the pages that it touches."""
    explained = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"
    root = connection.exec_driver_sql(explained, parameters).scalar_one()[0]["Plan"]
    nodes = list(_nodes(root))
    access = {node.get("Index Name") or f"all of {node['Relation Name']}" for node in nodes if _reads(node)}
    return ", ".join(sorted(access)), root["Shared Hit Blocks"] + root["Shared Read Blocks"]


def _reads(node: dict[str, Any]) -> bool:
    return "Index Name" in node or node["Node Type"] == "Seq Scan"


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)


async def pages(database: Database) -> int:
    """Pages of tables and indexes that were touched so far, in memory or not."""
    await asyncio.sleep(1.5)  # sessions tell what they did once a second
    statement = text("SELECT blks_hit + blks_read FROM pg_stat_database WHERE datname = current_database()")
    return await database.write(lambda connection: int(connection.execute(statement).scalar_one()))


def cpu_s() -> float:
    """Of this process and of PostgreSQL's, which are its children."""
    return sum(_times(process) for process in processes())


def processes() -> Iterator[psutil.Process]:
    own = psutil.Process(os.getpid())
    yield own
    yield from own.children(recursive=True)


def _times(process: psutil.Process) -> float:
    try:
        used = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return used.user + used.system


if __name__ == "__main__":
    main()
