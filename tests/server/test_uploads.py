"""Uploads and downloads against a real server."""

from __future__ import annotations

import asyncio
import errno
import os
import random

import grpc
import pytest
from google.rpc import error_details_pb2
from manual_clock import ManualClock
from modelpress_protos.v1 import upload_service_pb2
from modelpress_server.config import KIB, MIB
from modelpress_server.services.upload_session import RELEASE_WAIT_S
from modelpress_server.services.upload_writer import MIN_PROGRESS_BYTES
from server_harness import (
    PROJECT,
    Client,
    Running,
    Serve,
    chunks,
    committed,
    committed_after_cut,
    digest_of,
    failing,
    until,
)

Write = upload_service_pb2.WriteUploadRequest
ACTIVE = upload_service_pb2.Upload.STATE_ACTIVE
COMPLETED = upload_service_pb2.Upload.STATE_COMPLETED


def some_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


async def find_missing(client: Client, contents: list[bytes], parent: str = PROJECT) -> list[object]:
    request = upload_service_pb2.FindMissingBlobsRequest(parent=parent, digests=[digest_of(item) for item in contents])
    return list((await client.uploads.FindMissingBlobs(request)).missing)


async def test_round_trip_is_exact_and_deduplicated(running: Running) -> None:
    """What is read is what was sent, from any offset; a second upload of the same content is complete at once."""
    content = some_bytes(3 * MIB + 17)
    assert await find_missing(running.client, [content]) == [digest_of(content)]
    digest = await running.client.upload(content)
    assert await find_missing(running.client, [content]) == []
    for offset in (0, 1, MIB, 3 * MIB, len(content)):
        assert await running.client.read(digest, offset) == content[offset:]
    again = await running.client.start_upload(content)
    assert (again.state, again.committed_size) == (COMPLETED, len(content))
    # The first chunk alone: grpc.aio replaces the status of a stream that ends during a write by a bare INTERNAL.
    answers = await running.client.send(chunks(again.name, content)[:1])
    assert answers[-1].upload.state == COMPLETED


async def test_an_empty_blob_is_a_blob(running: Running) -> None:
    """Zero bytes can be stored and read."""
    digest = await running.client.upload(b"")
    assert await running.client.read(digest) == b""


async def test_acknowledgements_are_durable_offsets(serve: Serve) -> None:
    """committed_size rises with every interval and ends at the size, with the upload in the last message only."""
    content = some_bytes(2 * MIB)
    async with serve(ack_interval_bytes=256 * KIB) as running:
        upload = await running.client.start_upload(content)
        assert (upload.state, upload.ack_interval_bytes) == (ACTIVE, 256 * KIB)
        answers = await running.client.send(chunks(upload.name, content, size=64 * KIB))
    sizes = [answer.committed_size for answer in answers]
    assert sizes == sorted(sizes)
    assert len(sizes) == 8
    assert sizes[-1] == len(content)
    assert [answer.HasField("upload") for answer in answers] == [False] * (len(sizes) - 1) + [True]


async def test_resumes_after_a_cancelled_stream(running: Running) -> None:
    """What came before a cut is kept; a new stream goes on from there at once."""
    content = some_bytes(2 * MIB)
    upload = await running.client.start_upload(content)
    assert (await running.client.start_upload(content)).name == upload.name
    call = running.client.uploads.WriteUpload()
    await call.write(chunks(upload.name, content, finish=False)[0])
    await running.received(upload, MIB)
    call.cancel()
    assert await committed_after_cut(running.client, upload.name, MIB) == MIB
    answers = await running.client.send(chunks(upload.name, content, start=MIB))
    assert answers[-1].upload.state == COMPLETED
    assert await running.client.read(digest_of(content)) == content


async def test_an_ended_stream_without_finish_keeps_its_bytes(running: Running) -> None:
    """A stream may end early; the answer says how far the server got."""
    content = some_bytes(MIB)
    upload = await running.client.start_upload(content)
    answers = await running.client.send(chunks(upload.name, content[: 300 * KIB], finish=False))
    assert [answer.committed_size for answer in answers] == [300 * KIB]
    assert not answers[-1].HasField("upload")


