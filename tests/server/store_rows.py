"""Models and jobs to put into a store."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from modelpress_protos.v1 import common_pb2, job_service_pb2, model_service_pb2, upload_service_pb2
from modelpress_server.names import format_name, new_id
from modelpress_server.services.job_requests import new_job
from modelpress_server.stores.blob_index import StorageQuota, UploadRecord
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.database import Database
from modelpress_server.stores.jobs import Claim, JobRecord, Outcome
from modelpress_server.stores.models import ModelQuota, ModelRecord
from modelpress_server.stores.queries import RequestKey
from modelpress_server.stores.records import now_us
from modelpress_server.stores.sql_blobs import SqlBlobIndex
from modelpress_server.stores.sql_jobs import SqlJobStore
from modelpress_server.stores.sql_models import SqlModelStore
from modelpress_server.stores.sql_servers import SqlServerStore

LONG_S = 3600.0
NO_QUOTA = StorageQuota()
Model = model_service_pb2.Model


def blob_of(content: bytes) -> BlobKey:
    return BlobKey(hashlib.sha256(content).digest(), len(content))


KIND = b"one kind of processor"


def succeeded(*contents: bytes, made_by: bytes = KIND) -> Outcome:
    """An end with one artifact for each content."""
    blobs = tuple(blob_of(content) for content in contents)
    artifacts = tuple(
        job_service_pb2.Artifact(files=[common_pb2.FileEntry(path="model.onnx", digest=blob.to_digest())])
        for blob in blobs
    )
    return Outcome(job_service_pb2.JOB_STATE_SUCCEEDED, artifacts=artifacts, blobs=blobs, made_by=made_by)


@dataclass
class Stores:
    """The stores of one database, as one server has them."""

    database: Database
    server_id: str = field(default_factory=new_id)
    kinds: tuple[bytes, ...] = (KIND,)

    def __post_init__(self) -> None:
        self.jobs, self.models = SqlJobStore(self.database, lambda: self.kinds), SqlModelStore(self.database)
        self.index, self.servers = SqlBlobIndex(self.database), SqlServerStore(self.database)

    async def upload(self, content: bytes, project: str = "p") -> UploadRecord:
        """A completed upload."""
        blob = blob_of(content)
        record = await self.begin_upload(blob, project)
        return await self.index.complete_upload(record.id, now_us())

    async def begin_upload(
        self, blob: BlobKey, project: str = "p", most: StorageQuota = NO_QUOTA, left_bytes: int = 10**12
    ) -> UploadRecord:
        now = now_us()
        expire_us = now + 10**12
        state = upload_service_pb2.Upload.STATE_ACTIVE
        record = UploadRecord(project, new_id(), blob, state, 0, now, expire_us)
        return await self.index.create_upload(record, present=False, most=most, left_bytes=left_bytes)

    async def model(
        self, content: bytes = b"model", project: str = "p", request: RequestKey | None = None, most: int = 0
    ) -> ModelRecord:
        await self.upload(content, project)
        blob, model_id = blob_of(content), new_id()
        message = Model(
            name=format_name(project, "models", model_id),
            files=[common_pb2.FileEntry(path="model.onnx", digest=blob.to_digest())],
            state=Model.STATE_PROCESSING,
        )
        key = hashlib.sha256(content + project.encode()).digest()
        record = ModelRecord(project, model_id, 1, key, message)
        return await self.models.create(record, [blob], request, most=ModelQuota(most, 0))

    async def job(
        self,
        model: ModelRecord,
        request: RequestKey | None = None,
        max_queued: int = 10**6,
        max_stored_bytes: int = 0,
        there: bool = True,
        **spec: Any,
    ) -> JobRecord:
        given = job_service_pb2.Job(spec=job_service_pb2.JobSpec(model=model.message.name, **spec))
        if not given.spec.max_attempts:
            given.spec.max_attempts = 3
        record = new_job(model.project, given, model.message)
        blobs = [BlobKey.of(entry.digest) for entry in model.message.files]
        return await self.jobs.create(
            record,
            blobs,
            request,
            max_queued=max_queued,
            max_stored_bytes=max_stored_bytes,
            is_there=lambda _: there,
        )

    async def claim(self, waiting: tuple[str, ...] = ()) -> Claim:
        return await self.jobs.claim(now_us(), list, self.server_id, waiting)

    async def claimed(self) -> JobRecord:
        """A claim that must give a job."""
        job = (await self.claim()).job
        assert job is not None
        return job

    async def live(self, lease_s: float = LONG_S) -> bool:
        return await self.servers.renew(self.server_id, lease_s)
