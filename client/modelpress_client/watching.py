"""Streams of a job, events and log lines, that go on after a cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from modelpress_protos.v1 import job_service_pb2 as pb

from modelpress_client.connection import Connection, stalled
from modelpress_client.errors import ModelpressError
from modelpress_client.resources import ENDED, JobEvent, job_event

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


async def watch_job(connection: Connection, name: str) -> AsyncIterator[tuple[JobEvent, pb.Job]]:
    """Every event until the job has ended, with the job as last read; begins again where a cut stream was.

    The first event is a snapshot; the last one shows how the job ended.
    """
    await connection.reach()
    patience = connection.patience()
    job, after, past = pb.Job(), 0, 0
    while True:
        request = pb.WatchJobRequest(name=name, after_sequence=after)
        try:
            async for response in _responses(connection, connection.jobs.WatchJob, request, "Watching the job"):
                patience.progressed()
                after = max(after, response.sequence)
                kind = response.WhichOneof("event")
                if kind == "snapshot":
                    job.CopyFrom(response.snapshot)
                    past = job.last_sequence
                elif kind == "progress":
                    job.progress.CopyFrom(response.progress)
                elif kind == "state":
                    job.state = response.state
                else:
                    continue
                is_past = 0 < response.sequence <= past
                yield job_event(kind, response.sequence, job.state, job.progress, is_past=is_past), job
                if kind == "snapshot" and job.state in ENDED:
                    return
            raise stalled("The server ended the watch early", 0)
        except ModelpressError as error:
            if error.reason == "EVENTS_COMPACTED":
                job.CopyFrom(await connection.call(connection.jobs.GetJob, pb.GetJobRequest(name=name)))
                after = job.last_sequence
                continue
            await patience.wait(error)


async def stream_logs(
    connection: Connection, name: str, *, follow: bool = False
) -> AsyncIterator[pb.StreamJobLogsResponse]:
    """The lines of a job's log; with `follow` until the job has ended."""
    await connection.reach()
    patience = connection.patience()
    after = 0
    while True:
        request = pb.StreamJobLogsRequest(name=name, after_sequence=after, follow=follow)
        try:
            # A log may be silent for as long as a job runs: without heartbeats only the keepalive notices a cut.
            async for response in _responses(connection, connection.jobs.StreamJobLogs, request, None):
                patience.progressed()
                after = max(after, response.sequence)
                yield response
            return
        except ModelpressError as error:
            await patience.wait(error)


async def _responses(
    connection: Connection,
    method: grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT],
    request: RequestT,
    what: str | None,
) -> AsyncIterator[ResponseT]:
    """One stream; with `what`, standstill counts as a cut."""
    idle_timeout_s = connection.settings.retry.watch_idle_timeout_s if what else None
    call = method(request, metadata=connection.metadata)
    responses = aiter(call)
    try:
        while True:
            try:
                async with connection.translated(), asyncio.timeout(idle_timeout_s):
                    response = await anext(responses, None)
            except TimeoutError:
                raise stalled(what or "", idle_timeout_s or 0) from None
            if response is None:
                return
            yield response
    finally:
        call.cancel()
