"""The servers that share a database, in SQL."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from modelpress_server.stores.database import Database, time_us
from modelpress_server.stores.tables import models, servers

# Rows of servers that have long been dead go.
KEPT_US = 3600 * 1_000_000


class SqlServerStore:
    """ServerStore on a Database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def renew(self, server_id: str, lease_s: float) -> bool:
        def work(connection: Connection) -> bool:
            now_us = time_us(connection)
            lease_until_us = now_us + round(lease_s * 1e6)
            own = servers.c.id == server_id
            before_us = connection.execute(select(servers.c.lease_until_us).where(own).with_for_update()).scalar()
            if before_us is None:
                connection.execute(insert(servers).values(id=server_id, lease_until_us=lease_until_us))
            else:
                connection.execute(update(servers).where(own).values(lease_until_us=lease_until_us))
            connection.execute(delete(servers).where(servers.c.lease_until_us < now_us - KEPT_US, ~own))
            return before_us is not None and before_us > now_us

        return await self._database.write(work, must=True)

    async def remove(self, server_id: str) -> None:
        await self._database.write(lambda connection: _remove(connection, servers.c.id == server_id), must=True)

    async def remove_others(self, server_id: str) -> None:
        await self._database.write(lambda connection: _remove(connection, servers.c.id != server_id), must=True)


def _remove(connection: Connection, which: ColumnElement[bool]) -> None:
    gone = select(servers.c.id).where(which)
    connection.execute(update(models).where(models.c.owner.in_(gone)).values(owner=None))
    connection.execute(delete(servers).where(which))
