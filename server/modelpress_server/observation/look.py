"""What is read when somebody asks for metrics: the store, the disk, and the workers."""

from __future__ import annotations

import asyncio
import logging
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from modelpress_server.clock import Clock
from modelpress_server.executors.base import Figures, WorkerHost
from modelpress_server.executors.process_tree import memory_bytes
from modelpress_server.host import Host
from modelpress_server.stores.overview import StoreFigures, StoreOverview

logger = logging.getLogger(__name__)

# However often somebody asks, the store is read no more often than this: counting goes over all jobs.
STORE_INTERVAL_S = 5.0
STORE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Look:
    """What was seen. `store`: None where the store did not answer; `able`: whether workers can be started."""

    store: StoreFigures | None = None
    figures: Figures = field(default_factory=Figures)
    memory_bytes: int = 0
    disk_free_bytes: int = 0
    disk_size_bytes: int = 0
    able: bool = True


class Lookout:
    """Looks at a server."""

    def __init__(self, data_dir: Path, store: StoreOverview, executor: WorkerHost, host: Host, clock: Clock) -> None:
        self._data_dir = data_dir
        self._store = store
        self._executor = executor
        self._host = host
        self._clock = clock
        self._seen: StoreFigures | None = None
        self._read_at_s = -STORE_INTERVAL_S

    async def look(self) -> Look:
        """One look; only one at a time."""
        await self._read_store()
        figures = self._executor.figures()
        look = Look(store=self._seen, figures=figures, able=self._host.able)
        return await asyncio.to_thread(self._with_machine, look)

    async def _read_store(self) -> None:
        if self._clock.now_s() - self._read_at_s < STORE_INTERVAL_S:
            return
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                self._seen = await self._store.figures()
        except Exception as error:  # noqa: BLE001  # the other metrics say most when the store is broken
            logger.warning("metrics: the store could not be read: %s", error or type(error).__name__)
            self._seen = None
        self._read_at_s = self._clock.now_s()

    def _with_machine(self, look: Look) -> Look:
        disk = shutil.disk_usage(self._data_dir)
        held = sum(memory_bytes(pid) for pid in look.figures.pids)
        return replace(look, memory_bytes=held, disk_free_bytes=disk.free, disk_size_bytes=disk.total)
