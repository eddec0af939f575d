"""Alembic environment; `stores.database` hands over an open connection."""

from __future__ import annotations

from alembic import context

from modelpress_server.stores.tables import metadata

connection = context.config.attributes["connection"]
# SQLite cannot alter a column in place; batch mode copies the table.
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
