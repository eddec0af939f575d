"""Room on the disk: what is promised to uploads and to running tasks is not promised again.

What uploads still have to send stands in their records; what tasks may still write stands here, since no task outlives
the server.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from modelpress_server.config import GIB
from modelpress_server.errors import DiskTooSmallError, StorageFullError
from modelpress_server.shortage import FULL_BYTES, storage_full
from modelpress_server.stores.blob_index import BlobIndex

# A task may write so many times what it was expected to, and so much more, before that counts as a fault of its own:
# samples may be compressed well.
LIMIT_FACTOR = 4
LIMIT_EXTRA_BYTES = 1 * GIB
# Where there is more than this, those who come at once share a look at the disk, for so long.
PLENTY_BYTES = 4 * GIB
LOOK_S = 0.2


@dataclass(frozen=True)
class Promise:
    """Room for one task. `limit_bytes`: what it may write at most; `cut`: only because the disk has no more."""

    need_bytes: int
    folder: Path
    limit_bytes: int
    cut: bool

    async def outgrown(self) -> bool:
        """Whether the task has written more than it was promised."""
        return await asyncio.to_thread(folder_bytes, self.folder) > self.need_bytes


class Space:
    """The room of the file system that holds `root`. `reserve_bytes`: what nobody is promised.

    `uploads`: the records of the uploads that are stored there, too; None: they are stored elsewhere.
    """

    def __init__(self, root: Path, reserve_bytes: int, uploads: BlobIndex | None = None) -> None:
        self._root = root
        self._uploads = uploads
        self._reserve_bytes = reserve_bytes
        self._promises: set[Promise] = set()
        # Called when somebody was refused room.
        self.on_short: Callable[[], None] = lambda: None
        # Between the look at what is left and the promise nobody else may promise it.
        self._lock = asyncio.Lock()
        self._seen_bytes = 0  # at the last look, less what was promised since
        self._seen_s = -math.inf
        self._set_aside_bytes = 0  # of those who look at what is left, and have not promised it yet

    @asynccontextmanager
    async def left(self, need_bytes: int = 0) -> AsyncIterator[int]:
        """Bytes that are neither used nor promised; nobody else promises them meanwhile.

        `need_bytes`: what is promised then, unless an error ends this. Where there is plenty it is set aside, and
        others need not wait; where room is short they do.
        """
        waits = self._lock.locked()
        async with AsyncExitStack() as held:
            await held.enter_async_context(self._lock)
            left_bytes = await self._left_bytes(need_bytes, share=waits)
            self._seen_bytes -= need_bytes
            self._set_aside_bytes += need_bytes
            if left_bytes - need_bytes > PLENTY_BYTES:
                await held.aclose()
            try:
                yield left_bytes
            except StorageFullError:
                self.on_short()
                raise
            finally:
                self._set_aside_bytes -= need_bytes

    @asynccontextmanager
    async def left_for_uploads(self, need_bytes: int) -> AsyncIterator[int]:
        """`left`, of the place that uploads are stored in."""
        if self._uploads is None:
            yield sys.maxsize
            return
        async with self.left(need_bytes) as left_bytes:
            yield left_bytes

    @asynccontextmanager
    async def promised(self, need_bytes: int, folder: Path) -> AsyncIterator[Promise]:
        """Room for a task that writes below `folder`. Raises StorageFullError, DiskTooSmallError."""
        total_bytes = (await asyncio.to_thread(shutil.disk_usage, self._root)).total
        async with self.left(need_bytes) as left_bytes:
            if need_bytes > total_bytes - self._reserve_bytes:
                raise _too_small(need_bytes, total_bytes, self._reserve_bytes)
            if need_bytes > left_bytes:
                raise storage_full()
            generous_bytes = LIMIT_FACTOR * need_bytes + LIMIT_EXTRA_BYTES
            limit_bytes = min(generous_bytes, left_bytes)
            promise = Promise(need_bytes, folder, limit_bytes, limit_bytes < generous_bytes)
            self._promises.add(promise)
        try:
            yield promise
        finally:
            self._promises.discard(promise)

    async def is_full(self) -> bool:
        """Whether there is next to nothing left, whoever used it up."""
        return await asyncio.to_thread(disk_is_full, self._root)

    async def _left_bytes(self, need_bytes: int, *, share: bool) -> int:
        """`share`: others were before, and may have looked a moment ago."""
        now_s = time.monotonic()
        if share and now_s - self._seen_s < LOOK_S and self._seen_bytes - need_bytes > PLENTY_BYTES:
            return self._seen_bytes
        uploads_bytes = await self._uploads.awaited_bytes() if self._uploads is not None else 0
        left_bytes = await asyncio.to_thread(self._measure) - uploads_bytes
        self._seen_bytes, self._seen_s = left_bytes - self._set_aside_bytes, now_s
        return self._seen_bytes

    def _measure(self) -> int:
        free_bytes = shutil.disk_usage(self._root).free - self._reserve_bytes
        unwritten = (max(item.need_bytes - folder_bytes(item.folder), 0) for item in tuple(self._promises))
        return free_bytes - sum(unwritten)


def disk_is_full(folder: Path) -> bool:
    """Whether the disk that holds a folder has next to nothing left."""
    return shutil.disk_usage(folder).free < FULL_BYTES


def _too_small(need_bytes: int, total_bytes: int, reserve_bytes: int) -> DiskTooSmallError:
    return DiskTooSmallError(
        f"This needs about {need_bytes / 2**20:.0f} MiB of disk, and the server's has {total_bytes / 2**20:.0f} MiB in "
        f"all, {reserve_bytes / 2**20:.0f} MiB of them kept free. Use a server with a larger disk, or send less data."
    )


def folder_bytes(folder: Path) -> int:
    """What a folder takes on the disk, with everything below it; what vanishes meanwhile counts as nothing."""
    total = 0
    for parent, folders, files in os.walk(folder, onerror=None):
        for name in (*folders, *files):
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512  # noqa: PTH118  # walked often
            except OSError:
                continue
    return total
