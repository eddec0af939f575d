"""Helpers that speak to a server on 127.0.0.1 through the real stubs."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from modelpress_protos.v1 import (
    common_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    server_service_pb2_grpc,
    upload_service_pb2,
    upload_service_pb2_grpc,
)
from modelpress_server.app import Server
from modelpress_server.config import Settings
from scripted_executor import ScriptedExecutor

DEFAULTS: dict[str, Any] = {"listen": "127.0.0.1:0", "reserve_bytes": 0, "drain_grace_s": 0.0, "worker_memory_bytes": 0}
PROJECT = "projects/default"


@dataclass
class Client:
    """The stubs of one channel, with shorthands for what every test needs."""

    channel: grpc.aio.Channel
    uploads: Any = field(init=False)
    models: Any = field(init=False)
    jobs: Any = field(init=False)
    info: Any = field(init=False)

    def __post_init__(self) -> None:
        self.uploads = upload_service_pb2_grpc.UploadServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.jobs = job_service_pb2_grpc.JobServiceStub(self.channel)
        self.info = server_service_pb2_grpc.ServerServiceStub(self.channel)

    async def start_upload(self, content: bytes, parent: str = PROJECT) -> upload_service_pb2.Upload:
        request = upload_service_pb2.CreateUploadRequest(parent=parent, digest=digest_of(content))
        return await self.uploads.CreateUpload(request)

    async def send(self, messages: list[upload_service_pb2.WriteUploadRequest]) -> list[Any]:
        """All answers to one WriteUpload stream."""
        call = self.uploads.WriteUpload()
        for message in messages:
            await call.write(message)
        await call.done_writing()
        return [response async for response in call]

    async def upload(self, content: bytes, parent: str = PROJECT) -> common_pb2.Digest:
        upload = await self.start_upload(content, parent)
        await self.send(chunks(upload.name, content))
        return digest_of(content)

    async def model(self, parent: str = PROJECT, labels: dict[str, str] | None = None, **script: str) -> Any:
        """Uploads a script and registers it as a model."""
        digest = await self.upload(json.dumps(script).encode(), parent)
        files = [common_pb2.FileEntry(path="model.onnx", digest=digest)]
        model = model_service_pb2.Model(files=files, labels=labels or {})
        return await self.models.CreateModel(model_service_pb2.CreateModelRequest(parent=parent, model=model))

    async def job(self, model: Any, request_id: str = "", labels: dict[str, str] | None = None, **spec: Any) -> Any:
        job = job_service_pb2.Job(spec=job_service_pb2.JobSpec(model=model.name, **spec), labels=labels or {})
        parent = "/".join(model.name.split("/")[:2])
        request = job_service_pb2.CreateJobRequest(parent=parent, job=job, request_id=request_id)
        return await self.jobs.CreateJob(request)

    async def wait(self, job: Any) -> Any:
        """The job once it has ended."""
        while not job.HasField("end_time"):
            job = await self.jobs.WaitJob(job_service_pb2.WaitJobRequest(name=job.name))
        return job

    async def read(self, digest: common_pb2.Digest, offset: int = 0, parent: str = PROJECT) -> bytes:
        request = upload_service_pb2.ReadBlobRequest(parent=parent, digest=digest, read_offset=offset)
        return b"".join([response.data async for response in self.uploads.ReadBlob(request)])


def digest_of(content: bytes) -> common_pb2.Digest:
    return common_pb2.Digest(sha256=hashlib.sha256(content).digest(), size_bytes=len(content))


def chunks(
    name: str, content: bytes, start: int = 0, size: int = 1024 * 1024, finish: bool = True
) -> list[upload_service_pb2.WriteUploadRequest]:
    """The messages that send `content` from `start` on."""
    made = []
    for offset in range(start, max(len(content), start + 1), size):
        data = content[offset : offset + size]
        made.append(
            upload_service_pb2.WriteUploadRequest(
                name=name if offset == start else "",
                write_offset=offset,
                data=data,
                crc32c=google_crc32c.value(data),
                finish_write=finish and offset + size >= len(content),
            )
        )
    return made


async def committed(client: Client, name: str) -> int:
    return (await client.uploads.GetUpload(upload_service_pb2.GetUploadRequest(name=name))).committed_size


async def until(condition: Callable[[], Any]) -> Any:
    """Waits until the condition, which may be a coroutine function, gives something true, and returns that.

    Without a limit of its own: what never comes is ended by pytest's.
    """
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        await asyncio.sleep(0.01)


async def committed_after_cut(client: Client, name: str, at_least: int) -> int:
    """The durable size once the server has noticed that the stream is gone."""

    async def size_bytes() -> int:
        found = await committed(client, name)
        return found if found >= at_least else 0

    return await until(size_bytes)


@dataclass(frozen=True)
class Failure:
    """What a client is told of a failed call."""

    code: grpc.StatusCode
    reason: str
    message: str
    metadata: dict[str, str]
    status: status_pb2.Status

    def detail(self, kind: type[Any]) -> Any:
        """The detail of a type; fails where there is none."""
        for packed in self.status.details:
            made = kind()
            if packed.Unpack(made):
                return made
        raise AssertionError(f"no {kind.__name__} in {self.status}")


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    (packed,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    status = status_pb2.Status.FromString(packed)
    assert status.ByteSize() < 4096
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "modelpress"
    return Failure(error.code(), info.reason, status.message, dict(info.metadata), status)


async def failing(call: Awaitable[Any]) -> Failure:
    """The failure of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return failure_of(caught.value)


@dataclass
class Running:
    """A server in this process, its executor, and a client of it."""

    server: Server
    executor: ScriptedExecutor
    client: Client
    settings: Settings

    async def received(self, upload: upload_service_pb2.Upload, size_bytes: int) -> None:
        """Returns once a stream has brought so much of an upload, acknowledged or not."""
        sessions = self.server._uploads.sessions._sessions
        upload_id = upload.name.rpartition("/")[2]
        await until(lambda: upload_id in sessions and sessions[upload_id].partial.size_bytes >= size_bytes)


Serve = Callable[..., AbstractAsyncContextManager[Running]]
