"""How long a task is in each of its stages, from the progress that its worker tells."""

from __future__ import annotations

import time
from collections.abc import Callable

from modelpress_protos.internal.v1 import worker_pb2

from modelpress_server.observation.meter import Meter


class StageTimes:
    """`with` around a task, whose events go through `on_event`."""

    def __init__(self, meter: Meter, task: str, on_event: Callable[[worker_pb2.WorkerEvent], None]) -> None:
        self._meter = meter
        self._task = task
        self._pass_on = on_event
        self._stage = ""
        self._since_s = 0.0

    def on_event(self, event: worker_pb2.WorkerEvent) -> None:
        """Passes an event on."""
        if event.HasField("progress") and event.progress.stage != self._stage:
            self._enter(event.progress.stage)
        self._pass_on(event)

    def __enter__(self) -> StageTimes:
        return self

    def __exit__(self, *_: object) -> None:
        self._enter("")

    def _enter(self, stage: str) -> None:
        now_s = time.monotonic()
        if self._stage:
            self._meter.stage_ended(self._task, self._stage, now_s - self._since_s)
        self._stage, self._since_s = stage, now_s
