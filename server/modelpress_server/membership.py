"""This server among those that share its database: it says that it lives, and takes up what dead ones left.

With a database of its own a server is alone: its lease never ends, and there is nobody to watch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from modelpress_server.clock import Clock
from modelpress_server.names import new_id
from modelpress_server.stores.servers import ServerStore

logger = logging.getLogger(__name__)

ALONE_S = 100 * 365 * 24 * 3600.0
BEATS_PER_LEASE = 4
# In the data folder: the one who had it before is dead, whatever its lease says.
ID_FILE = "server.id"


class Membership:
    """One server's lease. `on_beat` is called after each renewal: to take up, compare, and look for work."""

    def __init__(self, servers: ServerStore, data_dir: Path, lease_s: float, clock: Clock, *, shared: bool) -> None:
        self.server_id = new_id()
        self.on_beat: Callable[[], Awaitable[None]] | None = None
        self._servers = servers
        self._id_file = data_dir / ID_FILE
        self._lease_s = lease_s
        self._clock = clock
        self._shared = shared
        self._task: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Before anything is claimed."""
        if not self._shared:
            await self._servers.remove_others(self.server_id)
            await self._servers.renew(self.server_id, ALONE_S)
            return
        with suppress(OSError, ValueError):
            await self._servers.remove(self._id_file.read_text("ascii").strip())
        await self._servers.renew(self.server_id, self._lease_s)
        self._id_file.write_text(self.server_id, "ascii")
        self._task = asyncio.create_task(self._beat_regularly())

    async def leave(self) -> None:
        """Once nothing runs here any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        with suppress(Exception):  # its lease ends by itself
            await self._servers.remove(self.server_id)

    async def _beat_regularly(self) -> None:
        while True:
            await self._clock.sleep(self._lease_s / BEATS_PER_LEASE)
            try:
                if not await self._servers.renew(self.server_id, self._lease_s):
                    logger.warning("the database was not reached for %g s; others may have our jobs", self._lease_s)
                if self.on_beat is not None:
                    await self.on_beat()
            except Exception as error:  # noqa: BLE001  # a database that is away comes back
                logger.warning("the lease could not be renewed: %s", error or type(error).__name__)
