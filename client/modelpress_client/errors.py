"""Everything that this package raises on purpose.

    ModelpressError                exit code of the CLI: 1
    ├── UsageError                 2  an argument is wrong, or the resource is not in a state for this call
    │   ├── InvalidRecipeError     2  .violations lists all that is wrong
    │   ├── MissingExtraError      2  a package is missing; the message has the pip line
    │   └── NotFoundError          2  no such model, job or preset
    ├── UnusableInputError         2  the model or the data cannot be used
    ├── AuthenticationError        3  not authenticated, or not allowed
    ├── ServerUnreachableError     4  no server there, or it went away for too long
    ├── TimedOutError              5
    ├── TransferError              1  the bytes did not get through, or to the disk
    ├── QuotaError                 1  a limit of the server
    ├── ServerError                1  a bug or a breakdown of the server
    └── JobError                   1  the job did not succeed
        ├── JobFailedError         1, or 2 where the model or the data is the cause
        ├── JobCancelledError      1
        └── JobExpiredError        1

Every exception has `reason` (for machines: the server's ErrorReason or one of ours), `details`, and `exit_code`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

if TYPE_CHECKING:
    import grpc
    from google.rpc.status_pb2 import Status
    from modelpress_protos.schema import Violation

EXIT_CONSTRAINT_NOT_MET = 6
EXIT_INTERRUPTED = 130
ERROR_DOMAIN = "modelpress"


class ModelpressError(Exception):
    """Base of all. `str(error)` is one short paragraph: what happened, where, what to do."""

    default_reason: ClassVar[str] = "ERROR"
    default_exit_code: ClassVar[int] = 1

    def __init__(
        self, message: str, *, reason: str = "", details: Mapping[str, object] | None = None, retry: Retry | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.details = dict(details or {})
        self.retry = retry
        """How the call may be repeated; None: repeating it would change nothing."""

    @property
    def exit_code(self) -> int:
        """Exit code of the CLI."""
        return self.default_exit_code


@dataclass(frozen=True)
class Retry:
    """That a call may be repeated, and when: after `delay_s`, or 0 where the client may choose."""

    delay_s: float = 0.0


class UsageError(ModelpressError):
    """An argument is wrong, or the resource is not in a state for this call."""

    default_reason = "USAGE"
    default_exit_code = 2


class InvalidRecipeError(UsageError):
    """The recipe breaks the rules; `violations` lists everything that is wrong."""

    default_reason = "INVALID_FIELDS"

    def __init__(self, message: str, violations: Sequence[Violation] = ()) -> None:
        listed = [{"field": item.path, "description": item.description} for item in violations]
        super().__init__(message, details={"violations": listed})
        self.violations = tuple(violations)


class MissingExtraError(UsageError):
    """A package that only some users need is missing."""

    default_reason = "MISSING_PACKAGE"


class NotFoundError(UsageError):
    """No such model, job, upload or preset in this project."""

    default_reason = "RESOURCE_NOT_FOUND"


class UnusableInputError(ModelpressError):
    """The model or the data cannot be used."""

    default_reason = "UNSUPPORTED_FORMAT"
    default_exit_code = 2


class AuthenticationError(ModelpressError):
    """The server does not know who calls, or does not allow it."""

    default_reason = "UNAUTHENTICATED"
    default_exit_code = 3


class ServerUnreachableError(ModelpressError):
    """No server answers at that address."""

    default_reason = "SERVER_UNREACHABLE"
    default_exit_code = 4


class TimedOutError(ModelpressError):
    """The caller's own time limit ran out."""

    default_reason = "TIMED_OUT"
    default_exit_code = 5


class TransferError(ModelpressError):
    """The bytes did not get through, or to the disk."""

    default_reason = "TRANSFER_FAILED"


class QuotaError(ModelpressError):
    """A limit of the server: size, number, queue, disk."""

    default_reason = "QUOTA_EXCEEDED"


class ServerError(ModelpressError):
    """A bug or a breakdown of the server."""

    default_reason = "INTERNAL"


class JobError(ModelpressError):
    """The job ended without a result."""

    default_reason = "JOB_FAILED"


class JobFailedError(JobError):
    """The job failed; `reason` says why."""

    @property
    def exit_code(self) -> int:
        """2 where the model, the data or the recipe is the cause, 1 otherwise."""
        return 2 if self.reason in INPUT_REASONS else 1


class JobCancelledError(JobError):
    """Somebody cancelled the job."""

    default_reason = "JOB_CANCELLED"


class JobExpiredError(JobError):
    """No worker was free within the job's queue timeout."""

    default_reason = "QUEUE_TIMEOUT"


