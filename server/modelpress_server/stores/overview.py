"""All projects together, for those who run the server, and changes as they come; `sql_overview` implements it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class StateChange:
    """A job or model is in another state. `state`: SUCCEEDED, ACTIVE and so on; `reason`: of its error, if any.

    `wait_s`: from the creation to the first start, when that has come; `run_s`: from the last start to the end, when
    that has come.
    """

    kind: Literal["job", "model"]
    project: str
    id: str
    state: str
    reason: str = ""
    created: bool = False
    from_cache: bool = False
    attempt: int = 0
    wait_s: float | None = None
    run_s: float | None = None


@dataclass(frozen=True, slots=True)
class Queue:
    """The queued jobs of one project: how many, and how old the oldest is."""

    jobs: int
    oldest_age_s: float


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """What a store holds. `jobs`, `models`: by state (RUNNING, ACTIVE and so on); `queues`: by project."""

    jobs: Mapping[str, int]
    models: Mapping[str, int]
    queues: Mapping[str, Queue]
    stored_bytes: int


class StoreOverview(Protocol):
    """All projects together, for those who run the server."""

    async def ping(self) -> None:
        """Returns when the store has answered."""
        ...

    async def figures(self) -> StoreFigures:
        """Counts; takes time that grows with what is stored."""
        ...

    async def jobs_by_project(self) -> Mapping[str, Mapping[str, int]]:
        """Of each project with jobs, how many are in each state (RUNNING and so on)."""
        ...
