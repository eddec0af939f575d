"""The servers that share a store; `sql_servers` implements it."""

from __future__ import annotations

from typing import Protocol


class ServerStore(Protocol):
    """The servers that share a store. Each renews its lease; whose lease is over has lost what it had claimed."""

    async def renew(self, server_id: str, lease_s: float) -> bool:
        """The server lives for so long at least. False: its lease was over, or this is its first."""
        ...

    async def remove(self, server_id: str) -> None:
        """The server is gone, and what it had claimed is free."""
        ...

    async def remove_others(self, server_id: str) -> None:
        """No other server lives: this one alone may have the store."""
        ...
