"""What the server forgets, and what it must not."""

from __future__ import annotations

import os
from typing import Any

import grpc
from manual_clock import ManualClock
from modelpress_protos.v1 import job_service_pb2, model_service_pb2, upload_service_pb2
from modelpress_server.janitor import MIN_BLOB_AGE_S, START_GRACE_S
from modelpress_server.stores.records import now_us
from server_harness import PROJECT, Running, Serve, chunks, digest_of, failing

S = job_service_pb2


def blob_names(running: Running) -> set[str]:
    return {path.name for path in (running.settings.data_dir / "blobs").rglob("*") if path.is_file()}


async def sweep(running: Running, after_s: float = 0.0) -> None:
    """A sweep as it will be after so many seconds."""
    await running.server._janitor.sweep(now_us() + round(after_s * 1e6))


async def test_only_unused_blobs_go(running: Running) -> None:
    """Blobs of models and jobs stay; others go after their time, from the index and from the disk."""
    ttl_s = running.settings.blob_ttl_s
    job = await running.client.wait(await running.client.job(await running.client.model()))
    loose = await running.client.upload(b"nobody uses this")
    await sweep(running, ttl_s / 2)
    assert loose.sha256.hex() in blob_names(running)
    await sweep(running, ttl_s)
    kept = {entry.digest.sha256.hex() for artifact in job.artifacts for entry in artifact.files}
    assert kept < blob_names(running)
    assert loose.sha256.hex() not in blob_names(running)
    assert (await failing(running.client.read(loose))).code == grpc.StatusCode.NOT_FOUND
    await running.client.upload(b"nobody uses this")
    assert await running.client.read(loose) == b"nobody uses this"


async def test_deleting_everything_frees_everything(running: Running) -> None:
    """After the model and its job are deleted, nothing is left on the disk."""
    job = await running.client.wait(await running.client.job(await running.client.model()))
    await running.client.jobs.DeleteJob(S.DeleteJobRequest(name=job.name))
    await running.client.models.DeleteModel(model_service_pb2.DeleteModelRequest(name=job.spec.model))
    await sweep(running, running.settings.blob_ttl_s)
    assert blob_names(running) == set()


async def test_a_blob_without_a_record_stays_for_an_hour(running: Running) -> None:
    """A file that was just published has no record yet; an old one without a record is what a crash left."""
    content = b"published, then killed"
    digest = digest_of(content)
    shard = running.settings.data_dir / "blobs" / digest.sha256.hex()[:2]
    shard.mkdir(exist_ok=True)
    (shard / digest.sha256.hex()).write_bytes(content)
    await sweep(running)
    assert blob_names(running) == {digest.sha256.hex()}
    await sweep(running, MIN_BLOB_AGE_S)
    assert blob_names(running) == set()


async def test_expired_uploads_go(running: Running) -> None:
    """An unfinished upload is dropped with its file after its time."""
    upload = await running.client.start_upload(b"0123456789")
    await running.client.send(chunks(upload.name, b"01234", finish=False))
    get = upload_service_pb2.GetUploadRequest(name=upload.name)
    await sweep(running, running.settings.upload_ttl_s / 2)
    assert (await running.client.uploads.GetUpload(get)).committed_size == 5
    await sweep(running, running.settings.upload_ttl_s)
    failure = await failing(running.client.uploads.GetUpload(get))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "UPLOAD_EXPIRED")
    assert list((running.settings.data_dir / "uploads").iterdir()) == []


async def test_compacted_events_are_told(running: Running) -> None:
    """Events of an old job are gone: a resumed watch is OUT_OF_RANGE, a fresh one gets the snapshot."""
    job = await running.client.wait(await running.client.job(await running.client.model()))
    await sweep(running, running.settings.event_ttl_s)

    async def watched(after: int) -> list[Any]:
        request = S.WatchJobRequest(name=job.name, after_sequence=after)
        return [event async for event in running.client.jobs.WatchJob(request)]

    failure = await failing(watched(1))
    assert (failure.code, failure.reason) == (grpc.StatusCode.OUT_OF_RANGE, "EVENTS_COMPACTED")
    for after in (0, job.last_sequence):
        assert [event.snapshot.state for event in await watched(after)] == [S.JOB_STATE_SUCCEEDED] * 2


async def test_a_clock_that_is_set_forward_drops_nothing(serve: Serve) -> None:
    """Two days that nobody had count for neither uploads nor blobs; two days that passed do."""
    clock = ManualClock()
    async with serve(clock=clock) as running:
        janitor, get = running.server._janitor, upload_service_pb2.GetUploadRequest
        loose = await running.client.upload(b"nobody uses this yet")
        upload = await running.client.start_upload(b"0123456789")
        await running.client.send(chunks(upload.name, b"01234", finish=False))
        clock.set_forward_s = 2 * 86400.0
        for _ in range(3):
            await janitor.sweep_now()
            clock.advance(60)
        assert (await running.client.uploads.GetUpload(get(name=upload.name))).committed_size == 5
        assert await running.client.read(loose) == b"nobody uses this yet"
        for _ in range(2):
            clock.advance(86400)
            await janitor.sweep_now()
        assert (await failing(running.client.uploads.GetUpload(get(name=upload.name)))).reason == "UPLOAD_EXPIRED"
        assert (await failing(running.client.read(loose))).code == grpc.StatusCode.NOT_FOUND