# The one table: ErrorInfo.reason -> exception, whether a repeated call can succeed.
_BY_REASON: dict[str, tuple[type[ModelpressError], bool]] = {
    "CHUNK_CHECKSUM_MISMATCH": (TransferError, True),
    "DIGEST_MISMATCH": (TransferError, False),
    "OFFSET_MISMATCH": (TransferError, True),
    "UPLOAD_BUSY": (TransferError, True),
    "UPLOAD_EXPIRED": (TransferError, True),
    "UPLOAD_TOO_LARGE": (QuotaError, False),
    "UNSUPPORTED_FORMAT": (UnusableInputError, False),
    "MODEL_REJECTED": (UnusableInputError, False),
    "REQUEST_ID_REUSED": (UsageError, False),
    "ETAG_MISMATCH": (UsageError, False),
    "DRAINING": (ServerUnreachableError, True),
    "SERVER_BUSY": (ServerUnreachableError, True),
    "EVENTS_COMPACTED": (TransferError, False),
    "UNSUPPORTED_OPERATOR": (UnusableInputError, False),
    "INVALID_FIELDS": (UsageError, False),
    "INVALID_INPUTS": (UnusableInputError, False),
    "INVALID_DATA": (UnusableInputError, False),
    "MODEL_NOT_RUNNABLE": (UnusableInputError, False),
    "RESOURCE_NOT_FOUND": (NotFoundError, False),
    "WRONG_STATE": (UsageError, False),
    "STORAGE_FULL": (QuotaError, False),
    "INTERNAL": (ServerError, False),
    "BLOB_MISSING": (TransferError, False),
    "UPLOAD_IDLE": (TransferError, True),
    "UNAUTHENTICATED": (AuthenticationError, False),
    "PERMISSION_DENIED": (AuthenticationError, False),
    "TOO_MANY_ATTEMPTS": (AuthenticationError, False),
    "METRIC_FAILED": (UsageError, False),
}
INPUT_REASONS = frozenset(
    reason for reason, (kind, _) in _BY_REASON.items() if kind is UnusableInputError or reason == "INVALID_FIELDS"
)
# Where the server gave no reason (a proxy answered, or gRPC itself): status code name -> the same.
# INTERNAL and CANCELLED without a reason come from a stream that broke on the way.
_BY_CODE: dict[str, tuple[type[ModelpressError], bool]] = {
    "CANCELLED": (TransferError, True),
    "UNKNOWN": (ServerError, False),
    "INTERNAL": (ServerError, True),
    "DATA_LOSS": (TransferError, True),
    "UNAVAILABLE": (ServerUnreachableError, True),
    "ABORTED": (TransferError, True),
    "DEADLINE_EXCEEDED": (ServerUnreachableError, True),
    "UNAUTHENTICATED": (AuthenticationError, False),
    "PERMISSION_DENIED": (AuthenticationError, False),
    "NOT_FOUND": (NotFoundError, False),
    "INVALID_ARGUMENT": (UsageError, False),
    "FAILED_PRECONDITION": (UsageError, False),
    "ALREADY_EXISTS": (UsageError, False),
    "OUT_OF_RANGE": (TransferError, False),
    "RESOURCE_EXHAUSTED": (QuotaError, False),
    "UNIMPLEMENTED": (ServerError, False),
}
_HINTS: dict[type[ModelpressError], str] = {
    AuthenticationError: "Pass --token or set COMPRESS_TOKEN (in Python: token=...).",
}


@dataclass(frozen=True)
class StatusDetails:
    """What the details of a google.rpc.Status say."""

    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: tuple[dict[str, str], ...] = ()
    retry_delay_s: float | None = None


def status_details(status: Status) -> StatusDetails:
    """Reads ErrorInfo, BadRequest, QuotaFailure and RetryInfo of a status."""
    from google.rpc import error_details_pb2

    reason, metadata, violations, delay = "", {}, [], None
    for packed in status.details:
        info, bad, quota = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.QuotaFailure(),
        )
        retry = error_details_pb2.RetryInfo()
        if packed.Unpack(info) and info.domain == ERROR_DOMAIN:
            reason, metadata = info.reason.removeprefix("ERROR_REASON_"), dict(info.metadata)
        elif packed.Unpack(bad):
            violations += [{"field": item.field, "description": item.description} for item in bad.field_violations]
        elif packed.Unpack(quota):
            violations += [{"subject": item.subject, "description": item.description} for item in quota.violations]
        elif packed.Unpack(retry):
            delay = retry.retry_delay.ToTimedelta().total_seconds()
    return StatusDetails(reason, metadata, tuple(violations), delay)


def from_rpc_error(error: grpc.aio.AioRpcError, *, server: str) -> ModelpressError:
    """The exception for a failed call."""
    from google.rpc.status_pb2 import Status

    details = StatusDetails()
    # grpc-stubs types the metadata of an error as its item.
    for key, value in cast(Any, error.trailing_metadata()) or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            details = status_details(Status.FromString(value))
    code = error.code().name
    kind, retryable = _BY_REASON.get(details.reason) or _BY_CODE.get(code, (ServerError, False))
    text = error.details() or "no further details"
    if kind is ServerUnreachableError and details.reason != "DRAINING":
        text = f"The server at {server} does not answer: {text}"
    described: dict[str, object] = {"status": code, **details.metadata}
    if details.violations:
        described["violations"] = list(details.violations)
    # Of a reason that is known, the table says whether waiting helps: nobody makes room on a full disk meanwhile.
    retryable = retryable or (details.reason not in _BY_REASON and details.retry_delay_s is not None)
    return kind(
        _paragraph(text, details, _HINTS.get(kind, "")),
        reason=details.reason if details.reason else "" if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED") else code,
        details=described,
        retry=Retry(details.retry_delay_s or 0.0) if retryable else None,
    )


def from_job_status(status: Status, *, details: Mapping[str, object]) -> JobFailedError:
    """The exception for a job that failed, or for a model that was refused."""
    found = status_details(status)
    described: dict[str, object] = {**details, **found.metadata}
    if found.violations:
        described["violations"] = list(found.violations)
    message = _paragraph(status.message or "The job failed without saying why; its log may.", found, "")
    return JobFailedError(message, reason=found.reason, details=described)


def _paragraph(text: str, details: StatusDetails, hint: str) -> str:
    listed = [f"{item.get('field') or item.get('subject')}: {item['description']}" for item in details.violations]
    # The server may have put the violations into the message already.
    unsaid = [item for item in listed if item not in text]
    # The server's own text may have the hint in its words.
    hinted = f"{text.rstrip('.')}. {hint}" if hint and "COMPRESS_TOKEN" not in text else text
    return "\n".join([hinted, *unsaid])
