"""Workers that are forked from a process that does their imports: ready in a tenth of a second, not in seconds.

The other side is `worker.zygote`. The zygote is started before the first task; when it ends, its workers end with it,
and the next start gets a new one. Where it finds that nothing can be forked, workers do their own imports.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import tempfile
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path
from signal import SIGKILL

from modelpress_protos.internal.v1 import worker_pb2

from modelpress_server.executors.output import LineSplitter
from modelpress_server.executors.process import (
    ChildEnds,
    ExecStarter,
    StartError,
    WorkerCommand,
    WorkerProcess,
    child_environment,
    open_reading_pipe,
)
from modelpress_server.executors.process_tree import kill_tree
from modelpress_server.sandbox.worker_user import WorkerUser
from modelpress_server.worker.zygote import MAX_MESSAGE_BYTES

logger = logging.getLogger(__name__)

PREFIX = "zygote-"
IMPORT_TIMEOUT_S = 120.0
FORK_TIMEOUT_S = 60.0
_OUTPUT_CHARS = 2000
_READ_BYTES = 64 * 1024


class ForkedProcess:
    """A worker of a zygote: what asyncio's `Process` is for a child of our own."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.lost_parent = False
        self._end = asyncio.Event()

    async def wait(self) -> int:
        """See `WorkerProcess.wait`."""
        await self._end.wait()
        return self.returncode if self.returncode is not None else -SIGKILL

    def ended(self, status: int) -> None:
        """The zygote has seen its end."""
        self.returncode = status
        self._end.set()

    def orphaned(self) -> None:
        """The zygote has ended: the kernel kills the worker, and nobody can say with which status it ended."""
        self.lost_parent = True
        kill_tree(self.pid)  # the kernel may not have come to it yet
        self.ended(-SIGKILL)


