"""One run of one task: what the executor says becomes the outcome of a job or the state of a model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import grpc
from google.rpc import status_pb2
from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import job_service_pb2, model_service_pb2

from modelpress_server import errors
from modelpress_server.config import Settings
from modelpress_server.executors.base import Executor, Limits, WorkerLostError
from modelpress_server.recorder import JobRecorder
from modelpress_server.stores.base import BlobKey, JobRecord, JobStore, LogLine, ModelRecord, ModelStore, Outcome
from modelpress_server.stores.filesystem import FileBlobStore
from modelpress_server.stores.records import now_us, unique
from modelpress_server.task_folder import task_folder
from modelpress_server.waiting import Notifier

logger = logging.getLogger(__name__)

SUCCEEDED = job_service_pb2.JOB_STATE_SUCCEEDED
FAILED = job_service_pb2.JOB_STATE_FAILED
CANCELLED = job_service_pb2.JOB_STATE_CANCELLED
CRASHED = "WORKER_CRASHED"
INSPECT_ATTEMPTS = 3
STORE_RETRY_S = 2.0
# Larger messages would not fit a page of a list.
MAX_INSPECTION_BYTES = 128 * 1024
LOST_CODES = {
    "WORKER_OUT_OF_MEMORY": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "WORKER_TIMEOUT": grpc.StatusCode.DEADLINE_EXCEEDED,
    CRASHED: grpc.StatusCode.ABORTED,
}

_Model = model_service_pb2.Model


@dataclass(frozen=True)
class RunResources:
    """All that every run needs, besides its own job."""

    settings: Settings
    executor: Executor
    blobs: FileBlobStore
    work: Path


class JobRun:
    """One attempt of one job."""

    def __init__(
        self, resources: RunResources, record: JobRecord, jobs: JobStore, models: ModelStore, notifier: Notifier
    ) -> None:
        self._resources = resources
        self._record = record
        self._jobs = jobs
        self._models = models
        self._inspected: asyncio.Task[None] | None = None
        self._notifier = notifier
        self._stop: Literal["cancel", "drain"] | None = None
        self._work: asyncio.Task[Outcome] | None = None

    def stop(self, why: Literal["cancel", "drain"]) -> None:
        """Kills the worker; the job ends as CANCELLED, or is queued again for the next server."""
        self._stop = self._stop or why
        if self._work is not None:
            self._work.cancel()

    async def run(self) -> None:
        """Runs the attempt and stores how it ended."""
        record = self._record
        recorder = JobRecorder(record.id, self._jobs, self._notifier)
        self._work = asyncio.create_task(self._attempt(recorder))
        self._notifier.notify(record.id)
        current = await self._jobs.get(record.project, record.id)
        if current.message.state == job_service_pb2.JOB_STATE_CANCELLING:
            # Cancelled between the claim and now, when there was no run to stop yet.
            self.stop("cancel")
        try:
            outcome: Outcome | None = await self._work
        except asyncio.CancelledError:
            outcome = Outcome(CANCELLED) if self._stop == "cancel" else None
        except WorkerLostError as error:
            outcome = self._lost(error, recorder)
        except errors.ServiceError as error:
            outcome = Outcome(FAILED, error=errors.status_of(error))
        except Exception:  # noqa: BLE001  # whatever it is, the job must end
            outcome = Outcome(FAILED, error=_incident(f"job {record.id}"))
        await recorder.close()
        if self._inspected is not None:
            await asyncio.wait([self._inspected])
        await self._store(outcome)
        self._notifier.notify(record.id)

    async def _attempt(self, recorder: JobRecorder) -> Outcome:
        resources, job = self._resources, self._record.message
        time_s = resources.settings.run_time_limit_s
        if job.spec.HasField("run_timeout"):
            time_s = min(time_s, job.spec.run_timeout.ToMilliseconds() / 1000)
        limits = Limits(time_s=time_s, memory_bytes=resources.settings.worker_memory_bytes)
        recorder.start()
        async with task_folder(resources.work, resources.blobs) as folder:
            request = await folder.compress_request(job, self._record.manifest, time_s)

            def on_event(event: worker_pb2.WorkerEvent) -> None:
                if event.HasField("loaded"):
                    self._inspected = asyncio.create_task(self._keep_inspection(event.loaded))
                else:
                    recorder.on_event(event)

            event = await resources.executor.run(request, limits=limits, on_event=on_event)
            if event.WhichOneof("event") == "failed":
                return Outcome(FAILED, error=errors.sanitized(event.failed))
            if event.WhichOneof("event") != "compressed":
                raise WorkerLostError(CRASHED, "The worker ended without a result.")
            artifacts = await folder.collect(event.compressed.artifacts, resources.settings.max_blob_bytes)
        files = [entry for artifact in artifacts for entry in artifact.files]
        return Outcome(
            SUCCEEDED,
            artifacts=tuple(artifacts),
            summary=event.compressed.summary,
            blobs=unique(BlobKey.of(entry.digest) for entry in files),
        )

    async def _keep_inspection(self, found: worker_pb2.InspectResult) -> None:
        try:
            await self._models.finish_inspection(self._record.message.spec.model.rpartition("/")[2], _judged(found))
        except Exception:  # the model stays PROCESSING and is inspected by itself when the job has ended
            logger.exception("job %s: the inspection of its model could not be stored", self._record.id)

    def _lost(self, error: WorkerLostError, recorder: JobRecorder) -> Outcome | None:
        """None: the job is queued again."""
        job = self._record.message
        if error.reason == CRASHED and job.attempt < job.spec.max_attempts:
            recorder.log("WARNING", f"Attempt {job.attempt} of {job.spec.max_attempts}: {error} It is tried again.")
            return None
        recorder.log("ERROR", f"Attempt {job.attempt} of {job.spec.max_attempts}: {error}")
        return Outcome(FAILED, error=_lost_status(error))

    async def _store(self, outcome: Outcome | None) -> None:
        while True:
            try:
                await self._store_once(outcome)
                return
            except errors.StorageFullError:
                if self._stop == "drain":
                    return  # still RUNNING on disk: the next server queues it again
                logger.warning("job %s: its end cannot be stored, the disk is full; trying again", self._record.id)
                await asyncio.sleep(STORE_RETRY_S)
            except Exception:
                if outcome is not None and outcome.state == FAILED:
                    raise
                # Whatever is wrong with this result, the job must not stay RUNNING.
                outcome = Outcome(FAILED, error=_incident(f"the end of job {self._record.id}"))

    async def _store_once(self, outcome: Outcome | None) -> None:
        if outcome is not None:
            await self._jobs.finish(self._record.id, outcome)
        elif self._stop == "drain":
            line = LogLine(now_us(), "WARNING", "The server shut down; the job is queued again.")
            await self._jobs.requeue(self._record.id, count_attempt=False, log=[line])
        else:
            await self._jobs.requeue(self._record.id, count_attempt=True)


async def inspect_model(
    resources: RunResources, record: ModelRecord, on_event: Callable[[worker_pb2.WorkerEvent], None]
) -> model_service_pb2.Model:
    """Has a model inspected; state, format, inspection and error of the answer are what was found."""
    for attempt in range(1, INSPECT_ATTEMPTS + 1):
        try:
            return await _inspect_once(resources, record, on_event)
        except WorkerLostError as error:
            logger.warning("model %s: inspection %d: %s", record.id, attempt, error)
            if error.reason != CRASHED or attempt == INSPECT_ATTEMPTS:
                return _Model(state=_Model.STATE_REJECTED, error=_lost_status(error))
        except errors.ServiceError as error:
            return _Model(state=_Model.STATE_REJECTED, error=errors.status_of(error))
        except Exception:  # noqa: BLE001  # whatever it is, the model must not stay PROCESSING
            return _Model(state=_Model.STATE_REJECTED, error=_incident(f"model {record.id}"))
    raise AssertionError("the last attempt returns")


async def _inspect_once(
    resources: RunResources, record: ModelRecord, on_event: Callable[[worker_pb2.WorkerEvent], None]
) -> model_service_pb2.Model:
    limits = Limits(resources.settings.inspect_time_limit_s, resources.settings.worker_memory_bytes)
    async with task_folder(resources.work, resources.blobs) as folder:
        request = await folder.inspect_request(record.message)
        event = await resources.executor.run(request, limits=limits, on_event=on_event)
    kind = event.WhichOneof("event")
    if kind == "failed":
        return _Model(state=_Model.STATE_REJECTED, error=errors.sanitized(event.failed))
    if kind != "inspected":
        raise WorkerLostError(CRASHED, "The worker ended without a result.")
    return _judged(event.inspected)


def _judged(found: worker_pb2.InspectResult) -> model_service_pb2.Model:
    blocking = [
        item for item in found.inspection.findings if item.severity == model_service_pb2.Finding.SEVERITY_BLOCKING
    ]
    if blocking:
        return _rejected(found.format, blocking[0].detail, blocking[0].code)
    if found.inspection.ByteSize() > MAX_INSPECTION_BYTES:
        return _rejected(
            found.format, "It has more inputs, outputs or operators than this server takes.", "TOO_COMPLEX"
        )
    return _Model(state=_Model.STATE_ACTIVE, format=found.format, inspection=found.inspection)


def _rejected(model_format: int, detail: str, code: str) -> model_service_pb2.Model:
    model = _Model(state=_Model.STATE_REJECTED)
    model.format = model_format  # type: ignore[assignment]  # an unknown number stays as it is
    metadata = {"finding": detail, "code": code}
    status = errors.make_status(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_REJECTED", detail, metadata)
    model.error.CopyFrom(status)
    return model


def _lost_status(error: WorkerLostError) -> status_pb2.Status:
    code = LOST_CODES.get(error.reason, grpc.StatusCode.ABORTED)
    return errors.make_status(code, error.reason, str(error))


def _incident(what: str) -> status_pb2.Status:
    internal = errors.InternalError()
    logger.exception("incident %s in %s", internal.incident, what)
    return errors.status_of(internal)
