"""One run of one task: what the executor says becomes the outcome of a job or the state of a model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import grpc
from google.rpc import status_pb2
from modelpress_protos.internal.v1 import site_pb2, worker_pb2
from modelpress_protos.v1 import job_service_pb2, model_service_pb2

from modelpress_server import errors
from modelpress_server.config import Settings
from modelpress_server.executors.base import WorkerLostError
from modelpress_server.executors.lost import CRASHED
from modelpress_server.observation.meter import Meter
from modelpress_server.observation.stages import StageTimes
from modelpress_server.observation.tracer import Tracer
from modelpress_server.recorder import JobRecorder
from modelpress_server.sites.base import Postpone, PostponedError, Site, TaskFailedError, postponement_of
from modelpress_server.sites.machine import OUT_OF_DISK
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.jobs import MAX_EXCUSED_LOSSES, JobRecord, JobStore, Lease, LogLine, Outcome
from modelpress_server.stores.models import ModelRecord, ModelStore
from modelpress_server.stores.records import job_state_name, now_us, unique
from modelpress_server.stores.usage import UsageStore
from modelpress_server.waiting import Notifier, uninterrupted

logger = logging.getLogger(__name__)

SUCCEEDED = job_service_pb2.JOB_STATE_SUCCEEDED
FAILED = job_service_pb2.JOB_STATE_FAILED
CANCELLED = job_service_pb2.JOB_STATE_CANCELLED
INSPECT_ATTEMPTS = 3
STORE_RETRY_S = 2.0
# What a run has used is stored so often, so that it counts although the server is killed.
CHARGE_INTERVAL_S = 10.0
# Larger messages would not fit a page of a list.
MAX_INSPECTION_BYTES = 128 * 1024
LOST_CODES = {
    "WORKER_OUT_OF_MEMORY": grpc.StatusCode.RESOURCE_EXHAUSTED,
    OUT_OF_DISK: grpc.StatusCode.RESOURCE_EXHAUSTED,
    "WORKER_TIMEOUT": grpc.StatusCode.DEADLINE_EXCEEDED,
    CRASHED: grpc.StatusCode.ABORTED,
}

_Model = model_service_pb2.Model


@dataclass(frozen=True)
class RunResources:
    """All that every run needs, besides its own job."""

    settings: Settings
    site: Site
    usage: UsageStore
    meter: Meter
    tracer: Tracer


@dataclass(frozen=True)
class Again:
    """A job goes back into the queue. `excused`: it was lost, but not by its own doing."""

    why: Postpone
    count_attempt: bool = False
    excused: bool = False


class JobRun:
    """One attempt of one job. `postponed`: it was put off before; `growth`: it needs so many times the usual room."""

    def __init__(
        self,
        resources: RunResources,
        record: JobRecord,
        jobs: JobStore,
        models: ModelStore,
        notifier: Notifier,
        *,
        postponed: bool = False,
        growth: int = 1,
    ) -> None:
        self._resources = resources
        self._record = record
        self._jobs = jobs
        self._models = models
        self._inspected: asyncio.Task[None] | None = None
        self._notifier = notifier
        self._postponed = postponed
        self._growth = growth
        self._stop: Literal["cancel", "drain", "lost"] | None = None
        self._bill = Bill(resources.usage, record.project, count_run=True)
        self._work: asyncio.Task[Outcome] | None = None
        self._trace = resources.tracer.run(record.message)

    @property
    def lease(self) -> Lease:
        """What it holds the job by."""
        return self._record.lease

    def stop(self, why: Literal["cancel", "drain", "lost"]) -> None:
        """Kills the worker; the job ends as CANCELLED, or is queued again for the next server, or is another's."""
        self._stop = self._stop or why
        if self._work is not None:
            self._work.cancel()

    async def run(self) -> Again | None:
        """Runs the attempt and stores how it ended; returns why the job is queued again, None: it has ended."""
        record = self._record
        recorder = JobRecorder(record.lease, self._jobs, self._notifier, lambda: self.stop("lost"))
        self._work = asyncio.create_task(self._attempt(recorder))
        self._notifier.notify(record.id)
        current = await self._jobs.get(record.project, record.id)
        if current.message.state == job_service_pb2.JOB_STATE_CANCELLING:
            # Cancelled between the claim and now, when there was no run to stop yet.
            self.stop("cancel")
        try:
            async with self._bill:
                ending = await self._ending(self._work, recorder)
        except BaseException:
            self._trace.end("LOST")
            raise
        self._trace.end(*_told(ending))
        await recorder.close()
        if self._inspected is not None:
            await asyncio.wait([self._inspected])
        await self._store(ending)
        self._notifier.notify(record.id)
        return ending if isinstance(ending, Again) else None

    async def _ending(self, work: asyncio.Task[Outcome], recorder: JobRecorder) -> Outcome | Again:
        try:
            return await work
        except asyncio.CancelledError:
            taken = self._stop == "lost"
            return Outcome(CANCELLED) if self._stop == "cancel" else Again(Postpone.TAKEN if taken else Postpone.DRAIN)
        except TaskFailedError as error:
            return Outcome(FAILED, error=error.status)
        except WorkerLostError as error:
            return self._lost(error, recorder)
        except Exception as error:  # noqa: BLE001  # whatever it is, the job must end or be queued again
            why = postponement_of(error)
            if why is None:
                return Outcome(FAILED, error=_status_of(error, f"job {self._record.id}"))
            if not self._postponed:
                recorder.log("WARNING", f"The job waits: {why.value}. This costs it no attempt.")
            return Again(why)

    async def _attempt(self, recorder: JobRecorder) -> Outcome:
        recorder.start()

        def on_event(event: worker_pb2.WorkerEvent) -> None:
            self._trace.on_event(event)
            if event.HasField("used"):
                self._bill.add(event.used)
            elif event.HasField("loaded"):
                self._inspected = asyncio.create_task(self._keep_inspection(event.loaded))
            else:
                recorder.on_event(event)

        with StageTimes(self._resources.meter, "compress", on_event) as times:
            done = await self._resources.site.compress(self._assignment(), times.on_event)
        files = [entry for artifact in done.artifacts for entry in artifact.files]
        return Outcome(
            SUCCEEDED,
            artifacts=tuple(done.artifacts),
            summary=done.summary,
            blobs=unique(BlobKey.of(entry.digest) for entry in files),
            made_by=done.made_by,
        )

    def _assignment(self) -> site_pb2.Assignment:
        settings, job = self._resources.settings, self._record.message
        time_s = settings.run_time_limit_s
        if job.spec.HasField("run_timeout"):
            time_s = min(time_s, job.spec.run_timeout.ToMilliseconds() / 1000)
        return site_pb2.Assignment(
            job=job,
            model=self._record.manifest,
            project=self._record.project,
            time_limit_s=time_s,
            memory_limit_bytes=settings.worker_memory_bytes,
            traced=self._trace.asks,
            growth=self._growth,
        )

    async def _keep_inspection(self, found: worker_pb2.InspectResult) -> None:
        try:
            await self._models.finish_inspection(self._record.message.spec.model.rpartition("/")[2], _judged(found))
        except Exception:  # the model stays PROCESSING and is inspected by itself when the job has ended
            logger.exception("job %s: the inspection of its model could not be stored", self._record.id)

    def _lost(self, error: WorkerLostError, recorder: JobRecorder) -> Outcome | Again:
        job = self._record.message
        if not error.own and job.excused_losses < MAX_EXCUSED_LOSSES:
            recorder.log("WARNING", f"{error} It is tried again; this costs the job no attempt.")
            return Again(Postpone.LOSS, excused=True)
        if error.reason == CRASHED and job.attempt < job.spec.max_attempts:
            recorder.log("WARNING", f"Attempt {job.attempt} of {job.spec.max_attempts}: {error} It is tried again.")
            return Again(Postpone.LOSS, count_attempt=True)
        recorder.log("ERROR", f"Attempt {job.attempt} of {job.spec.max_attempts}: {error}")
        return Outcome(FAILED, error=_lost_status(error))

    async def _store(self, ending: Outcome | Again) -> None:
        while True:
            try:
                await self._store_once(ending)
                return
            except (errors.StorageFullError, errors.ServerBusyError) as error:
                if self._stop == "drain":
                    return  # still RUNNING on disk: the next server queues it again
                logger.warning("job %s: its end cannot be stored yet: %s", self._record.id, error)
                await asyncio.sleep(STORE_RETRY_S)
            except Exception:
                if isinstance(ending, Outcome) and ending.state == FAILED:
                    raise
                # Whatever is wrong with this result, the job must not stay RUNNING.
                ending = Outcome(FAILED, error=_incident(f"the end of job {self._record.id}"))

    async def _store_once(self, ending: Outcome | Again) -> None:
        lease = self._record.lease
        if isinstance(ending, Outcome):
            if not await self._jobs.finish(lease, ending):
                logger.warning("job %s: its end does not count, another server has it", lease.job_id)
            return
        log = []
        if ending.why is Postpone.DRAIN:
            log = [LogLine(now_us(), "WARNING", "The server shut down; the job is queued again.")]
        await self._jobs.requeue(lease, count_attempt=ending.count_attempt, excused=ending.excused, log=log)