class Zygote:
    """A process that forks workers. Make one with `Zygote.start`."""

    def __init__(self, process: Process, control: socket.socket, output: asyncio.StreamReader, folder: Path) -> None:
        self.alive = True
        self.unfit = ""  # why it forks nothing any more, which it may find with later imports
        self._process = process
        self._control = control
        self._folder = folder
        self._said = ""
        self._ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._asked: dict[int, asyncio.Future[ForkedProcess]] = {}
        self._numbers = 0
        self._workers: dict[int, ForkedProcess] = {}
        self._talk = asyncio.create_task(self._listen())
        self._reading = asyncio.create_task(self._read(output))

    @classmethod
    async def start(cls, command: WorkerCommand) -> tuple[Zygote | None, str]:
        """A zygote that has imported what every task needs; None with the reason where nothing can be forked.

        Raises StartError, OSError; cancellation kills it.
        """
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=command.root))
        try:
            zygote = await cls._spawn(command, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            async with asyncio.timeout(IMPORT_TIMEOUT_S):
                unfit = await zygote._ready
        except TimeoutError as error:
            await zygote.close()
            raise StartError(f"The imports of the workers did not end. Output: {zygote._said}") from error
        except BaseException:
            await zygote.close()
            raise
        if unfit:
            await zygote.close()
            return None, unfit
        return zygote, ""

    @classmethod
    async def _spawn(cls, command: WorkerCommand, folder: Path) -> Zygote:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs:
                write, output, _ = await open_reading_pipe()
                with os.fdopen(write, "wb", 0) as output_end:
                    process = await asyncio.create_subprocess_exec(
                        *command.arguments("modelpress_server.worker.zygote"),
                        f"--control-fd={theirs.fileno()}",
                        stdin=DEVNULL,
                        stdout=output_end,
                        stderr=output_end,
                        env=child_environment(folder),
                        cwd=folder,
                        pass_fds=(theirs.fileno(),),
                        start_new_session=True,
                    )
        except BaseException:
            ours.close()
            raise
        return cls(process, ours, output, folder)

    async def fork(self, ends: ChildEnds, directory: Path, user: WorkerUser | None) -> WorkerProcess:
        """A new worker. Raises StartError, OSError."""
        self._numbers += 1
        request = worker_pb2.ForkRequest(number=self._numbers, directory=str(directory), user=str(user or ""))
        answer: asyncio.Future[ForkedProcess] = asyncio.get_running_loop().create_future()
        self._asked[self._numbers] = answer
        descriptors = [ends.requests, ends.events, ends.output]
        try:
            if not self.alive:
                raise StartError("The process that workers are forked from has ended.")
            socket.send_fds(self._control, [request.SerializeToString()], descriptors)
            async with asyncio.timeout(FORK_TIMEOUT_S):
                return await answer
        except TimeoutError as error:
            self._process.kill()  # a next one may do better
            raise StartError("The process that workers are forked from does not answer.") from error
        finally:
            self._asked.pop(request.number, None)

    async def close(self) -> None:
        """Kills it; its workers end with it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await asyncio.wait([self._talk, self._reading])
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _listen(self) -> None:
        """Takes what the zygote tells until it has ended."""
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(self._control, MAX_MESSAGE_BYTES):
                self._take(worker_pb2.ZygoteEvent.FromString(data))
        except ConnectionError:
            pass  # it was killed with a request unread
        finally:
            self._control.close()
            await self._process.wait()
            self._die()

    def _die(self) -> None:
        self.alive = False
        gone = StartError(f"The process that workers are forked from has ended. Its output: {self._said}")
        if not self._ready.done():
            self._ready.set_exception(gone)
            self._ready.exception()  # nobody may wait for it any more
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(gone)
        for worker in list(self._workers.values()):
            worker.orphaned()
        self._workers.clear()

    def _take(self, event: worker_pb2.ZygoteEvent) -> None:
        kind = event.WhichOneof("event")
        if kind in ("imported", "unfit"):
            self.unfit = event.unfit.why
            if not self._ready.done():
                self._ready.set_result(self.unfit)
        elif kind == "forked":
            self._take_fork(event.forked)
        elif kind == "ended":
            worker = self._workers.pop(event.ended.pid, None)
            if worker is not None:
                worker.ended(event.ended.status)

    def _take_fork(self, forked: worker_pb2.Forked) -> None:
        answer = self._asked.get(forked.number)
        if answer is not None and answer.done():
            answer = None  # nobody waits for it any more
        if forked.error:
            if answer is not None:
                answer.set_exception(OSError(forked.error, "a worker cannot be forked"))
            return
        worker = self._workers[forked.pid] = ForkedProcess(forked.pid)
        if answer is not None:
            answer.set_result(worker)
        else:
            kill_tree(worker.pid)

    async def _read(self, output: asyncio.StreamReader) -> None:
        """What it prints is kept for the case that it ends; there is little of it."""

        def keep(line: str) -> None:
            self._said = f"{self._said}\n{line}"[-_OUTPUT_CHARS:]

        splitter = LineSplitter(keep)
        while data := await output.read(_READ_BYTES):
            splitter.feed(data)
        splitter.close()


class ForkStarter:
    """Forks workers, and keeps a zygote for it."""

    def __init__(self, command: WorkerCommand) -> None:
        self._command = command
        self._exec = ExecStarter(command)
        self._zygote: Zygote | None = None
        self._starting: asyncio.Task[Zygote | None] | None = None
        self._unfit = ""

    @property
    def ready(self) -> bool:
        """See `Starter.ready`."""
        return self._zygote is not None and self._zygote.alive and not self._zygote.unfit

    async def open(self) -> None:
        """See `Starter.open`."""
        await self._current()

    async def start(self, ends: ChildEnds, directory: Path, user: WorkerUser | None) -> WorkerProcess:
        """See `Starter.start`."""
        zygote = await self._current()
        if zygote is not None:
            try:
                return await zygote.fork(ends, directory, user)
            except OSError:
                if not zygote.unfit:
                    raise
                self._give_up(zygote.unfit)
        return await self._exec.start(ends, directory, user)

    async def close(self) -> None:
        """See `Starter.close`."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        if self._zygote is not None:
            await self._zygote.close()

    async def _current(self) -> Zygote | None:
        """One that lives; None: nothing can be forked here. Several that ask meanwhile wait for the same one."""
        if self.ready:
            return self._zygote
        if self._zygote is not None and self._zygote.unfit:  # it lives on for its workers, which end with it
            self._give_up(self._zygote.unfit)
        if self._unfit:
            return None
        if self._starting is None:
            self._starting = asyncio.create_task(self._renew())
            self._starting.add_done_callback(self._started)
        return await asyncio.shield(self._starting)

    def _started(self, task: asyncio.Task[Zygote | None]) -> None:
        self._starting = None
        if not task.cancelled():
            task.exception()  # whoever waits has it; it may be that nobody does

    async def _renew(self) -> Zygote | None:
        if self._zygote is not None:
            logger.warning("the process that workers are forked from has ended, and its workers with it")
            await self._zygote.close()
            self._zygote = None
        self._zygote, unfit = await Zygote.start(self._command)
        if self._zygote is None:
            self._give_up(unfit)
        return self._zygote

    def _give_up(self, unfit: str) -> None:
        if not self._unfit:
            logger.warning("workers cannot be forked here, each does its own imports: %s", unfit)
        self._unfit = unfit
