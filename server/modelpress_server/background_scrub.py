"""Reads stored files again, slowly and always, so that damage is found before somebody needs them.

`compress-server check` does the same at full speed, and checks the records besides. Files that workers or clients read
are verified on their way in any case; this is for those that nobody asks for.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time

from modelpress_server.clock import Clock
from modelpress_server.config import Settings
from modelpress_server.stores.filesystem import FileBlobStore

logger = logging.getLogger(__name__)

# A server has better things to do when it starts.
FIRST_AFTER_S = 3600.0
FAULT_PAUSE_S = 600.0


class BackgroundScrub:
    """One pass over all blobs every `settings.scrub_interval_s`, at `settings.scrub_bytes_per_s` at most; 0: none."""

    def __init__(self, settings: Settings, blobs: FileBlobStore, clock: Clock) -> None:
        self._settings = settings
        self._blobs = blobs
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins, unless it is turned off."""
        if self._settings.scrub_bytes_per_s:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stops where it is."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def scrub(self) -> int:
        """One pass; how many blobs were damaged, and set aside."""
        blobs = await self._blobs.older_than(time.time())
        # From somewhere else each time: a server that is often restarted gets to all of them.
        start = random.randrange(len(blobs)) if blobs else 0  # noqa: S311  # no secret
        damaged = 0
        for blob in (*blobs[start:], *blobs[:start]):
            damaged += await self._blobs.check(blob, self._pace) is False
        if damaged:
            logger.error("%d of %d stored files were damaged", damaged, len(blobs))
        return damaged

    async def _pace(self, size_bytes: int) -> None:
        await self._clock.sleep(size_bytes / self._settings.scrub_bytes_per_s)

    async def _run(self) -> None:
        pause_s = FIRST_AFTER_S
        while True:
            await self._clock.sleep(pause_s)
            began_s = self._clock.now_s()
            try:
                await self.scrub()
            except Exception:  # a disk that fails in another way must not end the looking
                logger.exception("reading stored files again failed")
            pause_s = max(self._settings.scrub_interval_s - (self._clock.now_s() - began_s), FAULT_PAUSE_S)
