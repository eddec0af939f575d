"""How the process of a worker comes about, and the pipes between it and the server."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, Process
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from modelpress_server.sandbox.worker_user import WorkerUser
from modelpress_server.worker.framing import MAX_FRAME_BYTES


class StartError(Exception):
    """A worker did not get ready; the message holds the end of its output, for the server's log."""


@dataclass(frozen=True)
class WorkerCommand:
    """What all workers of a server have in common.

    `root`: folder of their private folders; `tasks`: module or file that runs tasks; `private`: what none may read.
    """

    root: Path
    sandbox: str
    tasks: str
    private: tuple[Path, ...] = ()

    def arguments(self, module: str) -> list[str]:
        """The command line of a module of `modelpress_server.worker`, as far as workers have it in common."""
        return [
            *python_command(module),
            f"--parent-pid={os.getpid()}",
            f"--root={self.root}",
            f"--sandbox={self.sandbox}",
            f"--tasks={self.tasks}",
            *(f"--private={path}" for path in self.private),
        ]


def python_command(module: str) -> list[str]:
    """Runs one of our modules with this interpreter: neither the current folder nor the user's own is looked in."""
    return [sys.executable, "-P", "-s", "-m", module]


def child_environment(directory: Path) -> dict[str, str]:
    """All that a worker gets of the environment: no tokens, no proxies, no settings of libraries.

    The import path is the server's own, so that every kind of installation works.
    """
    import_path = [entry for entry in sys.path if Path(entry).is_absolute() and Path(entry).exists()]
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": str(directory),
        "TMPDIR": str(directory),
        "PYTHONPATH": os.pathsep.join(import_path),
        "PYTHONDONTWRITEBYTECODE": "1",
        # numpy's library starts its threads when it is imported. The tasks start them, once they are confined.
        "OPENBLAS_NUM_THREADS": "1",
    }


class WorkerProcess(Protocol):
    """A process that was started, as far as the server needs it."""

    @property
    def pid(self) -> int:
        """Process id; also that of its process group."""
        ...

    @property
    def returncode(self) -> int | None:
        """None while it has not ended, as far as is known; negative for a signal."""
        ...

    @property
    def lost_parent(self) -> bool:
        """Whether it was killed because the process that it was forked from has ended."""
        ...

    async def wait(self) -> int:
        """Waits for its end; the exit status."""
        ...


@dataclass(frozen=True)
class Pipes:
    """The server's ends: the protocol's two pipes, and what the worker prints.

    Not `asyncio.subprocess.PIPE`: a process that the worker started may hold that open, and `wait` would wait for it.
    """

    requests: asyncio.WriteTransport
    events: asyncio.StreamReader
    output: asyncio.StreamReader
    read_transports: tuple[asyncio.BaseTransport, ...]

    def close(self) -> None:
        """Closes all, without waiting for what was not yet sent."""
        if not self.requests.is_closing():
            self.requests.abort()
        for transport in self.read_transports:
            transport.close()


@dataclass(frozen=True)
class ChildEnds:
    """Descriptors of the worker's ends."""

    requests: int
    events: int
    output: int

    def close(self) -> None:
        """The worker has its own by now."""
        for descriptor in (self.requests, self.events, self.output):
            os.close(descriptor)


async def open_pipes() -> tuple[ChildEnds, Pipes]:
    """Both ends of the pipes of one worker. Raises OSError."""
    loop = asyncio.get_running_loop()
    requests_read, requests_write = os.pipe()
    requests, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(requests_write, "wb", 0))
    events_write, events, events_transport = await open_reading_pipe()
    output_write, output, output_transport = await open_reading_pipe()
    pipes = Pipes(requests, events, output, (events_transport, output_transport))
    return ChildEnds(requests_read, events_write, output_write), pipes


async def open_reading_pipe() -> tuple[int, asyncio.StreamReader, asyncio.BaseTransport]:
    """The end to write to, as a descriptor, and the end to read from. Raises OSError."""
    read, write = os.pipe()
    reader = asyncio.StreamReader(limit=MAX_FRAME_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb", 0)
    )
    return write, reader, transport


class Starter(Protocol):
    """Starts the processes of workers."""

    async def open(self) -> None:
        """Gets ready, so that the first start need not wait. Raises StartError, OSError."""
        ...

    @property
    def ready(self) -> bool:
        """Whether a worker that is started now has its imports done already."""
        ...

    async def start(self, ends: ChildEnds, directory: Path, user: WorkerUser | None) -> WorkerProcess:
        """A worker that reads its task from `ends`. Raises StartError, OSError."""
        ...

    async def close(self) -> None:
        """Ends what it keeps; workers may end with it."""
        ...


class _Child:
    """A child of the server's own: it ends with the server alone."""

    lost_parent = False

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid
        self.wait = process.wait

    @property
    def returncode(self) -> int | None:
        """See `WorkerProcess.returncode`."""
        return self._process.returncode


class ExecStarter:
    """Each worker is a Python of its own, and does its own imports."""

    ready = False

    def __init__(self, command: WorkerCommand) -> None:
        self._command = command

    async def open(self) -> None:
        """See `Starter.open`."""

    async def start(self, ends: ChildEnds, directory: Path, user: WorkerUser | None) -> WorkerProcess:
        """See `Starter.start`."""
        process = await asyncio.create_subprocess_exec(
            *self._command.arguments("modelpress_server.worker"),
            f"--directory={directory}",
            f"--user={user or ''}",
            f"--requests-fd={ends.requests}",
            f"--events-fd={ends.events}",
            stdin=DEVNULL,
            stdout=ends.output,
            stderr=ends.output,
            env=child_environment(directory),
            cwd=directory,
            pass_fds=(ends.requests, ends.events),
            start_new_session=True,
        )
        return _Child(process)

    async def close(self) -> None:
        """See `Starter.close`."""
