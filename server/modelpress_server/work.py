"""Work without a service: takes tasks from the database that servers share, and does them on this machine.

Beside servers that run nothing themselves (`--workers 0`), as long-running processes, or one for each task (`--once`),
as Kubernetes' Jobs like it. All that holds between servers holds here: a claim has a lease and a fence, and what a
process that is gone has left is taken up by others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

from modelpress_server.app import local_executor
from modelpress_server.clock import Clock
from modelpress_server.config import Settings, SettingsError
from modelpress_server.executors.base import Executor, WorkerUnavailableError
from modelpress_server.findings import Findings
from modelpress_server.host import Host
from modelpress_server.janitor import clear_work_folders
from modelpress_server.lock import DataDirLock
from modelpress_server.membership import Membership
from modelpress_server.observation.changes import ChangeLog
from modelpress_server.observation.meter import Meter
from modelpress_server.observation.tracer import Tracer
from modelpress_server.projects import Projects
from modelpress_server.runs import RunResources
from modelpress_server.scheduler import Scheduler
from modelpress_server.sites.machine import ThisMachine
from modelpress_server.space import Space
from modelpress_server.stores.database import Database
from modelpress_server.stores.news import News
from modelpress_server.stores.s3 import S3BlobStore
from modelpress_server.stores.sql_jobs import SqlJobStore
from modelpress_server.stores.sql_models import SqlModelStore
from modelpress_server.stores.sql_servers import SqlServerStore
from modelpress_server.stores.sql_usage import SqlUsage
from modelpress_server.waiting import Notifier

logger = logging.getLogger(__name__)

# In the data folder: written so often while the process gets on, for whoever watches it.
ALIVE_FILE = "alive"
ALIVE_INTERVAL_S = 15.0


class Work:
    """Takes tasks; `start`, then `stop` once. Or `once` alone."""

    def __init__(
        self,
        settings: Settings,
        make_executor: Callable[[Settings], Executor] = local_executor,
        clock: Clock | None = None,
    ) -> None:
        """Raises SettingsError."""
        if settings.database is None or settings.blobs is None:
            raise SettingsError("work: tasks come from servers that share their stores: set --database and --blobs.")
        if settings.ray_address is not None:
            raise SettingsError("work: tasks run on this machine; for a Ray cluster give --ray-address to the servers.")
        self._settings = settings
        self._database_url, self._blobs_url = settings.database, settings.blobs
        self._make_executor = make_executor
        self._clock = clock or Clock()
        self._lock = DataDirLock(settings.data_dir)
        # What a stop, or a start that fails, has to close, the last opened first.
        self._opened = AsyncExitStack()
        self._telling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to take tasks. Raises SettingsError."""
        await self._open()
        await self._scheduler.start(machine_restarted=self._lock.machine_restarted)
        self._lock.note_boot()
        self._telling = asyncio.create_task(self._tell_alive())

    async def once(self) -> bool:
        """Does one task, and closes. False: there was none. Raises WorkerUnavailableError, SettingsError."""
        await self._open()
        try:
            done = await self._scheduler.take_one()
            if not self._host.able:
                raise WorkerUnavailableError("No worker can be started here; the log says why. The task waits.")
            return done
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Takes no more; what runs may finish within the grace, or is queued again. Then closes everything."""
        await self.drain()
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.wait([self._telling])
        await self._news.close()
        await self._membership.leave()
        await self._opened.aclose()

    async def drain(self) -> None:
        """Takes no more; what runs may finish within the grace, or is queued again."""
        await self._scheduler.drain(self._settings.drain_grace_s)

    async def _tell_alive(self) -> None:
        while True:
            with suppress(OSError):  # a full disk
                (self._settings.data_dir / ALIVE_FILE).write_text("")
            await asyncio.sleep(ALIVE_INTERVAL_S)

    async def _open(self) -> None:
        settings, clock = self._settings, self._clock
        self._lock.acquire()
        self._opened.callback(self._lock.release)
        try:
            await asyncio.to_thread(clear_work_folders, settings.data_dir / "work")
            self._blobs = S3BlobStore(self._blobs_url, settings.data_dir / "tmp")
            self._opened.push_async_callback(self._blobs.close)
            await self._blobs.open()
            database = await asyncio.to_thread(Database.connect, self._database_url)
            self._opened.push_async_callback(database.close)
            meter, projects = Meter(), Projects(settings)
            database.on_change = ChangeLog(meter).note
            space = Space(settings.data_dir, settings.reserve_bytes)
            self._site = ThisMachine(
                self._make_executor(settings),
                self._blobs,
                space,
                settings.data_dir / "work",
                findings=Findings(settings.data_dir / "findings", projects, self._blobs, space),
                meter=meter,
                max_blob_bytes=settings.max_blob_bytes,
            )
            self._membership = Membership(
                SqlServerStore(database), settings.data_dir, settings.lease_s, clock, shared=True
            )
            self._host = Host(self._site, clock, _nobody_asks)
            self._scheduler = Scheduler(
                RunResources(settings, self._site, SqlUsage(database), meter, Tracer()),
                projects,
                SqlModelStore(database),
                SqlJobStore(database, self._site.kinds),
                Notifier(),
                self._host,
                clock,
                self._membership.server_id,
            )
            self._membership.on_beat = self._scheduler.beat
            self._news = News(self._database_url, self._scheduler.hear)
            self._opened.push_async_callback(self._site.close)
            await self._site.start()
            await self._membership.join()
            self._news.start()
        except BaseException:
            await self._opened.aclose()
            raise


async def _nobody_asks(able: bool) -> None:
    """There is no health service to tell."""
