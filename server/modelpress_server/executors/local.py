"""Runs each task in a child process of this machine.

    fork a worker -> limit its memory -> hand over the task -> pass events on -> kill the process group

Nothing that a worker does is trusted: frames are bounded, log lines and progress are rationed, and the process group is
killed when the task has ended, however it ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from google.rpc import status_pb2
from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import job_service_pb2

from modelpress_server.clock import Clock, Waited
from modelpress_server.config import SettingsError
from modelpress_server.executors import lost
from modelpress_server.executors.base import START_WORKER, Figures, Limits, WorkerLostError, WorkerUnavailableError
from modelpress_server.executors.child import PREFIX, Worker
from modelpress_server.executors.output import EventFilter
from modelpress_server.executors.probing import Probe, run_probe
from modelpress_server.executors.process import ExecStarter, Starter, StartError, WorkerCommand
from modelpress_server.executors.process_tree import CpuMeter, memory_bytes
from modelpress_server.executors.turns import MeasuringTurns
from modelpress_server.executors.zygote import PREFIX as ZYGOTE_PREFIX
from modelpress_server.executors.zygote import ForkStarter
from modelpress_server.sandbox.confinement import LEVEL_FILES_AND_NETWORK
from modelpress_server.sandbox.worker_user import WorkerUser, WorkerUsers, barrier, may_change_user
from modelpress_server.shortage import storage_full
from modelpress_server.space import disk_is_full, folder_bytes
from modelpress_server.waiting import uninterrupted
from modelpress_server.worker import DEFAULT_TASKS
from modelpress_server.worker.failures import take_debug_info
from modelpress_server.worker.framing import FramingError
from modelpress_server.worker.paths import Redactor, task_paths

logger = logging.getLogger(__name__)

MEMORY_POLL_S = 0.1
_DISK_POLL_LOOKS = 5  # a look at the disk after so many at the memory
# What a task has used is told so often: a server that is killed loses no more of it.
_USED_INTERVAL_S = 5.0
# The kernel's cap counts memory that was asked for, the watchdog what is used: stacks and arenas are asked for in
# advance, for each thread, and a library starts threads by the number of processors.
_CAP_RESERVE_BYTES = 512 * 1024**2 + 32 * 1024**2 * (os.cpu_count() or 1)
_TERMINAL = ("inspected", "compressed", "failed")
_LAST_WORDS_S = 1.0
WAITS_FOR_TURN = "waits until another job has measured"

OnEvent = Callable[[worker_pb2.WorkerEvent], None]


class LocalExecutor:
    """The embedded executor: one child process a task.

    `fork`: workers are forked from a process that has done their imports, where that is possible; else each does its
    own. `temp_root`: folder that holds the workers' private folders and, somewhere below it, the folders of all tasks:
    a sandboxed worker sees nothing else. `sandbox`: auto, require or off. `tasks`: module (or file) that runs them.
    `measure_cores`: the processors that measuring is pinned to; none: wherever the kernel likes.
    `private`: files and folders that no worker may read. `first_uid`: workers run as users from this one on, where the
    server may change users; 0: as the server's own.
    """

    def __init__(
        self,
        *,
        fork: bool,
        sandbox: str,
        temp_root: Path,
        tasks: str = DEFAULT_TASKS,
        private: Sequence[Path] = (),
        first_uid: int = 0,
        measure_cores: tuple[int, ...] = (),
        clock: Clock | None = None,
    ) -> None:
        self.sandbox_level = 0
        self._users = WorkerUsers(first_uid) if first_uid and may_change_user() else None
        self._clock = clock or Clock()
        self._sandbox = sandbox
        self._root = temp_root.resolve()
        command = WorkerCommand(self._root, sandbox, tasks, tuple(private))
        self._private = command.private
        self._running: set[Worker] = set()
        self._starts = self._failed_starts = 0
        self._turns = MeasuringTurns(lambda: self._running, self._clock, measure_cores)
        self._starter: Starter = ForkStarter(command) if fork else ExecStarter(command)
        self._opening: asyncio.Task[None] | None = None

    @property
    def separate_users(self) -> bool:
        """Whether workers run as users of their own."""
        return self._users is not None

    def figures(self) -> Figures:
        """See `Executor.figures`."""
        return Figures(
            pids=tuple(worker.pid for worker in self._running),
            imported=self._starter.ready,
            starts=self._starts,
            failed_starts=self._failed_starts,
            turns=self._turns.figures(),
        )

    async def start(self) -> None:
        """Removes what an earlier server left, finds the sandbox level, begins with the imports of the workers.

        Raises SettingsError where the sandbox is required and does not hold, OSError.
        """
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in (*self._root.glob(f"{PREFIX}*"), *self._root.glob(f"{ZYGOTE_PREFIX}*")):
            await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)
        if self._users is not None:
            self._users.open(self._root)
            user = self._users.next()
            if fault := (await self._probe(user)).user_fault:
                # Python itself says strange things where it cannot read its own library.
                logger.warning("workers run as the server's own user: %s", barrier(user, self._root) or fault)
                self._users.close(self._root)
                self._users = None
        found = await self._probe(self._users.next() if self._users else None)
        self.sandbox_level = found.level
        if found.level < LEVEL_FILES_AND_NETWORK and self._sandbox == "require":
            raise SettingsError(f"sandbox: level {found.level} is all that workers reach: {found.fault}.")
        if found.level < LEVEL_FILES_AND_NETWORK and self._sandbox == "auto":
            logger.warning("workers are confined to level %d only: %s", found.level, found.fault)
        self._opening = asyncio.create_task(self._open_starter())

    async def try_start(self) -> None:
        """See `Executor.try_start`."""
        try:
            worker = await self._start_worker()
        except (StartError, OSError) as error:
            raise _unavailable(error) from error
        await worker.end()

    async def run(
        self, request: worker_pb2.WorkerRequest, *, limits: Limits, on_event: OnEvent
    ) -> worker_pb2.WorkerEvent:
        """See `Executor.run`."""
        paths = self._check_folders(request)
        on_event(_starting_worker(self._what_a_start_waits_for()))
        try:
            worker = await self._start_worker()
        except (StartError, OSError) as error:
            raise _unavailable(error) from error
        try:
            await self._turns.quiet()
            self._running.add(worker)
            if worker.user is not None:
                await asyncio.to_thread(worker.user.hand_over, self._root, paths)
            task = _Run(worker, limits, on_event, self._turns, self._clock, self._running)
            return await self._perform(task, request)
        finally:
            worker.kill()
            await uninterrupted(self._end(worker))

    async def _perform(self, task: _Run, request: worker_pb2.WorkerRequest) -> worker_pb2.WorkerEvent:
        """As `run`. Looks at the disk before the worker's own folder is gone, which may be what fills it."""
        try:
            event = await task.perform(request)
        except WorkerLostError as error:
            if error.reason == lost.CRASHED and await asyncio.to_thread(disk_is_full, self._root):
                raise storage_full() from error
            raise
        # Whatever it says of its model: a library whose file was cut short says anything.
        if event.HasField("failed") and await asyncio.to_thread(disk_is_full, self._root):
            raise storage_full()
        return event

    async def close(self) -> None:
        """Kills whatever runs; its tasks end with WorkerLostError."""
        for worker in self._running:
            worker.kill()
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        await self._starter.close()

    async def _open_starter(self) -> None:
        """The first task need not wait for the imports then."""
        try:
            async with self._turns.starting():
                await self._starter.open()
        except (StartError, OSError) as error:
            logger.error("no worker could be started: %s", error)

    def _what_a_start_waits_for(self) -> str:
        if self._turns.taken:
            return WAITS_FOR_TURN
        return "" if self._starter.ready else "its process loads the libraries"

    async def _start_worker(self) -> Worker:
        try:
            worker = await self._started_worker()
        except (StartError, OSError):
            self._failed_starts += 1
            raise
        self._starts += 1
        return worker

    async def _started_worker(self) -> Worker:
        async with self._turns.starting():
            worker = await Worker.start(self._starter, self._root, self._users.next() if self._users else None)
        level, fault = worker.sandbox.sandbox_level, worker.sandbox.sandbox_fault
        if level < LEVEL_FILES_AND_NETWORK and self._sandbox == "require":
            await worker.end()
            raise StartError(f"A worker reached sandbox level {level} only, and is not used: {fault}")
        if level < self.sandbox_level:
            logger.warning("a worker is confined to level %d only: %s", level, fault)
        self.sandbox_level = level  # what a worker has tried itself counts for more than the try at the start
        return worker

    async def _end(self, worker: Worker) -> None:
        # First of all it runs no more: who measures meanwhile must not stop it, and wake it up after its end.
        self._running.discard(worker)
        self._turns.forget(worker)
        await worker.end()

    def _check_folders(self, request: worker_pb2.WorkerRequest) -> list[Path]:
        """What the task touches, resolved."""
        readable, writable = task_paths(request)
        paths = [path.resolve() for path in (*readable, *writable)]
        for path in paths:
            if not path.is_relative_to(self._root):
                raise ValueError(f"{path} is not below {self._root}, where tasks have their files")
        return paths

    async def _probe(self, user: WorkerUser | None) -> Probe:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self._root))
        try:
            if user is not None:
                user.own(directory)
            return await run_probe(self._sandbox, directory, self._private, user)
        finally:
            shutil.rmtree(directory, ignore_errors=True)


