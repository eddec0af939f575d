"""The process that workers are forked from: it does their imports, and nothing else.

    import what every task needs -> see that there is one thread -> say Imported
      -> at each request fork a worker -> tell of its end
      -> between requests: import the rest

The rest takes longer than all else, and no task needs much of it. So the first worker does not wait for it, and a
server for one job, as `compress-client upload --local` has it, never does it: it begins with the second request, or
when there is nothing to do.

`python -m modelpress_server.worker.zygote`, started by `executors.zygote`. What is forked has no thread but the one
that forks, so whatever another one held at that moment would be held for ever: a zygote with a second thread forks
nothing. Libraries start threads with their first work, which is why no work is done here. It opens no file but those of
the Python installation; what a user sent goes from the server to the worker, by pipes that this process has closed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from modelpress_protos.internal.v1 import worker_pb2

from modelpress_server.sandbox import linux
from modelpress_server.sandbox.worker_user import WorkerUser
from modelpress_server.worker.__main__ import argument_parser, confinement
from modelpress_server.worker.life import Confinement, Place, freeze, live, load_tasks

MAX_MESSAGE_BYTES = 64 * 1024
IDLE_MS = 2000
_TASKS = Path("/proc/self/task")
_DESCRIPTORS = Path("/proc/self/fd")


def main() -> None:
    """Forks workers until the server closes its end."""
    parser = argument_parser("modelpress_server.worker.zygote")
    parser.add_argument("--control-fd", type=int, required=True)
    arguments = parser.parse_args()
    linux.forbid_new_privileges()
    linux.die_with_parent(arguments.parent_pid)
    control = socket.socket(fileno=arguments.control_fd)
    tasks = load_tasks(arguments.tasks)
    freeze()
    # Workers change their users and, until they are confined, read the installation; nothing else is needed.
    linux.drop_capabilities(keep=(linux.CAP_DAC_READ_SEARCH, linux.CAP_SETGID, linux.CAP_SETUID))
    if why := unfit():
        control.send(worker_pb2.ZygoteEvent(unfit=worker_pb2.Unfit(why=why)).SerializeToString())
        return
    _flush()
    control.send(worker_pb2.ZygoteEvent(imported=worker_pb2.Imported()).SerializeToString())
    Nursery(control, tasks, confinement(arguments, os.getpid())).serve()


def unfit() -> str:
    """Why this process must not be forked, or cannot tell of the end of what it forks; empty: it can be."""
    threads = [(task / "comm").read_text("utf-8", "replace").strip() for task in _TASKS.iterdir()]
    if len(threads) != 1:
        return f"after the imports there are {len(threads)} threads ({', '.join(threads)})"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        return f"the kernel does not tell of the end of processes ({error})"
    return ""


class Nursery:
    """The workers that were forked, until they have ended."""

    def __init__(self, control: socket.socket, tasks: ModuleType, shared: Confinement) -> None:
        self._control = control
        self._tasks = tasks
        self._shared = shared
        self._rest: Iterator[None] = tasks.preload()
        self._imports_done = False
        self._unfit = ""
        self._requests = 0
        self._workers: dict[int, int] = {}  # a descriptor that tells of its end -> process id
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def serve(self) -> None:
        """Until the server has closed its end: then the workers are killed by the kernel, with this process's end."""
        while True:
            events = self._poll.poll(self._patience_ms())
            if not events:
                self._import_more()
            for descriptor, _ in events:
                if descriptor != self._control.fileno():
                    self._bury(descriptor)
                elif not self._take_request():
                    return

    def _patience_ms(self) -> int | None:
        """How long nothing must happen before more is imported; None: nothing is."""
        if self._imports_done or (self._requests == 1 and self._workers):
            return None
        return 0 if self._requests > 1 else IDLE_MS

    def _import_more(self) -> None:
        try:
            next(self._rest)
        except StopIteration:
            self._imports_done = True
            freeze()
        except Exception:  # noqa: BLE001  # a worker that does its own imports will say the same
            self._imports_done = True
            self._give_up(f"imports failed: {traceback.format_exc()}")

    def _give_up(self, why: str) -> None:
        self._unfit = why
        self._tell(worker_pb2.ZygoteEvent(unfit=worker_pb2.Unfit(why=why)))

    def _take_request(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 3)
        if not data:
            return False
        request = worker_pb2.ForkRequest.FromString(data)
        answer = worker_pb2.Forked(number=request.number)
        self._requests += 1
        try:
            if not self._unfit and (why := unfit()):  # later imports may start threads
                self._give_up(why)
            if self._unfit:
                raise OSError(errno.EAGAIN, self._unfit)
            answer.pid = self._fork(request, descriptors)
        except OSError as error:
            answer.error = error.errno or -1
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._tell(worker_pb2.ZygoteEvent(forked=answer))
        return True

    def _fork(self, request: worker_pb2.ForkRequest, descriptors: list[int]) -> int:
        pid = os.fork()
        if pid == 0:
            _become_worker(request, descriptors, self._tasks, self._shared)
        try:
            end = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._workers[end] = pid
        self._poll.register(end, select.POLLIN)
        return pid

    def _bury(self, descriptor: int) -> None:
        pid = self._workers.pop(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        ended = worker_pb2.WorkerEnd(pid=pid, status=os.waitstatus_to_exitcode(status))
        self._tell(worker_pb2.ZygoteEvent(ended=ended))

    def _tell(self, event: worker_pb2.ZygoteEvent) -> None:
        self._control.send(event.SerializeToString())


def _become_worker(
    request: worker_pb2.ForkRequest, descriptors: list[int], tasks: ModuleType, shared: Confinement
) -> NoReturn:
    """In the forked process: nothing of the zygote's may stay within reach; then as any worker."""
    try:
        requests, events, output = descriptors
        os.setsid()
        for number in (1, 2):
            os.dup2(output, number)
        _close_all_but((0, 1, 2, requests, events))
        os.environ.update(HOME=request.directory, TMPDIR=request.directory)
        tempfile.tempdir = None
        place = Place(Path(request.directory), WorkerUser.parse(request.user), requests, events)
        live(shared, place, lambda: tasks)
    except BaseException:  # noqa: BLE001  whatever it is, this process must not go on as a second zygote
        traceback.print_exc()
        _flush()
    os._exit(1)


def _close_all_but(kept: tuple[int, ...]) -> None:
    for descriptor in [int(path.name) for path in _DESCRIPTORS.iterdir()]:
        if descriptor not in kept:
            with contextlib.suppress(OSError):  # the list was read by one of them
                os.close(descriptor)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


if __name__ == "__main__":
    main()
