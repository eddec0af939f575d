"""A worker's process and everything below it, seen through /proc: memory in use, and who to kill."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_PROC = Path("/proc")
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


def _own_memory_bytes(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "status").read_text("utf-8", "replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_OWN_MEMORY))
