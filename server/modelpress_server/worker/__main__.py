"""The life of a worker: confine itself, import, say Ready, take one task, run it, tell how it ended, end.

Started by `executors.local`, never by hand.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

from google.rpc import status_pb2
from modelpress_compression.errors import RejectedModelError
from modelpress_protos.internal.v1 import worker_pb2

from modelpress_server.sandbox.confinement import Sandbox
from modelpress_server.sandbox.worker_user import WorkerUser
from modelpress_server.space import folder_bytes
from modelpress_server.worker import DEFAULT_TASKS
from modelpress_server.worker.context import TaskContext
from modelpress_server.worker.events import Events
from modelpress_server.worker.failures import status_of_exception
from modelpress_server.worker.framing import FramingError, encode_frame, read_frame
from modelpress_server.worker.own_time import OwnClock
from modelpress_server.worker.paths import Redactor, model_directory, task_paths

# onnxruntime maps weights so that they could be written to, and asks for as much room besides, in each of two sessions:
# the kernel counts that as memory, although nothing of it is in use.
MAPPED_COPIES = 4


def main() -> None:
    """Runs one task; ends the process without the slow teardown of the libraries."""
    arguments = _parse_arguments()
    sandbox = Sandbox(arguments.sandbox, arguments.user)
    sandbox.enter(arguments.parent_pid, [arguments.root])
    tasks = _load_tasks(arguments.tasks)
    tasks.preload()
    # The libraries' objects live as long as the process: looking through a million of them in every full collection
    # would more than double the time of a small job.
    gc.collect()
    gc.freeze()
    sandbox.close_calls(arguments.private)
    requests = os.fdopen(arguments.requests_fd, "rb")
    events = os.fdopen(arguments.events_fd, "wb")
    _flush()  # what was printed so far does not belong to the task
    ready = worker_pb2.Ready(sandbox_level=sandbox.level, sandbox_fault=sandbox.fault)
    events.write(encode_frame(worker_pb2.WorkerEvent(ready=ready)))
    events.flush()
    request = read_frame(requests, worker_pb2.WorkerRequest)
    if request is not None:
        _run(request, tasks, TaskPipes(requests, events), sandbox, arguments)
        # The server kills this process and all below it; what lost its parent earlier could not be found any more.
        requests.read()
    os._exit(0)


class TaskPipes(NamedTuple):
    """The protocol's two pipes, as the worker has them."""

    requests: BinaryIO
    events: BinaryIO


def _run(
    request: worker_pb2.WorkerRequest,
    tasks: ModuleType,
    pipes: TaskPipes,
    sandbox: Sandbox,
    arguments: argparse.Namespace,
) -> None:
    readable, writable = task_paths(request)
    redact = Redactor([*readable, *writable, arguments.directory, arguments.root])
    events = Events(pipes.events, redact)
    try:
        if request.memory_limit_bytes:
            mapped_bytes = MAPPED_COPIES * folder_bytes(model_directory(request))
            sandbox.limit_memory(request.memory_limit_bytes + mapped_bytes)
        if request.file_limit_bytes:
            sandbox.limit_file_size(request.file_limit_bytes)
        sandbox.narrow(readable, [*writable, arguments.directory])
        clock = OwnClock(arguments.directory)
        last = tasks.run(request, TaskContext(events, sandbox, arguments.directory, pipes.requests, clock))
    except Exception as error:  # noqa: BLE001  # whatever went wrong, the server must hear of it
        last = worker_pb2.WorkerEvent(failed=status_of_exception(error, redact))
    _close_output()
    try:
        events.send(last)
    except FramingError:
        too_complex = RejectedModelError(
            "The model has more inputs, outputs or operators, or longer names, than this server takes.",
            finding="TOO_COMPLEX",
        )
        failed: status_pb2.Status = status_of_exception(too_complex, redact)
        events.send(worker_pb2.WorkerEvent(failed=failed))


def _close_output() -> None:
    """The server reads it to its end, and need not wait for the end of the process then."""
    _flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _load_tasks(name: str) -> ModuleType:
    """The module that runs tasks: a dotted name, or the path of a file."""
    if not name.endswith(".py"):
        return import_module(name)
    spec = importlib.util.spec_from_file_location("modelpress_worker_tasks", name)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="modelpress_server.worker", allow_abbrev=False)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--requests-fd", type=int, required=True)
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--root", type=Path, required=True, help="folder of all private and task folders")
    parser.add_argument("--directory", type=Path, required=True, help="this worker's private folder")
    parser.add_argument("--sandbox", choices=("auto", "require", "off"), required=True)
    parser.add_argument("--user", type=WorkerUser.parse, default=None, help="UID:GID to become; empty: stay")
    parser.add_argument("--private", type=Path, action="append", default=[], help="what no worker may read")
    parser.add_argument("--tasks", default=DEFAULT_TASKS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