def _told(ending: Outcome | Again) -> tuple[str, str]:
    """What a trace says of the end of a run."""
    if isinstance(ending, Again):
        return "QUEUED", ending.why.name
    return job_state_name(ending.state), errors.reason_of(ending.error) if ending.error is not None else ""


class Bill:
    """What one task takes, noted for its project while it runs: `async with` around the task.

    `count_run`: the task is a run of a job, and counts as one when it has used anything.
    """

    def __init__(self, usage: UsageStore, project: str, *, count_run: bool) -> None:
        self._usage = usage
        self._project = project
        self._run_to_count = count_run
        self._unpaid = worker_pb2.Used()
        self._paying: asyncio.Task[None]

    def add(self, used: worker_pb2.Used) -> None:
        """It took so much more."""
        self._unpaid.cpu_seconds += used.cpu_seconds
        self._unpaid.run_seconds += used.run_seconds

    async def __aenter__(self) -> Bill:
        self._paying = asyncio.create_task(self._pay_regularly())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._paying.cancel()
        await asyncio.wait([self._paying])
        await self._pay()

    async def _pay_regularly(self) -> None:
        while True:
            await asyncio.sleep(CHARGE_INTERVAL_S)
            await uninterrupted(self._pay())

    async def _pay(self) -> None:
        """A full disk costs the note, not the task's result."""
        if self._unpaid.run_seconds <= 0:
            return
        unpaid, runs = self._unpaid, int(self._run_to_count)
        self._unpaid, self._run_to_count = worker_pb2.Used(), False
        try:
            await self._usage.add(self._project, runs=runs, cpu_s=unpaid.cpu_seconds, run_s=unpaid.run_seconds)
        except Exception as error:  # noqa: BLE001  # as the docstring says
            logger.warning("project %s: what a task took could not be noted: %s", self._project, error)


