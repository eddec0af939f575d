"""What a store keeps and does: frozen records, and protocols that SQL and the file system implement.

Every method is a coroutine and one transaction: after a kill it has happened as a whole or not at all. A record holds
the protobuf message of its resource; treat it as read-only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, ParamSpec, Protocol, TypeVar

from google.rpc import status_pb2
from modelpress_protos.v1 import common_pb2, job_service_pb2, model_service_pb2, upload_service_pb2

Item = TypeVar("Item")
Parameters = ParamSpec("Parameters")

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
class BlobKey:
    """Identity of a blob: SHA-256 (32 bytes) and length."""

    sha256: bytes
    size_bytes: int

    @classmethod
    def of(cls, digest: common_pb2.Digest) -> BlobKey:
        return cls(digest.sha256, digest.size_bytes)

    def to_digest(self) -> common_pb2.Digest:
        return common_pb2.Digest(sha256=self.sha256, size_bytes=self.size_bytes)


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A client's request id with the hash of what it asked for."""

    request_id: str
    payload_sha256: bytes


@dataclass(frozen=True, slots=True)
class Term:
    """A comparison: `field` is state, model (its id), label (of `key`), create_time or end_time (microseconds).

    `operator`: = != < <= > >=, and : for a label that is there with any value. A label that is not there is not equal
    to any value; a time that is not there compares with nothing.
    """

    field: str
    operator: str
    value: str | int
    key: str = ""


