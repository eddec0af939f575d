"""Databases of a PostgreSQL server of the tests."""

from __future__ import annotations

from modelpress_server.names import new_id


def new_database(server: str) -> str:
    """Makes an empty database; its URL."""
    import psycopg
    from psycopg import sql

    name = f"test_{new_id()}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return f"{server.rpartition('/')[0]}/{name}"
