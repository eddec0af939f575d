"""One worker process as the server sees it: start it, wait until it is ready, talk to it, end it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from modelpress_protos.internal.v1 import worker_pb2

from modelpress_server.executors.output import LineSplitter
from modelpress_server.executors.process import Pipes, Starter, StartError, WorkerProcess, open_pipes
from modelpress_server.executors.process_tree import kill_tree
from modelpress_server.sandbox.worker_user import WorkerUser
from modelpress_server.worker.framing import FramingError, encode_frame, read_frame_async
from modelpress_server.worker.own_time import write_paused_s

PREFIX = "worker-"
READY_TIMEOUT_S = 120.0
_OUTPUT_DRAIN_S = 1.0
_START_OUTPUT_CHARS = 2000
_READ_BYTES = 64 * 1024


class Worker:
    """A started worker. Make one with `Worker.start`; end it with `end`, whatever happened."""

    def __init__(self, process: WorkerProcess, directory: Path, pipes: Pipes, user: WorkerUser | None) -> None:
        self.user = user
        self.sandbox = worker_pb2.Ready()  # what it said of its confinement
        self._process = process
        self._directory = directory
        self._pipes = pipes
        self._on_line: Callable[[str], None] | None = None
        self._on_pause: Callable[[bool], None] = lambda paused: None
        self._start_output = ""
        self._killed = False
        self._paused_since_s: float | None = None
        self._paused_s = 0.0
        self._output = asyncio.create_task(self._read_output())

    @classmethod
    async def start(cls, starter: Starter, root: Path, user: WorkerUser | None = None) -> Worker:
        """Starts a worker and waits until it is ready. Raises StartError, OSError; cancellation kills it.

        `root`: where it gets its private folder.
        """
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        try:
            if user is not None:
                user.own(directory)
            worker = await cls._spawn(starter, directory, user)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        try:
            await worker._wait_ready()
        except BaseException:
            await worker.end()
            raise
        return worker

    @classmethod
    async def _spawn(cls, starter: Starter, directory: Path, user: WorkerUser | None) -> Worker:
        ends, pipes = await open_pipes()
        try:
            process = await starter.start(ends, directory, user)
        except BaseException:
            pipes.close()
            raise
        finally:
            ends.close()
        return cls(process, directory, pipes, user)

    async def _wait_ready(self) -> None:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                event = await self.receive()
        except (TimeoutError, FramingError) as error:
            raise StartError(f"A worker did not get ready: {error!r}. Its output: {self._start_output}") from error
        if event is None or event.WhichOneof("event") != "ready":
            await self.wait_output()
            raise StartError(f"A worker ended before it was ready. Its output: {self._start_output}")
        self.sandbox = event.ready

    @property
    def pid(self) -> int:
        """Process id; also that of its process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return self._process.returncode is None

    @property
    def lost_parent(self) -> bool:
        """Whether it ended with the process that it was forked from, which is no fault of its own."""
        return self._process.lost_parent

    @property
    def directory(self) -> Path:
        """Its private folder."""
        return self._directory

    def listen(self, on_line: Callable[[str], None], on_pause: Callable[[bool], None]) -> None:
        """From now on, what the worker prints goes to `on_line`, line by line; `on_pause` hears when it is stopped
        where it is, and when it goes on."""
        self._on_line, self._on_pause = on_line, on_pause

    def send(self, request: worker_pb2.WorkerRequest) -> None:
        """Hands over the task; that a worker has ended shows in `receive`. Raises FramingError."""
        self._pipes.requests.write(encode_frame(request))

    async def receive(self) -> worker_pb2.WorkerEvent | None:
        """The next event; None when the worker has closed its end. Raises FramingError."""
        return await read_frame_async(self._pipes.events, worker_pb2.WorkerEvent)

    async def wait(self) -> int:
        """Waits for its end; the exit status, negative for a signal."""
        return await self._process.wait()

    async def wait_output(self) -> None:
        """Waits until everything it printed has been read; after its end only, and not for long."""
        await asyncio.wait([self._output], timeout=_OUTPUT_DRAIN_S)

    @property
    def paused_s(self) -> float:
        """For how long it stood still so far: that is not its own time."""
        now = 0.0 if self._paused_since_s is None else time.monotonic() - self._paused_since_s
        return self._paused_s + now

    def pause(self) -> None:
        """Stops it and its process group where they are."""
        if self._paused_since_s is None:
            self._paused_since_s = time.monotonic()
            self._signal(signal.SIGSTOP)
            self._on_pause(True)

    def resume(self) -> None:
        """Lets it go on, and tells it for how long it stood still (`worker.own_time`)."""
        if self._paused_since_s is not None:
            self._paused_s, self._paused_since_s = self.paused_s, None
            with contextlib.suppress(OSError):  # a full disk: its own clock then runs a little fast
                write_paused_s(self._directory, self._paused_s)
            self._signal(signal.SIGCONT)
            self._on_pause(False)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """Kills it and everything below it, at once; what it started may outlive it, so also after its end."""
        if not self._killed:
            self._killed = True
            kill_tree(self.pid)

    async def end(self) -> None:
        """Kills what still runs, waits for its end, and removes its private folder."""
        self.kill()
        await self.wait()
        await self.wait_output()
        self._output.cancel()
        self._pipes.close()
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def _read_output(self) -> None:
        """Reads whatever is printed, always: a full pipe would stop the worker."""
        splitter = LineSplitter(self._take_line)
        while data := await self._pipes.output.read(_READ_BYTES):
            splitter.feed(data)
        splitter.close()

    def _take_line(self, line: str) -> None:
        if self._on_line is not None:
            self._on_line(line)
        else:
            self._start_output = f"{self._start_output}\n{line}"[-_START_OUTPUT_CHARS:]
