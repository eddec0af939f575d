"""Jobs in SQL. Every state change is one transaction with the event that tells of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc
from modelpress_protos.v1 import job_service_pb2, model_service_pb2
from sqlalchemy import Connection, Row, delete, exists, func, select

from modelpress_server import errors
from modelpress_server.stores import job_rows, records
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.database import Database, hold, time_us
from modelpress_server.stores.jobs import ENDED_STATES, MAX_EXCUSED_LOSSES, Claim, JobRecord, Lease, LogLine, Outcome
from modelpress_server.stores.queries import ListQuery, Page, Rank, RequestKey
from modelpress_server.stores.sql_models import fetch_model
from modelpress_server.stores.tables import job_events, job_logs, jobs, models, servers

_KIND = "job"
QUEUED = job_service_pb2.JOB_STATE_QUEUED
RUNNING = job_service_pb2.JOB_STATE_RUNNING
CANCELLING = job_service_pb2.JOB_STATE_CANCELLING
CANCELLED = job_service_pb2.JOB_STATE_CANCELLED
QUEUE_FULL_RETRY_S = 15.0
MAX_ENDED_AT_ONCE = 100  # jobs of refused models, in one claim
_QUEUE_ORDER = (jobs.c.priority.desc(), jobs.c.id)


class SqlJobStore:
    """JobStore on a Database. `kinds`: what a result that serves a new job may be made by (`toolchain.made_by`)."""

    def __init__(self, database: Database, kinds: Callable[[], Collection[bytes]] = lambda: ()) -> None:
        self._database = database
        self._kinds = kinds

    async def create(
        self,
        record: JobRecord,
        blobs: Collection[BlobKey],
        request: RequestKey | None,
        *,
        max_queued: int,
        max_stored_bytes: int,
        is_there: Callable[[BlobKey], bool],
    ) -> JobRecord:
        return await self._database.write(
            lambda connection: _create(
                connection, record, blobs, request, max_queued, max_stored_bytes, is_there, self._kinds()
            )
        )

    async def get(self, project: str, job_id: str) -> JobRecord:
        return await self._database.look_up(
            lambda connection: job_rows.fetch_job(connection, job_id, project, lock=False)
        )

    async def list_page(self, query: ListQuery) -> Page[JobRecord]:
        def work(connection: Connection) -> Page[JobRecord]:
            rows, has_more = records.page_of(connection, jobs, query)
            return Page(tuple(job_rows.record_of(row) for row in rows), has_more)

        return await self._database.read(work)

    async def delete(self, project: str, job_id: str, etag: str) -> None:
        def work(connection: Connection) -> None:
            hold(connection, project)
            record = job_rows.fetch_job(connection, job_id, project)
            records.check_etag(etag, record.version)
            if not record.ended:
                state = records.job_state_name(record.message.state)
                raise errors.WrongStateError(
                    f"Job {job_id} is {state}. Cancel it and wait for its end, then delete it.",
                    metadata={"state": state},
                )
            connection.execute(delete(jobs).where(jobs.c.id == job_id))
            records.forget_owner(connection, job_id)

        await self._database.write(work, must=True)

    async def queue_positions(self) -> dict[str, int]:
        def work(connection: Connection) -> dict[str, int]:
            rows = connection.execute(
                select(jobs.c.id, jobs.c.project).where(jobs.c.state == QUEUED).order_by(*_QUEUE_ORDER)
            )
            return records.positions_in_turns((str(row.project), str(row.id)) for row in rows)

        return await self._database.read(work)

    def queue_version(self) -> int | None:
        return self._database.changes

    async def counts(self) -> tuple[int, int]:
        def work(connection: Connection) -> tuple[int, int]:
            rows = connection.execute(
                select(jobs.c.state, func.count().label("jobs"))
                .where(jobs.c.state.in_((QUEUED, RUNNING, CANCELLING)))
                .group_by(jobs.c.state)
            )
            found = {row.state: int(row.jobs) for row in rows}
            return found.get(QUEUED, 0), found.get(RUNNING, 0) + found.get(CANCELLING, 0)

        return await self._database.read(work)

    async def claim(self, now_us: int, rank: Rank, owner: str, waiting: Collection[str] = ()) -> Claim:
        return await self._database.write(lambda connection: _claim(connection, now_us, rank, owner, waiting))

    async def held(self, owner: str) -> Mapping[Lease, int]:
        def work(connection: Connection) -> Mapping[Lease, int]:
            rows = connection.execute(
                select(jobs.c.id, jobs.c.fence, jobs.c.state).where(
                    jobs.c.state.in_(job_rows.AT_WORK), jobs.c.owner == owner
                )
            )
            return {Lease(row.id, row.fence): row.state for row in rows}

        return await self._database.read(work)

    async def expire_overdue(self, now_us: int) -> tuple[str, ...]:
        return await self._database.write(lambda connection: tuple(_expire(connection, now_us)), must=True)

    async def next_queue_deadline_us(self) -> int | None:
        def work(connection: Connection) -> int | None:
            statement = select(func.min(jobs.c.queue_deadline_us)).where(jobs.c.state == QUEUED)
            return connection.execute(statement).scalar()

        return await self._database.look_up(work)

    async def progress(
        self, lease: Lease, events: Sequence[job_service_pb2.WatchJobResponse], log: Sequence[LogLine]
    ) -> bool:
        def work(connection: Connection) -> bool:
            record = job_rows.fetch_held(connection, lease)
            if record is None:
                return False
            if events:
                record.message.progress.CopyFrom(events[-1].progress)
                job_rows.write(connection, record)
                job_rows.append_events(connection, record.id, events)
            job_rows.append_log(connection, record.id, log)
            return True

        return await self._database.write(work)

    async def set_labels(self, project: str, job_id: str, etag: str, labels: Mapping[str, str] | None) -> JobRecord:
        def work(connection: Connection) -> JobRecord:
            record = job_rows.fetch_job(connection, job_id, project)
            records.check_etag(etag, record.version)
            if labels is None:
                return record
            record.message.labels.clear()
            record.message.labels.update(labels)
            job_rows.write(connection, record)
            records.set_labels(connection, job_id, labels)
            return job_rows.fetch_job(connection, job_id, project)

        return await self._database.write(work)

    async def request_cancel(self, project: str, job_id: str) -> JobRecord:
        def work(connection: Connection) -> JobRecord:
            record = job_rows.fetch_job(connection, job_id, project)
            if record.message.state == QUEUED:
                job_rows.move(connection, record, CANCELLED)
            elif record.message.state == RUNNING:
                job_rows.move(connection, record, CANCELLING)
            return job_rows.fetch_job(connection, job_id, project)

        return await self._database.write(work, must=True)

    async def finish(self, lease: Lease, outcome: Outcome) -> bool:
        def work(connection: Connection) -> bool:
            if outcome.blobs:
                hold(connection, _project_of(connection, lease))
            record = job_rows.fetch_held(connection, lease)
            if record is None:
                return False
            if record.message.state == CANCELLING:
                job_rows.finish_job(connection, record, Outcome(CANCELLED, log=outcome.log))
            else:
                job_rows.finish_job(connection, record, outcome)
            return True

        return await self._database.write(work, must=True)

    async def requeue(
        self, lease: Lease, *, count_attempt: bool, excused: bool = False, log: Sequence[LogLine] = ()
    ) -> bool:
        def work(connection: Connection) -> bool:
            record = job_rows.fetch_held(connection, lease)
            if record is None:
                return False
            _requeue(connection, record, count_attempt=count_attempt, excused=excused, log=log)
            return True

        return await self._database.write(work, must=True)

    async def recover(self, *, excused: bool = False) -> int:
        def work(connection: Connection) -> int:
            alive = exists().where(servers.c.id == jobs.c.owner, servers.c.lease_until_us > time_us(connection))
            lost = select(jobs).where(jobs.c.state.in_(job_rows.AT_WORK), ~alive)
            rows = connection.execute(lost.with_for_update(skip_locked=True)).all()
            for row in rows:
                _recover(connection, job_rows.record_of(row), excused)
            return len(rows)

        return await self._database.write(work, must=True)

    async def events(self, job_id: str, after_sequence: int, limit: int) -> list[job_service_pb2.WatchJobResponse]:
        def work(connection: Connection) -> Sequence[bytes]:
            statement = (
                select(job_events.c.message)
                .where(job_events.c.job_id == job_id, job_events.c.sequence > after_sequence)
                .order_by(job_events.c.sequence)
                .limit(limit)
            )
            return connection.execute(statement).scalars().all()

        return [job_service_pb2.WatchJobResponse.FromString(row) for row in await self._database.read(work)]

    async def logs(self, job_id: str, after_sequence: int, limit: int) -> list[LogLine]:
        def work(connection: Connection) -> Sequence[LogLine]:
            statement = (
                select(job_logs)
                .where(job_logs.c.job_id == job_id, job_logs.c.sequence > after_sequence)
                .order_by(job_logs.c.sequence)
                .limit(limit)
            )
            rows = connection.execute(statement)
            return [LogLine(row.time_us, row.severity, row.text, row.sequence) for row in rows]

        return list(await self._database.read(work))


def _create(
    connection: Connection,
    record: JobRecord,
    blobs: Collection[BlobKey],
    request: RequestKey | None,
    max_queued: int,
    max_stored_bytes: int,
    is_there: Callable[[BlobKey], bool],
    kinds: Collection[bytes],
) -> JobRecord:
    project = record.project
    hold(connection, project)
    earlier = records.earlier_request(connection, project, _KIND, request)
    if earlier is not None:
        return job_rows.fetch_job(connection, earlier, project)
    # Read again inside the transaction: the model may have been deleted or refused since the service looked.
    model = fetch_model(connection, project, record.message.spec.model.rpartition("/")[2])
    refuse_rejected(model.message)
    spec = record.message.spec
    cached = None if spec.skip_cache else job_rows.cached_result(connection, project, record.cache_key, kinds)
    if cached is not None and not all(is_there(blob) for blob in _result_blobs(cached)):
        job_rows.forget_result(connection, cached)
        cached = None
    if cached is None and job_rows.queued_count(connection, project) >= max_queued:
        raise errors.QueueFullError(
            f"Project {project} has {max_queued} queued jobs, the most that this server allows. Wait or cancel some.",
            subject=f"projects/{project}",
            retry_after_s=QUEUE_FULL_RETRY_S,
        )
    if cached is None:  # a result needs room as well
        records.check_stored(connection, project, 1, max_stored_bytes)
    records.refer(connection, project, record.id, blobs)
    records.remember_request(connection, project, _KIND, request, record.id)
    job_rows.insert_job(connection, record)
    if cached is not None:
        _take_over_result(connection, job_rows.fetch_job(connection, record.id), cached)
    return job_rows.fetch_job(connection, record.id)


def refuse_rejected(model: model_service_pb2.Model) -> None:
    """Raises ModelRejectedError for a model that its inspection refused."""
    if model.state == model_service_pb2.Model.STATE_REJECTED:
        raise errors.ModelRejectedError(
            f"Model {model.name} was refused: {model.error.message}",
            metadata={"finding": model.error.message, "cause": errors.reason_of(model.error)},
        )


def _result_blobs(job: JobRecord) -> tuple[BlobKey, ...]:
    return records.unique(BlobKey.of(entry.digest) for artifact in job.message.artifacts for entry in artifact.files)


def _take_over_result(connection: Connection, record: JobRecord, cached: JobRecord) -> None:
    record.message.from_cache = True
    outcome = Outcome(
        job_service_pb2.JOB_STATE_SUCCEEDED,
        artifacts=tuple(cached.message.artifacts),
        summary=cached.message.summary,
        blobs=_result_blobs(cached),
        log=(
            LogLine(records.now_us(), "INFO", f"The result of {cached.message.name} was taken: nothing has changed."),
        ),
    )
    job_rows.finish_job(connection, record, outcome)


def _claim(connection: Connection, now_us: int, rank: Rank, owner: str, waiting: Collection[str]) -> Claim:
    ended = _expire(connection, now_us)
    for project in rank(_waiting_projects(connection)):
        claim = _claim_of(connection, project, owner, waiting)
        ended += claim.ended
        if claim.job is not None:
            return Claim(claim.job, tuple(ended))
    return Claim(None, tuple(ended))


def _waiting_projects(connection: Connection) -> Sequence[str]:
    """Those with a queued job, the one with the oldest first.

    From project to project by the index, which takes as many steps as there are such projects, however long the queues.
    """
    queued = jobs.c.state == QUEUED
    first = select(func.min(jobs.c.project).label("project")).where(queued).cte("waiting", recursive=True)
    step = select(func.min(jobs.c.project)).where(queued, jobs.c.project > first.c.project).scalar_subquery()
    waiting = first.union_all(select(step).where(first.c.project.is_not(None)))
    oldest = select(func.min(jobs.c.id)).where(queued, jobs.c.project == waiting.c.project).scalar_subquery()
    found = select(waiting.c.project).where(waiting.c.project.is_not(None)).order_by(oldest)
    return connection.execute(found).scalars().all()


def _claim_of(connection: Connection, project: str, owner: str, waiting: Collection[str]) -> Claim:
    """The next job of a project; those of refused models end."""
    ended: list[str] = []
    while (row := _next_of(connection, project, waiting)) is not None:
        record = job_rows.record_of(row)
        if row.model_message is not None:
            model = model_service_pb2.Model.FromString(row.model_message)
            try:
                refuse_rejected(model)
            except errors.ModelRejectedError as error:
                outcome = Outcome(job_service_pb2.JOB_STATE_FAILED, error=errors.status_of(error))
                job_rows.finish_job(connection, record, outcome)
                ended.append(record.id)
                if len(ended) < MAX_ENDED_AT_ONCE:
                    continue
                break
        return Claim(_start(connection, record, owner), tuple(ended))
    return Claim(None, tuple(ended))


def _next_of(connection: Connection, project: str, waiting: Collection[str]) -> Row[Any] | None:
    """One row, and no more than one is locked: the others are for those who claim at the same time."""
    queued = (
        select(jobs, models.c.message.label("model_message"))
        .outerjoin(models, models.c.id == jobs.c.model_id)
        .where(jobs.c.state == QUEUED, jobs.c.project == project, jobs.c.id.not_in(waiting))
        .order_by(*_QUEUE_ORDER)
        .with_for_update(of=jobs, skip_locked=True)
    )
    return connection.execute(queued.limit(1)).first()


def _expire(connection: Connection, now_us: int) -> list[str]:
    overdue = select(jobs).where(jobs.c.state == QUEUED, jobs.c.queue_deadline_us <= now_us)
    rows = connection.execute(overdue.with_for_update(skip_locked=True)).all()
    for row in rows:
        job_rows.finish_job(connection, job_rows.record_of(row), _expired())
    return [str(row.id) for row in rows]


def _start(connection: Connection, record: JobRecord, owner: str) -> JobRecord:
    record = replace(record, owner=owner, fence=record.fence + 1)
    record.message.attempt += 1
    record.message.ClearField("progress")
    record.message.start_time.FromMicroseconds(records.now_us())
    job_rows.move(connection, record, RUNNING)
    return job_rows.fetch_job(connection, record.id)


def _expired() -> Outcome:
    status = errors.make_status(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "QUEUE_TIMEOUT",
        "No worker was free within queue_timeout. Create the job again with a longer one, or at a quieter time.",
    )
    return Outcome(job_service_pb2.JOB_STATE_EXPIRED, error=status)


def _project_of(connection: Connection, lease: Lease) -> str:
    return connection.execute(select(jobs.c.project).where(jobs.c.id == lease.job_id)).scalar() or ""


def _recover(connection: Connection, record: JobRecord, excused: bool) -> None:
    """A server that was killed did not say why: a job that takes it down each time must come to an end."""
    job = record.message
    excused = excused and job.excused_losses < MAX_EXCUSED_LOSSES
    if job.state == RUNNING and job.attempt >= job.spec.max_attempts and not excused:
        text = f"The server was lost {job.attempt} times while this job ran; it is not tried again."
        status = errors.make_status(grpc.StatusCode.ABORTED, "WORKER_CRASHED", text)
        line = LogLine(records.now_us(), "ERROR", text)
        job_rows.finish_job(connection, record, Outcome(job_service_pb2.JOB_STATE_FAILED, error=status, log=(line,)))
        return
    what = "machine" if excused else "server"
    line = LogLine(records.now_us(), "WARNING", f"The {what} was restarted; the job is queued again.")
    _requeue(connection, record, count_attempt=not excused, excused=excused, log=[line])


def _requeue(
    connection: Connection, record: JobRecord, *, count_attempt: bool, excused: bool, log: Sequence[LogLine]
) -> None:
    if record.message.state in ENDED_STATES or record.message.state == QUEUED:
        return
    job_rows.append_log(connection, record.id, log)
    if record.message.state == CANCELLING:
        job_rows.move(connection, record, CANCELLED)
        return
    if not count_attempt:
        record.message.attempt -= 1
    if excused:
        record.message.excused_losses += 1
    record.message.ClearField("progress")
    job_rows.move(connection, record, QUEUED)
