"""The interface between the scheduler and whatever runs a task in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from modelpress_protos.internal.v1 import worker_pb2

# Stage of the progress while a task waits for its worker process.
START_WORKER = "start_worker"


@dataclass(frozen=True)
class Limits:
    """What one task may use; 0: no limit. `disk_bytes`: in its own folders, besides the files that it was given."""

    time_s: float
    memory_bytes: int
    disk_bytes: int = 0


class WorkerLostError(Exception):
    """The worker ended without a terminal event.

    `reason` is the ErrorReason name WORKER_OUT_OF_MEMORY, WORKER_OUT_OF_DISK, WORKER_TIMEOUT or WORKER_CRASHED; the
    message is for people. `own`: whether it was the task's doing; False: others brought it down.
    """

    def __init__(self, reason: str, message: str, *, own: bool = True) -> None:
        super().__init__(message)
        self.reason = reason
        self.own = own


class WorkerUnavailableError(Exception):
    """No worker could be started: the task was not begun, and this host runs none for the moment."""


@dataclass(frozen=True)
class TurnFigures:
    """Turns of measuring so far: how many were given, and how long workers waited for them and had them."""

    given: int = 0
    waited_s: float = 0.0
    held_s: float = 0.0
    waiting: int = 0


@dataclass(frozen=True)
class Figures:
    """What a host of workers has done and does.

    `pids`: leaders of the workers that have a task, where they run here; `elsewhere`: how many run on other machines.
    `imported`: whether a worker that is started now has its imports done already.
    """

    pids: tuple[int, ...] = ()
    elsewhere: int = 0
    imported: bool = False
    starts: int = 0
    failed_starts: int = 0
    turns: TurnFigures = field(default_factory=TurnFigures)


class WorkerHost(Protocol):
    """Has workers, each in a process of its own."""

    @property
    def sandbox_level(self) -> int:
        """What confines the workers, as they have reported it: see `sandbox.confinement`."""
        ...

    @property
    def separate_users(self) -> bool:
        """Whether workers run as users of their own."""
        ...

    def figures(self) -> Figures:
        """What it has done and does, for whoever watches the server."""
        ...

    async def start(self) -> None:
        """Gets ready; called once, before the first task."""
        ...

    async def try_start(self) -> None:
        """Has a worker ready for the next task. Raises WorkerUnavailableError."""
        ...

    async def close(self) -> None:
        """Kills whatever runs."""
        ...


class Executor(WorkerHost, Protocol):
    """Runs tasks, each in its own child process."""

    async def run(
        self,
        request: worker_pb2.WorkerRequest,
        *,
        limits: Limits,
        on_event: Callable[[worker_pb2.WorkerEvent], None],
    ) -> worker_pb2.WorkerEvent:
        """Runs one task and returns its terminal event: inspected, compressed or failed.

        Progress and log events go to `on_event`, called on the event loop; while the task waits for its worker, the
        stage is START_WORKER. Raises WorkerLostError, WorkerUnavailableError, and StorageFullError where the task
        failed on a full disk. Cancelling the awaiting task kills the child's whole process group before CancelledError
        propagates.
        """
        ...
