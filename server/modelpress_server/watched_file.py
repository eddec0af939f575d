"""A file of the operator's that is read again when it has changed, so that the server need not be started again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from modelpress_server.config import SettingsError

Content = TypeVar("Content")
logger = logging.getLogger(__name__)


class WatchedFile(Generic[Content]):
    """`read` makes something of the file, and raises SettingsError or OSError; `setting` is the name of the setting."""

    def __init__(self, path: Path, read: Callable[[Path], Content], setting: str) -> None:
        """Raises SettingsError where it cannot be read."""
        self._path = path
        self._read = read
        self._setting = setting
        self._seen = self._signature()
        try:
            self._content = read(path)
        except OSError as error:
            raise SettingsError(f"{setting}: cannot read {path}: {error.strerror}.") from error

    def get(self) -> Content:
        """What the file says now; what it said before, where it cannot be read any more."""
        seen = self._signature()
        if seen != self._seen:
            self._seen = seen
            try:
                self._content = self._read(self._path)
                logger.info("%s: %s was read again", self._setting, self._path)
            except (OSError, SettingsError) as error:
                logger.error("%s: %s has changed and cannot be read; what it said before holds: %s",
                             self._setting, self._path, error)  # fmt: skip
        return self._content

    def _signature(self) -> tuple[int, int, int] | None:
        # A file that is replaced has another inode; one that is written in place another time or size.
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
