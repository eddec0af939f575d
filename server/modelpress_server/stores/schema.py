"""Brings the schema of a database up to date."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine, inspect

from modelpress_server.config import SettingsError
from modelpress_server.stores import migrations


def migrate(engine: Engine) -> None:
    """Makes or changes the tables. Raises SettingsError where a newer version wrote the database."""
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
            of_a_file = engine.dialect.name == "sqlite"
            setting, other = ("data_dir", "--data-dir") if of_a_file else ("database", "--database")
            raise SettingsError(
                f"{setting}: {engine.url.database} was written by a newer version of modelpress ({error}). Start that "
                f"version, or choose another {other}."
            ) from error
        connection.commit()
