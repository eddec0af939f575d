"""The server's log as JSON: what a line is about stands in fields, and no secret anywhere."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import subprocess
import sys
import termios
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from modelpress_protos.v1 import job_service_pb2, server_service_pb2
from modelpress_server import logs
from server_harness import Client, Serve, failing
from server_process import launched


def formatted(formatter: logging.Formatter, message: str, *arguments: Any, **extra: Any) -> str:
    record = logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": message, "args": arguments, **extra})
    return formatter.format(record)


def test_json_lines() -> None:
    """One object a line, whatever the message holds, with what is bound and what is given, and a traceback."""
    try:
        raise ValueError("first\nsecond\x1b[31m")
    except ValueError:
        error = sys.exc_info()
    logs.bind(project="p", job="j")
    try:
        line = formatted(logs.JsonFormatter(), "a %s\nb", '"', exc_info=error, fields={"state": "RUNNING"})
    finally:
        logs._bound.set({})
    entry = json.loads(line)
    assert "\n" not in line
    assert "\x1b" not in line
    assert (entry["level"], entry["logger"], entry["state"]) == ("info", "n", "RUNNING")
    assert (entry["project"], entry["job"]) == ("p", "j")
    assert "ValueError" in entry["traceback"]
    assert entry["time"].endswith("+00:00")


async def test_what_is_bound_stays_in_its_task() -> None:
    """Two tasks at once do not see each other's fields."""

    async def work(job: str) -> str:
        logs.bind(job=job)
        await asyncio.sleep(0)
        return str(json.loads(formatted(logs.JsonFormatter(), "x"))["job"])

    assert await asyncio.gather(work("a"), work("b")) == ["a", "b"]
    assert "job" not in json.loads(formatted(logs.JsonFormatter(), "x"))