async def test_resumes_after_a_restart(serve: Serve) -> None:
    """A new server hashes the durable bytes again and takes the rest."""
    content = some_bytes(2 * MIB)
    async with serve() as running:
        upload = await running.client.start_upload(content)
        await running.client.send(chunks(upload.name, content[:MIB], finish=False))
    partial = running.settings.data_dir / "uploads" / upload.name.rpartition("/")[2]
    with partial.open("ab") as file:
        file.write(b"never acknowledged")
    async with serve() as running:
        assert await committed(running.client, upload.name) == MIB
        answers = await running.client.send(chunks(upload.name, content, start=MIB))
        assert answers[-1].upload.state == COMPLETED
        assert await running.client.read(digest_of(content)) == content
    assert not partial.exists()


async def test_lost_partial_file_is_told(serve: Serve) -> None:
    """Acknowledged bytes that vanished from the disk are not papered over."""
    content = some_bytes(64 * KIB)
    async with serve() as running:
        upload = await running.client.start_upload(content)
        await running.client.send(chunks(upload.name, content[: 32 * KIB], finish=False))
    (running.settings.data_dir / "uploads" / upload.name.rpartition("/")[2]).unlink()
    async with serve() as running:
        failure = await failing(running.client.send(chunks(upload.name, content, start=32 * KIB)))
        assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "UPLOAD_EXPIRED")
        await running.client.upload(content)


async def test_wrong_chunk_checksum_aborts_and_can_resume(running: Running) -> None:
    """A damaged chunk is refused, those before it are kept."""
    content = some_bytes(128 * KIB)
    upload = await running.client.start_upload(content)
    messages = chunks(upload.name, content, size=64 * KIB)
    messages[1].crc32c ^= 1
    failure = await failing(running.client.send(messages))
    assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "CHUNK_CHECKSUM_MISMATCH")
    assert await committed(running.client, upload.name) == 64 * KIB == int(failure.metadata["committed_size"])
    answers = await running.client.send(chunks(upload.name, content, start=64 * KIB))
    assert answers[-1].upload.state == COMPLETED


