"""The SQL database, driven from threads: the one place that knows the dialect.

Writes run one after the other in one thread, which is what SQLite allows anyway, so that none waits on a lock; reads
have threads of their own and see the last commit (WAL). `synchronous=FULL`: a job that a client was told of survives a
power cut; progress is written in batches, so that the fsync of each commit costs little.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from modelpress_protos.v1 import upload_service_pb2
from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, inspect, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError, OperationalError

from modelpress_server.ballast import Ballast
from modelpress_server.config import SettingsError
from modelpress_server.errors import ServiceError, StorageFullError
from modelpress_server.shortage import server_busy, storage_full
from modelpress_server.stores import migrations
from modelpress_server.stores.base import StateChange
from modelpress_server.stores.tables import project_blobs, uploads

Result = TypeVar("Result")
BUSY_TIMEOUT_MS = 10_000
READERS = 4
_CHANGES = "modelpress_changes"  # of a state, in the transaction that runs
_OUT_OF_DESCRIPTORS = ("unable to open database file", "out of memory")


class Database:
    """Runs functions of a connection as transactions, off the event loop."""

    def __init__(self, engine: Engine, ballast: Ballast) -> None:
        self._engine = engine
        self._ballast = ballast
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sql-write")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="sql-read")
        # Told of each change of a state once it is committed; called in the thread that wrote, in the writer's context.
        self.on_change: Callable[[StateChange], None] = lambda change: None

    @classmethod
    def open(cls, path: Path, ballast: Ballast | None = None) -> Database:
        """Opens or creates the SQLite file and brings its schema up to date; `ballast` is one on the same disk."""
        path.touch(mode=0o600)
        path.chmod(0o600)  # SQLite gives its other files the mode of this one
        engine = create_engine(URL.create("sqlite", database=str(path)), pool_size=READERS + 1)
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        _migrate(engine)
        return cls(engine, ballast or Ballast(path.with_name("ballast")))

    async def read(self, function: Callable[[Connection], Result]) -> Result:
        """Runs `function` in a transaction that only reads."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._run, function, False)

    async def write(self, function: Callable[[Connection], Result], *, must: bool = False) -> Result:
        """Runs `function` in a transaction and commits it. Raises StorageFullError.

        `must`: it lets go of something or ends something, and is to succeed on a full disk as well.
        """
        run = partial(self._run_anyhow if must else self._run, function, True)
        # In a copy of the context: the log's lines on what is written say which call or job it was for.
        return await asyncio.get_running_loop().run_in_executor(self._writer, copy_context().run, run)

    async def close(self) -> None:
        """Waits for what runs, then closes."""
        for pool in (self._readers, self._writer):
            await asyncio.to_thread(partial(pool.shutdown, wait=True))
        self._engine.dispose()

    def _run_anyhow(self, function: Callable[[Connection], Result], writes: bool) -> Result:
        try:
            return self._run(function, writes)
        except StorageFullError:
            with self._ballast.lent() as there_was_some:
                if not there_was_some:
                    raise
                return self._run(function, writes)

    def _run(self, function: Callable[[Connection], Result], writes: bool) -> Result:
        with self._engine.connect().execution_options(modelpress_writes=writes) as connection:
            changes = connection.info[_CHANGES] = []
            try:
                with connection.begin():
                    result = function(connection)
            except OperationalError as error:
                raise _shortage(error) or error from error
        for change in changes:
            self.on_change(change)
        return result


@dataclass(frozen=True)
class Records:
    """What the database says that there is: sizes of blobs by the hexadecimal of their SHA-256, durable bytes of
    uploads by their id. `faults`: what is wrong with the database itself.
    """

    blobs: Mapping[str, int]
    uploads: Mapping[str, int]
    faults: Sequence[str]


def read_records(path: Path) -> Records:
    """Reads a database that a server may be using, and has SQLite check it."""
    engine = create_engine(f"sqlite:///file:{quote(str(path))}?mode=ro&uri=true")
    try:
        with engine.connect() as connection:
            answers = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
            blobs = connection.execute(select(project_blobs.c.sha256, project_blobs.c.size_bytes)).all()
            active = uploads.c.state == upload_service_pb2.Upload.STATE_ACTIVE
            open_uploads = connection.execute(select(uploads.c.id, uploads.c.committed_size).where(active)).all()
    except DatabaseError as error:
        return Records({}, {}, [f"the database: {error.orig}"])
    finally:
        engine.dispose()
    return Records(
        {row.sha256.hex(): row.size_bytes for row in blobs},
        {row.id: row.committed_size for row in open_uploads},
        [f"the database: {answer}" for answer in answers if answer != "ok"],
    )


def _shortage(error: OperationalError) -> ServiceError | None:
    text = str(error.orig)
    if "full" in text:
        return storage_full()
    # SQLite opens its files, and what it sorts in, when it needs them.
    return server_busy() if any(part in text for part in _OUT_OF_DESCRIPTORS) else None


def note_change(connection: Connection, change: StateChange) -> None:
    """Has `Database.on_change` told of a change when the transaction is committed."""
    connection.info[_CHANGES].append(change)


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
