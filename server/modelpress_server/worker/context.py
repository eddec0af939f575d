"""What a task may use."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from modelpress_protos.internal.v1 import worker_pb2

from modelpress_server.sandbox.confinement import Sandbox
from modelpress_server.worker.events import Events
from modelpress_server.worker.framing import read_frame
from modelpress_server.worker.own_time import OwnClock


@dataclass(frozen=True)
class TaskContext:
    """The ways to and from the server, the confinement that was reached, this worker's private folder and own time."""

    events: Events
    sandbox: Sandbox
    directory: Path
    requests: BinaryIO
    clock: OwnClock

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While no other worker of the server runs: for measuring latency, on the cores that the server names.

        Waits for its turn. Threads that are started within run on these cores as well.
        """
        self.events.send(worker_pb2.WorkerEvent(turn=worker_pb2.MeasuringTurn()))
        # Whatever comes, or the end of the pipe: the server knows best whether there is a turn to wait for.
        with self.clock.held():
            answer = read_frame(self.requests, worker_pb2.WorkerRequest)
        try:
            with _on_cores(answer.turn.cores if answer is not None else ()):
                yield
        finally:
            self.events.send(worker_pb2.WorkerEvent(turn=worker_pb2.MeasuringTurn(ended=True)))


@contextmanager
def _on_cores(cores: Collection[int]) -> Iterator[None]:
    """Pins this thread, and those that it starts meanwhile; without cores it stays as it is."""
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, before)
