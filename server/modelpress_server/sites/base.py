"""The interface between a run and the place where its task is done.

A site lays the task's files out, runs it in a confined worker, and takes what was made into the blob store:

    WorkerHost          whether workers can be had, and what confines them
    ├── Executor        runs a task whose files lie on this machine          executors.base
    └── Site            takes a task whose files are named by their digests
        ├── ThisMachine                                                      sites.machine
        └── RayCluster  hands it to a node, where a ThisMachine does it      sites.ray_cluster, sites.ray_node
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from typing import Protocol

from google.rpc import status_pb2
from modelpress_protos.internal.v1 import site_pb2, worker_pb2

from modelpress_server.errors import StorageFullError
from modelpress_server.executors.base import WorkerHost, WorkerUnavailableError
from modelpress_server.shortage import shortage_of

OnEvent = Callable[[worker_pb2.WorkerEvent], None]


class Postpone(enum.Enum):
    """Why a task is put off: it was not its doing, and costs it nothing."""

    HOST = "no worker could be started"
    ROOM = "the disk has no room for it"
    MORE_ROOM = "it needs more room than the disk has now"
    BUSY = "the server is short of descriptors, processes or memory"
    DAMAGE = "a file of it was damaged on the server's disk"
    DRAIN = "the server shut down"
    LOSS = "its worker was lost"
    TAKEN = "another server has taken it over"


class TaskFailedError(Exception):
    """The worker says what is wrong with a task, which is the task's own fault."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


class PostponedError(Exception):
    """A task cannot be done now, which is not its fault."""

    def __init__(self, why: Postpone) -> None:
        super().__init__(why.value)
        self.why = why


def postponement_of(error: BaseException) -> Postpone | None:
    """Why a task that ended with this error is to be put off; None: the error is its own."""
    if isinstance(error, PostponedError):
        return error.why
    if isinstance(error, WorkerUnavailableError):
        return Postpone.HOST
    shortage = shortage_of(error)
    if shortage is not None:
        return Postpone.ROOM if isinstance(shortage, StorageFullError) else Postpone.BUSY
    return None


class Site(WorkerHost, Protocol):
    """Does tasks: each in a confined worker process, with the files of the blob store.

    Both methods pass events on as `Executor.run` does, and raise TaskFailedError, WorkerLostError,
    WorkerUnavailableError, PostponedError, ServiceError. Cancelling them kills the worker.
    """

    def kinds(self) -> Collection[bytes]:
        """`toolchain.made_by` of the machines that jobs may run on, as far as is known."""
        ...

    async def compress(self, task: site_pb2.Assignment, on_event: OnEvent) -> site_pb2.Compressed:
        """Runs a job."""
        ...

    async def inspect(self, task: site_pb2.Assignment, on_event: OnEvent) -> worker_pb2.InspectResult:
        """Looks at a model."""
        ...
