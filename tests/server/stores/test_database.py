"""The schema and its migrations, transactions side by side, and who leads."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from modelpress_server.config import SettingsError
from modelpress_server.errors import ServerBusyError, WrongStateError
from modelpress_server.stores import migrations
from modelpress_server.stores.database import Database, hold, hold_all, note_change
from modelpress_server.stores.overview import StateChange
from modelpress_server.stores.tables import metadata
from server_harness import until
from shared_stores import new_database
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import IntegrityError


async def test_migrations_make_the_tables(database: Database) -> None:
    """The migrated schema is the one that the code declares."""

    def differences(connection: Connection) -> list[object]:
        # SQLite does not tell the directions of an index.
        told = connection.dialect.name == "postgresql"
        options = {"include_object": lambda _item, name, *_: told or name != "ix_jobs_queue"}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))

    assert await database.read(differences) == []


async def test_sqlite_is_durable(tmp_path: Path) -> None:
    """The settings that durability needs."""
    database = Database.open(tmp_path / "test.db")

    def pragmas(connection: Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys")
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    assert await database.read(pragmas) == ["wal", 2, 1]
    await database.close()


async def test_a_file_is_looked_up_without_a_thread(tmp_path: Path) -> None:
    """A look at a few rows runs where it is asked for, and sees what was committed; a read has a thread of its own."""
    database = Database.open(tmp_path / "test.db")
    names = [await ask(lambda _: threading.current_thread().name) for ask in (database.look_up, database.read)]
    assert names[0] == threading.current_thread().name
    assert names[1].startswith("sql-read")
    await database.write(lambda connection: connection.exec_driver_sql("PRAGMA user_version = 7").close())
    assert await database.look_up(lambda connection: connection.exec_driver_sql("PRAGMA user_version").scalar()) == 7
    await database.close()


async def test_changes_of_states_are_counted(database: Database) -> None:
    """Who keeps what follows from states learns that some have changed; where others change them too, nobody does."""

    def change(connection: Connection) -> None:
        note_change(connection, StateChange("job", "p", "x", "QUEUED"))

    before = database.changes
    await database.read(lambda connection: None)
    await database.write(lambda connection: None)
    assert database.changes == before
    await database.write(change)
    assert (database.changes is None) if database.shared else (database.changes != before)


def test_head_is_the_newest_revision() -> None:
    """The constant that lets a start skip alembic names the newest migration."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_current_head() == migrations.HEAD


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    """A data folder of a later version is left alone, and the message says what to do."""
    database = Database.open(tmp_path / "test.db")
    await database.write(lambda connection: connection.exec_driver_sql("UPDATE alembic_version SET version_num='9999'"))
    await database.close()
    with pytest.raises(SettingsError, match="newer version"):
        Database.open(tmp_path / "test.db")


async def make_lines(database: Database) -> None:
    """A table to write to."""
    await database.write(lambda connection: connection.execute(text("CREATE TABLE lines (n int PRIMARY KEY)")))


async def lines(database: Database) -> list[int]:
    """What is written in it."""
    found = await database.read(lambda connection: connection.execute(text("SELECT n FROM lines ORDER BY n")).scalars())
    return list(found)


def insert(number: int) -> Callable[[Connection], int]:
    """A write; it returns its number."""

    def work(connection: Connection) -> int:
        connection.execute(text("INSERT INTO lines VALUES (:n)"), {"n": number})
        note_change(connection, StateChange("job", "a", str(number), "QUEUED"))
        return number

    return work


@pytest.fixture
async def busy(tmp_path: Path) -> AsyncIterator[tuple[Database, Callable[[], None], list[str]]]:
    """A file whose writer is busy until the function is called, and what happens to its transactions meanwhile."""
    database = Database.open(tmp_path / "test.db")
    await make_lines(database)
    is_in, go_on, said = threading.Event(), threading.Event(), list[str]()
    for what in ("commit", "rollback"):
        event.listen(database._engine, what, lambda _connection, what=what: said.append(what))

    def hold_up(_: Connection) -> None:
        is_in.set()
        assert go_on.wait(60)

    first = asyncio.create_task(database.write(hold_up))
    await asyncio.to_thread(is_in.wait)
    yield database, go_on.set, said
    await first
    await database.close()


