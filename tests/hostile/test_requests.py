"""Hostile requests against a real server process: each is answered by name, another project is served meanwhile, and
the process is afterwards what it was before."""

from __future__ import annotations

import asyncio
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from footprint import Footprint, settled
from modelpress_protos.v1 import common_pb2, job_service_pb2, model_service_pb2, upload_service_pb2
from server_harness import Client, chunks, digest_of, failing, failure_of
from server_process import launched

TOKEN = (("authorization", "Bearer right"),)
A, B = "projects/a", "projects/b"
U = upload_service_pb2
ROUNDS = 4
# What connections and the allocator keep, whatever was asked of them.
SPARE_DESCRIPTORS, SPARE_MIB = 4, 24.0


@dataclass
class Attacker:
    """A client of project a, with what every row needs."""

    client: Client
    address: str
    pid: int
    model: Any

    async def upload(self, content: bytes, parent: str = A) -> Any:
        """An upload that has begun."""
        request = U.CreateUploadRequest(parent=parent, digest=digest_of(content))
        return await self.client.uploads.CreateUpload(request, metadata=TOKEN)

    async def send(self, *messages: Any) -> str:
        """The reason that a stream of messages is refused for."""
        call = self.client.uploads.WriteUpload(metadata=TOKEN)
        for message in messages:
            await call.write(message)
        await call.done_writing()
        return (await failing(call.read())).reason

    async def stored(self, content: bytes, parent: str = A) -> Any:
        """The digest of a blob that is there."""
        upload = await self.upload(content, parent)
        call = self.client.uploads.WriteUpload(metadata=TOKEN)
        for message in chunks(upload.name, content):
            await call.write(message)
        await call.done_writing()
        assert [answer async for answer in call]
        return digest_of(content)

    async def create_model(self, path: str, digest: Any, parent: str = A) -> Any:
        files = [common_pb2.FileEntry(path=path, digest=digest)]
        request = model_service_pb2.CreateModelRequest(parent=parent, model=model_service_pb2.Model(files=files))
        return await self.client.models.CreateModel(request, metadata=TOKEN)


async def until_refused(make: Callable[[], Awaitable[Any]]) -> tuple[list[Any], str]:
    """What could be made, and the reason why there could not be more."""
    made: list[Any] = []
    while True:
        try:
            made.append(await make())
        except grpc.aio.AioRpcError as error:
            return made, failure_of(error).reason


async def garbage(it: Attacker) -> set[str]:
    channel = it.client.channel
    call = channel.unary_unary("/modelpress.v1.JobService/CreateJob")
    return {(await failing(call(b"\xff" * 1000, metadata=TOKEN))).reason}


