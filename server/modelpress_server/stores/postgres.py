"""What is particular to PostgreSQL: connecting, locks, whose fault an error is, and news between servers.

Locks are advisory ones, each numbered by the hash of a text of ours. Names of passwords and keys never reach a message:
errors tell host and database alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from modelpress_server.config import SettingsError
from modelpress_server.errors import ServerBusyError, ServiceError
from modelpress_server.shortage import BUSY_RETRY_S, server_busy, storage_full

SCHEMES = ("postgresql", "postgres")
CHANNEL = "modelpress"
CONNECT_TIMEOUT_S = 10
# A server that hangs in a transaction must not hold its locks for ever.
IDLE_TIMEOUT_MS = 60_000
RECYCLE_S = 1800  # connections are not kept longer, so that a moved database is found
_CONNECT_ARGUMENTS = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "application_name": "modelpress",
    "options": f"-c idle_in_transaction_session_timeout={IDLE_TIMEOUT_MS}",
    # A database that vanished without a word is noticed.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
_ALL_PROJECTS = "projects"
_SERIALIZATION_FAILURE, _DEADLOCK = "40001", "40P01"
_DISK_FULL, _NO_RESOURCES = "53100", "53"


def create(url: str, pool_size: int) -> Engine:
    """An engine with a pool of connections. Raises SettingsError."""
    return create_engine(
        engine_url(url),
        pool_size=pool_size,
        max_overflow=0,
        pool_pre_ping=True,
        pool_recycle=RECYCLE_S,
        connect_args=_CONNECT_ARGUMENTS,
    )


def listen_arguments(url: str) -> dict[str, Any]:
    """What psycopg's own `connect` takes for the same database."""
    return {**engine_url(url).translate_connect_args(username="user", database="dbname"), **_CONNECT_ARGUMENTS,
            **engine_url(url).query}  # fmt: skip


def engine_url(url: str) -> URL:
    """The URL as SQLAlchemy wants it. Raises SettingsError."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        parsed = URL.create("unreadable")
    if parsed.drivername not in SCHEMES:
        raise SettingsError("database: it must be a URL such as postgresql://USER@HOST/DATABASE.")
    try:
        import psycopg  # noqa: F401  # the driver
    except ImportError as error:
        raise SettingsError("database: psycopg is not installed. Run: pip install 'modelpress[postgres]'") from error
    return parsed.set(drivername="postgresql+psycopg")


def for_reading(engine: Engine) -> Engine:
    """The same engine, whose transactions see one state and change nothing."""
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


@contextmanager
def migrating(engine: Engine) -> Iterator[None]:
    """One server at a time changes the schema. Raises SettingsError where the database cannot be reached."""
    try:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _key("migrations")})
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _key("migrations")})
    except OperationalError as error:
        reason = str(error.orig).strip().splitlines()[0] if error.orig else "no connection"
        raise SettingsError(
            f"database: {engine.url.host or 'localhost'}/{engine.url.database} cannot be used: {reason}."
        ) from error


def hold(connection: Connection, project: str) -> None:
    """See `database.hold`."""
    connection.execute(
        text("SELECT pg_advisory_xact_lock_shared(:everything), pg_advisory_xact_lock(:project)"),
        {"everything": _key(_ALL_PROJECTS), "project": _key(f"{_ALL_PROJECTS}/{project}")},
    )


def hold_all(connection: Connection) -> None:
    """See `database.hold_all`."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:everything)"), {"everything": _key(_ALL_PROJECTS)})


def try_to_lead(connection: Connection, task: str) -> bool:
    """Takes the lock of a task for the session of the connection; False: another one has it."""
    return bool(
        connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": _key(f"tasks/{task}")}).scalar_one()
    )


def lead_nothing(connection: Connection) -> None:
    """Gives back what `try_to_lead` took, at once: the end of a session is noticed a little after it was closed."""
    connection.execute(text("SELECT pg_advisory_unlock_all()"))


def tell(connection: Connection, news: Mapping[str, str]) -> None:
    """Tells all servers, once the transaction is committed: names of jobs and models, with the state if it changed."""
    for name, state in news.items():
        connection.execute(
            text("SELECT pg_notify(:channel, :news)"), {"channel": CHANNEL, "news": f"{name} {state}".rstrip()}
        )


def time_us(connection: Connection) -> int:
    """The time of day of the database, in microseconds since the epoch."""
    statement = "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)"
    return int(connection.execute(text(statement)).scalar_one())


def caused(error: DBAPIError) -> bool:
    """Whether the error is one of PostgreSQL's."""
    return hasattr(error.orig, "sqlstate")


def was_in_the_way(error: DBAPIError) -> bool:
    """Whether another transaction was the cause, so that the same one may go well now."""
    return _sqlstate(error) in (_SERIALIZATION_FAILURE, _DEADLOCK)


def shortage_of(error: DBAPIError) -> ServiceError:
    """The loss of a connection, or a want of the database, as something that passes."""
    state = _sqlstate(error)
    if state == _DISK_FULL:
        return storage_full()
    if state.startswith(_NO_RESOURCES):
        return server_busy()
    return ServerBusyError(
        "The server's database does not answer for the moment. Try again shortly.", retry_after_s=BUSY_RETRY_S
    )


def _sqlstate(error: DBAPIError) -> str:
    return str(getattr(error.orig, "sqlstate", None) or "")


def _key(name: str) -> int:
    digest = hashlib.sha256(f"modelpress/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
