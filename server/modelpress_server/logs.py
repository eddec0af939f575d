"""The server's own log: lines on stderr that nobody but the server can shape."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from modelpress_protos.printable import printable

_ErrorInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


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


def configure(level: str) -> None:
    """Logs to stderr from this level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every plugin
