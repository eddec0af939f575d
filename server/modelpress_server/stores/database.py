"""The SQL database, driven from threads: the one place that knows the dialect.

Writes run one after the other in one thread, which is what SQLite allows anyway, so that none waits on a lock; reads
have threads of their own and see the last commit (WAL). `synchronous=FULL`: a job that a client was told of survives a
power cut; progress is written in batches, so that the fsync of each commit costs little.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, inspect
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError

from modelpress_server.config import SettingsError
from modelpress_server.errors import ServiceError
from modelpress_server.shortage import server_busy, storage_full
from modelpress_server.stores import migrations

Result = TypeVar("Result")
BUSY_TIMEOUT_MS = 10_000
READERS = 4
_OUT_OF_DESCRIPTORS = ("unable to open database file", "out of memory")


class Database:
    """Runs functions of a connection as transactions, off the event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sql-write")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="sql-read")

    @classmethod
    def open(cls, path: Path) -> Database:
        """Opens or creates the SQLite file and brings its schema up to date."""
        path.touch(mode=0o600)
        path.chmod(0o600)  # SQLite gives its other files the mode of this one
        engine = create_engine(URL.create("sqlite", database=str(path)), pool_size=READERS + 1)
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        _migrate(engine)
        return cls(engine)

    async def read(self, function: Callable[[Connection], Result]) -> Result:
        """Runs `function` in a transaction that only reads."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._run, function, False)

    async def write(self, function: Callable[[Connection], Result]) -> Result:
        """Runs `function` in a transaction and commits it. Raises StorageFullError."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._run, function, True)

    async def close(self) -> None:
        """Waits for what runs, then closes."""
        for pool in (self._readers, self._writer):
            await asyncio.to_thread(partial(pool.shutdown, wait=True))
        self._engine.dispose()

    def _run(self, function: Callable[[Connection], Result], writes: bool) -> Result:
        with self._engine.connect().execution_options(modelpress_writes=writes) as connection:
            try:
                with connection.begin():
                    return function(connection)
            except OperationalError as error:
                raise _shortage(error) or error from error


def _shortage(error: OperationalError) -> ServiceError | None:
    text = str(error.orig)
    if "full" in text:
        return storage_full()
    # SQLite opens its files, and what it sorts in, when it needs them.
    return server_busy() if any(part in text for part in _OUT_OF_DESCRIPTORS) else None


def insert_missing(connection: Connection, table: Table, values: Mapping[str, Any]) -> None:
    """Inserts a row unless one with the same primary key is there."""
    dialects: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
    connection.execute(dialects[connection.dialect.name](table).values(**values).on_conflict_do_nothing())


def _configure_sqlite(dbapi_connection: Any, _record: Any) -> None:
    # sqlite3's own transaction handling would commit at the wrong moments; SQLAlchemy's `begin` event does it.
    dbapi_connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "cache_size=-2000",
    ):
        dbapi_connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE takes the write lock first: a transaction that reads and then writes cannot fail half-way.
    writes = connection.get_execution_options().get("modelpress_writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(engine: Engine) -> None:
    with engine.connect() as connection:
        if inspect(connection).has_table("alembic_version"):
            version = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
            if version == migrations.HEAD:
                return
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise SettingsError(
                f"data_dir: {engine.url.database} was written by a newer version of modelpress ({error}). Start that "
                "version, or choose another --data-dir."
            ) from error
        connection.commit()
