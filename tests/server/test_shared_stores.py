"""Several servers on one PostgreSQL and one bucket: what was begun on one goes on on another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from modelpress_protos.v1 import job_service_pb2, upload_service_pb2
from modelpress_server.config import Settings, SettingsError
from modelpress_server.stores.records import now_us
from server_harness import Running, Serve, chunks, committed, committed_after_cut, digest_of, failing, until
from shared_stores import new_database

psycopg = pytest.importorskip("psycopg")
S = job_service_pb2
MIB = 1024 * 1024
CONTENT = bytes(range(256)) * (20 * MIB // 256)

Start = Callable[..., Any]


@pytest.fixture
async def start(serve: Serve, postgres: str, s3: str, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts servers on the same stores, each with a folder of its own; they end with the test."""
    database = new_database(postgres)
    async with AsyncExitStack() as stack:
        count = 0

        async def one(**changes: Any) -> Running:
            nonlocal count
            count += 1
            settings = {"database": database, "blobs": s3, "data_dir": tmp_path / f"data{count}", "lease_s": 2.0}
            return await stack.enter_async_context(serve(**{**settings, **changes}))

        yield one


async def answers_of(call: Any) -> list[Any]:
    """All that is left of a stream."""
    return [response async for response in call]


async def test_an_upload_goes_on_on_another_server(start: Start) -> None:
    """Begun on one, cut, gone on with on another where the first one stopped; read from both; one copy is stored."""
    one, other = await start(ack_interval_bytes=MIB), await start(ack_interval_bytes=MIB)
    upload = await one.client.start_upload(CONTENT)
    await one.client.send(chunks(upload.name, CONTENT[: 11 * MIB], finish=False))
    assert await committed(other.client, upload.name) == 11 * MIB
    answers = await other.client.send(chunks(upload.name, CONTENT, start=11 * MIB))
    assert answers[-1].upload.state == upload_service_pb2.Upload.STATE_COMPLETED
    digest = digest_of(CONTENT)
    for running in (one, other):
        assert await running.client.read(digest) == CONTENT
        assert await running.client.read(digest, offset=19 * MIB) == CONTENT[19 * MIB :]
        again = await running.client.start_upload(CONTENT)
        assert again.state == upload_service_pb2.Upload.STATE_COMPLETED


async def test_the_last_writer_has_the_upload(start: Start) -> None:
    """A stream on one server gives way to a later one on another: it ends with an error, and nothing is mixed up."""
    one, other = await start(ack_interval_bytes=MIB), await start(ack_interval_bytes=MIB)
    upload = await one.client.start_upload(CONTENT)
    first = one.client.uploads.WriteUpload()
    messages = chunks(upload.name, CONTENT)
    for message in messages[:4]:
        await first.write(message)
    begun = await committed_after_cut(other.client, upload.name, 4 * MIB)
    answers = await other.client.send(chunks(upload.name, CONTENT, start=begun))
    assert answers[-1].upload.state == upload_service_pb2.Upload.STATE_COMPLETED
    for message in messages[4:6]:  # the second finds that the first could not be acknowledged
        await first.write(message)
    failure = await failing(answers_of(first))
    assert failure.reason == "UPLOAD_BUSY"
    assert await other.client.read(digest_of(CONTENT)) == CONTENT


async def test_a_watch_is_told_by_another_server(start: Start) -> None:
    """The job runs on one server; who watches through the other sees each event once, in order, without waiting."""
    one, other = await start(heartbeat_s=3600.0), await start(heartbeat_s=3600.0, workers=1)
    model = await one.client.model(compress="wait")
    job = await one.client.job(model)
    executors = (one.executor, other.executor)
    await until(lambda: any(executor.started for executor in executors))
    events: list[S.WatchJobResponse] = []

    async def watch(running: Running) -> list[int]:
        seen = []
        async for event in running.client.jobs.WatchJob(S.WatchJobRequest(name=job.name)):
            events.append(event)
            seen.append(event.sequence)
        return [sequence for sequence in seen if sequence]

    watching = [asyncio.create_task(watch(running)) for running in (one, other)]
    await until(lambda: len(events) >= 4)
    for executor in executors:
        executor.gate.set()
    first, second = await asyncio.gather(*watching)
    assert first == second == list(range(1, len(first) + 1))
    # A watch that was cut goes on at the other server.
    request = S.WatchJobRequest(name=job.name, after_sequence=2)
    rest = [event.sequence async for event in other.client.jobs.WatchJob(request)]
    assert [sequence for sequence in rest if sequence] == first[2:]


async def test_jobs_run_once(start: Start) -> None:
    """Twenty jobs made through two servers run on both, each once."""
    servers = [await start(workers=2), await start(workers=2)]
    model = await servers[0].client.model()
    jobs = [await servers[number % 2].client.job(model, skip_cache=True) for number in range(20)]
    for job in jobs:
        assert (await servers[0].client.wait(job)).state == S.JOB_STATE_SUCCEEDED
    started = [*servers[0].executor.started, *servers[1].executor.started]
    assert sorted(started) == sorted(job.name for job in jobs)
    assert all(running.executor.started for running in servers)


async def test_cancelling_through_another_server(start: Start) -> None:
    """The run is stopped where it is."""
    one = await start()
    job = await one.client.job(await one.client.model(compress="wait"))
    await one.executor.running.wait()
    other = await start()
    await other.client.jobs.CancelJob(S.CancelJobRequest(name=job.name))
    assert (await other.client.wait(job)).state == S.JOB_STATE_CANCELLED
    assert one.executor.killed == [job.name]


