"""A line of JSON for each call that changes something, takes files out, or was refused: who did what, when, and how it
ended. Reading is not noted."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from modelpress_protos.printable import printable

from modelpress_server.config import SettingsError
from modelpress_server.errors import clip
from modelpress_server.identity.roles import Role, needed_role

REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED", "TOO_MANY_ATTEMPTS")
MAX_CHARS = 300


class AuditLog:
    """Writes to a file, which may be moved away meanwhile (logrotate), or to the server's log."""

    def __init__(self, path: Path | None) -> None:
        """Raises SettingsError."""
        self._logger = logging.getLogger("modelpress_server.audit")
        self._handler: logging.Handler | None = None
        if path is not None:
            try:
                path.touch(mode=0o600)
                self._handler = WatchedFileHandler(path, encoding="utf-8")
            except OSError as error:
                raise SettingsError(f"audit_log: cannot write {path}: {error.strerror}.") from error
            self._handler.setFormatter(logging.Formatter("%(message)s"))

    def write(self, *, caller: str, peer: str, method: str, project: str, resource: str, outcome: str) -> None:
        """One call; `outcome`: OK, CANCELLED, or the reason of the error."""
        if outcome not in REFUSED and needed_role(method) < Role.SUBMITTER and method != "ReadBlob":
            return
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "caller": caller,
            "peer": peer,
            "method": method,
            "project": project,
            "resource": resource,
            "outcome": outcome,
        }
        text = json.dumps({key: clip(printable(value), MAX_CHARS) for key, value in entry.items()})
        if self._handler is None:
            self._logger.info("%s", text)
            return
        self._handler.handle(self._logger.makeRecord(self._logger.name, logging.INFO, "", 0, text, (), None))

    def close(self) -> None:
        """Closes the file."""
        if self._handler is not None:
            self._handler.close()


def resource_of(*messages: Any) -> str:
    """The name of what a call is about: of the answer, where it made something, else of the request."""
    for message in messages:
        for text in (getattr(message, "name", ""), getattr(getattr(message, "model", None), "name", "")):
            if isinstance(text, str) and text:
                return text
        digest: Any = getattr(message, "digest", None)
        if digest is not None and digest.sha256:
            return f"sha256:{digest.sha256.hex()}"
    return ""
