"""JobService: compressions as resources, watchable and re-attachable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import empty_pb2
from modelpress_protos.v1 import job_service_pb2, job_service_pb2_grpc

from modelpress_server import errors
from modelpress_server.clock import Clock
from modelpress_server.config import Settings
from modelpress_server.filters import Fields
from modelpress_server.interceptors import check_project, check_projects, current_trace_parent, draining
from modelpress_server.listing import fitted, list_query, page_token, wrong_field
from modelpress_server.names import parse_name, parse_project, parse_projects
from modelpress_server.pace import Pace
from modelpress_server.projects import Projects
from modelpress_server.scheduler import Scheduler
from modelpress_server.services.job_requests import blobs_of, check_job, new_job
from modelpress_server.services.job_watch import JobsWatch
from modelpress_server.stores.blob_index import BlobIndex
from modelpress_server.stores.blobs import BlobStore
from modelpress_server.stores.jobs import JobRecord, JobStore
from modelpress_server.stores.models import ModelStore
from modelpress_server.stores.records import now_us
from modelpress_server.stores.sql_jobs import refuse_rejected
from modelpress_server.validation import Checks, update_paths
from modelpress_server.waiting import Notifier, SharedLook, wait_until

STATES = {
    name.removeprefix("JOB_STATE_"): number
    for name, number in job_service_pb2.JobState.items()
    if number != job_service_pb2.JOB_STATE_UNSPECIFIED
}
FIELDS = Fields(STATES, times=("create_time", "end_time"), by_model=True)
QUEUED = job_service_pb2.JOB_STATE_QUEUED
MUTABLE = ("labels",)
MAX_WAIT_S = 60.0
BATCH = 500  # events or log lines read at once


class JobService(job_service_pb2_grpc.JobServiceServicer):
    """Jobs of all projects."""

    def __init__(
        self,
        settings: Settings,
        projects: Projects,
        jobs: JobStore,
        models: ModelStore,
        index: BlobIndex,
        blobs: BlobStore,
        scheduler: Scheduler,
        notifier: Notifier,
        clock: Clock,
        pace: Pace,
    ) -> None:
        self._settings = settings
        self._projects = projects
        self._jobs = jobs
        self._positions = SharedLook(jobs.queue_positions, jobs.queue_version)
        self._models = models
        self._index = index
        self._blobs = blobs
        self._scheduler = scheduler
        self._notifier = notifier
        self._clock = clock
        self._pace = pace

    async def CreateJob(  # noqa: N802  # the name of the method in the API
        self, request: job_service_pb2.CreateJobRequest, context: Any
    ) -> job_service_pb2.Job:
        project = check_project(parse_project(request.parent))
        checks, request_id = check_job(project, request, self._settings)
        blobs = blobs_of(request.job.spec)
        visible = await self._index.visible(project, set(blobs.values()), touch_us=now_us())
        for field, blob in blobs.items():
            checks.require(blob in visible, f"job.spec.{field}", "is not there; upload it first")
        checks.finish()
        model = await self._models.get(project, request.job.spec.model.rpartition("/")[2])
        refuse_rejected(model.message)
        record = new_job(project, request.job, model.message, current_trace_parent())
        if request.validate_only:
            return record.to_message()
        references = {*blobs.values(), *blobs_of(model.message).values()}
        limits = self._projects.limits(project)
        await self._blobs.require(references)
        created = await self._jobs.create(
            record,
            references,
            request_id,
            max_queued=limits.max_queued_jobs,
            max_stored_bytes=limits.max_stored_bytes,
            is_there=self._blobs.is_there,
        )
        self._scheduler.wake()
        self._notifier.notify(created.id)
        return await self._message(created)

    async def GetJob(  # noqa: N802
        self, request: job_service_pb2.GetJobRequest, context: Any
    ) -> job_service_pb2.Job:
        return await self._message(await self._get(request.name))

    async def ListJobs(  # noqa: N802
        self, request: job_service_pb2.ListJobsRequest, context: Any
    ) -> job_service_pb2.ListJobsResponse:
        scope = check_projects(parse_projects(request.parent))
        query = list_query(scope, request.page_size, request.page_token, request.filter, FIELDS)
        page = await self._jobs.list_page(query)
        queued = any(record.message.state == QUEUED for record in page.items)
        positions = await self._positions() if queued else {}
        messages = [self._shown(record, positions.get(record.id, 0)) for record in page.items]
        found, more = fitted(messages, has_more=page.has_more)
        token = page_token(scope, request.filter, page.items[len(found) - 1].id) if more else ""
        return job_service_pb2.ListJobsResponse(jobs=found, next_page_token=token)

    async def WatchJob(  # noqa: N802
        self, request: job_service_pb2.WatchJobRequest, context: Any
    ) -> AsyncIterator[job_service_pb2.WatchJobResponse]:
        record = await self._get(request.name)
        after = request.after_sequence
        _check_sequence(after, record.last_sequence)
        if 0 < after < record.compacted_sequence:
            raise errors.EventsCompactedError(
                f"Events up to {record.compacted_sequence} are no longer kept. Read the job, watch from its sequence.",
                metadata={"compacted_sequence": str(record.compacted_sequence)},
            )
        snapshot = await self._message(record)
        position = snapshot.progress.queue_position
        yield _event(snapshot=snapshot)
        ticket = self._notifier.ticket(record.id)
        try:
            while True:
                own = ticket.take()
                if own:
                    # The record first: an ended job has no events after those that are read next.
                    record = await self._get(request.name)
                while own and (events := await self._jobs.events(record.id, after, BATCH)):
                    for event in events:
                        if event.sequence == record.last_sequence and event.HasField("progress"):
                            event.progress.CopyFrom((await self._message(record)).progress)
                        yield event
                    after = events[-1].sequence
                if record.ended:
                    yield _event(snapshot=record.to_message())
                    return
                if self._notifier.closed:
                    raise draining()
                if record.message.state == QUEUED:
                    # One look serves all who are told of the same change of the queue.
                    look = self._positions() if own else self._positions.since(self._notifier.queue_told_s)
                    place = (await look).get(record.id, 0)
                    if place != position:
                        position = place
                        yield _event(progress=self._shown(record, place).progress)
                if not await wait_until(ticket, self._settings.heartbeat_s):
                    ticket.own = True  # what was not told is seen now
                    yield _event(heartbeat=job_service_pb2.Heartbeat())
        finally:
            self._notifier.drop(record.id, ticket)

    async def WatchJobs(  # noqa: N802
        self, request: job_service_pb2.WatchJobsRequest, context: Any
    ) -> AsyncIterator[job_service_pb2.WatchJobsResponse]:
        parent = parse_projects(request.parent)
        query = list_query(check_projects(parent), 0, "", request.filter, FIELDS)
        watch = JobsWatch(self._jobs, self._positions, self._notifier, self._clock, query, self._settings.heartbeat_s)

        def check() -> None:
            if check_projects(parent).projects != query.projects:
                raise errors.PermissionDeniedError("The projects that you may read are others now. Watch again.")

        async for response in watch.changes(check, self._shown):
            yield response
        raise draining()

    async def WaitJob(  # noqa: N802
        self, request: job_service_pb2.WaitJobRequest, context: Any
    ) -> job_service_pb2.Job:
        timeout_s = MAX_WAIT_S
        if request.HasField("timeout"):
            timeout_s = min(max(request.timeout.ToMilliseconds() / 1000, 0.0), MAX_WAIT_S)
        deadline_s = self._clock.now_s() + timeout_s
        record = await self._get(request.name)
        ticket = self._notifier.ticket(record.id)
        try:
            while True:
                ticket.clear()
                record = await self._get(request.name)
                left_s = deadline_s - self._clock.now_s()
                if record.ended or left_s <= 0:
                    return await self._message(record)
                if self._notifier.closed:
                    raise draining()
                news = asyncio.ensure_future(ticket.wait())
                try:
                    await self._clock.wait({news}, left_s)
                finally:
                    news.cancel()
        finally:
            self._notifier.drop(record.id, ticket)

    async def UpdateJob(  # noqa: N802
        self, request: job_service_pb2.UpdateJobRequest, context: Any
    ) -> job_service_pb2.Job:
        project, job_id = parse_name(request.job.name, "jobs", "job.name")
        checks = Checks()
        paths = update_paths(request.job, request.update_mask, MUTABLE, checks)
        checks.labels("job.labels", request.job.labels)
        checks.finish()
        labels = dict(request.job.labels) if "labels" in paths else None
        record = await self._jobs.set_labels(check_project(project), job_id, request.job.etag, labels)
        self._notifier.notify(job_id)
        return await self._message(record)

    async def CancelJob(  # noqa: N802
        self, request: job_service_pb2.CancelJobRequest, context: Any
    ) -> job_service_pb2.Job:
        project, job_id = parse_name(request.name, "jobs")
        record = await self._jobs.request_cancel(check_project(project), job_id)
        self._scheduler.cancel(job_id)
        self._notifier.notify(job_id)
        self._notifier.notify_queue()
        return await self._message(record)

    async def DeleteJob(  # noqa: N802
        self, request: job_service_pb2.DeleteJobRequest, context: Any
    ) -> empty_pb2.Empty:
        project, job_id = parse_name(request.name, "jobs")
        await self._jobs.delete(check_project(project), job_id, request.etag)
        self._notifier.notify(job_id)
        return empty_pb2.Empty()

    async def StreamJobLogs(  # noqa: N802
        self, request: job_service_pb2.StreamJobLogsRequest, context: Any
    ) -> AsyncIterator[job_service_pb2.StreamJobLogsResponse]:
        record = await self._get(request.name)
        after = request.after_sequence
        if after < 0:
            raise wrong_field("after_sequence", f"{after} is negative")
        ticket = self._notifier.ticket(record.id)
        try:
            while True:
                ticket.clear()
                record = await self._get(request.name)
                while lines := await self._jobs.logs(record.id, after, BATCH):
                    for line in lines:
                        response = job_service_pb2.StreamJobLogsResponse(
                            sequence=line.sequence, severity=line.severity, text=line.text
                        )
                        response.time.FromMicroseconds(line.time_us)
                        yield response
                    after = lines[-1].sequence
                if record.ended or not request.follow:
                    return
                if self._notifier.closed:
                    raise draining()
                await ticket.wait()
        finally:
            self._notifier.drop(record.id, ticket)

    async def _get(self, name: str) -> JobRecord:
        project, job_id = parse_name(name, "jobs")
        return await self._jobs.get(check_project(project), job_id)

    async def _message(self, record: JobRecord) -> job_service_pb2.Job:
        if record.message.state != QUEUED:
            return self._shown(record)
        return self._shown(record, (await self._positions()).get(record.id, 0))

    def _shown(self, record: JobRecord, queue_position: int = 0) -> job_service_pb2.Job:
        message = record.to_message(queue_position)
        self._pace.tell(message)
        return message


def _event(**kind: Any) -> job_service_pb2.WatchJobResponse:
    response = job_service_pb2.WatchJobResponse(**kind)
    response.time.FromMicroseconds(now_us())
    return response


def _check_sequence(after: int, last: int) -> None:
    if after < 0 or after > last:
        raise wrong_field("after_sequence", f"{after} is not between 0 and the job's last_sequence, {last}")
