"""What a task says while it runs: progress and log lines, as frames on the events pipe."""

from __future__ import annotations

import threading
import time
from typing import BinaryIO

from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.printable import printable
from modelpress_protos.v1 import job_service_pb2

from modelpress_server.worker.framing import encode_frame
from modelpress_server.worker.paths import Redactor

MAX_LINE_CHARS = 4096
MAX_MESSAGE_CHARS = 500
SEVERITIES = ("INFO", "WARNING", "ERROR")
# A pass may report every batch of thousands; nobody reads more than a few a second, and each one is stored.
MIN_PROGRESS_INTERVAL_S = 0.1


class Events:
    """The sending end; may be called from any thread."""

    def __init__(self, pipe: BinaryIO, redact: Redactor) -> None:
        self._pipe = pipe
        self._redact = redact
        self._lock = threading.Lock()
        self._last_stage = -1
        self._last_time = 0.0
        self._fraction = 0.0

    def send(self, event: worker_pb2.WorkerEvent) -> None:
        """One event, whole and at once. Raises FramingError, OSError."""
        frame = encode_frame(event)
        with self._lock:
            self._pipe.write(frame)
            self._pipe.flush()

    def progress(self, stage: str, stage_index: int, stage_count: int, fraction: float, message: str) -> None:
        """How far the job is; within a stage, calls that follow too closely are left out."""
        now = time.monotonic()
        # The end is always told; else a job that ends quickly would seem to stop short of it.
        if stage_index == self._last_stage and now - self._last_time < MIN_PROGRESS_INTERVAL_S and fraction < 1.0:
            return
        self._last_stage, self._last_time = stage_index, now
        self._fraction = max(self._fraction, min(max(fraction, 0.0), 1.0))
        progress = job_service_pb2.Progress(
            stage=stage,
            stage_index=stage_index,
            stage_count=stage_count,
            fraction=self._fraction,
            message=printable(self._redact(message))[:MAX_MESSAGE_CHARS],
        )
        self.send(worker_pb2.WorkerEvent(progress=progress))

    def log(self, severity: str, text: str) -> None:
        """Lines for the job's log; a text of several lines becomes several."""
        shown = severity if severity in SEVERITIES else "INFO"
        for line in self._redact(text).splitlines():
            entry = worker_pb2.LogLine(severity=shown, text=printable(line)[:MAX_LINE_CHARS])
            self.send(worker_pb2.WorkerEvent(log=entry))