async def test_wrong_offset_says_the_right_one(running: Running) -> None:
    """A gap or a repetition is OUT_OF_RANGE with the offset to go on from; finishing early as well."""
    content = some_bytes(64 * KIB)
    upload = await running.client.start_upload(content)
    failure = await failing(running.client.send(chunks(upload.name, content, start=1)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.OUT_OF_RANGE, "OFFSET_MISMATCH")
    assert failure.metadata["committed_size"] == "0"
    failure = await failing(running.client.send(chunks(upload.name, content[:1000])))
    assert (failure.reason, failure.metadata["committed_size"]) == ("OFFSET_MISMATCH", "1000")


@pytest.mark.parametrize("extra", [b"", b"too long"])
async def test_wrong_content_discards_the_upload(running: Running, extra: bytes) -> None:
    """A wrong final digest, or more bytes than announced: the upload is gone and nothing is stored."""
    content = some_bytes(64 * KIB)
    upload = await running.client.start_upload(content)
    failure = await failing(running.client.send(chunks(upload.name, some_bytes(64 * KIB, seed=1) + extra)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DIGEST_MISMATCH")
    gone = await failing(committed(running.client, upload.name))
    assert (gone.code, gone.reason) == (grpc.StatusCode.NOT_FOUND, "UPLOAD_EXPIRED")
    assert await find_missing(running.client, [content]) == [digest_of(content)]
    assert list((running.settings.data_dir / "uploads").iterdir()) == []
    assert await running.client.start_upload(content) != upload


async def test_a_second_writer_is_turned_away(serve: Serve, clock: ManualClock) -> None:
    """While a writer is alive a second one gets ABORTED; once it is gone the second goes on."""
    content = some_bytes(128 * KIB)
    async with serve(clock) as running:
        upload = await running.client.start_upload(content)
        first = running.client.uploads.WriteUpload()
        await first.write(chunks(upload.name, content[: 64 * KIB], finish=False)[0])
        await running.received(upload, 64 * KIB)
        second = asyncio.create_task(failing(running.client.send(chunks(upload.name, content))))
        await until(lambda: RELEASE_WAIT_S in clock.sleeping)
        clock.advance(RELEASE_WAIT_S)
        failure = await second
        assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "UPLOAD_BUSY")
        assert failure.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        first.cancel()
        await committed_after_cut(running.client, upload.name, 64 * KIB)
        answers = await running.client.send(chunks(upload.name, content, start=64 * KIB))
        assert answers[-1].upload.state == COMPLETED


async def test_a_silent_writer_gives_way(serve: Serve, clock: ManualClock) -> None:
    """A new stream takes over from one that was silent, as after a network that went away without a word."""
    content = some_bytes(128 * KIB)
    async with serve(clock) as running:
        upload = await running.client.start_upload(content)
        first = running.client.uploads.WriteUpload()
        await first.write(chunks(upload.name, content[: 64 * KIB], finish=False)[0])
        await running.received(upload, 64 * KIB)
        clock.advance(running.settings.upload_takeover_s)
        answers = await running.client.send(chunks(upload.name, content, start=64 * KIB))
        assert answers[-1].upload.state == COMPLETED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await first.read()
        assert caught.value.code() == grpc.StatusCode.ABORTED


async def test_an_idle_stream_is_closed(serve: Serve, clock: ManualClock) -> None:
    """A writer that sends nothing is told so, and its bytes are kept."""
    content = some_bytes(64 * KIB)
    async with serve(clock) as running:
        upload = await running.client.start_upload(content)
        call = running.client.uploads.WriteUpload()
        await call.write(chunks(upload.name, content[:1000], finish=False)[0])
        await running.received(upload, 1000)
        clock.advance(running.settings.upload_idle_timeout_s)
        failure = await failing(call.read())
        assert (failure.code, failure.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "UPLOAD_IDLE")
        assert await committed(running.client, upload.name) == 1000


@pytest.mark.parametrize(("size", "idle"), [(1, True), (MIN_PROGRESS_BYTES, False)])
async def test_a_byte_now_and_then_is_idle(serve: Serve, clock: ManualClock, size: int, idle: bool) -> None:
    """A writer that drips single bytes, each well within the limit, is closed all the same; one whose drops are large
    enough to be progress is not."""
    content = some_bytes(4 * size)
    async with serve(clock) as running:
        upload = await running.client.start_upload(content)
        call = running.client.uploads.WriteUpload()
        for sent, message in enumerate(chunks(upload.name, content[: 3 * size], size=size, finish=False), start=1):
            await call.write(message)
            await running.received(upload, sent * size)
            clock.advance(running.settings.upload_idle_timeout_s * 0.4)
        if idle:
            assert (await failing(call.read())).reason == "UPLOAD_IDLE"
            assert await committed(running.client, upload.name) == 3
        else:
            await call.write(chunks(upload.name, content, start=3 * size)[0])
            assert (await call.read()).upload.state == COMPLETED


async def test_killed_between_publishing_and_the_record(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blob's file is there and its record is not: the upload is finished by its next stream."""
    content = some_bytes(64 * KIB)
    upload = await running.client.start_upload(content)

    with monkeypatch.context() as patched:
        patched.setattr(running.server._uploads._index, "complete_upload", failing_complete)
        await failing(running.client.send(chunks(upload.name, content)))
    assert await find_missing(running.client, [content]) == [digest_of(content)]
    assert await committed(running.client, upload.name) == len(content)
    answers = await running.client.send(chunks(upload.name, content, start=len(content)))
    assert answers[-1].upload.state == COMPLETED
    assert await running.client.read(digest_of(content)) == content


async def failing_complete(*_: object) -> None:
    """What a kill at this moment amounts to."""
    raise RuntimeError("killed")


async def test_cancel_is_idempotent_and_ends_the_writer(running: Running) -> None:
    """A cancelled upload is gone, with its file and its writer; a completed one stays."""
    content = some_bytes(64 * KIB)
    upload = await running.client.start_upload(content)
    call = running.client.uploads.WriteUpload()
    await call.write(chunks(upload.name, content[:1000], finish=False)[0])
    await running.received(upload, 1000)
    cancel = upload_service_pb2.CancelUploadRequest(name=upload.name)
    for _ in range(2):
        assert (await running.client.uploads.CancelUpload(cancel)).state == upload_service_pb2.Upload.STATE_CANCELLED
    assert (await failing(call.read())).reason == "UPLOAD_EXPIRED"
    assert list((running.settings.data_dir / "uploads").iterdir()) == []
    await running.client.upload(content)
    completed = upload_service_pb2.CancelUploadRequest(name=(await running.client.start_upload(content)).name)
    assert (await running.client.uploads.CancelUpload(completed)).state == COMPLETED


async def test_a_full_disk_is_told_and_stores_nothing(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC while writing is RESOURCE_EXHAUSTED; with space again the upload goes on from what was durable."""
    content = some_bytes(128 * KIB)
    upload = await running.client.start_upload(content)
    await running.client.send(chunks(upload.name, content[: 64 * KIB], finish=False))
    real = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        # Half of it fits: what a real disk does.
        real(fd, bytes(data)[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        failure = await failing(running.client.send(chunks(upload.name, content, start=64 * KIB)))
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
    assert await committed(running.client, upload.name) == 64 * KIB
    answers = await running.client.send(chunks(upload.name, content, start=64 * KIB))
    assert answers[-1].upload.state == COMPLETED
    assert await running.client.read(digest_of(content)) == content


async def test_limits(serve: Serve) -> None:
    """Too large, too many, no room, too large a chunk: each is refused with its own reason."""
    async with serve(max_blob_bytes=MIB, max_open_uploads=2, max_chunk_bytes=64 * KIB) as running:
        failure = await failing(running.client.start_upload(bytes(MIB + 1)))
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "UPLOAD_TOO_LARGE")
        first = await running.client.start_upload(b"1")
        await running.client.start_upload(b"2")
        assert (await running.client.start_upload(b"1")).name == first.name
        failure = await failing(running.client.start_upload(b"3"))
        assert failure.reason == "QUOTA_EXCEEDED"
        assert failure.detail(error_details_pb2.QuotaFailure).violations[0].subject == PROJECT
        assert failure.detail(error_details_pb2.RetryInfo).retry_delay.seconds > 0
        await running.client.send(chunks(first.name, b"1"))
        content = some_bytes(65 * KIB)
        upload = await running.client.start_upload(content)
        assert (await failing(running.client.send(chunks(upload.name, content)))).reason == "INVALID_FIELDS"
    async with serve(reserve_bytes=1 << 60) as running:
        assert (await failing(running.client.start_upload(b"x"))).reason == "STORAGE_FULL"


async def test_blobs_of_another_project_do_not_exist(running: Running) -> None:
    """Neither FindMissingBlobs nor ReadBlob nor an upload's name tells what another project has."""
    content = some_bytes(1000)
    digest = await running.client.upload(content)
    other = "projects/other"
    assert await find_missing(running.client, [content], other) == [digest]
    failure = await failing(running.client.read(digest, parent=other))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
    upload = await running.client.start_upload(content, other)
    assert upload.state == ACTIVE
    stolen = upload.name.replace("projects/other", PROJECT)
    assert (await failing(committed(running.client, stolen))).code == grpc.StatusCode.NOT_FOUND
    await running.client.upload(content, other)
    assert await running.client.read(digest, parent=other) == content


async def test_malformed_requests_list_every_violation(running: Running) -> None:
    """Names and digests are checked before anything is touched."""
    for parent in ("", "default", "projects/", "projects/..", "projects/a/b", "projects/a\0", "projects/" + "a" * 64):
        failure = await failing(find_missing(running.client, [], parent))
        assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    bad = upload_service_pb2.FindMissingBlobsRequest(parent=PROJECT)
    bad.digests.add(sha256=b"short", size_bytes=-1)
    failure = await failing(running.client.uploads.FindMissingBlobs(bad))
    fields = [item.field for item in failure.detail(error_details_pb2.BadRequest).field_violations]
    assert fields == ["digests[0].sha256", "digests[0].size_bytes"]
    digest = await running.client.upload(b"x")
    assert (await failing(running.client.read(digest, 2))).reason == "OFFSET_MISMATCH"
    assert (await failing(running.client.read(digest, -1))).reason == "INVALID_FIELDS"
    assert (await failing(running.client.send([]))).reason == "INVALID_FIELDS"


async def test_stored_blobs_are_read_only_files_named_by_digest(running: Running) -> None:
    """The store has exactly the complete blobs, not writable."""
    content = some_bytes(1000)
    digest = await running.client.upload(content)
    files = [path for path in (running.settings.data_dir / "blobs").rglob("*") if path.is_file()]
    assert [path.name for path in files] == [digest.sha256.hex()]
    assert [path.lstat().st_mode & 0o777 for path in files] == [0o444]
