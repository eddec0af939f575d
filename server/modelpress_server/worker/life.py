"""The life of a worker: confine itself, say Ready, take one task, run it, tell how it ended, end.

A worker that was started with exec does its imports once it is confined; one that was forked has them already.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
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
from modelpress_server.worker.context import TaskContext
from modelpress_server.worker.events import Events
from modelpress_server.worker.failures import status_of_exception
from modelpress_server.worker.framing import FramingError, encode_frame, read_frame
from modelpress_server.worker.own_time import OwnClock
from modelpress_server.worker.paths import Redactor, model_directory, task_paths

# onnxruntime maps weights so that they could be written to, and asks for as much room besides, in each of two sessions:
# the kernel counts that as memory, although nothing of it is in use.
MAPPED_COPIES = 4


@dataclass(frozen=True)
class Confinement:
    """What confines a worker. `root`: folder of all private and task folders; `private`: what no worker may read."""

    parent_pid: int
    root: Path
    mode: str
    private: tuple[Path, ...]


@dataclass(frozen=True)
class Place:
    """Where one worker works: its private folder, whom it becomes, and its ends of the two pipes."""

    directory: Path
    user: WorkerUser | None
    requests_fd: int
    events_fd: int


def live(confinement: Confinement, place: Place, load: Callable[[], ModuleType]) -> None:
    """Runs one task and ends the process, without the slow teardown of the libraries. Raises OSError before the task.

    `load`: gives the tasks, once it is confined to the files that imports need.
    """
    sandbox = Sandbox(confinement.mode, place.user)
    sandbox.enter(confinement.parent_pid, [confinement.root])
    os.chdir(place.directory)
    tasks = load()
    sandbox.close_calls(confinement.private)
    pipes = TaskPipes(os.fdopen(place.requests_fd, "rb"), os.fdopen(place.events_fd, "wb"))
    _flush()  # what was printed so far does not belong to the task
    ready = worker_pb2.Ready(sandbox_level=sandbox.level, sandbox_fault=sandbox.fault)
    pipes.events.write(encode_frame(worker_pb2.WorkerEvent(ready=ready)))
    pipes.events.flush()
    request = read_frame(pipes.requests, worker_pb2.WorkerRequest)
    if request is not None:
        _run(request, tasks, pipes, sandbox, confinement.root, place.directory)
        # The server kills this process and all below it; what lost its parent earlier could not be found any more.
        pipes.requests.read()
    os._exit(0)


def imported(name: str) -> ModuleType:
    """The module that runs tasks, a dotted name or the path of a file, with all that a task will need."""
    tasks = load_tasks(name)
    for _ in tasks.preload():
        pass
    freeze()
    return tasks


def freeze() -> None:
    """Keeps the garbage collector from what has been imported."""
    # The libraries' objects live as long as the process: looking through a million of them in every full collection
    # would more than double the time of a small job, and have a forked process copy the memory that they lie in.
    gc.collect()
    gc.freeze()


class TaskPipes(NamedTuple):
    """The protocol's two pipes, as the worker has them."""

    requests: BinaryIO
    events: BinaryIO


def _run(
    request: worker_pb2.WorkerRequest,
    tasks: ModuleType,
    pipes: TaskPipes,
    sandbox: Sandbox,
    root: Path,
    directory: Path,
) -> None:
    readable, writable = task_paths(request)
    redact = Redactor([*readable, *writable, directory, root])
    events = Events(pipes.events, redact)
    try:
        if request.memory_limit_bytes:
            mapped_bytes = MAPPED_COPIES * folder_bytes(model_directory(request))
            sandbox.limit_memory(request.memory_limit_bytes + mapped_bytes)
        if request.file_limit_bytes:
            sandbox.limit_file_size(request.file_limit_bytes)
        sandbox.narrow(readable, [*writable, directory])
        clock = OwnClock(directory)
        last = tasks.run(request, TaskContext(events, sandbox, directory, pipes.requests, clock))
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


def load_tasks(name: str) -> ModuleType:
    """The module that runs tasks: a dotted name, or the path of a file."""
    if not name.endswith(".py"):
        return import_module(name)
    spec = importlib.util.spec_from_file_location("modelpress_worker_tasks", name)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
