"""The site that is this machine: files in a folder of the task, the task in a child process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

from modelpress_protos.internal.v1 import site_pb2, worker_pb2
from modelpress_protos.v1 import job_service_pb2

from modelpress_server import errors
from modelpress_server.executors.base import Executor, Figures, Limits, WorkerLostError
from modelpress_server.executors.lost import CRASHED
from modelpress_server.findings import Findings
from modelpress_server.observation.meter import Meter
from modelpress_server.sandbox.confinement import LEVEL_FILES_AND_NETWORK
from modelpress_server.shortage import storage_full
from modelpress_server.sites.base import OnEvent, Postpone, PostponedError, TaskFailedError, postponement_of
from modelpress_server.space import Promise, Space
from modelpress_server.stores.blobs import BlobStore
from modelpress_server.task_folder import TaskFolder, inspection_need_bytes, job_need_bytes, task_folder
from modelpress_server.toolchain import made_by

STORAGE_FULL = "STORAGE_FULL"
OUT_OF_DISK = "WORKER_OUT_OF_DISK"


class ThisMachine:
    """Site whose workers are children of this process.

    `work`: folder of the tasks' folders. `findings`: None: nothing is kept for later jobs. `max_blob_bytes`: largest
    artifact.
    """

    def __init__(
        self,
        executor: Executor,
        blobs: BlobStore,
        space: Space,
        work: Path,
        *,
        findings: Findings | None,
        meter: Meter,
        max_blob_bytes: int,
    ) -> None:
        self._executor = executor
        self._blobs = blobs
        self._space = space
        self._work = work
        self._findings = findings
        self._meter = meter
        self._max_blob_bytes = max_blob_bytes

    @property
    def sandbox_level(self) -> int:
        return self._executor.sandbox_level

    @property
    def separate_users(self) -> bool:
        return self._executor.separate_users

    def figures(self) -> Figures:
        return self._executor.figures()

    def kinds(self) -> Collection[bytes]:
        return (made_by(),)

    async def start(self) -> None:
        await self._executor.start()

    async def try_start(self) -> None:
        await self._executor.try_start()

    async def close(self) -> None:
        await self._executor.close()

    async def compress(self, task: site_pb2.Assignment, on_event: OnEvent) -> site_pb2.Compressed:
        findings_bytes = self._findings.limit_bytes(task.project) if self._findings is not None else 0
        need_bytes = task.growth * job_need_bytes(task.job.spec, task.model, findings_bytes)
        async with self._folder(need_bytes) as (folder, promise):
            return await self._compress(task, folder, promise, on_event, findings_bytes)

    async def inspect(self, task: site_pb2.Assignment, on_event: OnEvent) -> worker_pb2.InspectResult:
        async with self._folder(task.growth * inspection_need_bytes(task.model)) as (folder, promise):
            try:
                request = await folder.inspect_request(task.model)
            except (errors.BlobDamagedError, errors.BlobMissingError) as error:
                raise PostponedError(Postpone.DAMAGE) from error
            event = await self._run(request, _limits(task, promise), promise, on_event)
        if event.WhichOneof("event") != "inspected":
            raise WorkerLostError(CRASHED, "The worker ended without a result.")
        return event.inspected

    async def _compress(
        self,
        task: site_pb2.Assignment,
        folder: TaskFolder,
        promise: Promise,
        on_event: OnEvent,
        findings_bytes: int,
    ) -> site_pb2.Compressed:
        spec, findings = task.job.spec, self._findings if findings_bytes else None
        limits = _limits(task, promise)
        request = await folder.compress_request(task.job, task.model, limits, findings_bytes)
        request.compress.traced = task.traced
        if findings is not None and not spec.skip_cache:
            found = await findings.lay_out(task.project, spec, task.model, folder.known, link=self._links)
            self._meter.findings_looked_up(found)
        async with findings.collecting(task.project, spec, task.model, folder.found) if findings else nullcontext():
            event = await self._run(request, limits, promise, on_event)
        if event.WhichOneof("event") != "compressed":
            raise WorkerLostError(CRASHED, "The worker ended without a result.")
        artifacts: list[job_service_pb2.Artifact] = await folder.collect(
            event.compressed.artifacts, self._max_blob_bytes
        )
        return site_pb2.Compressed(artifacts=artifacts, summary=event.compressed.summary, made_by=made_by())

    @property
    def _links(self) -> bool:
        """Whether workers may be given the stored files themselves: only where they cannot change them."""
        return self._executor.sandbox_level >= LEVEL_FILES_AND_NETWORK

    @asynccontextmanager
    async def _folder(self, need_bytes: int) -> AsyncIterator[tuple[TaskFolder, Promise]]:
        """A folder for the task, and room in it. A task that fills the disk itself is given more and more, until it is
        more than there is."""
        async with (
            task_folder(self._work, self._blobs, link=self._links) as folder,
            self._space.promised(need_bytes, folder.root) as promise,
        ):
            try:
                yield folder, promise
            except Exception as error:
                if postponement_of(error) is Postpone.ROOM and await promise.outgrown():
                    raise PostponedError(Postpone.MORE_ROOM) from error
                raise

    async def _run(
        self, request: worker_pb2.WorkerRequest, limits: Limits, promise: Promise, on_event: OnEvent
    ) -> worker_pb2.WorkerEvent:
        """The terminal event of a task that did not fail.

        Raises TaskFailedError, WorkerLostError, and StorageFullError where the disk is to blame for either.
        """
        try:
            event = await self._executor.run(request, limits=limits, on_event=on_event)
        except WorkerLostError as error:
            self._meter.worker_lost(error.reason)
            # Writing to a mapped file on a full disk ends a process with SIGBUS.
            if await self._disk_is_to_blame(promise, error.reason):
                raise storage_full() from error
            raise
        if event.WhichOneof("event") == "failed":
            status = errors.sanitized(event.failed)
            if await self._disk_is_to_blame(promise, errors.reason_of(status)):
                raise storage_full()
            raise TaskFailedError(status)
        return event

    async def _disk_is_to_blame(self, promise: Promise, reason: str) -> bool:
        if reason == STORAGE_FULL or (reason == OUT_OF_DISK and promise.cut):
            return True
        # A library whose file was cut short reports anything.
        return reason in ("INTERNAL", CRASHED) and await self._space.is_full()


def _limits(task: site_pb2.Assignment, promise: Promise) -> Limits:
    return Limits(task.time_limit_s, task.memory_limit_bytes, promise.limit_bytes)
