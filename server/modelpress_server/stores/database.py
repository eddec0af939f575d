"""The SQL database, driven from threads: with `postgres` the one place that knows the dialect.

Two kinds. A file (SQLite) belongs to one server: writes run one after the other in one thread, which is what SQLite
allows anyway, so that none waits on a lock; reads have threads of their own and see the last commit (WAL).
`synchronous=FULL`: a job that a client was told of survives a power cut. What waits to be written while another commit
reaches the disk is committed together, so that many writers wait for few of them.

PostgreSQL may be shared by many servers: writes run side by side at READ COMMITTED, and a transaction takes what it
needs to be alone with: rows by FOR UPDATE, a project by `hold`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, cast
from urllib.parse import quote

from modelpress_protos.v1 import upload_service_pb2
from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError, DBAPIError, InvalidRequestError, OperationalError

from modelpress_server.ballast import Ballast
from modelpress_server.errors import ServiceError, StorageFullError
from modelpress_server.shortage import server_busy, storage_full
from modelpress_server.stores import postgres
from modelpress_server.stores.overview import StateChange
from modelpress_server.stores.schema import migrate
from modelpress_server.stores.tables import project_blobs, uploads

Result = TypeVar("Result")
BUSY_TIMEOUT_MS = 10_000
READERS = 4
WRITERS = 8  # of PostgreSQL
# So many writes share a commit at most: the first of them waits for the last.
MAX_GROUP = 32
# A transaction that PostgreSQL ended because of another one is begun again.
MAX_TRIES = 10
_CHANGES = "modelpress_changes"  # of a state, in the transaction that runs
_NEWS = "modelpress_news"  # for other servers, likewise
_SUBSCRIBERS = "modelpress_subscribers"
_OUT_OF_DESCRIPTORS = ("unable to open database file", "out of memory")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Write:
    """A transaction that waits for the thread that writes. `context`: of whoever asked for it."""

    function: Callable[[Connection], Any]
    must: bool
    context: Context = field(default_factory=copy_context)
    result: Future[Any] = field(default_factory=Future)


class Database:
    """Runs functions of a connection as transactions, off the event loop.

    A function may be run again where its transaction failed because of another one: it does nothing else.
    """

    def __init__(self, engine: Engine, ballast: Ballast | None = None, *, writers: int = 1) -> None:
        self._engine = engine
        self._ballast = ballast
        # Whether other servers may use it at the same time.
        self.shared = engine.dialect.name == "postgresql"
        self._reading = postgres.for_reading(engine) if self.shared else engine
        self._writer = ThreadPoolExecutor(writers, thread_name_prefix="sql-write")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="sql-read")
        self._waiting: deque[_Write] = deque()  # for the thread that writes a file
        self._led: dict[str, Connection] = {}
        # Two threads that ask for the same task must not each open a session for it: one of them would be lost.
        self._asking_who_leads = Lock()
        self._changes = 0
        # Told of each change of a state once it is committed; called in the thread that wrote, in the writer's context.
        self.on_change: Callable[[StateChange], None] = lambda change: None
        # Names of the places that are told that a job of a project has ended in a state.
        self.subscribers: Callable[[str, str], Sequence[str]] = lambda project, state: ()

    @classmethod
    def open(cls, path: Path, ballast: Ballast | None = None) -> Database:
        """Opens or creates the SQLite file and brings its schema up to date; `ballast` is one on the same disk."""
        path.touch(mode=0o600)
        path.chmod(0o600)  # SQLite gives its other files the mode of this one
        engine = create_engine(URL.create("sqlite", database=str(path)), pool_size=READERS + 1)
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        with _closed_on_failure(engine):
            migrate(engine)
        return cls(engine, ballast or Ballast(path.with_name("ballast")))

    @classmethod
    def connect(cls, url: str) -> Database:
        """Connects to the PostgreSQL database of a `postgresql://` URL and brings its schema up to date.

        Raises SettingsError where it cannot be reached.
        """
        engine = postgres.create(url, pool_size=READERS + WRITERS + 1)
        with _closed_on_failure(engine), postgres.migrating(engine):
            migrate(engine)
        return cls(engine, writers=WRITERS)

    @property
    def changes(self) -> int | None:
        """Another number once states have changed; None: other servers make some as well."""
        return None if self.shared else self._changes

    async def read(self, function: Callable[[Connection], Result]) -> Result:
        """Runs `function` in a transaction that only reads."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._run, function, False)

    async def look_up(self, function: Callable[[Connection], Result]) -> Result:
        """`read` of a few rows by their keys, which are there at once where the database is a file.

        That takes less time than to hand it to a thread and back, on a busy machine by far: each thread waits for its
        turn at a processor, and at Python's lock.
        """
        return await self.read(function) if self.shared else self._run(function, False)

    async def write(self, function: Callable[[Connection], Result], *, must: bool = False) -> Result:
        """Runs `function` in a transaction and commits it. Raises StorageFullError, ServerBusyError.

        `must`: it lets go of something or ends something, and is to succeed on a full disk as well.
        """
        # In a copy of the context: the log's lines on what is written say which call or job it was for.
        write = _Write(function, must)
        if self.shared:
            self._writer.submit(self._write_alone, write)
        else:
            self._waiting.append(write)
            self._writer.submit(self._write_waiting)
        return cast(Result, await asyncio.wrap_future(write.result))

    async def leads(self, task: str) -> bool:
        """Whether this server is the one that does a task which one does for all; it stays so until it is gone."""
        if not self.shared:
            return True
        # In a thread that `close` waits for.
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._ask_who_leads, task)

    async def close(self) -> None:
        """Waits for what runs, then closes."""
        for pool in (self._readers, self._writer):
            await asyncio.to_thread(partial(pool.shutdown, wait=True))
        for task in tuple(self._led):
            await asyncio.to_thread(self._resign, task)
        self._engine.dispose()

    def _write_waiting(self) -> None:
        group: list[_Write] = []
        while self._waiting and len(group) < MAX_GROUP:
            write = self._waiting.popleft()
            if write.result.set_running_or_notify_cancel():
                group.append(write)
        if len(group) < 2 or not self._write_together(group):
            for write in group:
                self._write_started(write)

    def _write_alone(self, write: _Write) -> None:
        if write.result.set_running_or_notify_cancel():
            self._write_started(write)

    def _write_started(self, write: _Write) -> None:
        _resolve(write, partial(self._run_anyhow if write.must else self._run, write.function, True))

    def _write_together(self, group: Sequence[_Write]) -> bool:
        """One commit for all; False: nothing was written, since the database or the disk failed for one of them."""
        ends: list[tuple[_Write, Callable[[], Any]]] = []
        try:
            with self._engine.connect() as connection:
                connection.execution_options(modelpress_writes=True)
                with connection.begin():
                    for write in group:
                        ends.append((write, self._write_in_group(connection, write)))
        except (DBAPIError, StorageFullError):
            return False
        for write, end in ends:
            _resolve(write, end)
        return True

    def _write_in_group(self, connection: Connection, write: _Write) -> Callable[[], Any]:
        """What is left to do once the group is committed; it returns or raises what the write is to."""
        try:
            with connection.begin_nested():
                changes, result = write.context.run(self._transact, connection, write.function)
        except (DBAPIError, StorageFullError):
            raise
        except Exception as error:  # noqa: BLE001  of this write alone: it is undone, and the others go on
            return partial(_raise, error)
        return partial(self._told, changes, result)

    def _told(self, changes: Sequence[StateChange], result: Result) -> Result:
        if changes:
            self._changes += 1  # of a file only the one thread that writes it comes here
        for change in changes:
            self.on_change(change)
        return result

    def _run_anyhow(self, function: Callable[[Connection], Result], writes: bool) -> Result:
        try:
            return self._run(function, writes)
        except StorageFullError:
            if self._ballast is None:
                raise
            with self._ballast.lent() as there_was_some:
                if not there_was_some:
                    raise
                return self._run(function, writes)

    def _run(self, function: Callable[[Connection], Result], writes: bool) -> Result:
        for tries_left in range(MAX_TRIES - 1, -1, -1):
            try:
                return self._run_once(function, writes)
            except DBAPIError as error:
                if not (tries_left and postgres.was_in_the_way(error)):
                    raise _shortage(error) or error from error
                time.sleep(random.uniform(0.0, 0.02))  # noqa: S311  # no secret
        raise AssertionError("the last try returns or raises")

    def _run_once(self, function: Callable[[Connection], Result], writes: bool) -> Result:
        with (self._engine if writes else self._reading).connect() as connection:
            if not self.shared:
                connection.execution_options(modelpress_writes=writes)
            with connection.begin():
                changes, result = self._transact(connection, function)
                if self.shared and connection.info[_NEWS]:
                    postgres.tell(connection, connection.info[_NEWS])
        return self._told(changes, result)

    def _transact(
        self, connection: Connection, function: Callable[[Connection], Result]
    ) -> tuple[Sequence[StateChange], Result]:
        """Calls it in the transaction of the connection; also what it says that it changed."""
        changes: list[StateChange] = []
        connection.info[_CHANGES], connection.info[_NEWS] = changes, {}
        connection.info[_SUBSCRIBERS] = self.subscribers
        return changes, function(connection)

    def _ask_who_leads(self, task: str) -> bool:
        with self._asking_who_leads:
            return self._leads(task)

    def _leads(self, task: str) -> bool:
        try:
            if task in self._led:
                self._led[task].exec_driver_sql("SELECT 1")
                return True
            self._led[task] = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            if postgres.try_to_lead(self._led[task], task):
                return True
        except DatabaseError as error:
            logger.warning("%s: the database does not answer: %s", task, type(error.orig).__name__)
        self._resign(task)
        return False

    def _resign(self, task: str) -> None:
        """Ends the session that has the lock, if there is one."""
        connection = self._led.pop(task, None)
        if connection is not None:
            with suppress(DatabaseError, InvalidRequestError):
                postgres.lead_nothing(connection)
            with suppress(DatabaseError, InvalidRequestError):
                connection.detach()  # else it would go back to the pool, with the lock
            connection.close()


