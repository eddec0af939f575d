"""What can go wrong, and what a client sees of it.

    ServiceError
    ├── InvalidFieldsError          INVALID_ARGUMENT     INVALID_FIELDS, with every violation
    ├── RequestIdReusedError        INVALID_ARGUMENT     REQUEST_ID_REUSED
    ├── DigestMismatchError         INVALID_ARGUMENT     DIGEST_MISMATCH
    ├── UnauthenticatedError        UNAUTHENTICATED      UNAUTHENTICATED
    ├── PermissionDeniedError       PERMISSION_DENIED    PERMISSION_DENIED
    ├── ResourceNotFoundError       NOT_FOUND            RESOURCE_NOT_FOUND
    ├── UploadExpiredError          NOT_FOUND            UPLOAD_EXPIRED
    ├── BlobMissingError            FAILED_PRECONDITION  BLOB_MISSING
    ├── BlobDamagedError            FAILED_PRECONDITION  BLOB_MISSING
    ├── ModelRejectedError          FAILED_PRECONDITION  MODEL_REJECTED
    ├── WrongStateError             FAILED_PRECONDITION  WRONG_STATE
    ├── ChunkChecksumError          ABORTED              CHUNK_CHECKSUM_MISMATCH
    ├── UploadBusyError             ABORTED              UPLOAD_BUSY
    ├── EtagMismatchError           ABORTED              ETAG_MISMATCH
    ├── OffsetMismatchError         OUT_OF_RANGE         OFFSET_MISMATCH
    ├── EventsCompactedError        OUT_OF_RANGE         EVENTS_COMPACTED
    ├── UploadTooLargeError         RESOURCE_EXHAUSTED   UPLOAD_TOO_LARGE
    ├── QuotaExceededError          RESOURCE_EXHAUSTED   QUOTA_EXCEEDED
    ├── QueueFullError              RESOURCE_EXHAUSTED   QUEUE_FULL
    ├── StoredQuotaError            RESOURCE_EXHAUSTED   QUOTA_EXCEEDED
    ├── StorageFullError            RESOURCE_EXHAUSTED   STORAGE_FULL
    ├── TooManyAttemptsError        RESOURCE_EXHAUSTED   TOO_MANY_ATTEMPTS
    ├── DiskTooSmallError           RESOURCE_EXHAUSTED   STORAGE_FULL
    ├── UploadIdleError             DEADLINE_EXCEEDED    UPLOAD_IDLE
    ├── DrainingError               UNAVAILABLE          DRAINING
    ├── ServerBusyError             UNAVAILABLE          SERVER_BUSY
    └── InternalError               INTERNAL             INTERNAL, with an incident id

`status_of` is the only place that turns an exception into a `google.rpc.Status`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from modelpress_protos.printable import printable
from modelpress_protos.v1 import common_pb2

DOMAIN = "modelpress"
# Python gRPC refuses trailers over 16 KiB, and a long message turns into RESOURCE_EXHAUSTED at the client.
MAX_STATUS_BYTES = 4096
MAX_MESSAGE_CHARS = 1000
MAX_DETAIL_CHARS = 300
SHOWN_VIOLATIONS = 5  # in the message; BadRequest has all


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field of a request: its path and what is wrong with it."""

    field: str
    description: str


