"""The server's own log: lines on stderr that nobody but the server can shape.

What a line is about (request id, project, job, model) is bound to the context of the call or the run, and stands in the
fields of JSON lines. Tokens and the contents of files are never logged.
"""

from __future__ import annotations

import json
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Mapping
from contextvars import Context, ContextVar
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType

from modelpress_protos.printable import printable

# What waits to be written while whoever reads the log does not.
MAX_HELD_BYTES = 4 * 1024 * 1024
FLUSH_S = 1.0
STDERR = 2

_ErrorInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
_bound: ContextVar[Mapping[str, str]] = ContextVar("bound", default=MappingProxyType({}))


def bind(**fields: str) -> None:
    """Lines of this context (an asyncio task and what it starts) carry these fields from now on."""
    _bound.set({**_bound.get(), **fields})


class PrintableFormatter(logging.Formatter):
    """Time, level, logger, message; one line each, and a traceback's lines below.

    Errors and names that a client or a model brought may stand in either.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name in the standard library
        """The line of the record."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: _ErrorInfo) -> str:  # noqa: N802
        """The traceback."""
        return printable(super().formatException(ei), keep="\n")


class JsonFormatter(PrintableFormatter):
    """One JSON object a line: time, level, logger, message, what is bound, `extra={"fields": ...}`, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of the record."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage()),
            **_bound.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


FORMATTERS: Mapping[str, type[logging.Formatter]] = {"console": PrintableFormatter, "json": JsonFormatter}


class PipeHandler(logging.Handler):
    """Writes lines to a descriptor from a thread of its own: a pipe that nobody reads holds up nobody but that thread.

    At most `max_held_bytes` wait there; what does not fit is dropped, and a line says how much that was as soon as
    there is room again. Not the standard library's QueueListener: its handler is locked while it writes, and the end of
    the interpreter would wait for that lock.
    """

    def __init__(self, descriptor: int, max_held_bytes: int = MAX_HELD_BYTES) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._max_held_bytes = max_held_bytes
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._dropped = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Has the record written, or drops it."""
        try:
            line = self._line(record)
        except Exception:  # noqa: BLE001  as every handler: a line that cannot be formatted harms nobody
            self.handleError(record)
            return
        with self._changed:
            if self._held_bytes + len(line) > self._max_held_bytes:
                self._dropped += 1
                return
            self._tell_dropped()
            self._hold(line)

    def flush(self) -> None:
        """Waits until all is written, but not for long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held_bytes, FLUSH_S)

    def _line(self, record: logging.LogRecord) -> bytes:
        return self.format(record).encode("utf-8", "backslashreplace") + b"\n"

    def _hold(self, line: bytes) -> None:
        self._held.append(line)
        self._held_bytes += len(line)
        self._changed.notify_all()

    def _tell_dropped(self) -> None:
        if not self._dropped:
            return
        text = "%d lines of the log were dropped here: they were not read in time"
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, text, (self._dropped,), None)
        self._hold(Context().run(self._line, record))  # what is bound here is not what it is about
        self._dropped = 0

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._held)
                line = self._held.popleft()
            self._write_whole(line)
            with self._changed:
                self._held_bytes -= len(line)
                if not self._held:
                    self._tell_dropped()
                self._changed.notify_all()

    def _write_whole(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # another process that has the pipe as well turned waiting off
                select.select([], [self._descriptor], [])
            except OSError:  # nobody can read it any more, or the disk is full
                return


def configure(level: str, log_format: str = "console") -> None:
    """Logs to stderr from this level on; `log_format`: console or json."""
    handler = PipeHandler(STDERR)
    handler.setFormatter(FORMATTERS[log_format]())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in ("alembic", "uvicorn"):  # they tell of every plugin, and of every start
        logging.getLogger(name).setLevel(logging.WARNING)
