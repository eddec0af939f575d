"""What went wrong in a task, as the `google.rpc.Status` that the job will carry.

An error of the engine is the user's to read and mend. Anything else is a bug of ours: the user gets an incident id, and
the traceback travels beside it as a DebugInfo that the server writes to its own log and takes out.
"""

from __future__ import annotations

import errno
import secrets
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import grpc
from google.rpc import error_details_pb2, status_pb2

from modelpress_server.errors import make_status
from modelpress_server.shortage import FULL
from modelpress_server.worker.paths import Redactor

_CODE = grpc.StatusCode
_CODES: Mapping[str, grpc.StatusCode] = {
    "UNSUPPORTED_FORMAT": _CODE.INVALID_ARGUMENT,
    "INVALID_INPUTS": _CODE.INVALID_ARGUMENT,
    "INVALID_DATA": _CODE.INVALID_ARGUMENT,
    "INVALID_FIELDS": _CODE.INVALID_ARGUMENT,
    "METRIC_FAILED": _CODE.INVALID_ARGUMENT,
    "MODEL_REJECTED": _CODE.FAILED_PRECONDITION,
    "MODEL_NOT_RUNNABLE": _CODE.FAILED_PRECONDITION,
    "UNSUPPORTED_OPERATOR": _CODE.UNIMPLEMENTED,
    "WORKER_TIMEOUT": _CODE.DEADLINE_EXCEEDED,
    "WORKER_OUT_OF_MEMORY": _CODE.RESOURCE_EXHAUSTED,
    "WORKER_OUT_OF_DISK": _CODE.RESOURCE_EXHAUSTED,
    "STORAGE_FULL": _CODE.RESOURCE_EXHAUSTED,
}
MAX_TRACEBACK_CHARS = 32 * 1024

_OUT_OF_MEMORY = (
    "The task needs more memory than a worker may use. Take a smaller model, smaller batch sizes or fewer samples, or "
    "raise the server's worker memory limit."
)
# The server tries the job again: a user sees this only when that is given up.
_DISK_FULL = "The server's disk is full; free some space there, then submit the job again."
_TOO_MUCH_WRITTEN = (
    "The task wants to write a larger file than its model and its data explain. Send fewer samples, or data that is "
    "not compressed so much."
)
# torch, onnxruntime and the C++ library have no exception class of their own for these.
_DISK_TEXTS = ("no space left on device",)
_MEMORY_TEXTS = ("can't allocate memory", "cannot allocate memory", "failed to allocate memory", "bad_alloc")


@runtime_checkable
class EngineError(Protocol):
    """`modelpress_compression.errors.CompressionError`, named by its shape so that this module stays light."""

    reason: str
    message: str
    metadata: dict[str, str]


def status_of_exception(error: BaseException, redact: Redactor) -> status_pb2.Status:
    """The status, under 4 KiB but for the DebugInfo of an unexpected error."""
    if _is(error, (errno.ENOMEM,), _MEMORY_TEXTS) or any(isinstance(link, MemoryError) for link in _chain(error)):
        return make_status(_CODES["WORKER_OUT_OF_MEMORY"], "WORKER_OUT_OF_MEMORY", _OUT_OF_MEMORY)
    if _is(error, (errno.EFBIG,), ()):
        return make_status(_CODES["WORKER_OUT_OF_DISK"], "WORKER_OUT_OF_DISK", _TOO_MUCH_WRITTEN)
    if _is(error, FULL, _DISK_TEXTS):
        return make_status(_CODES["STORAGE_FULL"], "STORAGE_FULL", _DISK_FULL)
    if isinstance(error, EngineError):
        metadata = {key: redact(str(value)) for key, value in error.metadata.items()}
        code = _CODES.get(error.reason, _CODE.INTERNAL)
        return make_status(code, error.reason, redact(error.message), metadata)
    return _incident(error)


def _incident(error: BaseException) -> status_pb2.Status:
    incident = secrets.token_hex(6)
    message = f"Internal error. The server's log has the details under incident {incident}."
    status = make_status(_CODE.INTERNAL, "INTERNAL", message, {"incident": incident})
    text = "".join(traceback.format_exception(error))
    status.details.add().Pack(error_details_pb2.DebugInfo(detail=text[-MAX_TRACEBACK_CHARS:]))
    return status


def take_debug_info(status: status_pb2.Status) -> str:
    """Removes the DebugInfo from a status and returns its text; empty: there was none."""
    found = ""
    for index in reversed(range(len(status.details))):
        debug = error_details_pb2.DebugInfo()
        if status.details[index].Unpack(debug):
            found = str(debug.detail)
            del status.details[index]
    return found


def _is(error: BaseException, numbers: Sequence[int], texts: Sequence[str]) -> bool:
    """Whether it, or what led to it, is an OSError of these numbers or says one of these texts."""
    return any(
        (isinstance(link, OSError) and link.errno in numbers) or any(text in str(link).lower() for text in texts)
        for link in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and what led to it."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
