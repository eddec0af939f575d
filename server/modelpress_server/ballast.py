"""Room that is kept to be lent: on a full disk, even a deletion has to write a few pages to the database first.

When such a write fails for want of room, the ballast goes, the write is made again, and what it left is taken back
before anybody else gets hold of it.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

BALLAST_BYTES = 4 * 1024**2  # 4 MiB: the log of the database holds as much between two checkpoints
_SLACK_BYTES = 64 * 1024  # left over for the others when it is taken back


class Ballast:
    """One file of up to BALLAST_BYTES; all methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def take_on(self) -> None:
        """Makes the file as large as it shall be, if the disk has clearly more room than that."""
        with self._lock:
            if self._size_bytes() < BALLAST_BYTES and self._free_bytes() > 3 * BALLAST_BYTES:
                self._take(BALLAST_BYTES)

    def ease(self) -> None:
        """Before anything else is opened: a server needs a little room to start, too."""
        if self._free_bytes() < BALLAST_BYTES:
            self._path.unlink(missing_ok=True)

    @contextmanager
    def lent(self) -> Iterator[bool]:
        """While this lasts, its room is free for others. Gives whether there was any."""
        with self._lock:
            size_bytes = self._size_bytes()
            self._path.unlink(missing_ok=True)
            if size_bytes:
                logger.warning("the disk is full; %d KiB of ballast are used", size_bytes // 1024)
            try:
                yield size_bytes > 0
            finally:
                self._take(min(size_bytes, self._free_bytes() - _SLACK_BYTES))

    def _take(self, size_bytes: int) -> None:
        if size_bytes <= 0:
            return
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Not a hole: the blocks must be there to be given up.
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError:
            self._path.unlink()
        finally:
            os.close(fd)

    def _size_bytes(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._path.parent).free