async def test_a_clock_that_is_set_forward_ends_nothing_early(serve: Serve) -> None:
    """A job and its model have their whole time, whatever the clock skips; those after the step have theirs as well."""
    clock, day = ManualClock(), 86400.0
    async with serve(clock=clock, job_ttl_s=3 * day, model_ttl_s=3 * day) as running:
        janitor, client = running.server._janitor, running.client

        async def left() -> int:
            return len((await client.jobs.ListJobs(S.ListJobsRequest(parent=PROJECT))).jobs)

        clock.advance(START_GRACE_S)
        await client.wait(await client.job(await client.model()))
        for _ in range(2):
            clock.set_forward_s += 10 * day
            await janitor.sweep_now()
        clock.advance(3 * day - START_GRACE_S - 60)  # jobs end by the real clock
        await janitor.sweep_now()
        assert await left() == 1
        clock.advance(120)
        await janitor.sweep_now()
        assert await left() == 0


async def test_a_clock_that_is_wrong_at_the_start_ends_nothing(serve: Serve) -> None:
    """A machine whose clock is a year ahead until the network has set it."""
    clock, year = ManualClock(), 365 * 86400.0
    async with serve(clock=clock, job_ttl_s=86400.0) as running:
        await running.client.wait(await running.client.job(await running.client.model()))
    clock.set_forward_s = year
    async with serve(clock=clock, job_ttl_s=86400.0) as running:
        janitor, listing = running.server._janitor, S.ListJobsRequest(parent=PROJECT)
        await janitor.sweep_now()
        clock.set_forward_s = 0.0
        clock.advance(60)
        await janitor.sweep_now()
        clock.advance(START_GRACE_S)
        await janitor.sweep_now()
        (job,) = (await running.client.jobs.ListJobs(listing)).jobs
        found = S.WatchJobRequest(name=job.name, after_sequence=1)
        assert [event async for event in running.client.jobs.WatchJob(found)]
        clock.advance(86400)
        await janitor.sweep_now()
        assert (await running.client.jobs.ListJobs(listing)).jobs == []


async def test_a_clock_that_is_set_back_drops_nothing(serve: Serve) -> None:
    """Then everything lives longer, and nothing for ever."""
    clock = ManualClock()
    async with serve(clock=clock) as running:
        janitor, get = running.server._janitor, upload_service_pb2.GetUploadRequest
        upload = await running.client.start_upload(b"0123456789")
        clock.set_forward_s = -2 * 86400.0
        await janitor.sweep_now()
        clock.advance(60)
        await janitor.sweep_now()
        assert (await running.client.uploads.GetUpload(get(name=upload.name))).name == upload.name
        for _ in range(4):
            clock.advance(86400)
            await janitor.sweep_now()
        assert (await failing(running.client.uploads.GetUpload(get(name=upload.name)))).reason == "UPLOAD_EXPIRED"


async def test_what_was_used_while_the_clock_was_ahead_does_not_stay(serve: Serve) -> None:
    """Once the clock is right again, a blob has its usual time, from the present on."""
    clock = ManualClock()
    async with serve(clock=clock) as running:
        janitor = running.server._janitor
        clock.set_forward_s = 30 * 86400.0
        await janitor.sweep_now()
        loose = await running.client.upload(b"nobody uses this")

        def use_in_future(connection: Any) -> None:
            connection.exec_driver_sql("UPDATE project_blobs SET used_us = ?", (clock.wall_us(),))

        await running.server._database.write(use_in_future)
        (path,) = (running.settings.data_dir / "blobs").glob("??/*")
        os.utime(path, (clock.wall_us() / 1e6, clock.wall_us() / 1e6))
        clock.set_forward_s = 0.0
        await janitor.sweep_now()
        assert await running.client.read(loose) == b"nobody uses this"
        clock.advance(running.settings.blob_ttl_s + MIN_BLOB_AGE_S)
        await janitor.sweep_now()
        assert blob_names(running) == set()


async def test_uploads_outlive_a_server_that_was_away(serve: Serve) -> None:
    """An upload whose time ran out while no server was there can still be resumed for a while."""
    async with serve(upload_ttl_s=7200.0) as running:
        upload = await running.client.start_upload(b"0123456789")
    clock = ManualClock()
    clock.advance(86400)
    async with serve(clock=clock, upload_ttl_s=7200.0) as running:
        get = upload_service_pb2.GetUploadRequest(name=upload.name)
        await running.server._janitor.sweep_now()
        assert (await running.client.uploads.GetUpload(get)).name == upload.name
        clock.advance(START_GRACE_S + 60)
        await running.server._janitor.sweep_now()
        assert (await failing(running.client.uploads.GetUpload(get))).reason == "UPLOAD_EXPIRED"
