"""A worker's process and everything below it, seen through /proc: memory in use, and who to kill."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Memory that only ending the process frees. Pages of mapped files are left out: the kernel drops them when it must.
_OWN_MEMORY = ("RssAnon:", "RssShmem:", "VmSwap:")


def descendants(pid: int) -> list[int]:
    """The process and all below it that exist at this moment."""
    found = [pid]
    for parent in found:
        found += [child for child in _children(parent) if child not in found]
    return found


def memory_bytes(pid: int) -> int:
    """What the process and all below it hold; 0 when they have ended."""
    return sum(_own_memory_bytes(process) for process in descendants(pid))


class CpuMeter:
    """Seconds of processors that a process and all below it take from now on, as long as it can be looked at."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began_s = self._last_s = _cpu_s(pid)

    def sample(self) -> None:
        """Looks again; after the end of the process the last look counts."""
        self._last_s = max(self._last_s, _cpu_s(self._pid))

    @property
    def used_s(self) -> float:
        """As of the last look."""
        return self._last_s - self._began_s


def kill_tree(pid: int) -> None:
    """Kills the process group led by `pid`, and what left the group but still stands below `pid`.

    Works after the leader's end as well: its number stays taken while its group has members.
    """
    below = descendants(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for process in below[1:]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in (_PROC / str(pid) / "task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (task / "children").read_text("ascii").split())
    return found


def _cpu_s(pid: int) -> float:
    """Of the process, of what it has waited for, and of what still runs below it."""
    total = 0
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            # Behind the name, which may hold anything: utime, stime, cutime, cstime are the fields 14 to 17.
            fields = (_PROC / str(process) / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))
    return total / _TICKS_PER_S


def _own_memory_bytes(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "status").read_text("utf-8", "replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_OWN_MEMORY))