async def test_a_result_serves_all(start: Start) -> None:
    """What one server computed is the result of an identical job on another; not once a part of it is lost."""
    one, other = await start(), await start()
    model = await one.client.model()
    done = await one.client.wait(await one.client.job(model))
    again = await other.client.job(model)
    assert (again.state, again.from_cache) == (S.JOB_STATE_SUCCEEDED, True)
    assert again.artifacts == done.artifacts
    lost = next(iter(done.artifacts)).files[0].digest
    (blob,) = [blob for blob in await other.server._blobs.older_than(1e12) if blob.sha256 == lost.sha256]
    await other.server._blobs.run(other.server._blobs.remove_older_than, blob, 1e12)
    assert not (await other.client.wait(await other.client.job(model))).from_cache
    assert (await one.client.job(model)).from_cache


async def test_a_server_that_hangs_has_lost_its_jobs(start: Start) -> None:
    """A server that cannot renew its lease: another one runs its job; what it brings later does not count."""
    one = await start(lease_s=1.0)
    job = await one.client.job(await one.client.model(compress="wait"))
    await one.executor.running.wait()
    one.server._membership._task.cancel()  # it is heard of no more, and works on
    other = await start(lease_s=1.0)
    await other.executor.running.wait()
    other.executor.gate.set()
    ended = await other.client.wait(job)
    assert (ended.state, ended.attempt) == (S.JOB_STATE_SUCCEEDED, 2)
    one.executor.gate.set()
    await until(lambda: not one.server._scheduler._runs)
    after = await other.client.jobs.GetJob(S.GetJobRequest(name=job.name))
    assert after == ended
    lines = [line.text async for line in other.client.jobs.StreamJobLogs(S.StreamJobLogsRequest(name=job.name))]
    assert any("queued again" in line for line in lines)


async def test_a_lost_lease_stops_the_run(start: Start) -> None:
    """A server that is heard of again, and finds its job with another one, stops its own run of it."""
    one = await start(lease_s=1.0)
    job = await one.client.job(await one.client.model(compress="wait"))
    await one.executor.running.wait()
    await one.server._database.write(
        lambda connection: connection.exec_driver_sql("UPDATE jobs SET fence = fence + 1, owner = 'another'")
    )
    await until(lambda: one.executor.killed)
    assert one.executor.killed == [job.name]


async def test_a_claim_without_an_answer(start: Start) -> None:
    """A job that is this server's by the store, and that no run knows, is queued again and costs it no attempt."""
    one = await start(lease_s=1.0)
    await one.client.job(await one.client.model(compress="wait"))
    await one.executor.running.wait()  # the one worker has something to do
    job = await one.client.job(await one.client.model())
    scheduler = one.server._scheduler
    claim = await scheduler._jobs.claim(now_us(), list, scheduler._server_id)
    assert claim.job is not None
    one.executor.gate.set()
    ended = await one.client.wait(job)
    assert (ended.state, ended.attempt) == (S.JOB_STATE_SUCCEEDED, 1)


async def test_a_database_that_went_away(start: Start) -> None:
    """All its sessions end while a job runs: the job's end is stored, its watch goes on, and later jobs run."""
    one = await start(heartbeat_s=3600.0)
    job = await one.client.job(await one.client.model(compress="wait"))
    await one.executor.running.wait()
    watching = asyncio.create_task(answers_of(one.client.jobs.WatchJob(S.WatchJobRequest(name=job.name))))
    with psycopg.connect(one.settings.database, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    one.executor.gate.set()
    assert (await watching)[-1].snapshot.state == S.JOB_STATE_SUCCEEDED
    later = await one.client.job(await one.client.model(), skip_cache=True)
    assert (await one.client.wait(later)).state == S.JOB_STATE_SUCCEEDED


async def test_one_janitor(start: Start) -> None:
    """Of two servers one sweeps what they share."""
    one, other = await start(), await start()
    found = {await running.server._database.leads("janitor") for running in (one, other)}
    assert found == {True, False}


def test_settings_go_together(tmp_path: Path) -> None:
    """A shared database without a shared place for files is refused; secrets are not shown."""
    with pytest.raises(SettingsError, match="--blobs"):
        Settings(data_dir=tmp_path, database="postgresql://host/name")
    settings = Settings(data_dir=tmp_path, database="postgresql://me:verysecret@host/name", blobs="s3://bucket")
    assert "verysecret" not in repr(settings)


async def test_a_wrong_digest_on_two_servers(start: Start) -> None:
    """Bytes that are not those of the digest make no blob, whoever sent which of them."""
    one, other = await start(), await start()
    upload = await one.client.start_upload(CONTENT)
    await one.client.send(chunks(upload.name, bytes(MIB), finish=False))
    failure = await failing(other.client.send(chunks(upload.name, bytes(len(CONTENT)), start=MIB)))
    assert failure.reason == "DIGEST_MISMATCH"
    assert (await other.client.start_upload(CONTENT)).committed_size == 0


async def test_a_start_that_fails_leaves_nothing_open(start: Start, postgres: str, tmp_path: Path) -> None:
    """Another one has the port: the server that came too late lets go of its folder and of its sessions."""
    one, database = await start(), new_database(postgres)
    for _ in range(2):  # the second time the folder is free again
        with pytest.raises(SettingsError, match="cannot bind"):
            await start(listen=one.server.address, data_dir=tmp_path / "late", database=database)

    async def no_session_is_left() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        async with await psycopg.AsyncConnection.connect(database) as connection:
            return await (await connection.execute(query)).fetchone() == (0,)

    await until(no_session_is_left)
