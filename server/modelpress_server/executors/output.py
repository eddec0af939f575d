"""What libraries print in a worker, as lines of the job's log: redacted, cut, and no more than a budget."""

from __future__ import annotations

from collections.abc import Callable

from modelpress_protos.internal.v1 import worker_pb2
from modelpress_server.errors import printable

MAX_LINE_CHARS = 4096
MAX_LINES = 2000
MAX_BYTES = 1024 * 1024  # 1 MiB

OnEvent = Callable[[worker_pb2.WorkerEvent], None]


class LogBudget:
    """Passes log lines of one task on until there have been too many; says so once."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._lines_left = MAX_LINES
        self._bytes_left = MAX_BYTES

    def log(self, severity: str, text: str) -> None:
        """One line; control characters become spaces."""
        if self._lines_left <= 0:
            return
        self._lines_left -= 1
        self._bytes_left -= len(text)
        if self._bytes_left <= 0 or self._lines_left == 0:
            self._lines_left = 0
            severity, text = "WARNING", "The worker wrote too much; the rest of its log is left out."
        shown = severity if severity in ("INFO", "WARNING", "ERROR") else "INFO"
        line = worker_pb2.LogLine(severity=shown, text=printable(text)[:MAX_LINE_CHARS])
        self._on_event(worker_pb2.WorkerEvent(log=line))


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