async def too_large(it: Attacker) -> set[str]:
    found = set()
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        call = it.client.uploads.WriteUpload(compression=compression, metadata=TOKEN)
        await call.write(U.WriteUploadRequest(data=bytes(5 << 20)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        found.add(caught.value.code().name)
    return found


async def wrong_tokens(it: Attacker) -> set[str]:
    request = job_service_pb2.ListJobsRequest(parent=A)
    calls = [it.client.jobs.ListJobs(request, metadata=(("authorization", f"Bearer {n}"),)) for n in range(40)]
    return {(await failing(call)).reason for call in calls}


async def wrong_names(it: Attacker) -> set[str]:
    names = ("projects/../models/x", "projects/a/models/../../x", "\0", "x" * 100_000, "projects/a\n/jobs/x")
    calls = [it.client.models.GetModel(model_service_pb2.GetModelRequest(name=n), metadata=TOKEN) for n in names]
    digest = it.model.files[0].digest
    paths = ("../x", "/etc/passwd", "a\0b", "a\x1b[31m", "a/./b", "x" * 10_000)
    return {(await failing(call)).reason for call in (*calls, *(it.create_model(path, digest) for path in paths))}


async def of_another_project(it: Attacker) -> set[str]:
    digest = await it.stored(b"secret of b", B)
    read = it.client.uploads.ReadBlob(U.ReadBlobRequest(parent=A, digest=digest), metadata=TOKEN)
    return {(await failing(it.create_model("m.onnx", digest))).reason, (await failing(read.read())).reason}


async def wrong_bytes(it: Attacker) -> set[str]:
    content = uuid.uuid4().bytes
    upload = await it.upload(content)
    (right,) = chunks(upload.name, content)
    damaged, elsewhere, other = (U.WriteUploadRequest.FromString(right.SerializeToString()) for _ in range(3))
    damaged.crc32c ^= 1
    elsewhere.write_offset = 8
    (other,) = chunks(upload.name, content[::-1])
    return {await it.send(damaged), await it.send(elsewhere), await it.send(other)}


async def two_writers(it: Attacker) -> set[str]:
    content = uuid.uuid4().bytes
    upload = await it.upload(content)
    (first,) = chunks(upload.name, content[:4], finish=False)
    holder = it.client.uploads.WriteUpload(metadata=TOKEN)
    await holder.write(first)
    while True:
        call = it.client.uploads.WriteUpload(metadata=TOKEN)
        await call.write(first)
        await call.done_writing()
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            reason = failure_of(error).reason
            if reason != "OFFSET_MISMATCH":
                break
        # The second came first.
    holder.cancel()
    await it.client.uploads.CancelUpload(U.CancelUploadRequest(name=upload.name), metadata=TOKEN)
    return {reason}


async def lost_uploads(it: Attacker) -> set[str]:
    """As many as there may be; they can be found and cancelled."""
    _, reason = await until_refused(lambda: it.upload(uuid.uuid4().bytes))
    listed = await it.client.uploads.ListUploads(U.ListUploadsRequest(parent=A), metadata=TOKEN)
    for upload in listed.uploads:
        await it.client.uploads.CancelUpload(U.CancelUploadRequest(name=upload.name), metadata=TOKEN)
    await it.upload(b"one more")
    return {reason}


async def too_many_jobs(it: Attacker) -> set[str]:
    spec = job_service_pb2.JobSpec(model=it.model.name, skip_cache=True)
    request = job_service_pb2.CreateJobRequest(parent=A, job=job_service_pb2.Job(spec=spec))
    made, reason = await until_refused(lambda: it.client.jobs.CreateJob(request, metadata=TOKEN))
    for job in made:
        await it.client.jobs.CancelJob(job_service_pb2.CancelJobRequest(name=job.name), metadata=TOKEN)
    return {reason}


async def streams_that_are_cut(it: Attacker) -> set[str]:
    content = uuid.uuid4().bytes * 1000
    upload = await it.upload(content)
    (job,) = (await it.client.jobs.ListJobs(job_service_pb2.ListJobsRequest(parent=B), metadata=TOKEN)).jobs[-1:]
    for _ in range(20):
        writing = it.client.uploads.WriteUpload(metadata=TOKEN)
        await writing.write(U.WriteUploadRequest(name=upload.name))
        watching = it.client.jobs.WatchJob(job_service_pb2.WatchJobRequest(name=job.name), metadata=TOKEN)
        await watching.read()
        watching.cancel()
        writing.cancel()
    await it.client.uploads.CancelUpload(U.CancelUploadRequest(name=upload.name), metadata=TOKEN)
    return set()


async def silent_connections(it: Attacker) -> set[str]:
    """More than there may be; those that are connected go on."""
    host, _, port = it.address.rpartition(":")
    idle = Footprint.of(it.pid).descriptors
    sockets = [socket.create_connection((host, int(port))) for _ in range(300)]
    try:
        await it.client.jobs.ListJobs(job_service_pb2.ListJobsRequest(parent=A), metadata=TOKEN)
        held = Footprint.of(it.pid).descriptors - idle
        assert 50 <= held <= 210, held
    finally:
        for item in sockets:
            item.close()
    return set()


ROWS: dict[Callable[[Attacker], Awaitable[set[str]]], set[str]] = {
    garbage: {"INVALID_FIELDS"},
    too_large: {"RESOURCE_EXHAUSTED"},
    wrong_names: {"INVALID_FIELDS"},
    of_another_project: {"BLOB_MISSING", "RESOURCE_NOT_FOUND"},
    wrong_bytes: {"CHUNK_CHECKSUM_MISMATCH", "OFFSET_MISMATCH", "DIGEST_MISMATCH"},
    two_writers: {"UPLOAD_BUSY"},
    lost_uploads: {"QUOTA_EXCEEDED"},
    too_many_jobs: {"QUEUE_FULL"},
    streams_that_are_cut: set(),
    silent_connections: set(),
    wrong_tokens: {"TOO_MANY_ATTEMPTS"},  # at once, where the round before has used up what is permitted
}


@pytest.fixture
async def attacker(tmp_path: Path) -> AsyncIterator[Attacker]:
    """A server process with a token and few connections, and who attacks it."""
    limits = ("--max-connections", "200", "--handshake-timeout-s", "2", "--max-queued-jobs", "50")
    arguments = ("--data-dir", str(tmp_path / "data"), "--token", "right", "--reserve-bytes", "0", *limits)
    with launched(*arguments, "--audit-log", str(tmp_path / "audit.log")) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        # Each of the many jobs leaves lines in the log: a full pipe would hold the server up.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        address = process.stdout.readline().removeprefix("listening on ").strip()
        async with grpc.aio.insecure_channel(address) as channel:
            made = Attacker(Client(channel), address, process.pid, None)
            made.model = await made.create_model("model.onnx", await made.stored(b'{"compress": "wait"}'))
            yield made


async def serves_another(it: Attacker) -> None:
    """Project b's model and job are done as ever."""
    model = await it.create_model("model.onnx", await it.stored(b"{}", B), B)
    spec = job_service_pb2.JobSpec(model=model.name, skip_cache=True)
    request = job_service_pb2.CreateJobRequest(parent=B, job=job_service_pb2.Job(spec=spec))
    job = await it.client.jobs.CreateJob(request, metadata=TOKEN)
    async with asyncio.timeout(60):
        while not job.HasField("end_time"):
            job = await it.client.jobs.WaitJob(job_service_pb2.WaitJobRequest(name=job.name), metadata=TOKEN)
    assert job.state == job_service_pb2.JOB_STATE_SUCCEEDED


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_day_of_hostile_requests(attacker: Attacker, capsys: pytest.CaptureFixture[str]) -> None:
    """All rows several times: the same answers each time, no descriptor and hardly any memory more than after the first
    round, which loads what is loaded once."""
    await serves_another(attacker)
    after_first = Footprint(0, 0, 0, 0.0)
    for number in range(ROUNDS):
        for row, expected in ROWS.items():
            assert await row(attacker) >= expected, row.__name__
        await serves_another(attacker)
        if number == 0:
            after_first = await settled(attacker.pid, after_first, descriptors=40, memory_mib=500.0)
    now = await settled(attacker.pid, after_first, descriptors=SPARE_DESCRIPTORS, memory_mib=SPARE_MIB)
    with capsys.disabled():
        print(f"\nhostile requests: after the first round {after_first}, after {ROUNDS} {now}")
    assert now.descriptors <= after_first.descriptors + SPARE_DESCRIPTORS
    assert now.memory_mib <= after_first.memory_mib + SPARE_MIB
    assert now.children == 0
