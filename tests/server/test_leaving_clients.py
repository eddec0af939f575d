"""Clients that leave in the middle of an answer: the server, a process of its own, goes on."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from modelpress_protos.v1 import server_service_pb2, upload_service_pb2
from modelpress_server.interceptors import Gate
from server_harness import PROJECT, Client, Serve, digest_of, until
from server_process import launched

# More than the buffers on the way take, so that the server is in the middle of sending when the client leaves.
CONTENT = os.urandom(16 * 1024 * 1024)
LEAVING = 3


@pytest.fixture
def audit_log(tmp_path: Path) -> Path:
    """Where the server of `process` notes what was done."""
    return tmp_path / "audit.log"


@pytest.fixture
def process(tmp_path: Path, audit_log: Path) -> Iterator[subprocess.Popen[str]]:
    """A server; where it crashes, its stderr says in which line."""
    arguments = ("--data-dir", str(tmp_path / "data"), "--audit-log", str(audit_log), "--reserve-bytes", "0")
    with launched(*arguments, environment={"PYTHONFAULTHANDLER": "1"}) as started:
        yield started


def cancelled_downloads(audit_log: Path) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in audit_log.read_text().splitlines()]
    return [line for line in lines if (line["method"], line["outcome"]) == ("ReadBlob", "CANCELLED")]


@pytest.mark.parametrize("way", ["cancels the call", "closes the connection"])
async def test_a_download_that_is_left(process: subprocess.Popen[str], audit_log: Path, way: str) -> None:
    """The server answers the next call, notes each download as cancelled, with its peer, and still stops with 0."""
    assert process.stdout is not None
    address = (await asyncio.to_thread(process.stdout.readline)).removeprefix("listening on ").strip()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            client = Client(channel)
            request: Any = upload_service_pb2.ReadBlobRequest(parent=PROJECT, digest=await client.upload(CONTENT))
            for _ in range(LEAVING):
                async with grpc.aio.insecure_channel(address) as other:
                    download = Client(other).uploads.ReadBlob(request)
                    assert (await download.read()).data
                    if way == "cancels the call":
                        download.cancel()
                await client.info.GetServerInfo(server_service_pb2.GetServerInfoRequest())
            left = await until(lambda: (found := cancelled_downloads(audit_log))[LEAVING - 1 :] and found)
    except grpc.aio.AioRpcError:
        process.terminate()
        _, stderr = await asyncio.to_thread(process.communicate)
        pytest.fail(f"the server does not answer; exit {process.returncode}\n{stderr}")
    assert len(left) == LEAVING
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in left)
    process.terminate()
    _, stderr = await asyncio.to_thread(process.communicate)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr


async def test_a_client_that_leaves_while_an_answer_is_written(
    serve: Serve, audit_log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What gRPC raises then is a call that was cancelled: noted as such, and no error in the log."""
    entered = asyncio.Event()

    async def fail_when_left(*_: object) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise grpc.aio.InternalError("a batch failed") from None

    monkeypatch.setattr(Gate, "_enter", fail_when_left)
    async with serve(audit_log=audit_log) as running:
        request = upload_service_pb2.ReadBlobRequest(parent=PROJECT, digest=digest_of(b"x"))
        download = running.client.uploads.ReadBlob(request)
        await entered.wait()
        download.cancel()
        assert await until(lambda: cancelled_downloads(audit_log))
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
