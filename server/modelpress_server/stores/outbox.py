"""Events that wait to be told; `sql_outbox` implements the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event for one place. `attempts`: so many have failed."""

    id: str
    attempts: int
    body: bytes


class OutboxStore(Protocol):
    """Events for places that are told when jobs end."""

    async def lend_events(self, endpoint: str, due_us: int, until_us: int, limit: int) -> list[StoredEvent]:
        """Those that are due, the longest first; they are due again at `until_us`, unless they were removed."""
        ...

    async def next_event_us(self, endpoint: str) -> int | None:
        """When the next one is due."""
        ...

    async def postpone_event(self, endpoint: str, event_id: str, due_us: int) -> None:
        """It did not arrive."""
        ...

    async def remove_event(self, endpoint: str, event_id: str) -> None:
        """It has arrived, or will not."""
        ...

    async def drop_events(self, before_us: int) -> int:
        """Gives up what was stored before; returns how many."""
        ...
