"""Records of jobs, with their events and logs; `sql_jobs` implements the store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from google.rpc import status_pb2
from modelpress_protos.v1 import job_service_pb2, model_service_pb2

from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.queries import ListQuery, Page, Rank, RequestKey, etag

ENDED_STATES = frozenset(
    {
        job_service_pb2.JOB_STATE_SUCCEEDED,
        job_service_pb2.JOB_STATE_FAILED,
        job_service_pb2.JOB_STATE_CANCELLED,
        job_service_pb2.JOB_STATE_EXPIRED,
    }
)
# So often a job may be lost through no fault of its own. One that takes the machine down comes to an end after these.
MAX_EXCUSED_LOSSES = 10


@dataclass(frozen=True, slots=True)
class Lease:
    """One claim of a job. `fence` counts its claims: who has an earlier one has lost the job, and changes nothing."""

    job_id: str
    fence: int


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job. `manifest` is its model as it was when the job was created, so that the model may be deleted.

    `owner`: the server that runs it; `fence`: how often it was claimed.
    """

    project: str
    id: str
    version: int
    cache_key: bytes
    last_sequence: int
    compacted_sequence: int
    message: job_service_pb2.Job
    manifest: model_service_pb2.Model
    owner: str | None = None
    fence: int = 0

    @property
    def lease(self) -> Lease:
        """That of its last claim."""
        return Lease(self.id, self.fence)

    @property
    def ended(self) -> bool:
        """Whether its state is final."""
        return self.message.state in ENDED_STATES

    def to_message(self, queue_position: int = 0) -> job_service_pb2.Job:
        """A copy for the client."""
        copy = job_service_pb2.Job()
        copy.CopyFrom(self.message)
        copy.etag = etag(self.version)
        copy.last_sequence = self.last_sequence
        if queue_position:
            copy.progress.queue_position = queue_position
        return copy


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a job's log."""

    time_us: int
    severity: str
    text: str
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: `state` with an `error`, or with artifacts, whose blobs become the project's.

    `made_by`: what a result depends on besides what was asked for, by which it is found again (`toolchain.made_by`).
    """

    state: job_service_pb2.JobState.ValueType
    error: status_pb2.Status | None = None
    artifacts: tuple[job_service_pb2.Artifact, ...] = ()
    summary: job_service_pb2.ReportSummary | None = None
    blobs: tuple[BlobKey, ...] = ()
    log: tuple[LogLine, ...] = ()
    made_by: bytes = b""


@dataclass(frozen=True, slots=True)
class Claim:
    """What came of asking for the next job: one to run, and jobs that ended without running."""

    job: JobRecord | None
    ended: tuple[str, ...] = field(default=())


class JobStore(Protocol):
    """Jobs of all projects, with their events and logs."""

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
        """Stores a job, or returns the one that the request id made before.

        Ends it at once with the result of an earlier identical job, unless it says skip_cache or `is_there` misses a
        part of that result. Raises BlobMissingError, RequestIdReusedError, QueueFullError, StoredQuotaError,
        ResourceNotFoundError, ModelRejectedError.
        """
        ...

    async def get(self, project: str, job_id: str) -> JobRecord:
        """Raises ResourceNotFoundError."""
        ...

    async def list_page(self, query: ListQuery) -> Page[JobRecord]:
        """One page, newest first."""
        ...

    async def delete(self, project: str, job_id: str, etag: str) -> None:
        """Raises ResourceNotFoundError, EtagMismatchError, WrongStateError."""
        ...

    async def queue_positions(self) -> dict[str, int]:
        """About how many jobs are ahead of each queued job, when projects take turns one by one."""
        ...

    def queue_version(self) -> int | None:
        """Another number whenever the queue may be another one; None: that is not known here."""
        ...

    async def counts(self) -> tuple[int, int]:
        """How many jobs are queued, and how many run."""
        ...

    async def claim(self, now_us: int, rank: Rank, owner: str, waiting: Collection[str] = ()) -> Claim:
        """Takes a queued job of the first ranked project for the server `owner`: RUNNING, one attempt more.

        Of a project's jobs, the one with the highest priority, then the oldest; those in `waiting` are passed over.
        Whoever claims at the same time gets another one.

        Queued jobs of a rejected model end as FAILED, overdue ones as EXPIRED.
        """
        ...

    async def held(self, owner: str) -> Mapping[Lease, int]:
        """What a server has claimed and not ended, with the state of each job."""
        ...

    async def expire_overdue(self, now_us: int) -> tuple[str, ...]:
        """Ends queued jobs whose queue_timeout is over; returns their ids."""
        ...

    async def next_queue_deadline_us(self) -> int | None:
        """When the next queued job expires."""
        ...

    async def progress(
        self, lease: Lease, events: Sequence[job_service_pb2.WatchJobResponse], log: Sequence[LogLine]
    ) -> bool:
        """Appends events and log lines; the last progress event becomes the job's progress.

        False: the lease is lost, and nothing was stored. So it is with `finish` and `requeue`.
        """
        ...

    async def set_labels(self, project: str, job_id: str, etag: str, labels: Mapping[str, str] | None) -> JobRecord:
        """Replaces the labels. Raises ResourceNotFoundError, EtagMismatchError."""
        ...

    async def request_cancel(self, project: str, job_id: str) -> JobRecord:
        """QUEUED -> CANCELLED, RUNNING -> CANCELLING; others unchanged. Raises ResourceNotFoundError."""
        ...

    async def finish(self, lease: Lease, outcome: Outcome) -> bool:
        """Ends a job that runs; a CANCELLING one ends as CANCELLED, whatever the outcome."""
        ...

    async def requeue(
        self, lease: Lease, *, count_attempt: bool, excused: bool = False, log: Sequence[LogLine] = ()
    ) -> bool:
        """Puts a job that runs back into the queue; a CANCELLING one ends as CANCELLED.

        `excused`: it was lost through no fault of its own, which is counted apart.
        """
        ...

    async def recover(self, *, excused: bool = False) -> int:
        """Queues again what dead servers left running, or fails what has used up its attempts; returns how many.

        Dead is a server whose lease is over. `excused`: the machine was restarted, which is not the jobs' doing.
        """
        ...

    async def events(self, job_id: str, after_sequence: int, limit: int) -> list[job_service_pb2.WatchJobResponse]:
        """Events in order."""
        ...

    async def logs(self, job_id: str, after_sequence: int, limit: int) -> list[LogLine]:
        """Log lines in order."""
        ...
