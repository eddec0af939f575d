"""Errors as statuses."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from modelpress_protos.v1 import common_pb2
from modelpress_server import errors
from server_harness import Running, failing


def subclasses(kind: type[errors.ServiceError]) -> set[type[errors.ServiceError]]:
    found = set(kind.__subclasses__())
    return found.union(*(subclasses(item) for item in found)) if found else set()


def test_every_error_has_its_row() -> None:
    """The table is complete, and the tree in the module's docstring names each error with its code and reason."""
    assert set(errors.STATUS) == subclasses(errors.ServiceError)
    for kind, (code, reason) in errors.STATUS.items():
        row = next(line for line in str(errors.__doc__).splitlines() if kind.__name__ in line)
        assert code.name in row
        assert errors.reason_name(reason) in row


@pytest.mark.parametrize("text", ["x" * 100_000, "é" * 100_000, "\U0001f600" * 100_000])
def test_a_status_is_under_4_kib(text: str) -> None:
    """Whatever stands in an error: message, metadata, violations."""
    violations = [errors.FieldViolation(text, text)] * 100
    made = [
        errors.InvalidFieldsError(violations),
        errors.ModelRejectedError(text, metadata={str(index): text for index in range(100)}),
        errors.QuotaExceededError(text, subject="projects/p", retry_after_s=1.0),
    ]
    for error in made:
        assert errors.status_of(error).ByteSize() < errors.MAX_STATUS_BYTES


def test_a_workers_status_is_not_trusted() -> None:
    """Control characters, foreign domains, unknown reasons, an OK code, and length: all are taken out."""
    status = status_pb2.Status(code=0, message="bad\x1b[31m" + "x" * 100_000)
    info = error_details_pb2.ErrorInfo(domain="evil", reason="UNSUPPORTED_FORMAT")
    status.details.add().Pack(info)
    clean = errors.sanitized(status)
    assert (clean.code, errors.reason_of(clean)) == (grpc.StatusCode.INTERNAL.value[0], "INTERNAL")
    assert clean.message.isprintable()
    assert clean.ByteSize() < errors.MAX_STATUS_BYTES
    info = error_details_pb2.ErrorInfo(domain="modelpress", reason="NO_SUCH_REASON")
    status.details[0].Pack(info)
    assert errors.reason_of(errors.sanitized(status)) == "INTERNAL"


def test_a_workers_reason_and_metadata_are_kept() -> None:
    """What the worker may say reaches the client."""
    given = errors.make_status(
        grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED_OPERATOR", "No Foo.", {"node": "n", "op_type": "Foo"}
    )
    assert errors.sanitized(given) == given


def test_reasons_are_those_of_the_api() -> None:
    """A reason is spelled as the enum without its prefix."""
    assert errors.reason_name(common_pb2.ERROR_REASON_QUEUE_FULL) == "QUEUE_FULL"


async def test_bytes_that_are_no_request(running: Running) -> None:
    """Unary or streaming: what is no message is the client's fault, and is said so."""
    channel, noise = running.client.channel, b"\xff" * 9

    async def streamed(call: Any) -> list[Any]:
        return [answer async for answer in call]

    calls = (
        channel.unary_unary("/modelpress.v1.JobService/GetJob")(noise),
        streamed(channel.unary_stream("/modelpress.v1.JobService/WatchJob")(noise)),
        streamed(channel.stream_stream("/modelpress.v1.UploadService/WriteUpload")(iter([noise]))),
    )
    for call in calls:
        failure = await failing(call)
        assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
