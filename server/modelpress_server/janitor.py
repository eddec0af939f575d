"""Cleans up: blobs that nothing uses, expired uploads, events of old jobs, folders of dead tasks."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from modelpress_server.ballast import Ballast
from modelpress_server.clock import Clock
from modelpress_server.config import Settings
from modelpress_server.errors import ServiceError
from modelpress_server.findings import Findings
from modelpress_server.projects import Projects
from modelpress_server.services.upload_session import UploadSessions
from modelpress_server.stores.blob_index import BlobIndex
from modelpress_server.stores.blobs import BlobKey, BlobStore
from modelpress_server.stores.usage import Retention
from modelpress_server.waiting import wait_until

logger = logging.getLogger(__name__)

# A blob has a file a moment before it has a record; its file is left alone for so long.
MIN_BLOB_AGE_S = 3600.0
# The time of day and the time that passed differ by less between two passes, unless somebody set the clock.
MAX_CLOCK_DRIFT_US = 30_000_000
# After a start nothing expires for so long: the server was away, or the clock was set meanwhile.
START_GRACE_S = 3600.0
# When room is short, unused blobs go so soon after their last use, and the janitor comes so soon.
SHORT_BLOB_TTL_S = 3600.0
SHORT_INTERVAL_S = 10.0
# Files of blobs that were let go may be wanted again by an upload that ends just now.
SETTLED_S = 60.0
# A bucket is looked through for what no record names so often, beginning an interval after the start.
LISTING_INTERVAL_S = 24 * 3600.0
BATCH = 500
MAX_STEPS = 100  # of the clock, that are remembered


class Janitor:
    """Sweeps every `settings.janitor_interval_s`.

    Of servers that share a database one alone does (`leads`), but each sweeps what is its own: findings and ballast.
    """

    def __init__(
        self,
        settings: Settings,
        projects: Projects,
        blobs: BlobStore,
        index: BlobIndex,
        retention: Retention,
        sessions: UploadSessions,
        findings: Findings,
        ballast: Ballast,
        clock: Clock,
        *,
        leads: Callable[[], Awaitable[bool]],
    ) -> None:
        self._leads = leads
        self._projects = projects
        self._retention = retention
        self._settings = settings
        self._blobs = blobs
        self._index = index
        self._sessions = sessions
        self._findings = findings
        self._ballast = ballast
        self._clock = clock
        self._room_is_short = asyncio.Event()
        self._ahead_us = self._wall_ahead_us()
        self._steps: list[tuple[int, int]] = []  # time of day after a step forward, and its length, in microseconds
        self._began_s = self._listed_at_s = clock.now_s()
        self._has_given_grace = False
        self._sweeping = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins."""
        self._task = asyncio.create_task(self._sweep_regularly())

    def hurry(self) -> None:
        """Somebody was refused room: the next pass comes soon, and frees what it can."""
        self._room_is_short.set()

    async def close(self) -> None:
        """Stops; what was begun may be finished by the next server."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def sweep_now(self) -> None:
        """One pass at the present time; none where the clock was set forward since the last one.

        Nobody had the time that a clock skips: what would expire in it gets its whole time again. Nor did anybody while
        the server was away: the first pass gives a grace.
        """
        async with self._sweeping:  # a pass must not go by a time of day that another has corrected
            now, step_us = self._clock.wall_us(), self._wall_ahead_us() - self._ahead_us
            self._ahead_us += step_us
            if not await self._leads():
                await self._sweep_own(now, self._settings.blob_ttl_s)
                return
            if step_us < -MAX_CLOCK_DRIFT_US or not self._has_given_grace:
                # What was used while the clock was ahead would stay until the clock is there again.
                await self._index.undo_future(now, upload_expire_us=now + round(self._settings.upload_ttl_s * 1e6))
                await self._blobs.undo_future(now / 1e6)
            if not self._has_given_grace:
                await self._renew(
                    now, min(START_GRACE_S, self._settings.blob_ttl_s), min(START_GRACE_S, self._settings.upload_ttl_s)
                )
                self._has_given_grace = True
            if step_us <= MAX_CLOCK_DRIFT_US:
                settled = self._clock.now_s() - self._began_s >= START_GRACE_S
                await self.sweep(now, expire=settled)
                return
            logger.warning("the clock was set forward by %d s; what would have expired is kept", step_us // 1_000_000)
            self._steps = [*self._steps[1 - MAX_STEPS :], (now, step_us)]
            await self._renew(now, self._settings.blob_ttl_s, self._settings.upload_ttl_s)

    def _before_us(self, now: int, ttl_s: float) -> int:
        """What ended before this has had its time. A time that a clock skipped was nobody's."""
        before_us = now - round(ttl_s * 1e6)
        for stepped_at_us, step_us in reversed(self._steps):
            if before_us >= stepped_at_us:
                break
            before_us -= step_us
        return before_us

    async def _renew(self, now: int, blob_s: float, upload_s: float) -> None:
        """Unused blobs and unfinished uploads are kept for so long at least."""
        used_us = now - round((self._settings.blob_ttl_s - blob_s) * 1e6)
        await self._index.renew(used_us, upload_expire_us=now + round(upload_s * 1e6))

    def _wall_ahead_us(self) -> int:
        return self._clock.wall_us() - round(self._clock.now_s() * 1e6)

    async def sweep(self, now: int, *, expire: bool = True) -> None:
        """One pass at the time `now`, in microseconds. Records go first, then files that no record names any more.

        `expire`: jobs, models and events that have had their time go; soon after a start the clock may be wrong.
        """
        if expire:
            await self._expire(now)
        short, blob_ttl_s = self._room_is_short.is_set(), self._settings.blob_ttl_s
        self._room_is_short.clear()
        if short:
            blob_ttl_s = min(blob_ttl_s, SHORT_BLOB_TTL_S)
        forgotten_us = self._before_us(now, self._settings.event_ttl_s)
        await self._blobs.empty_quarantine((now if short else forgotten_us) / 1e6)
        swept = await self._index.sweep(
            blobs_before_us=now - round(blob_ttl_s * 1e6),
            events_before_us=forgotten_us if expire else 0,
            now_us=now,
        )
        for upload_id in swept.uploads:
            await self._sessions.discard(upload_id)
        active = await self._index.active_uploads()
        for upload_id in await self._blobs.partial_ids() - active:
            await self._sessions.discard(upload_id)
        for blob in set(swept.blobs) - await self._index.known(swept.blobs):
            await self._remove(blob, now / 1e6 - SETTLED_S)
        removed = await self._remove_unknown_files(now / 1e6)
        await self._sweep_own(now, blob_ttl_s)
        if removed or swept.uploads or swept.jobs_compacted:
            logger.info(
                "cleaned up: %d blobs, %d uploads, events of %d jobs", removed, len(swept.uploads), swept.jobs_compacted
            )

    async def _sweep_own(self, now: int, blob_ttl_s: float) -> None:
        """What each server has for itself."""
        await self._findings.remove_older_than(now / 1e6 - blob_ttl_s)
        await self._blobs.run(self._ballast.take_on)

    async def _expire(self, now: int) -> None:
        """Jobs and models that have had their time; their blobs go with the sweep, once nothing else uses them."""
        for project in await self._retention.projects():
            limits, jobs, models = self._projects.limits(project), 0, 0
            if limits.job_ttl_s:
                jobs = await self._retention.expire_jobs(project, self._before_us(now, limits.job_ttl_s))
            if limits.model_ttl_s:
                models = await self._retention.expire_models(project, self._before_us(now, limits.model_ttl_s))
            if jobs or models:
                logger.info("project %s: %d jobs and %d models have had their time", project, jobs, models)

    async def _remove(self, blob: BlobKey, before_s: float) -> bool:
        return await self._index.drop_unknown(blob, partial(self._blobs.remove_older_than, blob, before_s))

    async def _remove_unknown_files(self, now_s: float) -> int:
        if self._blobs.shared:
            # A listing of a bucket is paid for, and little is left behind there.
            if self._clock.now_s() - self._listed_at_s < LISTING_INTERVAL_S:
                return 0
            self._listed_at_s = self._clock.now_s()
        before_s = now_s - min(self._settings.blob_ttl_s, MIN_BLOB_AGE_S)
        files, removed = await self._blobs.older_than(before_s), 0
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            for blob in set(batch) - await self._index.known(batch):
                removed += await self._remove(blob, before_s)
        return removed

    async def _sweep_regularly(self) -> None:
        while True:
            try:
                await self.sweep_now()
            except ServiceError as error:
                logger.warning("cleaning up failed: %s", error)
            except Exception:  # a bug here must not leave the disk to fill up for good
                logger.exception("cleaning up failed")
            await wait_until(self._room_is_short, self._settings.janitor_interval_s)
            if self._room_is_short.is_set():
                await self._clock.sleep(SHORT_INTERVAL_S)


def clear_work_folders(work: Path) -> None:
    """Removes what tasks of a dead server left; called before any task runs."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(mode=0o700, parents=True)