def _resolve(write: _Write, work: Callable[[], Any]) -> None:
    """Gives whoever asked for a write what `work` returns or raises."""
    try:
        result = write.context.run(work)
    except BaseException as error:  # noqa: BLE001  nobody else waits for it
        write.result.set_exception(error)
    else:
        write.result.set_result(result)


def _raise(error: Exception) -> None:
    raise error


@contextmanager
def _closed_on_failure(engine: Engine) -> Iterator[None]:
    try:
        yield
    except BaseException:
        engine.dispose()
        raise


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


def _shortage(error: DBAPIError) -> ServiceError | None:
    if not (isinstance(error, OperationalError) or error.connection_invalidated):
        return None
    if postgres.caused(error):
        return postgres.shortage_of(error)
    text = str(error.orig)
    if "full" in text:
        return storage_full()
    # SQLite opens its files, and what it sorts in, when it needs them.
    return server_busy() if any(part in text for part in _OUT_OF_DESCRIPTORS) else None


def note_change(connection: Connection, change: StateChange) -> None:
    """Has `Database.on_change`, and other servers, told of a change when the transaction is committed."""
    connection.info[_CHANGES].append(change)
    connection.info[_NEWS][change.id] = change.state


def subscribers(connection: Connection, project: str, state: str) -> Sequence[str]:
    """Names of the places that are told that a job of a project has ended in a state."""
    names: Sequence[str] = connection.info[_SUBSCRIBERS](project, state)
    return names


def note_news(connection: Connection, job_id: str) -> None:
    """Has other servers told that there is something new to read of a job."""
    connection.info[_NEWS].setdefault(job_id, "")


def hold(connection: Connection, project: str) -> None:
    """Until the transaction ends, no other one counts or refers to what the project has, nor sweeps.

    Before any row is locked, lest two transactions wait for each other.
    """
    if connection.dialect.name == "postgresql":
        postgres.hold(connection, project)


def hold_all(connection: Connection) -> None:
    """`hold` of all projects."""
    if connection.dialect.name == "postgresql":
        postgres.hold_all(connection)


def time_us(connection: Connection) -> int:
    """The time of day that leases go by, in microseconds since the epoch: of the database, if servers share it."""
    return postgres.time_us(connection) if connection.dialect.name == "postgresql" else time.time_ns() // 1000


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
