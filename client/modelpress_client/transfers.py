"""What uploads and downloads share: local files with their digests, and progress."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modelpress_protos.v1.common_pb2 import Digest

from modelpress_client.errors import UsageError

HASH_BLOCK_BYTES = 4 * 1024 * 1024  # 4 MiB


@dataclass(frozen=True)
class TransferProgress:
    """How far one file is. phase: what happens to it; path: the local file."""

    phase: Literal["hash", "upload", "download"]
    path: Path
    done_bytes: int
    total_bytes: int


OnProgress = Callable[[TransferProgress], None]


@dataclass(frozen=True)
class LocalBlob:
    """A local file and the identity of its content."""

    path: Path
    sha256: bytes
    size_bytes: int
    mtime_ns: int

    @property
    def digest(self) -> Digest:
        """The identity as a message."""
        return Digest(sha256=self.sha256, size_bytes=self.size_bytes)

    def has_changed(self) -> bool:
        """Whether the file was written to since it was hashed."""
        try:
            status = self.path.stat()
        except OSError:
            return True
        return (status.st_size, status.st_mtime_ns) != (self.size_bytes, self.mtime_ns)


async def hash_file(path: Path, on_progress: OnProgress | None = None) -> LocalBlob:
    """Hashes a file in a thread. Raises UsageError when it cannot be read."""
    loop = asyncio.get_running_loop()
    stop = threading.Event()

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            loop.call_soon_threadsafe(on_progress, TransferProgress("hash", path, done, total))

    try:
        return await asyncio.to_thread(_hash, path, report, stop)
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.", details={"path": str(path)}) from error
    finally:
        stop.set()  # a cancelled command must not wait for the rest of a large file


def _hash(path: Path, report: Callable[[int, int], None], stop: threading.Event) -> LocalBlob:
    sha256 = hashlib.sha256()
    buffer = bytearray(HASH_BLOCK_BYTES)
    done = 0
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        while (count := file.readinto(buffer)) and not stop.is_set():
            sha256.update(memoryview(buffer)[:count])
            done += count
            report(done, status.st_size)
    return LocalBlob(path, sha256.digest(), done, status.st_mtime_ns)
