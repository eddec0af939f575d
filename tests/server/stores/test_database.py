"""The schema and its migrations."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from modelpress_server.config import SettingsError
from modelpress_server.stores import migrations
from modelpress_server.stores.database import Database
from modelpress_server.stores.tables import metadata
from sqlalchemy import Connection


async def test_migrations_make_the_tables(tmp_path: Path) -> None:
    """The migrated schema is the one that the code declares, with the settings that durability needs."""
    database = Database.open(tmp_path / "test.db")

    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    def pragmas(connection: Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys")
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    assert await database.read(differences) == []
    assert await database.read(pragmas) == ["wal", 2, 1]
    await database.close()


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