async def test_state_changes_are_told(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """One line at info for each state of a model and of a job; a failure with its reason; at debug one a call."""
    with caplog.at_level(logging.DEBUG, logger="modelpress_server"):
        async with serve() as running:
            client = running.client
            model = await client.model(compress="fail")
            job = await client.wait(await client.job(model))
    told = [record.fields for record in caplog.records if record.name == "modelpress_server.observation.changes"]
    of_job = [entry for entry in told if entry.get("job") == job.name.rpartition("/")[2]]
    assert [entry["state"] for entry in of_job] == ["QUEUED", "RUNNING", "FAILED"]
    assert of_job[-1]["reason"] == "UNSUPPORTED_FORMAT"
    assert {entry["project"] for entry in told} == {"default"}
    assert [entry["state"] for entry in told if "model" in entry] == ["PROCESSING", "ACTIVE"]
    calls = [record for record in caplog.records if record.name == "modelpress_server.interceptors"]
    created = [record.fields for record in calls if record.fields["method"].endswith("/CreateJob")]
    assert [entry["code"] for entry in created] == ["OK"]
    assert all(record.levelno == logging.DEBUG for record in calls)


def test_lines_that_nobody_reads_are_dropped_and_counted() -> None:
    """What fits is written once somebody reads, whole and in order; where others are missing a line says how many."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    handler = logs.PipeHandler(writing, max_held_bytes=20_000)
    handler.setFormatter(logs.PrintableFormatter())
    for number in range(1000):
        handler.emit(logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": f"line {number} {'x' * 90}"}))
    accounted = written = 0
    with os.fdopen(reading, "r") as pipe:
        while accounted < 1000:
            line = pipe.readline()
            if "of the log were dropped here" in line:
                accounted += int(line.split(": ")[1].split()[0])
            else:
                assert line.endswith(f"INFO n: line {accounted} {'x' * 90}\n")
                accounted, written = accounted + 1, written + 1
    handler.flush()
    assert accounted == 1000
    assert 0 < written < 300


async def test_a_log_that_nobody_reads(tmp_path: Path) -> None:
    """A server whose stderr is a full pipe serves, runs jobs, and ends in time with what it was told to end with."""
    with launched("--data-dir", str(tmp_path), "--log-level", "debug") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        fcntl.fcntl(process.stderr.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        address = (await asyncio.to_thread(process.stdout.readline)).removeprefix("listening on ").strip()
        async with grpc.aio.insecure_channel(address) as channel:
            client = Client(channel)
            for _ in range(100):
                await client.info.GetServerInfo(server_service_pb2.GetServerInfoRequest())
            job = await client.wait(await client.job(await client.model()))
            assert job.state == job_service_pb2.JOB_STATE_SUCCEEDED
        unread = fcntl.ioctl(process.stderr.fileno(), termios.FIONREAD, bytes(4))
        assert int.from_bytes(unread, sys.byteorder) > 4096 - 500
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0


async def one_job(address: str, token: str) -> None:
    metadata = (("authorization", f"Bearer {token}"), ("x-request-id", "my-request"))
    async with grpc.aio.insecure_channel(address, interceptors=[_Unary(metadata), _Stream(metadata)]) as channel:
        client = Client(channel)
        await client.wait(await client.job(await client.model()))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = Client(channel).info
        wrong = (("authorization", "Bearer wrong-SECRET-two"),)
        await failing(stub.GetServerInfo(server_service_pb2.GetServerInfoRequest(), metadata=wrong))


class _Sending:
    """Sends metadata with every call."""

    def __init__(self, metadata: Any) -> None:
        self._metadata = grpc.aio.Metadata(*metadata)


class _Unary(_Sending, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(details._replace(metadata=self._metadata), request)


class _Stream(_Sending, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return await continuation(details._replace(metadata=self._metadata), requests)


def ended(process: subprocess.Popen[str]) -> list[str]:
    """The lines of its log."""
    process.terminate()
    assert process.stderr is not None
    text = process.stderr.read()  # `communicate` would leave out what `readline` has buffered
    assert process.wait() == 0, text
    return text.splitlines()


def test_no_token_is_ever_logged(tmp_path: Path) -> None:
    """A whole server at debug, in JSON: each line is an object, calls and states carry the request's id, no secret."""
    secret = "right-SECRET-one"
    arguments = ("--data-dir", str(tmp_path), "--log-format", "json", "--log-level", "debug")
    http = ("--http-listen", "127.0.0.1:0")
    with launched(*arguments, *http, environment={"COMPRESS_SERVER_TOKEN": secret}) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        address = process.stdout.readline().removeprefix("listening on ").strip()
        asyncio.run(one_job(address, secret))
        lines = [process.stderr.readline()]
        while "metrics and probes on" not in lines[-1]:
            lines.append(process.stderr.readline())
        url = json.loads(lines[-1])["message"].rpartition(" ")[2]
        for token in (secret, "wrong-SECRET-three"):
            request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {token}"})
            try:
                urllib.request.urlopen(request).close()
            except urllib.error.HTTPError as error:
                error.close()
        lines += ended(process)
    assert "SECRET" not in "".join(lines)
    entries = [json.loads(line) for line in lines]
    calls = [entry for entry in entries if entry.get("method", "").endswith("/CreateJob")]
    assert [(entry["request_id"], entry["project"], entry["code"]) for entry in calls] == [
        ("my-request", "default", "OK")
    ]
    states = [entry for entry in entries if "state" in entry and "job" in entry and "model" not in entry]
    assert [entry["state"] for entry in states] == ["QUEUED", "RUNNING", "SUCCEEDED"]
    assert states[0]["request_id"] == "my-request"


def test_console_lines_tell_of_jobs(tmp_path: Path) -> None:
    """The default: lines for people, one for each state; nothing about single calls."""
    with launched("--data-dir", str(tmp_path)) as process:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("listening on ").strip()

        async def run() -> None:
            async with grpc.aio.insecure_channel(address) as channel:
                client = Client(channel)
                await client.wait(await client.job(await client.model()))

        asyncio.run(run())
        lines = ended(process)
    states = [line.rpartition(" ")[2] for line in lines if "changes: projects/default/jobs/" in line]
    assert states == ["QUEUED", "RUNNING", "SUCCEEDED"]
    assert not [line for line in lines if "CreateJob: " in line]