Busy = tuple[Database, Callable[[], None], list[str]]


async def test_what_waits_is_committed_together(busy: Busy) -> None:
    """Twenty writes that wait need one commit; each returns what is its own, and its changes are told once."""
    database, go_on, said = busy
    told: list[str] = []
    database.on_change = lambda change: told.append(change.id)
    writes = [asyncio.create_task(database.write(insert(number))) for number in range(20)]
    await asyncio.sleep(0)
    go_on()
    assert await asyncio.gather(*writes) == list(range(20))
    assert said.count("commit") == 2  # that of the one which held them up, and theirs
    assert told == [str(number) for number in range(20)]
    assert await lines(database) == list(range(20))


async def test_a_write_that_fails_undoes_itself_alone(busy: Busy) -> None:
    """Of those that are committed together: it raises its error, nothing of it is stored or told, the others are."""
    database, go_on, said = busy
    told: list[str] = []
    database.on_change = lambda change: told.append(change.id)

    def fail(connection: Connection) -> None:
        insert(7)(connection)
        raise WrongStateError("on purpose")

    writes = [asyncio.create_task(database.write(work)) for work in (insert(1), fail, insert(2))]
    await asyncio.sleep(0)
    go_on()
    first, error, second = await asyncio.gather(*writes, return_exceptions=True)
    assert (first, second) == (1, 2)
    assert isinstance(error, WrongStateError)
    assert said.count("commit") == 2
    assert told == ["1", "2"]
    assert await lines(database) == [1, 2]


async def test_a_database_that_fails_for_one_of_several(busy: Busy) -> None:
    """Then nothing is committed together, and each is written alone: the others succeed, and are told of once."""
    database, go_on, said = busy
    told: list[str] = []
    database.on_change = lambda change: told.append(change.id)
    writes = [asyncio.create_task(database.write(work)) for work in (insert(1), insert(1), insert(2))]
    await asyncio.sleep(0)
    go_on()
    first, error, second = await asyncio.gather(*writes, return_exceptions=True)
    assert (first, second) == (1, 2)
    assert isinstance(error, IntegrityError)
    assert said.count("rollback") >= 2  # of all, then of the one
    assert told == ["1", "2"]
    assert await lines(database) == [1, 2]


async def test_a_write_that_nobody_waits_for_any_more(busy: Busy) -> None:
    """One that is cancelled before its turn is not made; those beside it are."""
    database, go_on, _ = busy
    writes = [asyncio.create_task(database.write(insert(number))) for number in range(3)]
    await asyncio.sleep(0)
    writes[1].cancel()
    await asyncio.wait([writes[1]])
    go_on()
    assert await writes[0] == 0
    assert await writes[2] == 2
    assert await lines(database) == [0, 2]


async def test_servers_that_start_together(postgres: str) -> None:
    """Each brings the schema up to date or finds it so; none fails on another."""
    url = new_database(postgres)
    databases = await asyncio.gather(*(asyncio.to_thread(Database.connect, url) for _ in range(4)))
    for database in databases:
        await database.close()


def test_a_database_that_is_not_there() -> None:
    """The message names host and database, and no password."""
    with pytest.raises(SettingsError, match=r"127\.0\.0\.1/none cannot be used") as caught:
        Database.connect("postgresql://somebody:verysecret@127.0.0.1:1/none")
    assert "verysecret" not in str(caught.value)
    for wrong in ("mysql://host/name", "no url", "sqlite:///x"):
        with pytest.raises(SettingsError, match="postgresql://"):
            Database.connect(wrong)


async def test_reads_change_nothing(postgres: str) -> None:
    """A transaction that reads is one that PostgreSQL lets read only."""
    database = Database.connect(new_database(postgres))
    with pytest.raises(Exception, match="read-only"):
        await database.read(lambda connection: connection.execute(text("DELETE FROM jobs")))
    await database.close()


