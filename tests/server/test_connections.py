"""Strangers who connect and say nothing: they are bounded and closed, and nobody else's jobs notice."""

from __future__ import annotations

import errno
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from modelpress_protos.v1 import job_service_pb2
from modelpress_server.config import Settings
from modelpress_server.connections import connection_options, raise_descriptor_limit
from server_harness import Client, Running, Serve, failing, until

DESCRIPTORS = 256
STRANGERS = 400
# It limits itself: a `preexec_fn` would fork this process, whose gRPC threads of other tests do not survive that.
SERVE = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))
sys.path.insert(0, {tests!r})
from pathlib import Path
from modelpress_server.app import Server
from modelpress_server.config import Settings
from scripted_executor import ScriptedExecutor
from server_harness import DEFAULTS

async def main():
    settings = Settings(**{{**DEFAULTS, "data_dir": Path(sys.argv[1]), "handshake_timeout_s": 1.0}})
    server = Server(settings, lambda _: ScriptedExecutor())
    await server.start()
    print(server.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def poor_server(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Address and process id of a server that may open DESCRIPTORS files only."""
    script = SERVE.format(tests=str(Path(__file__).parent), descriptors=DESCRIPTORS)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "data")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.kill()
        process.communicate()


def descriptors(pid: int) -> int:
    """How many files a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def test_silent_connections_harm_nobody(poor_server: tuple[str, int]) -> None:
    """More of them than the server has descriptors: who is connected goes on, jobs succeed, and all are closed."""
    address, pid = poor_server
    host, _, port = address.rpartition(":")
    async with grpc.aio.insecure_channel(address) as channel:
        client = Client(channel)
        model = await client.model()
        with ExitStack() as strangers:
            for _ in range(STRANGERS):
                strangers.enter_context(socket.create_connection((host, int(port))))
            for _ in range(3):
                ended = await client.wait(await client.job(model, skip_cache=True))
                assert (ended.state, ended.attempt) == (job_service_pb2.JOB_STATE_SUCCEEDED, 1)
            assert descriptors(pid) < DESCRIPTORS
            # Those that said nothing are closed, while they are still held here.
            await until(lambda: descriptors(pid) < DESCRIPTORS // 2)
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(address, options=options) as another:
                await another.channel_ready()
                await Client(another).upload(b"a new client")


async def test_an_idle_connection_is_closed_and_comes_again(serve: Serve) -> None:
    """A client without a call loses its connection, and its next call makes another."""
    async with serve(connection_idle_s=0.5) as running:
        await running.client.upload(b"one")
        channel = running.client.channel
        while channel.get_state() is not grpc.ChannelConnectivity.IDLE:
            await channel.wait_for_state_change(channel.get_state())
        await running.client.upload(b"two")


def test_no_more_connections_than_half_of_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs need the others."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (DESCRIPTORS, DESCRIPTORS))
    most = dict(connection_options(Settings(max_connections=1000)))["grpc.max_allowed_incoming_connections"]
    assert most == DESCRIPTORS // 2


def test_the_soft_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """To what the process may have."""
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: made.append(limits))
    raise_descriptor_limit()
    assert made == [(4096, 4096)]


async def test_descriptors_that_run_out_are_told_as_busy(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """UNAVAILABLE with SERVER_BUSY and RetryInfo: clients try again by themselves."""

    def short(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(running.server._uploads._index, "visible", short)
    failure = await failing(running.client.start_upload(b"x"))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_BUSY")
    assert failure.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
