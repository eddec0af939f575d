"""The server's own log: lines on stderr that nobody but the server can shape.

What a line is about (request id, project, job, model) is bound to the context of the call or the run, and stands in the
fields of JSON lines. Tokens and the contents of files are never logged.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType

from modelpress_protos.printable import printable

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


def configure(level: str, log_format: str = "console") -> None:
    """Logs to stderr from this level on; `log_format`: console or json."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATTERS[log_format]())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in ("alembic", "uvicorn"):  # they tell of every plugin, and of every start
        logging.getLogger(name).setLevel(logging.WARNING)
