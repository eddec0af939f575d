"""Every kind of store that a contract suite runs on."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from modelpress_server.stores.database import Database

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared_stores import new_database


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        made = Database.open(tmp_path / "test.db")
    else:
        made = Database.connect(new_database(request.getfixturevalue("postgres")))
    yield made
    await made.close()
