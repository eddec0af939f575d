"""What projects have and have used, and what has had its time; `sql_usage` implements both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """What a project has now (`jobs` by state), and has used so far: runs of jobs, and the time of its workers."""

    stored_bytes: int
    blobs: int
    models: int
    uploads: int
    jobs: Mapping[int, int]
    runs: int
    cpu_s: float
    run_s: float


class UsageStore(Protocol):
    """What projects have used."""

    async def add(self, project: str, *, runs: int, cpu_s: float, run_s: float) -> None:
        """Adds to what a project has used."""
        ...

    async def of(self, project: str) -> UsageRecord:
        """What a project has and has used; nothing for one that was never seen."""
        ...


class Retention(Protocol):
    """Deletes what has had its time, some at once, but nothing that is labelled `pin`. Returns how many."""

    async def projects(self) -> list[str]:
        """Those that have jobs or models."""
        ...

    async def expire_jobs(self, project: str, ended_before_us: int) -> int:
        """Jobs that ended before."""
        ...

    async def expire_models(self, project: str, unused_since_us: int) -> int:
        """Models that neither changed nor had a job since then."""
        ...
