"""A Ray cluster of processes on this machine: a head that runs nothing, and nodes beside it.

One at a time: what serves the clients of a head has fixed ports (23000 and on), so that two heads would mix them up.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

START_S = 120.0
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
TRIES = 3  # Ray gives a node 30 s to start, which is little on a busy machine
_SMALL = ["--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]


class NotHereError(Exception):
    """There is no Ray; the message says what is missing."""


class RayProcesses:
    """The cluster. `address`: what `--ray-address` takes."""

    def __init__(self, folder: Path, stack: ExitStack, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._stack = stack
        self._environment = {**os.environ, **_QUIET, **environment}
        self._gcs, client = free_ports(2)
        self.address = f"ray://127.0.0.1:{client}"
        self._head = self._start(
            "head", "--head", f"--port={self._gcs}", f"--ray-client-server-port={client}", "--num-cpus=0",
            "--include-dashboard=false", f"--temp-dir={folder / 'ray'}",
        )  # fmt: skip
        wait_for_port(client)

    def add_node(self, name: str, *, labels: str = "", cpus: int = 1) -> subprocess.Popen[bytes]:
        """One more node, as a process group; returns when it has joined."""
        arguments = [f"--address=127.0.0.1:{self._gcs}", f"--num-cpus={cpus}"]
        for _ in range(TRIES):
            process = self._start(name, *arguments, *([f"--labels={labels}"] if labels else []))
            if self._has_line(name, process, "This command will now block"):
                return process
        raise AssertionError(self.log(name))

    def cut_connections(self) -> None:
        """Kills what serves those that are connected by `address`."""
        for pid in descendants(self._head.pid):
            if "specific-server" in Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace"):
                os.kill(pid, signal.SIGKILL)

    def log(self, name: str) -> str:
        """What `ray start` of a node has printed."""
        return (self._folder / f"{name}.log").read_text("utf-8", "replace")

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts", "start", "--node-ip-address=127.0.0.1"]
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--block", *_SMALL, *arguments],
                stdout=log, stderr=log, env=self._environment, start_new_session=True,
            )  # fmt: skip
        self._stack.callback(kill_node, process)
        return process

    def _has_line(self, name: str, process: subprocess.Popen[bytes], line: str) -> bool:
        """Waits for a line in its log; False: it ended before."""
        deadline = time.monotonic() + START_S
        while line not in self.log(name):
            if process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.1)
        return True


def node_id(process: subprocess.Popen[bytes]) -> str:
    """How Ray names a node."""
    for pid in descendants(process.pid):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
        if found := re.search("--node[-_]id=([0-9a-f]{56})", command):
            return found[1]
    raise AssertionError("none of its processes says so")


def kill_node(process: subprocess.Popen[bytes]) -> None:
    """Kills a node and everything on it at once, as a machine that lost its power."""
    below = descendants(process.pid)
    for pid in below:
        _signal(pid, signal.SIGSTOP)  # lest one notices, and ends in good order
    for pid in (*below, *descendants(process.pid)):
        _signal(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split() if int(child) not in found]
            except OSError:
                continue
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@contextmanager
def ray_cluster(environment: Mapping[str, str]) -> Iterator[RayProcesses]:
    """Runs a head while it lasts; `environment`: of all that runs on the nodes. Raises NotHereError."""
    if importlib.util.find_spec("ray") is None:
        raise NotHereError("no ray: pip install 'modelpress[ray]'")
    # Sockets lie below it, whose names must be short.
    with tempfile.TemporaryDirectory(prefix="mp-ray-", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        yield RayProcesses(Path(folder), stack, environment)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has."""
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports


def wait_for_port(port: int) -> None:
    """Returns when somebody listens."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nobody listens on port {port}"
            time.sleep(0.1)
