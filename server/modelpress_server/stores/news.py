"""What other servers tell through PostgreSQL (LISTEN), so that nobody has to ask again and again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from modelpress_server.stores import postgres

logger = logging.getLogger(__name__)

RETRY_S = 1.0


class News:
    """Listens on a connection of its own. `on_news` is given the name of a job or model and its state, if it changed.

    Its own server's news come as well. With empty texts: some may have been missed.
    """

    def __init__(self, url: str, on_news: Callable[[str, str], None]) -> None:
        self._arguments = postgres.listen_arguments(url)
        self._on_news = on_news
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins."""
        self._task = asyncio.create_task(self._listen_always())

    async def close(self) -> None:
        """Stops."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _listen_always(self) -> None:
        while True:
            try:
                await self._listen()
            except Exception as error:  # noqa: BLE001  # a database that is away comes back
                logger.warning("news of other servers do not come: %s", type(error).__name__)
            await asyncio.sleep(RETRY_S)

    async def _listen(self) -> None:
        import psycopg

        async with await psycopg.AsyncConnection.connect(**self._arguments, autocommit=True) as connection:
            await connection.execute(f"LISTEN {postgres.CHANNEL}")
            self._on_news("", "")
            async for item in connection.notifies():
                name, _, state = item.payload.partition(" ")
                self._on_news(name, state)
