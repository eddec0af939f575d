"""Schema migrations (alembic), run when the server starts."""

# The newest revision: a database that is there already starts without importing alembic. A test compares it.
HEAD = "0005"