@dataclass(frozen=True, slots=True)
class ListQuery:
    """One page of a list, newest first; `before_id` is the last id of the page before.

    `projects`: of which; None: of all. `where`: of each clause, one term holds.
    """

    projects: tuple[str, ...] | None
    page_size: int
    before_id: str | None = None
    where: tuple[tuple[Term, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Items of one page, and whether others follow."""

    items: tuple[Item, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model. `inspection_key` is the same for models that an inspection must find the same of.

    `owner`: the server that inspects it.
    """

    project: str
    id: str
    version: int
    inspection_key: bytes
    message: model_service_pb2.Model
    owner: str | None = None

    def to_message(self) -> model_service_pb2.Model:
        """A copy for the client."""
        copy = model_service_pb2.Model()
        copy.CopyFrom(self.message)
        copy.etag = etag(self.version)
        return copy


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
class UploadRecord:
    """An upload; times in microseconds since the epoch."""

    project: str
    id: str
    blob: BlobKey
    state: upload_service_pb2.Upload.State.ValueType
    committed_size: int
    create_time_us: int
    expire_time_us: int


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
class Sweep:
    """What a clean-up of the records removed."""

    blobs: tuple[BlobKey, ...] = ()
    uploads: tuple[str, ...] = ()
    jobs_compacted: int = 0


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """What a project has now (`jobs` by state), and has used so far: runs of jobs, and the time of its workers."""

    stored_bytes: int
    blobs: int
    models: int
    uploads: int
    jobs: Mapping[int, int]
    runs: int
    cpu_s: float
    run_s: float


@dataclass(frozen=True, slots=True)
class StateChange:
    """A job or model is in another state. `state`: SUCCEEDED, ACTIVE and so on; `reason`: of its error, if any.

    `wait_s`: from the creation to the first start, when that has come; `run_s`: from the last start to the end, when
    that has come.
    """

    kind: Literal["job", "model"]
    project: str
    id: str
    state: str
    reason: str = ""
    created: bool = False
    from_cache: bool = False
    attempt: int = 0
    wait_s: float | None = None
    run_s: float | None = None


@dataclass(frozen=True, slots=True)
class Queue:
    """The queued jobs of one project: how many, and how old the oldest is."""

    jobs: int
    oldest_age_s: float


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """What a store holds. `jobs`, `models`: by state (RUNNING, ACTIVE and so on); `queues`: by project."""

    jobs: Mapping[str, int]
    models: Mapping[str, int]
    queues: Mapping[str, Queue]
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What came of asking for the next job: one to run, and jobs that ended without running."""

    job: JobRecord | None
    ended: tuple[str, ...] = field(default=())


# Orders projects that have something waiting, the oldest first, by whose turn it is; leaves out who may not start more.
Rank = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True, slots=True)
class ModelQuota:
    """Most models of a project, and most of them that wait for inspection; 0: no limit."""

    models: int = 0
    pending: int = 0


@dataclass(frozen=True, slots=True)
class StorageQuota:
    """Most unfinished uploads of a project, and most bytes that it has stored; 0: no limit."""

    uploads: int = 0
    size_bytes: int = 0


class ModelStore(Protocol):
    """Models of all projects."""

    async def create(
        self, record: ModelRecord, blobs: Collection[BlobKey], request: RequestKey | None, *, most: ModelQuota
    ) -> ModelRecord:
        """Stores a model, or returns the one that the request id made before.

        An earlier inspection of the same content in the same project is taken over. Raises BlobMissingError,
        RequestIdReusedError, QuotaExceededError.
        """
        ...

    async def get(self, project: str, model_id: str) -> ModelRecord:
        """Raises ResourceNotFoundError."""
        ...

    async def list_page(self, query: ListQuery) -> Page[ModelRecord]:
        """One page, newest first."""
        ...

    async def update(
        self, project: str, model_id: str, etag: str, change: Callable[[model_service_pb2.Model], None]
    ) -> ModelRecord:
        """Applies a change. Raises ResourceNotFoundError, EtagMismatchError."""
        ...

    async def delete(self, project: str, model_id: str, etag: str) -> None:
        """Raises ResourceNotFoundError, EtagMismatchError."""
        ...

    async def claim_inspection(self, busy: Collection[str], rank: Rank, owner: str) -> ModelRecord | None:
        """Takes the oldest model of the first ranked project that has one to inspect, for the server `owner`.

        Not one in `busy`, nor one that another server inspects or a running job inspects anyway.
        """
        ...

    async def processing_positions(self) -> dict[str, int]:
        """About how many inspections come before that of each model, when projects take turns one by one."""
        ...

    async def finish_inspection(self, model_id: str, found: model_service_pb2.Model) -> None:
        """Stores state, format, inspection and error of `found`; nothing where the model is gone or was inspected."""
        ...


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


class ServerStore(Protocol):
    """The servers that share a store. Each renews its lease; whose lease is over has lost what it had claimed."""

    async def renew(self, server_id: str, lease_s: float) -> bool:
        """The server lives for so long at least. False: its lease was over, or this is its first."""
        ...

    async def remove(self, server_id: str) -> None:
        """The server is gone, and what it had claimed is free."""
        ...

    async def remove_others(self, server_id: str) -> None:
        """No other server lives: this one alone may have the store."""
        ...


class BlobIndex(Protocol):
    """Which project may see which blob, and the uploads under way."""

    async def visible(self, project: str, blobs: Collection[BlobKey], *, touch_us: int | None) -> set[BlobKey]:
        """Those of `blobs` that the project has; extends their life from `touch_us` on, unless it is None."""
        ...

    async def create_upload(
        self, record: UploadRecord, *, present: bool, most: StorageQuota, left_bytes: int
    ) -> UploadRecord:
        """Stores an upload, or returns the unfinished or completed one of the same digest.

        `present`: the project has the blob, so that the upload is complete from the start. `left_bytes`: room on the
        disk that is promised to nobody. Raises QuotaExceededError, StorageFullError.
        """
        ...

    async def list_uploads(self, query: ListQuery) -> Page[UploadRecord]:
        """One page, newest first."""
        ...

    async def idle_uploads(self, project: str, expire_before_us: int) -> list[str]:
        """Ids of the unfinished uploads of a project that expire before, those that have been idle longest first."""
        ...

    async def get_upload(self, project: str, upload_id: str) -> UploadRecord:
        """Raises UploadExpiredError."""
        ...

    async def take_upload(self, project: str, upload_id: str, writer: str) -> UploadRecord:
        """Makes `writer` the one whose bytes count, instead of one on another server. Raises UploadExpiredError."""
        ...

    async def commit_upload(self, upload_id: str, writer: str, committed_size: int, expire_time_us: int) -> bool:
        """Notes how many bytes are durable. False: another writer has the upload."""
        ...

    async def complete_upload(self, upload_id: str, now_us: int) -> UploadRecord:
        """The blob is stored: the upload is COMPLETED and the project sees the blob."""
        ...

    async def cancel_upload(self, project: str, upload_id: str) -> UploadRecord:
        """ACTIVE -> CANCELLED; a COMPLETED one is returned unchanged. Raises UploadExpiredError."""
        ...

    async def active_uploads(self) -> set[str]:
        """Ids of the uploads that take bytes."""
        ...

    async def awaited_bytes(self) -> int:
        """What the unfinished uploads of all projects still have to send."""
        ...

    async def known(self, blobs: Collection[BlobKey]) -> set[BlobKey]:
        """Those of `blobs` that any project has."""
        ...

    async def drop_unknown(self, blob: BlobKey, drop: Callable[[], None]) -> bool:
        """Calls `drop` if no project has the blob, and none can get it meanwhile; whether it was called."""
        ...

    async def renew(self, used_us: int, *, upload_expire_us: int) -> None:
        """Unused blobs and request ids count as used then, uploads expire then, where that is later than before."""
        ...

    async def undo_future(self, now_us: int, *, upload_expire_us: int) -> None:
        """Nothing was used later than `now_us`, and no upload lives longer than `upload_expire_us`: clocks err."""
        ...

    async def sweep(self, *, blobs_before_us: int, events_before_us: int, now_us: int) -> Sweep:
        """Forgets unused blobs, expired uploads, the events of old jobs and old request ids."""
        ...


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event for one place. `attempts`: so many have failed."""

    id: str
    attempts: int
    body: bytes


class OutboxStore(Protocol):
    """Events for places that are told when jobs end."""

    async def lend_events(self, endpoint: str, due_us: int, until_us: int, limit: int) -> list[StoredEvent]:
        """Those that are due, the longest first; they are due again at `until_us`, unless they were removed."""
        ...

    async def next_event_us(self, endpoint: str) -> int | None:
        """When the next one is due."""
        ...

    async def postpone_event(self, endpoint: str, event_id: str, due_us: int) -> None:
        """It did not arrive."""
        ...

    async def remove_event(self, endpoint: str, event_id: str) -> None:
        """It has arrived, or will not."""
        ...

    async def drop_events(self, before_us: int) -> int:
        """Gives up what was stored before; returns how many."""
        ...


class UsageStore(Protocol):
    """What projects have used."""

    async def add(self, project: str, *, runs: int, cpu_s: float, run_s: float) -> None:
        """Adds to what a project has used."""
        ...

    async def of(self, project: str) -> UsageRecord:
        """What a project has and has used; nothing for one that was never seen."""
        ...


class StoreOverview(Protocol):
    """All projects together, for those who run the server."""

    async def ping(self) -> None:
        """Returns when the store has answered."""
        ...

    async def figures(self) -> StoreFigures:
        """Counts; takes time that grows with what is stored."""
        ...

    async def jobs_by_project(self) -> Mapping[str, Mapping[str, int]]:
        """Of each project with jobs, how many are in each state (RUNNING and so on)."""
        ...


class Retention(Protocol):
    """Deletes what has had its time, some at once, but nothing that is labelled `pin`. Returns how many."""

    async def projects(self) -> list[str]:
        """Those that have jobs or models."""
        ...

    async def expire_jobs(self, project: str, ended_before_us: int) -> int:
        """Jobs that ended before."""
        ...

    async def expire_models(self, project: str, unused_since_us: int) -> int:
        """Models that neither changed nor had a job since then."""
        ...


class PartialBlob(Protocol):
    """The bytes of an unfinished upload with the hash of them; one writer at a time."""

    @property
    def size_bytes(self) -> int:
        """How many bytes there are, durable or not."""
        ...

    async def open(self, committed_size: int) -> None:
        """Goes on at the durable length, also where another server wrote what is there.

        Raises FileNotFoundError where less is there.
        """
        ...

    async def append(self, data: bytes) -> None:
        """Writes and hashes. Raises StorageFullError, ServerBusyError; then nothing of `data` counts."""
        ...

    async def sync(self) -> None:
        """Returns when all bytes so far are durable. Raises StorageFullError, ServerBusyError."""
        ...

    def digest(self) -> bytes:
        """SHA-256 of all bytes so far."""
        ...

    def close(self) -> None:
        """Nobody writes for now; the hash is kept for the next writer."""
        ...


class BlobReader(Protocol):
    """A blob that is open to be read."""

    async def read(self, offset: int, size_bytes: int) -> bytes:
        """So many bytes from `offset` on, fewer at the end."""
        ...

    def close(self) -> None:
        """Lets go of it."""
        ...


class BlobStore(Protocol):
    """Blobs: there whole or not at all. A folder of one server, or a bucket that servers share."""

    @property
    def shared(self) -> bool:
        """Whether other servers use it as well, and nothing of it lies on this machine's disk."""
        ...

    async def open(self) -> None:
        """Gets ready. Raises SettingsError where it cannot be used."""
        ...

    async def close(self) -> None:
        """Waits for what runs."""
        ...

    async def run(
        self, function: Callable[Parameters, Item], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Item:
        """Runs file work in one of the store's threads."""
        ...

    async def ping(self) -> None:
        """Returns when the store has answered. Raises ServerBusyError, StorageFullError."""
        ...

    def partial(self, upload_id: str) -> PartialBlob:
        """An unfinished upload."""
        ...

    async def remove_partial(self, upload_id: str) -> None:
        """Frees what an upload takes."""
        ...

    async def partial_ids(self) -> set[str]:
        """Uploads that take anything."""
        ...

    async def publish(self, upload_id: str, blob: BlobKey) -> None:
        """Makes a verified, complete, durable upload the blob."""
        ...

    async def has(self, blob: BlobKey) -> bool:
        """Whether the blob is there."""
        ...

    def is_there(self, blob: BlobKey) -> bool:
        """`has` for a thread that may wait."""
        ...

    async def require(self, blobs: Collection[BlobKey]) -> None:
        """Raises BlobMissingError where one of them is not there: it was damaged and set aside, or is lost."""
        ...

    async def open_blob(self, blob: BlobKey) -> BlobReader:
        """Opens a blob to read it. Raises BlobMissingError."""
        ...

    async def place(self, blob: BlobKey, target: Path, *, link: bool) -> None:
        """Gives a blob another name, or copies it, and verifies what lies there then.

        Raises BlobMissingError, BlobDamagedError, StorageFullError.
        """
        ...

    async def ingest(self, folder: Path, path: str, *, max_bytes: int) -> BlobKey:
        """Takes a worker's file: regular files below `folder` only. Raises ArtifactError, StorageFullError."""
        ...

    async def quarantine(self, blob: BlobKey) -> None:
        """Sets a damaged blob aside: from now on it is missing, and uploading it again heals it."""
        ...

    async def empty_quarantine(self, time_s: float) -> None:
        """Removes what was set aside before `time_s`."""
        ...

    async def undo_future(self, now_s: float) -> None:
        """No blob was published later than `now_s`: clocks err."""
        ...

    def remove_older_than(self, blob: BlobKey, time_s: float) -> None:
        """Removes a blob unless it was published since `time_s`; for a thread that may wait."""
        ...

    async def older_than(self, time_s: float) -> list[BlobKey]:
        """Blobs that were published before `time_s`."""
        ...


def etag(version: int) -> str:
    """The etag of a version."""
    return f"v{version}"
