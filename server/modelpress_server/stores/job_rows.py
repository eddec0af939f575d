"""Rows of jobs and their events: what every transaction on a job uses."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

from modelpress_protos.v1 import job_service_pb2, model_service_pb2
from sqlalchemy import Connection, Row, delete, func, insert, select, update

from modelpress_server.errors import ResourceNotFoundError, reason_of
from modelpress_server.stores import records
from modelpress_server.stores.database import insert_missing, note_change, note_news
from modelpress_server.stores.jobs import ENDED_STATES, JobRecord, Lease, LogLine, Outcome
from modelpress_server.stores.overview import StateChange
from modelpress_server.stores.sql_outbox import store_end
from modelpress_server.stores.tables import job_events, job_logs, jobs, result_cache

_Job = job_service_pb2.Job
# A worker has it, or is about to let go of it.
AT_WORK = (job_service_pb2.JOB_STATE_RUNNING, job_service_pb2.JOB_STATE_CANCELLING)


def record_of(row: Row[Any]) -> JobRecord:
    """The record of a row of `jobs`."""
    return JobRecord(
        project=row.project,
        id=row.id,
        version=row.version,
        cache_key=row.cache_key,
        last_sequence=row.last_sequence,
        compacted_sequence=row.compacted_sequence,
        message=_Job.FromString(row.message),
        manifest=model_service_pb2.Model.FromString(row.manifest),
        owner=row.owner,
        fence=row.fence,
    )


def fetch_job(connection: Connection, job_id: str, project: str | None = None, *, lock: bool = True) -> JobRecord:
    """One job, of a project where one is given. Raises ResourceNotFoundError.

    `lock`: nobody else changes it until the transaction ends.
    """
    statement = select(jobs).where(jobs.c.id == job_id)
    if lock:
        statement = statement.with_for_update()
    if project is not None:
        statement = statement.where(jobs.c.project == project)
    row = connection.execute(statement).first()
    if row is None:
        raise ResourceNotFoundError(f"There is no job {job_id} in this project.")
    return record_of(row)


def fetch_held(connection: Connection, lease: Lease) -> JobRecord | None:
    """The job of a lease, which nobody else changes until the transaction ends; None: the lease is lost."""
    row = connection.execute(select(jobs).where(jobs.c.id == lease.job_id).with_for_update()).first()
    if row is None or row.fence != lease.fence or row.state not in AT_WORK:
        return None
    return record_of(row)


def insert_job(connection: Connection, record: JobRecord) -> None:
    """A new job with its first event: its state."""
    message = record.message
    connection.execute(
        insert(jobs).values(
            id=record.id,
            project=record.project,
            model_id=message.spec.model.rpartition("/")[2],
            state=message.state,
            version=record.version,
            cache_key=record.cache_key,
            priority=message.spec.priority,
            queue_deadline_us=_queue_deadline_us(message),
            end_time_us=None,
            last_sequence=0,
            compacted_sequence=0,
            last_log_sequence=0,
            message=message.SerializeToString(),
            manifest=record.manifest.SerializeToString(),
        )
    )
    append_events(connection, record.id, [state_event(message.state)])
    note_change(connection, _change(record, created=True))
    records.set_labels(connection, record.id, message.labels)


def move(connection: Connection, record: JobRecord, state: job_service_pb2.JobState.ValueType) -> None:
    """Writes a changed job in its new state, with an event that says so."""
    record.message.state = state
    record.message.progress.queue_position = 0
    if state in ENDED_STATES:
        record.message.end_time.FromMicroseconds(records.now_us())
    write(connection, record)
    append_events(connection, record.id, [state_event(state)])
    note_change(connection, _change(record))
    if state in ENDED_STATES:
        store_end(connection, record)


def write(connection: Connection, record: JobRecord) -> None:
    """Writes a changed job."""
    message = record.message
    message.update_time.FromMicroseconds(records.now_us())
    ended = message.end_time.ToMicroseconds() if message.HasField("end_time") else None
    connection.execute(
        update(jobs)
        .where(jobs.c.id == record.id)
        .values(
            state=message.state,
            version=jobs.c.version + 1,
            owner=record.owner if message.state in AT_WORK else None,
            fence=record.fence,
            end_time_us=ended,
            message=message.SerializeToString(),
        )
    )


def append_events(connection: Connection, job_id: str, events: Sequence[job_service_pb2.WatchJobResponse]) -> None:
    """Numbers events and stores them."""
    if not events:
        return
    last = connection.execute(select(jobs.c.last_sequence).where(jobs.c.id == job_id)).scalar_one()
    rows = []
    for sequence, event in enumerate(events, last + 1):
        numbered = job_service_pb2.WatchJobResponse()
        numbered.CopyFrom(event)
        numbered.sequence = sequence
        rows.append({"job_id": job_id, "sequence": sequence, "message": numbered.SerializeToString()})
    connection.execute(insert(job_events), rows)
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(last_sequence=last + len(rows)))
    note_news(connection, job_id)


def append_log(connection: Connection, job_id: str, lines: Sequence[LogLine]) -> None:
    """Numbers log lines and stores them."""
    if not lines:
        return
    last = connection.execute(select(jobs.c.last_log_sequence).where(jobs.c.id == job_id)).scalar_one()
    rows = [
        {"job_id": job_id, "sequence": sequence, "time_us": line.time_us, "severity": line.severity, "text": line.text}
        for sequence, line in enumerate(lines, last + 1)
    ]
    connection.execute(insert(job_logs), rows)
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(last_log_sequence=last + len(rows)))
    note_news(connection, job_id)


def finish_job(connection: Connection, record: JobRecord, outcome: Outcome) -> None:
    """Ends a job: artifacts, references, cache entry and state at once."""
    append_log(connection, record.id, outcome.log)
    message = record.message
    if outcome.state == job_service_pb2.JOB_STATE_SUCCEEDED:
        for blob in outcome.blobs:
            records.add_project_blob(connection, record.project, blob)
        records.refer(connection, record.project, record.id, outcome.blobs)
        del message.artifacts[:]
        message.artifacts.extend(outcome.artifacts)
        if outcome.summary is not None:
            message.summary.CopyFrom(outcome.summary)
        message.progress.fraction = 1.0
        message.ClearField("error")
        if not message.from_cache:
            key = result_key(record.cache_key, outcome.made_by)
            entry = {"project": record.project, "cache_key": key, "job_id": record.id}
            insert_missing(connection, result_cache, entry)
    if outcome.error is not None:
        message.error.CopyFrom(outcome.error)
    move(connection, record, outcome.state)


def result_key(cache_key: bytes, made_by: bytes) -> bytes:
    """Of a result: what was asked for, and what the answer depends on besides."""
    return hashlib.sha256(cache_key + made_by).digest()


def cached_result(connection: Connection, project: str, cache_key: bytes, kinds: Collection[bytes]) -> JobRecord | None:
    """The last job of the project that had the same to do and succeeded, on a machine of one of these kinds."""
    keys = [result_key(cache_key, made_by) for made_by in kinds]
    row = connection.execute(
        select(jobs)
        .join(result_cache, result_cache.c.job_id == jobs.c.id)
        .where(result_cache.c.project == project, result_cache.c.cache_key.in_(keys))
        .order_by(jobs.c.id.desc())
    ).first()
    return record_of(row) if row is not None else None


def forget_result(connection: Connection, job: JobRecord) -> None:
    """Its result serves no other jobs any more: some of it was lost."""
    connection.execute(delete(result_cache).where(result_cache.c.job_id == job.id))


def queued_count(connection: Connection, project: str) -> int:
    """Queued jobs of a project."""
    condition = (jobs.c.project == project) & (jobs.c.state == job_service_pb2.JOB_STATE_QUEUED)
    return int(connection.execute(select(func.count()).select_from(jobs).where(condition)).scalar_one())


def state_event(state: job_service_pb2.JobState.ValueType) -> job_service_pb2.WatchJobResponse:
    """An event that says: the job is now in this state."""
    event = job_service_pb2.WatchJobResponse(state=state)
    event.time.FromMicroseconds(records.now_us())
    return event


def _change(record: JobRecord, *, created: bool = False) -> StateChange:
    message = record.message
    started_us, ended = message.start_time.ToMicroseconds(), message.state in ENDED_STATES
    first_start = message.state == job_service_pb2.JOB_STATE_RUNNING and message.attempt == 1
    ran = ended and message.HasField("start_time") and not message.from_cache
    return StateChange(
        kind="job",
        project=record.project,
        id=record.id,
        state=records.job_state_name(message.state),
        reason=reason_of(message.error) if message.state == job_service_pb2.JOB_STATE_FAILED else "",
        created=created,
        from_cache=ended and message.from_cache,
        attempt=message.attempt,
        wait_s=max(started_us - message.create_time.ToMicroseconds(), 0) / 1e6 if first_start else None,
        run_s=max(message.end_time.ToMicroseconds() - started_us, 0) / 1e6 if ran else None,
    )


def _queue_deadline_us(message: _Job) -> int | None:
    if not message.spec.HasField("queue_timeout"):
        return None
    return int(message.create_time.ToMicroseconds() + message.spec.queue_timeout.ToMicroseconds())
