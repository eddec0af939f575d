"""A server for one command: `--local`.

A server that already runs on the data directory is used as it is; one that was started here ends with the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from modelpress_client.async_client import AsyncClient
from modelpress_client.errors import MissingExtraError, ModelpressError, ServerUnreachableError, UsageError
from modelpress_client.settings import RetryPolicy

SERVER_MODULE = "modelpress_server"
SERVER_PACKAGES = ("modelpress_server", "sqlalchemy", "alembic", "grpc_health", "torch", "onnxruntime")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 2.0
LOG_NAME = "local-server.log"

_LISTENING = re.compile(r"listening on (\S+:\d+)")


def default_data_dir() -> Path:
    """The user's data directory."""
    import platformdirs

    return platformdirs.user_data_path("modelpress")


@asynccontextmanager
async def local_server(data_dir: Path) -> AsyncIterator[str]:
    """Yields the address. Raises MissingExtraError, or ServerUnreachableError when the server does not start."""
    running = await _running(data_dir)
    if running is not None:
        yield running
        return
    missing = [name for name in SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"--local needs {', '.join(missing)} on this machine. Run: pip install 'modelpress[server]'"
        )
    process = await _start(data_dir)
    drain: asyncio.Task[None] | None = None
    try:
        address = await _address(process, data_dir)
        drain = asyncio.create_task(_drain(process))
        yield address
    finally:
        await _stop(process)
        if drain is not None:
            await drain


async def _running(data_dir: Path) -> str | None:
    """The address in server.json, when a server answers there."""
    try:
        document = json.loads(await asyncio.to_thread((data_dir / "server.json").read_text))
        address = str(document["address"])
        os.kill(int(document["pid"]), 0)
        async with AsyncClient(address, retry=RetryPolicy(connect_timeout_s=PROBE_TIMEOUT_S)) as client:
            return address if await client.health() == "SERVING" else None
    except (OSError, ValueError, KeyError, TypeError, ModelpressError):
        return None


async def _start(data_dir: Path) -> asyncio.subprocess.Process:
    try:
        await asyncio.to_thread(data_dir.mkdir, parents=True, exist_ok=True)
        log = await asyncio.to_thread((data_dir / LOG_NAME).open, "wb")
    except OSError as error:
        raise UsageError(f"Cannot write to the data directory {data_dir}: {error.strerror}.") from error
    with log:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", SERVER_MODULE, "--listen", "127.0.0.1:0", "--data-dir", str(data_dir)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            # Ctrl-C is for this command; the server then ends in order, by SIGTERM.
            start_new_session=True,
        )


async def _address(process: asyncio.subprocess.Process, data_dir: Path) -> str:
    assert process.stdout is not None  # noqa: S101 - it was started with a pipe
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S):
            while line := await process.stdout.readline():
                if match := _LISTENING.search(line.decode(errors="replace")):
                    return match[1]
    log = data_dir / LOG_NAME
    lines = (await asyncio.to_thread(log.read_text, errors="replace")).strip().splitlines()
    raise ServerUnreachableError(
        f"The local server did not start; its last words: {lines[-1] if lines else '(none)'}. All of them: {log}"
    )


async def _drain(process: asyncio.subprocess.Process) -> None:
    """A full pipe would block the server."""
    assert process.stdout is not None  # noqa: S101 - it was started with a pipe
    while await process.stdout.read(65536):
        pass


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
