"""Exceptions of a task as the status that its job carries."""

from __future__ import annotations

import errno
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from modelpress_compression import errors as engine
from modelpress_compression.schema import Violation
from modelpress_protos.v1 import common_pb2
from modelpress_server.errors import MAX_STATUS_BYTES
from modelpress_server.worker.failures import status_of_exception, take_debug_info
from modelpress_server.worker.paths import Redactor

REDACT = Redactor(["/srv/data/work/task-1"])


def info_of(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    """The first detail."""
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info


ENGINE_ERRORS = [
    engine.UnsupportedFormatError("no format"),
    engine.RejectedModelError("refused", finding="PICKLE_GLOBAL"),
    engine.InvalidInputsError("inputs"),
    engine.InvalidDataError("data"),
    engine.MetricError("no number"),
    engine.InvalidRecipeError([Violation("steps[0]", "wrong")]),
    engine.UnsupportedOperatorError("operator", op_type="Foo", node="n1"),
    engine.ModelNotRunnableError("does not run"),
    engine.TimeLimitError("too late"),
    engine.MemoryLimitError("too large"),
    engine.DiskSpaceError("too full"),
]


@pytest.mark.parametrize("error", ENGINE_ERRORS, ids=lambda error: type(error).__name__)
def test_errors_of_the_engine_keep_reason_message_and_metadata(error: engine.CompressionError) -> None:
    """The reason is one of the API's; the message is the engine's; nothing is hidden in debug details."""
    status = status_of_exception(error, REDACT)
    info = info_of(status)
    assert f"ERROR_REASON_{info.reason}" in set(common_pb2.ErrorReason.keys())
    assert info.reason == error.reason
    assert info.domain == "modelpress"
    assert status.message == error.message
    assert dict(info.metadata) == error.metadata
    assert status.code not in (grpc.StatusCode.OK.value[0], grpc.StatusCode.INTERNAL.value[0])
    assert take_debug_info(status) == ""


def test_every_engine_error_is_in_the_table() -> None:
    """A new class of the engine must be given a code here."""
    assert {type(error) for error in ENGINE_ERRORS} == set(engine.CompressionError.__subclasses__())


def test_a_long_message_stays_under_the_limit() -> None:
    """gRPC turns long errors into RESOURCE_EXHAUSTED at the client; so the status is cut, whatever its letters."""
    error = engine.RejectedModelError("漢" * 10_000, **{f"key{index}": "漢" * 2_000 for index in range(50)})
    assert status_of_exception(error, REDACT).ByteSize() < MAX_STATUS_BYTES


def test_paths_are_taken_out() -> None:
    """Folders of the server do not reach the user; the names inside them do."""
    error = engine.InvalidDataError("cannot read /srv/data/work/task-1/data.npz", file="/srv/data/work/task-1/data.npz")
    status = status_of_exception(error, REDACT)
    assert status.message == "cannot read data.npz"
    assert info_of(status).metadata["file"] == "data.npz"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"),
        engine.ModelNotRunnableError("onnxruntime cannot run the model: std::bad_alloc"),
    ],
    ids=["python", "system", "torch", "onnxruntime"],
)
def test_lack_of_memory_in_all_its_guises(error: Exception) -> None:
    """Each library says it in its own way; the user always gets the same answer."""
    assert info_of(status_of_exception(error, REDACT)).reason == "WORKER_OUT_OF_MEMORY"


def test_lack_of_memory_behind_another_error() -> None:
    """What an engine error was raised from counts."""
    error = engine.ModelNotRunnableError("does not run")
    error.__cause__ = MemoryError()
    assert info_of(status_of_exception(error, REDACT)).reason == "WORKER_OUT_OF_MEMORY"


def test_a_full_disk() -> None:
    """It is the server's trouble, not the model's, and says so."""
    status = status_of_exception(OSError(errno.ENOSPC, "No space left on device"), REDACT)
    assert info_of(status).reason == "STORAGE_FULL"


def test_an_unexpected_error_is_an_incident() -> None:
    """The user sees an id and nothing of the error; the traceback is a separate detail that the server takes out."""
    try:
        raise ZeroDivisionError("secret")
    except ZeroDivisionError as error:
        status = status_of_exception(error, REDACT)
    info = info_of(status)
    assert info.reason == "INTERNAL"
    assert info.metadata["incident"] in status.message
    assert "secret" not in status.message
    debug = take_debug_info(status)
    assert "ZeroDivisionError: secret" in debug
    assert __file__ in debug
    assert len(status.details) == 1


def test_redaction_leaves_node_names_alone() -> None:
    """ONNX nodes are named like paths."""
    redact = Redactor([Path("/srv/data")])
    assert redact("Node '/layer1/conv1/Conv': weight in /srv/data/model.onnx") == (
        "Node '/layer1/conv1/Conv': weight in model.onnx"
    )
    assert redact("/srv/database is another folder") == "/srv/database is another folder"
    assert redact("in /srv/data") == "in "
