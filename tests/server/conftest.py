"""A real server on 127.0.0.1 with a scripted executor."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from modelpress_server.app import Server
from modelpress_server.clock import Clock
from modelpress_server.config import Settings
from modelpress_server.names import new_id

# The helpers beside this file; in importlib mode pytest does not put the folder on the path.
sys.path.insert(0, str(Path(__file__).parent))
import s3_server
from manual_clock import ManualClock
from postgres_server import NotHereError, postgres_server
from scripted_executor import ScriptedExecutor
from server_harness import DEFAULTS, Client, Running, Serve
from shared_stores import new_database


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of the tests' own: the URL of its database `postgres`. Skipped where there is none."""
    pytest.importorskip("psycopg")
    try:
        with postgres_server() as url:
            yield url
    except NotHereError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A server that speaks S3. Skipped where there is none."""
    try:
        with s3_server.s3_server() as endpoint:
            yield endpoint
    except s3_server.NotHereError as error:
        pytest.skip(str(error))


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place in a bucket; the environment has the keys."""
    for name, value in s3_server.environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.BUCKET}/{new_id()}"


@pytest.fixture
def stores(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of the stores. MODELPRESS_STORES=shared: the ones that servers share, instead of the data folder."""
    if os.environ.get("MODELPRESS_STORES") != "shared":
        return {}
    return {"database": new_database(request.getfixturevalue("postgres")), "blobs": request.getfixturevalue("s3")}


@pytest.fixture
def serve(tmp_path: Path, stores: dict[str, Any]) -> Serve:
    """Starts servers, by default on the same data folder: `async with serve(workers=2) as running`."""

    @asynccontextmanager
    async def start(clock: Clock | None = None, **changes: Any) -> AsyncIterator[Running]:
        settings = Settings(**{**DEFAULTS, "data_dir": tmp_path / "data", **stores, **changes})
        executor = ScriptedExecutor()
        server = Server(settings, lambda _: executor, clock)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                yield Running(server, executor, Client(channel), settings)
        finally:
            await server.stop()

    return start


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still: `serve(clock)`."""
    return ManualClock()


@pytest.fixture
async def running(serve: Serve) -> AsyncIterator[Running]:
    """One server with default settings."""
    async with serve() as server:
        yield server
