"""The process that workers are forked from: it has done their imports, and does nothing else.

    import -> see that there is one thread -> say Imported -> at each request fork a worker -> tell of its end

`python -m modelpress_server.worker.zygote`, started by `executors.zygote`. What is forked has no thread but the one
that forks, so whatever another one held at that moment would be held for ever: a zygote with a second thread forks
nothing. Libraries start threads with their first work, which is why no work is done here. It opens no file but those of
the Python installation; what a user sent goes from the server to the worker, by pipes that this process has closed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from modelpress_protos.internal.v1 import worker_pb2

from modelpress_server.sandbox import linux
from modelpress_server.sandbox.worker_user import WorkerUser
from modelpress_server.worker.__main__ import argument_parser, confinement
from modelpress_server.worker.life import Confinement, Place, imported, live

MAX_MESSAGE_BYTES = 64 * 1024
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
    tasks = imported(arguments.tasks)
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
        self._workers: dict[int, int] = {}  # a descriptor that tells of its end -> process id
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def serve(self) -> None:
        """Until the server has closed its end: then the workers are killed by the kernel, with this process's end."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._control.fileno():
                    self._bury(descriptor)
                elif not self._take_request():
                    return

    def _take_request(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 3)
        if not data:
            return False
        request = worker_pb2.ForkRequest.FromString(data)
        answer = worker_pb2.Forked(number=request.number)
        try:
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