async def test_a_project_is_held_by_one(postgres: str) -> None:
    """Two transactions on a project run one after the other; on two projects side by side; a sweep waits for both."""
    database = Database.connect(new_database(postgres))
    order: list[str] = []
    first_is_in, go_on = threading.Event(), threading.Event()

    def first(connection: Connection) -> None:
        hold(connection, "a")
        first_is_in.set()
        assert go_on.wait(60)
        order.append("first")

    def after(name: str, project: str | None) -> None:
        def work(connection: Connection) -> None:
            if project is None:
                hold_all(connection)
            else:
                hold(connection, project)
            order.append(name)

        return work

    async def waiting() -> int:
        statement = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        return await database.read(lambda connection: connection.execute(statement).scalar_one())

    holder = asyncio.create_task(database.write(first))
    await asyncio.to_thread(first_is_in.wait)
    await database.write(after("other project", "b"))
    behind = [
        asyncio.create_task(database.write(after("same project", "a"))),
        asyncio.create_task(database.write(after("sweep", None))),
    ]

    async def both_wait() -> bool:
        return await waiting() == 2

    await until(both_wait)
    go_on.set()
    await asyncio.gather(holder, *behind)
    assert order[:2] == ["other project", "first"]
    assert sorted(order[2:]) == ["same project", "sweep"]
    await database.close()


async def test_a_deadlock_is_tried_again(postgres: str) -> None:
    """Of two transactions that wait for each other one is begun again, and both go well."""
    database = Database.connect(new_database(postgres))
    await database.write(lambda connection: connection.execute(text("CREATE TABLE pair (id int PRIMARY KEY, n int)")))
    await database.write(lambda connection: connection.execute(text("INSERT INTO pair VALUES (1, 0), (2, 0)")))
    barrier = threading.Barrier(2)
    tries: list[int] = []

    def raise_both(first: int, second: int) -> None:
        def work(connection: Connection) -> None:
            connection.execute(text("SET LOCAL deadlock_timeout = '50ms'"))
            connection.execute(text("UPDATE pair SET n = n + 1 WHERE id = :id"), {"id": first})
            tries.append(first)
            if len(tries) <= 2:
                barrier.wait(60)
            connection.execute(text("UPDATE pair SET n = n + 1 WHERE id = :id"), {"id": second})

        return work

    await asyncio.gather(database.write(raise_both(1, 2)), database.write(raise_both(2, 1)))
    rows = await database.read(lambda connection: connection.execute(text("SELECT n FROM pair")).scalars().all())
    assert rows == [2, 2]
    assert len(tries) == 3
    await database.close()


async def test_one_server_leads(postgres: str) -> None:
    """One of two has a task of which there is one; when it is gone, the other has it."""
    url = new_database(postgres)
    one, other = Database.connect(url), Database.connect(url)
    assert await one.leads("janitor")
    assert not await other.leads("janitor")
    assert await other.leads("something else")
    assert await one.leads("janitor")
    await one.close()
    assert await other.leads("janitor")
    await other.close()


async def test_several_ask_at_once_who_leads(postgres: str) -> None:
    """All callers of one server get the same answer, and no session is left open when it has closed."""
    url = new_database(postgres)

    async def all_are_told(leads: bool) -> None:
        database = Database.connect(url)
        assert await asyncio.gather(*(database.leads("janitor") for _ in range(4))) == [leads] * 4
        await database.close()

    with warnings.catch_warnings(record=True) as left_open:
        warnings.simplefilter("always", ResourceWarning)
        for _ in range(5):
            await all_are_told(True)
        leader = Database.connect(url)
        assert await leader.leads("janitor")
        for _ in range(5):
            await all_are_told(False)
        await leader.close()
        gc.collect()
    assert [str(warning.message) for warning in left_open] == []


async def test_a_lost_connection_is_told_as_such(postgres: str) -> None:
    """A session that is ended in a transaction: an error that says to try again; the next transaction goes well."""
    database = Database.connect(new_database(postgres))
    with pytest.raises(ServerBusyError, match="database does not answer"):
        await database.write(
            lambda connection: connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        )
    assert await database.write(lambda connection: connection.execute(text("SELECT 1")).scalar_one()) == 1
    await database.close()