class ServiceError(Exception):
    """An error that a client is told of; the message is for people, `metadata` for programs."""

    def __init__(
        self, message: str, *, metadata: Mapping[str, str] | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s


class InvalidFieldsError(ServiceError):
    """One or more fields are wrong; all of them at once."""

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        shown = "; ".join(f"{item.field}: {item.description}" for item in violations[:SHOWN_VIOLATIONS])
        more = f"; and {len(violations) - SHOWN_VIOLATIONS} more" if len(violations) > SHOWN_VIOLATIONS else ""
        super().__init__(f"The request is not valid: {shown}{more}")
        self.violations = tuple(violations)


class RequestIdReusedError(ServiceError):
    """The request id belongs to another payload."""


class DigestMismatchError(ServiceError):
    """The complete content is not what was announced; the upload is gone."""


class UnauthenticatedError(ServiceError):
    """No token, or none that the server knows."""


class PermissionDeniedError(ServiceError):
    """The caller's role in the project does not allow this."""


class TooManyAttemptsError(ServiceError):
    """Too many wrong tokens came from this address."""


class ResourceNotFoundError(ServiceError):
    """No such resource in this project."""


class UploadExpiredError(ServiceError):
    """The upload expired or was cancelled."""


class BlobMissingError(ServiceError):
    """A blob that the request names is not there."""


class BlobDamagedError(ServiceError):
    """The stored bytes of a blob are no longer what their digest says; they were set aside."""


class ModelRejectedError(ServiceError):
    """The model was inspected and refused."""


class WrongStateError(ServiceError):
    """The resource is not in a state that allows this."""


class ChunkChecksumError(ServiceError):
    """A chunk does not match its CRC-32C."""


class UploadBusyError(ServiceError):
    """Another writer holds the upload."""


class EtagMismatchError(ServiceError):
    """The resource has changed since it was read."""


class OffsetMismatchError(ServiceError):
    """The offset is not where the upload or the blob stands."""


class EventsCompactedError(ServiceError):
    """Those events are no longer kept."""


class UploadTooLargeError(ServiceError):
    """Larger than the server accepts."""


class QuotaExceededError(ServiceError):
    """A per-project limit is reached; `subject` is the project."""

    def __init__(self, message: str, *, subject: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.subject = subject


class QueueFullError(QuotaExceededError):
    """Too many queued jobs."""


class StoredQuotaError(QuotaExceededError):
    """The project has stored as much as it may."""


class StorageFullError(ServiceError):
    """The disk is full."""


class DiskTooSmallError(ServiceError):
    """The disk could not hold it if it were empty: waiting does not help."""


class UploadIdleError(ServiceError):
    """No bytes came for too long."""


class DrainingError(ServiceError):
    """The server is shutting down."""


class ServerBusyError(ServiceError):
    """The machine is short of descriptors, processes or memory for the moment."""


class InternalError(ServiceError):
    """A bug of ours; the log has the details under the incident id."""

    def __init__(self) -> None:
        incident = secrets.token_hex(6)
        super().__init__(
            f"Internal error. The server's log has the details under incident {incident}.",
            metadata={"incident": incident},
        )
        self.incident = incident


_REASON = common_pb2.ErrorReason
_CODE = grpc.StatusCode
STATUS: Mapping[type[ServiceError], tuple[grpc.StatusCode, common_pb2.ErrorReason.ValueType]] = {
    InvalidFieldsError: (_CODE.INVALID_ARGUMENT, _REASON.ERROR_REASON_INVALID_FIELDS),
    RequestIdReusedError: (_CODE.INVALID_ARGUMENT, _REASON.ERROR_REASON_REQUEST_ID_REUSED),
    DigestMismatchError: (_CODE.INVALID_ARGUMENT, _REASON.ERROR_REASON_DIGEST_MISMATCH),
    UnauthenticatedError: (_CODE.UNAUTHENTICATED, _REASON.ERROR_REASON_UNAUTHENTICATED),
    PermissionDeniedError: (_CODE.PERMISSION_DENIED, _REASON.ERROR_REASON_PERMISSION_DENIED),
    TooManyAttemptsError: (_CODE.RESOURCE_EXHAUSTED, _REASON.ERROR_REASON_TOO_MANY_ATTEMPTS),
    ResourceNotFoundError: (_CODE.NOT_FOUND, _REASON.ERROR_REASON_RESOURCE_NOT_FOUND),
    UploadExpiredError: (_CODE.NOT_FOUND, _REASON.ERROR_REASON_UPLOAD_EXPIRED),
    BlobMissingError: (_CODE.FAILED_PRECONDITION, _REASON.ERROR_REASON_BLOB_MISSING),
    BlobDamagedError: (_CODE.FAILED_PRECONDITION, _REASON.ERROR_REASON_BLOB_MISSING),
    ModelRejectedError: (_CODE.FAILED_PRECONDITION, _REASON.ERROR_REASON_MODEL_REJECTED),
    WrongStateError: (_CODE.FAILED_PRECONDITION, _REASON.ERROR_REASON_WRONG_STATE),
    ChunkChecksumError: (_CODE.ABORTED, _REASON.ERROR_REASON_CHUNK_CHECKSUM_MISMATCH),
    UploadBusyError: (_CODE.ABORTED, _REASON.ERROR_REASON_UPLOAD_BUSY),
    EtagMismatchError: (_CODE.ABORTED, _REASON.ERROR_REASON_ETAG_MISMATCH),
    OffsetMismatchError: (_CODE.OUT_OF_RANGE, _REASON.ERROR_REASON_OFFSET_MISMATCH),
    EventsCompactedError: (_CODE.OUT_OF_RANGE, _REASON.ERROR_REASON_EVENTS_COMPACTED),
    UploadTooLargeError: (_CODE.RESOURCE_EXHAUSTED, _REASON.ERROR_REASON_UPLOAD_TOO_LARGE),
    QuotaExceededError: (_CODE.RESOURCE_EXHAUSTED, _REASON.ERROR_REASON_QUOTA_EXCEEDED),
    StoredQuotaError: (_CODE.RESOURCE_EXHAUSTED, _REASON.ERROR_REASON_QUOTA_EXCEEDED),
    QueueFullError: (_CODE.RESOURCE_EXHAUSTED, _REASON.ERROR_REASON_QUEUE_FULL),
    StorageFullError: (_CODE.RESOURCE_EXHAUSTED, _REASON.ERROR_REASON_STORAGE_FULL),
    DiskTooSmallError: (_CODE.RESOURCE_EXHAUSTED, _REASON.ERROR_REASON_STORAGE_FULL),
    UploadIdleError: (_CODE.DEADLINE_EXCEEDED, _REASON.ERROR_REASON_UPLOAD_IDLE),
    DrainingError: (_CODE.UNAVAILABLE, _REASON.ERROR_REASON_DRAINING),
    ServerBusyError: (_CODE.UNAVAILABLE, _REASON.ERROR_REASON_SERVER_BUSY),
    InternalError: (_CODE.INTERNAL, _REASON.ERROR_REASON_INTERNAL),
}


def code_of(error: ServiceError) -> grpc.StatusCode:
    """The gRPC code of an error."""
    return STATUS[type(error)][0]


def reason_name(reason: common_pb2.ErrorReason.ValueType) -> str:
    """Spelling of a reason in `ErrorInfo.reason`."""
    return common_pb2.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")


def status_of(error: ServiceError) -> status_pb2.Status:
    """The rich status of an error: ErrorInfo first, then what else helps; under 4 KiB as a whole."""
    code, reason = STATUS[type(error)]
    status = make_status(code, reason_name(reason), str(error), error.metadata)
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, QuotaExceededError):
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(subject=error.subject, description=clip(printable(str(error)), MAX_DETAIL_CHARS))
        _pack(status, quota)
    if isinstance(error, InvalidFieldsError):
        _pack(status, _bad_request(error.violations, MAX_STATUS_BYTES - status.ByteSize() - 100))
    return status


def make_status(
    code: grpc.StatusCode, reason: str, message: str, metadata: Mapping[str, str] | None = None
) -> status_pb2.Status:
    """A status with an ErrorInfo of our domain; every text is printable, and cut so that the whole is under 4 KiB."""
    status = status_pb2.Status(code=code.value[0], message=clip(printable(message), MAX_MESSAGE_CHARS))
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    budget = MAX_DETAIL_CHARS * 4
    for key, value in sorted((metadata or {}).items()):
        text = clip(printable(value), MAX_DETAIL_CHARS)
        budget -= len(key.encode()) + len(text.encode())
        if budget < 0:
            break
        info.metadata[key] = text
    _pack(status, info)
    return status


def sanitized(status: status_pb2.Status) -> status_pb2.Status:
    """The status of a failed task as a client may see it.

    It comes from a process that handled a stranger's file: only one ErrorInfo of our domain with a reason that we know
    is kept, and every text is cut.
    """
    reason, metadata = reason_name(_REASON.ERROR_REASON_INTERNAL), {}
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN and f"ERROR_REASON_{info.reason}" in _REASON.keys():  # noqa: SIM118  # an enum wrapper has no "in"
            reason, metadata = info.reason, dict(info.metadata)
            break
    codes = {code.value[0]: code for code in grpc.StatusCode}
    code = codes.get(status.code, grpc.StatusCode.INTERNAL)
    if code is grpc.StatusCode.OK:
        code = grpc.StatusCode.INTERNAL
    return make_status(code, reason, status.message or "The task failed without a message.", metadata)


def reason_of(status: status_pb2.Status) -> str:
    """The ErrorInfo reason of a status that `make_status` made; empty: none."""
    info = error_details_pb2.ErrorInfo()
    return str(info.reason) if status.details and status.details[0].Unpack(info) else ""


def clip(text: str, limit: int) -> str:
    """At most `limit` characters and as many bytes, since one character may be four bytes on the wire."""
    text = text[: limit + 1]
    if len(text) <= limit and len(text.encode(errors="replace")) <= limit:
        return text
    return text.encode(errors="replace")[: limit - 3].decode(errors="ignore") + "..."


def _bad_request(violations: Sequence[FieldViolation], budget: int) -> error_details_pb2.BadRequest:
    detail = error_details_pb2.BadRequest()
    for index, item in enumerate(violations):
        field, description = clip(printable(item.field), 200), clip(printable(item.description), MAX_DETAIL_CHARS)
        detail.field_violations.add(field=field, description=description)
        if detail.ByteSize() > budget - 80:
            del detail.field_violations[-1]
            detail.field_violations.add(description=f"and {len(violations) - index} more")
            break
    return detail


def _pack(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)
