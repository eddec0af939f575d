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

    def __init__(
        self, path: Path, read: Callable[[Path], Content], setting: str, *, optional: Content | None = None
    ) -> None:
        """Raises SettingsError where it cannot be read. `optional`: what holds until there is a file."""
        self._path = path
        self._read = read
        self._setting = setting
        self._seen = signature(self._path)
        if optional is not None and self._seen is None:
            self._content = optional
            return
        try:
            self._content = read(path)
        except OSError as error:
            raise SettingsError(f"{setting}: cannot read {path}: {error.strerror}.") from error

    @property
    def exists(self) -> bool:
        """Whether there is, or was, such a file."""
        return self._seen is not None or signature(self._path) is not None

    def get(self) -> Content:
        """What the file says now; what it said before, where it cannot be read any more."""
        seen = signature(self._path)
        # Gone is not empty: a file that is being replaced is not there for a moment.
        if seen is not None and seen != self._seen:
            self._seen = seen
            try:
                self._content = self._read(self._path)
                logger.info("%s: %s was read again", self._setting, self._path)
            except (OSError, SettingsError) as error:
                logger.error("%s: %s has changed and cannot be read; what it said before holds: %s",
                             self._setting, self._path, error)  # fmt: skip
        return self._content


def signature(path: Path) -> tuple[int, int, int] | None:
    """Changes when the file does: one that is replaced has another inode, one that is written another time or size."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