class _Run:
    """One task on one worker."""

    def __init__(
        self,
        worker: Worker,
        limits: Limits,
        on_event: OnEvent,
        turns: MeasuringTurns,
        clock: Clock,
        running: Collection[Worker] = (),
    ) -> None:
        self._worker = worker
        self._running = running
        self._memory_bytes = 0  # when it was last looked at
        self._limits = limits
        self._clock = clock
        self._turns = turns
        self._waited_s = 0.0  # for turns, in which the worker stood still by itself
        self._events = EventFilter(on_event)
        self._on_event = on_event
        self._cpu = CpuMeter(worker.pid)
        self._told_s = clock.now_s()
        self._told_cpu_s = 0.0
        self._memory_was_short = False
        self._redact: Callable[[str], str] = str

    async def perform(self, request: worker_pb2.WorkerRequest) -> worker_pb2.WorkerEvent:
        """The terminal event. Raises WorkerLostError."""
        readable, writable = task_paths(request)
        self._redact = Redactor([*readable, *writable, self._worker.directory, self._worker.directory.parent])
        self._worker.listen(self._take_line, self._take_pause)
        limited = worker_pb2.WorkerRequest()
        limited.CopyFrom(request)
        if self._limits.memory_bytes:
            limited.memory_limit_bytes = self._limits.memory_bytes + _CAP_RESERVE_BYTES
        limited.file_limit_bytes = self._limits.disk_bytes
        self._worker.send(limited)
        self._told_s = self._clock.now_s()
        conversation = asyncio.create_task(self._converse())
        watchdog = asyncio.create_task(self._exceed_limits([*writable, self._worker.directory]))
        end = asyncio.create_task(self._worker.wait())
        try:
            done = await self._until_time_is_up({conversation, watchdog, end})
            if end in done and conversation not in done:
                # What it sent last may lie in the pipe still; a process that it started may hold that open for ever.
                done, _ = await asyncio.wait({conversation}, timeout=_LAST_WORDS_S)
            event = conversation.result() if conversation in done else None
            self._cpu.sample()
            if event is not None:
                self._worker.kill()
                await self._worker.wait_output()
                return event
            if watchdog in done:
                raise watchdog.result()
            if conversation in done or end.done():
                raise await self._lost(end)
            raise lost.too_slow(self._limits.time_s)
        finally:
            self._tell_used()
            for task in (conversation, watchdog, end):
                task.cancel()

    def _tell_used(self) -> None:
        """What was used since the last time."""
        now_s, cpu_s = self._clock.now_s(), self._cpu.used_s
        used = worker_pb2.Used(cpu_seconds=cpu_s - self._told_cpu_s, run_seconds=now_s - self._told_s)
        self._told_s, self._told_cpu_s = now_s, cpu_s
        self._on_event(worker_pb2.WorkerEvent(used=used))

    async def _until_time_is_up(self, tasks: Waited) -> Waited:
        """Those that are done first; none when the task has had its time. Standing still for others costs none."""
        began_s = self._clock.now_s()
        while True:
            own_s = self._clock.now_s() - began_s - self._worker.paused_s - self._waited_s
            left_s = self._limits.time_s - own_s if self._limits.time_s else None
            if left_s is not None and left_s <= 0:
                return set()
            done = await self._clock.wait(tasks, left_s)
            if done:
                return done

    async def _give_turn(self) -> None:
        if self._turns.taken:
            self._events.remark(WAITS_FOR_TURN)
        began_s, paused_s = self._clock.now_s(), self._worker.paused_s
        await self._turns.take(self._worker)
        self._waited_s += self._clock.now_s() - began_s - (self._worker.paused_s - paused_s)
        self._worker.send(worker_pb2.WorkerRequest(turn=worker_pb2.MeasuringTurn(cores=self._turns.cores)))

    async def _converse(self) -> worker_pb2.WorkerEvent | None:
        """Passes events on until the terminal one; None: the worker has closed its end before."""
        try:
            while (event := await self._worker.receive()) is not None:
                kind = event.WhichOneof("event")
                if kind in _TERMINAL:
                    _log_incident(event.failed)
                    return event
                if kind == "progress":
                    self._events.progress(event.progress)
                elif kind == "log":
                    self._events.log(event.log.severity, self._redact(event.log.text))
                elif kind == "loaded":
                    self._events.loaded(event)
                elif kind == "span":
                    self._events.span(event.span)
                elif kind == "turn" and event.turn.ended:
                    self._turns.release(self._worker)
                elif kind == "turn":
                    await self._give_turn()
                else:
                    raise FramingError(f"event {kind} in the middle of a task")
        except FramingError as error:
            logger.warning("worker %d: %s", self._worker.pid, error)
            raise lost.broken_protocol() from error
        return None

    async def _exceed_limits(self, folders: Sequence[Path]) -> WorkerLostError:
        """Returns when the worker holds more memory, or has more on the disk, than it may: how it is lost."""
        looks = 0
        while True:
            await asyncio.sleep(MEMORY_POLL_S)
            self._cpu.sample()
            if self._clock.now_s() - self._told_s >= _USED_INTERVAL_S:
                self._tell_used()
            self._memory_bytes = memory_bytes(self._worker.pid) or self._memory_bytes
            if self._limits.memory_bytes and self._memory_bytes > self._limits.memory_bytes:
                return lost.out_of_memory(self._limits.memory_bytes)
            looks += 1
            if self._limits.disk_bytes and looks % _DISK_POLL_LOOKS == 0:
                used_bytes = await asyncio.to_thread(lambda: sum(map(folder_bytes, folders)))
                if used_bytes > self._limits.disk_bytes:
                    return lost.out_of_disk(self._limits.disk_bytes)

    def _beside_larger(self) -> bool:
        others = [worker for worker in self._running if worker is not self._worker]
        return any(memory_bytes(worker.pid) > self._memory_bytes for worker in others)

    async def _lost(self, end: asyncio.Task[int]) -> WorkerLostError:
        """It ended, or closed its end of the pipe, without a terminal event."""
        ended, _ = await asyncio.wait({end}, timeout=_LAST_WORDS_S)
        self._worker.kill()
        await self._worker.wait_output()
        if self._memory_was_short:
            return lost.out_of_memory(self._limits.memory_bytes)
        if self._worker.lost_parent:
            return lost.orphaned()
        if not ended:
            return lost.broken_protocol()
        return lost.crashed(end.result(), beside_larger=self._beside_larger())

    def _take_pause(self, paused: bool) -> None:
        if paused:
            self._events.remark(WAITS_FOR_TURN)
        else:
            self._events.unremark()

    def _take_line(self, line: str) -> None:
        self._memory_was_short |= lost.is_out_of_memory_line(line)
        self._events.log("INFO", self._redact(line))


def _starting_worker(message: str) -> worker_pb2.WorkerEvent:
    return worker_pb2.WorkerEvent(progress=job_service_pb2.Progress(stage=START_WORKER, message=message))


def _unavailable(error: Exception) -> WorkerUnavailableError:
    logger.error("no worker could be started: %s", error)
    return WorkerUnavailableError("A worker process could not be started; the server's log says why.")


def _log_incident(status: status_pb2.Status) -> None:
    """The traceback of an unexpected error goes to the server's log, and no further."""
    if details := take_debug_info(status):
        logger.error("in a worker: %s\n%s", status.message, details)


__all__ = ["LocalExecutor", "WorkerLostError"]
