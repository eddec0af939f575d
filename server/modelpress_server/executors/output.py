"""What comes out of a worker while it works, rationed: events of the protocol, and lines that libraries print."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.printable import printable
from modelpress_protos.v1 import job_service_pb2

MAX_LINE_CHARS = 4096
MAX_LINES = 2000
MAX_LOG_BYTES = 1024 * 1024  # 1 MiB
MAX_MESSAGE_CHARS = 500
MAX_STAGE_CHARS = 100
MAX_SPAN_EVENTS = 2000  # each span begins and ends
# Each progress event is stored; an honest worker sends ten a second.
MIN_PROGRESS_INTERVAL_S = 0.05

OnEvent = Callable[[worker_pb2.WorkerEvent], None]


class EventFilter:
    """Passes the events of one task on, cut to size; too many log lines or too much progress are left out."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._lines_left = MAX_LINES
        self._bytes_left = MAX_LOG_BYTES
        self._stages_left = MAX_LINES
        self._stage = ""
        self._progress_time = -math.inf
        self._ended = False
        self._was_loaded = False
        self._spans_left = MAX_SPAN_EVENTS
        self._passed = job_service_pb2.Progress()

    def log(self, severity: str, text: str) -> None:
        """One line; control characters become spaces. When there have been too many, says so once."""
        if self._lines_left <= 0:
            return
        self._lines_left -= 1
        self._bytes_left -= len(text)
        if self._bytes_left <= 0 or self._lines_left == 0:
            self._lines_left = 0
            severity, text = "WARNING", "The worker wrote too much; the rest of its log is left out."
        shown = severity if severity in ("INFO", "WARNING", "ERROR") else "INFO"
        line = worker_pb2.LogLine(severity=shown, text=printable(text[:MAX_LINE_CHARS]))
        self._on_event(worker_pb2.WorkerEvent(log=line))

    def loaded(self, event: worker_pb2.WorkerEvent) -> None:
        """What the model of a compression is: told once."""
        if not self._was_loaded:
            self._was_loaded = True
            self._on_event(event)

    def span(self, span: worker_pb2.Span) -> None:
        """A part of the task has begun or ended."""
        self._spans_left -= 1
        if self._spans_left < 0:
            return
        shown = worker_pb2.Span()
        shown.CopyFrom(span)
        shown.kind, shown.name = printable(span.kind[:MAX_STAGE_CHARS]), printable(span.name[:MAX_MESSAGE_CHARS])
        self._on_event(worker_pb2.WorkerEvent(span=shown))

    def progress(self, progress: job_service_pb2.Progress) -> None:
        """How far the task is; a new stage and the end come through, else at most twenty a second."""
        now = time.monotonic()
        ends = progress.fraction >= 1.0 and not self._ended
        if progress.stage == self._stage and now - self._progress_time < MIN_PROGRESS_INTERVAL_S and not ends:
            return
        if progress.stage != self._stage:
            self._stages_left -= 1
            if self._stages_left < 0:
                return
        self._stage, self._progress_time, self._ended = progress.stage, now, self._ended or ends
        self._passed = job_service_pb2.Progress(
            stage=printable(progress.stage[:MAX_STAGE_CHARS]),
            stage_index=progress.stage_index,
            stage_count=progress.stage_count,
            fraction=min(max(progress.fraction, 0.0), 1.0) if math.isfinite(progress.fraction) else 0.0,
            message=printable(progress.message[:MAX_MESSAGE_CHARS]),
        )
        self._on_event(worker_pb2.WorkerEvent(progress=self._passed))

    def remark(self, message: str) -> None:
        """The server's own word on where the task is, until the worker says something, or `unremark`."""
        remarked = job_service_pb2.Progress()
        remarked.CopyFrom(self._passed)
        remarked.message = message
        self._on_event(worker_pb2.WorkerEvent(progress=remarked))

    def unremark(self) -> None:
        """What the worker said last holds again."""
        self._on_event(worker_pb2.WorkerEvent(progress=self._passed))


class LineSplitter:
    """Cuts a stream of bytes into lines; a line without an end is cut at MAX_LINE_CHARS."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """The next bytes. Progress bars rewrite their line with a carriage return: each state is a line here."""
        *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._emit(line)
        if len(self._rest) > MAX_LINE_CHARS:
            self._emit(self._rest)
            self._rest = b""

    def close(self) -> None:
        """The stream has ended."""
        self._emit(self._rest)
        self._rest = b""

    def _emit(self, line: bytes) -> None:
        if text := line.decode("utf-8", "replace").strip():
            self._on_line(text)