async def inspect_model(
    resources: RunResources,
    record: ModelRecord,
    on_event: Callable[[worker_pb2.WorkerEvent], None],
    *,
    growth: int = 1,
) -> model_service_pb2.Model:
    """Has a model inspected; state, format, inspection and error of the answer are what was found.

    `growth`: it needs so many times the usual room.

    Raises PostponedError where that is not possible now.
    """
    attempt = 1
    while True:
        try:
            return await _inspect_once(resources, record, on_event, growth)
        except WorkerLostError as error:
            logger.warning("model %s: inspection %d: %s", record.id, attempt, error)
            if not error.own:
                raise PostponedError(Postpone.LOSS) from error
            if error.reason != CRASHED or attempt == INSPECT_ATTEMPTS:
                return _Model(state=_Model.STATE_REJECTED, error=_lost_status(error))
            attempt += 1
        except TaskFailedError as error:
            return _Model(state=_Model.STATE_REJECTED, error=error.status)
        except PostponedError:
            raise
        except Exception as error:  # whatever it is, the model must not stay PROCESSING for ever
            why = postponement_of(error)
            if why is not None:
                raise PostponedError(why) from error
            return _Model(state=_Model.STATE_REJECTED, error=_status_of(error, f"model {record.id}"))


async def _inspect_once(
    resources: RunResources, record: ModelRecord, on_event: Callable[[worker_pb2.WorkerEvent], None], growth: int
) -> model_service_pb2.Model:
    task = site_pb2.Assignment(
        model=record.message,
        project=record.project,
        time_limit_s=resources.settings.inspect_time_limit_s,
        memory_limit_bytes=resources.settings.worker_memory_bytes,
        growth=growth,
    )
    with StageTimes(resources.meter, "inspect", on_event) as times:
        return _judged(await resources.site.inspect(task, times.on_event))


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


def _status_of(error: Exception, what: str) -> status_pb2.Status:
    return errors.status_of(error) if isinstance(error, errors.ServiceError) else _incident(what)


def _incident(what: str) -> status_pb2.Status:
    internal = errors.InternalError()
    logger.exception("incident %s in %s", internal.incident, what)
    return errors.status_of(internal)
