"""One node of a Ray cluster, as a long-lived actor: it does tasks with confined children of its own machine.

The servers share it. Whatever takes turns on a machine does so here, for all of them: measuring, warm workers, the room
on the disk. A server says regularly that it lives; the tasks of one that does not are stopped, and a node that no
server speaks to ends itself.

    server                                  node
    begin(task) ──────────────────────────▶ a free slot? files from the bucket ─▶ confined child
    news(task, seen) ◀─────────────────────  events, and in the end the Ending; what was made is in the bucket

Messages are serialized protobufs, so that neither side unpickles what a worker said.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from modelpress_protos.internal.v1 import site_pb2, worker_pb2

from modelpress_server.clock import Clock
from modelpress_server.config import SettingsError, default_worker_memory_bytes
from modelpress_server.executors.local import LocalExecutor
from modelpress_server.lock import DataDirLock
from modelpress_server.observation.meter import Meter
from modelpress_server.sites.endings import ending_of
from modelpress_server.sites.machine import ThisMachine
from modelpress_server.space import Space
from modelpress_server.stores.s3 import S3BlobStore
from modelpress_server.toolchain import made_by, processor_name
from modelpress_server.waiting import ended, wait_until
from modelpress_server.worker import DEFAULT_TASKS

logger = logging.getLogger(__name__)

NEWS_WAIT_S = 5.0  # a question for news is answered after so long at the latest
NEWS_EVENTS = 500  # in one answer
LOOK_S = 0.5
# A task that was turned away and has not asked again for so long waits no longer.
WAITS_S = 2.0
GRACE_S = 5.0
UNUSED_S = 10.0
_NAME = "node-"


@dataclass(frozen=True)
class NodeSettings:
    """What is the same for all nodes; nothing secret.

    `slots`: tasks at a time. `folder`: None: the node's own choice.
    """

    blobs: str
    slots: int
    worker_start: str
    sandbox: str
    worker_uid: int
    reserve_bytes: int
    max_blob_bytes: int
    folder: Path | None = None
    tasks: str = DEFAULT_TASKS


@dataclass
class _Task:
    """A task of a server, and what it said that the server has not seen."""

    server_id: str
    begun_s: float
    work: asyncio.Task[None] | None = None
    events: list[worker_pb2.WorkerEvent] = field(default_factory=list)
    dropped: int = 0
    ending: site_pb2.Ending | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, event: worker_pb2.WorkerEvent) -> None:
        self.events.append(event)
        self.changed.set()

    def end(self, ending: site_pb2.Ending) -> None:
        self.ending = ending
        self.changed.set()


class Node:
    """The actor. All its methods but `open` need that it was opened."""

    def __init__(self, settings: NodeSettings, node_id: str, clock: Clock | None = None) -> None:
        self._settings = settings
        self._clock = clock or Clock()
        base = settings.folder or Path(tempfile.gettempdir()) / f"modelpress-{os.getuid()}"
        self._folder = base.absolute() / f"{_NAME}{node_id[:16]}"
        self._lock = DataDirLock(self._folder)
        self._opening = asyncio.Lock()
        self._site: ThisMachine | None = None
        self._tasks: dict[str, _Task] = {}
        self._waiting: dict[str, float] = {}  # tasks that were turned away, the first one first; when they asked last
        self._heard_until_s: dict[str, float] = {}
        self._unused_since_s = self._clock.now_s()
        self._watch: asyncio.Task[None] | None = None

    @property
    def tasks(self) -> list[str]:
        """Ids of the tasks that it has."""
        return list(self._tasks)

    async def open(self, server_id: str, lease_s: float) -> bytes:
        """Gets ready, once; the NodeInfo. Raises SettingsError."""
        self._hear(server_id, lease_s)
        async with self._opening:
            if self._site is None:
                await self._open()
            assert self._site is not None  # noqa: S101  # for mypy
            return site_pb2.NodeInfo(
                sandbox_level=self._site.sandbox_level,
                separate_users=self._site.separate_users,
                made_by=made_by(),
                processor=processor_name(),
            ).SerializeToString()

    async def beat(self, server_id: str, lease_s: float, tasks: list[str]) -> None:
        """The server lives, for so long at least, and follows these tasks: others of its are stopped.

        It may have given up a node that was slow to answer, and come back to it.
        """
        self._hear(server_id, lease_s)
        old_s = self._clock.now_s() - GRACE_S  # younger ones may have been begun after the list was made
        for task_id, task in list(self._tasks.items()):
            if task.server_id == server_id and task.begun_s < old_s and task_id not in tasks:
                logger.warning("task %s is stopped: server %s follows it no longer", task_id, server_id)
                await self.forget(task_id)

    async def leave(self, server_id: str) -> None:
        """The server ends."""
        self._heard_until_s.pop(server_id, None)

    async def begin(self, server_id: str, task_id: str, assignment: bytes) -> bool:
        """Begins a task; False: all slots are taken, and it may ask again: who asked first has the next one.

        Asked for a task that it has, the answer is True.
        """
        if task_id in self._tasks:
            return True
        free = self._settings.slots - sum(task.ending is None for task in self._tasks.values())
        now_s = self._clock.now_s()
        self._waiting[task_id] = now_s
        self._waiting = {name: asked_s for name, asked_s in self._waiting.items() if now_s - asked_s < WAITS_S}
        if self._site is None or task_id not in list(self._waiting)[: max(free, 0)]:
            return False
        del self._waiting[task_id]
        task = self._tasks[task_id] = _Task(server_id, now_s)
        task.work = asyncio.create_task(self._perform(self._site, task, site_pb2.Assignment.FromString(assignment)))
        return True

    async def news(self, task_id: str, seen: int) -> bytes | None:
        """News of a task, after the first `seen` events; None: it is not known here."""
        task = self._tasks.get(task_id)
        if task is None:
            return None
        del task.events[: max(seen - task.dropped, 0)]
        task.dropped = max(seen, task.dropped)
        if not task.events and task.ending is None:
            task.changed.clear()
            await wait_until(task.changed, NEWS_WAIT_S)
        told = task.events[:NEWS_EVENTS]
        ending = task.ending if len(told) == len(task.events) else None
        return site_pb2.News(events=told, ending=ending).SerializeToString()

    async def forget(self, task_id: str) -> None:
        """The server knows how the task ended, or wants it to end, or has found another node for it."""
        self._waiting.pop(task_id, None)
        task = self._tasks.get(task_id)
        if task is None:
            return
        if task.work is not None:
            task.work.cancel()
            await ended(task.work)
        self._tasks.pop(task_id, None)

    async def close(self) -> None:
        """Stops all tasks and removes the folder."""
        if self._watch is not None:
            self._watch.cancel()
        for task_id in list(self._tasks):
            await self.forget(task_id)
        if self._site is not None:
            await self._site.close()
        self._lock.release()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _perform(self, site: ThisMachine, task: _Task, assignment: site_pb2.Assignment) -> None:
        limit_bytes = default_worker_memory_bytes()  # this machine may have less memory than the server's
        assignment.memory_limit_bytes = min(assignment.memory_limit_bytes or limit_bytes, limit_bytes)
        work = site.compress if assignment.HasField("job") else site.inspect
        try:
            task.end(ending_of(await work(assignment, task.note)))
        except Exception as error:  # noqa: BLE001  # whatever it is, the server must hear of it
            task.end(ending_of(error))

    async def _open(self) -> None:
        settings, folder = self._settings, self._folder
        folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if folder.parent.is_symlink() or folder.parent.stat().st_uid not in (0, os.getuid()):
            # In a folder that everybody may write to, another user may have been there first.
            raise SettingsError(f"node_dir: {folder.parent} belongs to another user.")
        self._lock.acquire()
        _remove_left(folder)
        blobs = S3BlobStore(settings.blobs, folder / "tmp")
        await blobs.open()
        executor = LocalExecutor(
            fork=settings.worker_start == "fork",
            sandbox=settings.sandbox,
            temp_root=folder / "work",
            tasks=settings.tasks,
            private=[folder, folder / "tmp"],
            first_uid=settings.worker_uid,
            clock=self._clock,
        )
        site = ThisMachine(
            executor,
            blobs,
            Space(folder, settings.reserve_bytes),
            folder / "work",
            findings=None,
            meter=Meter(),
            max_blob_bytes=settings.max_blob_bytes,
        )
        await site.start()
        self._site = site
        self._watch = asyncio.create_task(self._look_regularly())

    def _hear(self, server_id: str, lease_s: float) -> None:
        self._heard_until_s[server_id] = self._clock.now_s() + lease_s

    async def _look_regularly(self) -> None:
        while True:
            await self._clock.sleep(LOOK_S)
            now_s = self._clock.now_s()
            for server_id in [one for one, until_s in self._heard_until_s.items() if until_s < now_s]:
                del self._heard_until_s[server_id]
                logger.warning("server %s was not heard of; its tasks are stopped", server_id)
                for task_id in [name for name, task in self._tasks.items() if task.server_id == server_id]:
                    await self.forget(task_id)
            if self._heard_until_s:
                self._unused_since_s = now_s
            elif now_s - self._unused_since_s > UNUSED_S:
                self._watch = None
                await self.close()
                os._exit(0)  # Ray's own way out is for methods alone


def _remove_left(folder: Path) -> None:
    """Removes the folders of nodes that are no more."""
    for other in _others(folder):
        lock = DataDirLock(other)
        with contextlib.suppress(SettingsError):  # it lives
            lock.acquire()
            lock.release()
            shutil.rmtree(other, ignore_errors=True)


def _others(folder: Path) -> Iterator[Path]:
    # A young folder may be one whose node is about to take its lock.
    for other in folder.parent.glob(f"{_NAME}*"):
        with contextlib.suppress(OSError):
            if other != folder and time.time() - other.stat().st_mtime > UNUSED_S:
                yield other
