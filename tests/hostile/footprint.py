"""What a process holds, as the kernel says: for servers that must be after an attack what they were before it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Footprint:
    """Open descriptors, threads, child processes, and resident memory in MiB."""

    descriptors: int
    threads: int
    children: int
    memory_mib: float

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """Of a process that runs."""
        process = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text("utf-8").splitlines())
        children = [(task / "children").read_text("ascii").split() for task in (process / "task").iterdir()]
        return cls(
            descriptors=len(list((process / "fd").iterdir())),
            threads=int(status["Threads"]),
            children=sum(map(len, children)),
            memory_mib=int(status["VmRSS"].split()[0]) / 1024,
        )


async def settled(pid: int, before: Footprint, *, descriptors: int, memory_mib: float) -> Footprint:
    """The footprint once it is as `before` but for so many descriptors and so much memory; else the last one."""
    for _ in range(100):
        now = Footprint.of(pid)
        if now.descriptors <= before.descriptors + descriptors and now.memory_mib <= before.memory_mib + memory_mib:
            break
        await asyncio.sleep(0.2)
    return now
