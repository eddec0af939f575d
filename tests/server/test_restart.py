"""Shutting down, being killed, and going on where it was."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from modelpress_protos.v1 import job_service_pb2, model_service_pb2, upload_service_pb2
from modelpress_server.app import Server
from modelpress_server.config import MIB, Settings, SettingsError
from scripted_executor import ScriptedExecutor
from server_harness import DEFAULTS, Client, Serve, chunks, committed_after_cut, failing, failure_of, until

S = job_service_pb2


@asynccontextmanager
async def killed_server(data_dir: Path) -> AsyncIterator[Client]:
    """A server in a process of its own that is killed with SIGKILL at the end of the block."""
    script = Path(__file__).parent / "serve_scripted.py"
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), str(data_dir), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        address = (await process.stdout.readline()).decode().strip()
        async with grpc.aio.insecure_channel(address) as channel:
            yield Client(channel)
            process.kill()
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def running_state(client: Client, job: Any) -> None:
    """Returns once the job runs."""

    async def runs() -> bool:
        return (await client.jobs.GetJob(S.GetJobRequest(name=job.name))).state == S.JOB_STATE_RUNNING

    await until(runs)


async def read_on(call: Any) -> None:
    """Reads until the call fails."""
    while True:
        assert await call.read() is not grpc.aio.EOF


async def test_kill_9_loses_no_job_and_no_upload(serve: Serve, tmp_path: Path) -> None:
    """After SIGKILL: ended jobs keep their results, running and queued ones run once, an upload resumes."""
    content = bytes(2 * MIB)
    async with killed_server(tmp_path / "data") as client:
        done = await client.wait(await client.job(await client.model()))
        model = await client.model(compress="wait")
        ran = await client.job(model)
        await running_state(client, ran)
        queued = await client.job(model, skip_cache=True)
        upload = await client.start_upload(content)
        await client.send(chunks(upload.name, content[:MIB], finish=False))
    async with serve() as running:
        running.executor.gate.set()
        for job, attempt in ((ran, 2), (queued, 1)):
            ended = await running.client.wait(job)
            assert (ended.state, ended.attempt) == (S.JOB_STATE_SUCCEEDED, attempt)
        assert sorted(running.executor.started) == sorted([ran.name, queued.name])
        kept = await running.client.jobs.GetJob(S.GetJobRequest(name=done.name))
        assert kept == done
        assert await running.client.read(kept.artifacts[0].files[0].digest) == b"small"
        events = running.client.jobs.WatchJob(S.WatchJobRequest(name=ran.name))
        sequences = [event.sequence async for event in events if event.sequence]
        assert sequences == list(range(1, len(sequences) + 1))
        answers = await running.client.send(chunks(upload.name, content, start=MIB))
        assert answers[-1].upload.state == upload_service_pb2.Upload.STATE_COMPLETED


async def test_a_job_that_takes_the_server_down_comes_to_an_end(serve: Serve, tmp_path: Path) -> None:
    """Each time counts as an attempt; when they are used up, the job fails instead of killing the next server."""
    async with killed_server(tmp_path / "data") as client:
        job = await client.job(await client.model(compress="wait"), max_attempts=1)
        await running_state(client, job)
    async with serve() as running:
        ended = await running.client.wait(job)
        assert ended.state == S.JOB_STATE_FAILED
        assert "server was lost" in ended.error.message
        assert running.executor.started == []


async def test_a_client_that_was_killed_does_not_block_its_upload(running: Any) -> None:
    """The connection of a writer breaks; a new one resumes without waiting for a limit."""
    content = bytes(2 * MIB)
    upload = await running.client.start_upload(content)
    async with grpc.aio.insecure_channel(running.server.address) as channel:
        call = Client(channel).uploads.WriteUpload()
        await call.write(chunks(upload.name, content[:MIB], finish=False)[0])
        await running.received(upload, MIB)
    await committed_after_cut(running.client, upload.name, MIB)
    answers = await running.client.send(chunks(upload.name, content, start=MIB))
    assert answers[-1].upload.state == upload_service_pb2.Upload.STATE_COMPLETED


async def test_stopping_requeues_without_counting_an_attempt(serve: Serve) -> None:
    """A job that does not end within the grace is queued again; its watcher is sent to the next server."""
    async with serve() as running:
        job = await running.client.job(await running.client.model(compress="wait"))
        await running.executor.running.wait()
        call = running.client.jobs.WatchJob(S.WatchJobRequest(name=job.name))
        assert (await call.read()).HasField("snapshot")
        stopping = asyncio.create_task(running.server.stop())
        failure = await failing(read_on(call))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        await stopping
        assert running.executor.killed == [job.name]
    async with serve() as running:
        queued = await running.client.jobs.GetJob(S.GetJobRequest(name=job.name))
        assert queued.attempt <= 1
        running.executor.gate.set()
        ended = await running.client.wait(job)
        assert (ended.state, ended.attempt) == (S.JOB_STATE_SUCCEEDED, 1)


async def draining(running: Any) -> None:
    """Waits until the server refuses new work."""

    async def refused() -> bool:
        try:
            await running.client.start_upload(b"")
        except grpc.aio.AioRpcError as error:
            return failure_of(error).reason == "DRAINING"
        return False

    await until(refused)


async def test_running_jobs_may_finish_within_the_grace(serve: Serve) -> None:
    """While draining, new work is UNAVAILABLE with RetryInfo, reading goes on, and a job that ends is kept."""
    async with serve(drain_grace_s=600.0) as running:
        model = await running.client.model(compress="wait")
        job = await running.client.job(model)
        await running.executor.running.wait()
        stopping = asyncio.create_task(running.server.stop())
        await draining(running)
        for call in (running.client.job(model), running.client.start_upload(b"x")):
            failure = await failing(call)
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            assert failure.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        waiting = asyncio.create_task(running.client.wait(job))
        running.executor.gate.set()
        assert (await waiting).state == S.JOB_STATE_SUCCEEDED
        await stopping


async def test_a_cancelled_job_of_a_dead_server_stays_cancelled(serve: Serve, tmp_path: Path) -> None:
    """CANCELLING when the server died: the next one ends it as CANCELLED instead of running it again."""
    async with serve() as running:
        job = await running.client.job(await running.client.model(compress="wait"))
        await running.executor.running.wait()
        # What a server that dies between the request and the end of the worker leaves.
        await running.server._scheduler._jobs.request_cancel("default", job.name.rpartition("/")[2])
    async with serve() as running:
        ended = await running.client.wait(job)
        assert (ended.state, running.executor.started) == (S.JOB_STATE_CANCELLED, [])


async def test_one_server_a_data_folder(serve: Serve, tmp_path: Path) -> None:
    """A second server is refused with a clear message; server.json says where the first is, while it serves."""
    announcement = tmp_path / "data" / "server.json"
    async with serve() as running:
        assert json.loads(announcement.read_text())["address"] == running.server.address
        second = Server(Settings(**{**DEFAULTS, "data_dir": tmp_path / "data"}), lambda _: ScriptedExecutor())
        with pytest.raises(SettingsError, match="another server uses"):
            await second.start()
        assert announcement.exists()
    assert not announcement.exists()


async def test_a_taken_port_is_told(serve: Serve, tmp_path: Path) -> None:
    """Two servers do not share a port."""
    async with serve() as running:
        settings = Settings(**{**DEFAULTS, "data_dir": tmp_path / "other", "listen": running.server.address})
        with pytest.raises(SettingsError, match="cannot bind"):
            await Server(settings, lambda _: ScriptedExecutor()).start()


async def test_deleted_while_inspected(serve: Serve) -> None:
    """A model that is deleted during its inspection does not come back."""
    async with serve() as running:
        running.executor.inspection_gate.clear()
        model = await running.client.model()
        await running.client.models.DeleteModel(model_service_pb2.DeleteModelRequest(name=model.name))
        running.executor.inspection_gate.set()
        get = running.client.models.GetModel(model_service_pb2.GetModelRequest(name=model.name))
        assert (await failing(get)).code == grpc.StatusCode.NOT_FOUND
