"""For benchmarks: a real `compress-server` on a free port of 127.0.0.1, and memory of processes over time."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class ServerProcess:
    """A server that listens; `address`: HOST:PORT."""

    address: str
    process: subprocess.Popen[str]

    def wait_for_warm_worker(self) -> None:
        """Until it has a child process that is idle: its imports are done, and no job runs."""
        parent = psutil.Process(self.process.pid)
        while True:
            before = {child.pid: sum(child.cpu_times()[:2]) for child in parent.children()}
            time.sleep(0.5)
            after = {child.pid: sum(child.cpu_times()[:2]) for child in parent.children()}
            if before and before.keys() == after.keys() and all(after[pid] - before[pid] < 0.02 for pid in after):
                return


@contextmanager
def running_server(data_dir: Path, *options: str) -> Iterator[ServerProcess]:
    """Starts a server on `data_dir`, stops it in the end."""
    command = [sys.executable, "-m", "modelpress_server", "--listen", "127.0.0.1:0", "--data-dir", str(data_dir)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                log.seek(0)
                raise SystemExit(f"the server did not start: {log.read()}")
            yield ServerProcess(line.removeprefix("listening on ").strip(), process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class MemoryWatch:
    """How far a process's own memory (resident, without mapped files) rises above what it was at the beginning."""

    def __init__(self, pid: int, interval_s: float = 0.02) -> None:
        self._path = Path(f"/proc/{pid}/status")
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._first_bytes = self._now_bytes()
        self._peak_bytes = self._first_bytes
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def growth_bytes(self) -> int:
        """Ends the watching."""
        self._stop.set()
        self._thread.join()
        return self._peak_bytes - self._first_bytes

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._peak_bytes = max(self._peak_bytes, self._now_bytes())

    def _now_bytes(self) -> int:
        try:
            lines = self._path.read_text("ascii").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
