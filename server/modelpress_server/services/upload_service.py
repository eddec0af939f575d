"""UploadService: bytes in and out."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import google_crc32c
from modelpress_protos.v1 import upload_service_pb2, upload_service_pb2_grpc

from modelpress_server import errors
from modelpress_server.clock import Clock
from modelpress_server.config import MIB, Settings
from modelpress_server.filters import Fields
from modelpress_server.interceptors import check_project, check_projects, note_resource
from modelpress_server.listing import list_query, page_token, wrong_field
from modelpress_server.names import format_name, new_id, parse_name, parse_project, parse_projects
from modelpress_server.observation.meter import Meter
from modelpress_server.projects import Projects
from modelpress_server.services.upload_session import UploadSession, UploadSessions
from modelpress_server.services.upload_writer import UploadWriter, next_message, offset_mismatch
from modelpress_server.space import Space
from modelpress_server.stores.blob_index import BlobIndex, StorageQuota, UploadRecord
from modelpress_server.stores.blobs import BlobKey, BlobReader, BlobStore
from modelpress_server.stores.filesystem import damaged
from modelpress_server.stores.queries import Term
from modelpress_server.stores.records import now_us
from modelpress_server.validation import check_digest, check_digests
from modelpress_server.waiting import ended, uninterrupted

READ_CHUNK_BYTES = MIB
# Where a project has too many uploads, one without a byte for so long gives way to a new one.
MIN_IDLE_S = 600.0
_State = upload_service_pb2.Upload


class UploadService(upload_service_pb2_grpc.UploadServiceServicer):
    """Content-addressed, resumable uploads, and downloads from an offset."""

    def __init__(
        self,
        settings: Settings,
        projects: Projects,
        blobs: BlobStore,
        index: BlobIndex,
        space: Space,
        clock: Clock,
        meter: Meter,
    ) -> None:
        self._settings = settings
        self._projects = projects
        self._space = space
        self._blobs = blobs
        self._index = index
        self._clock = clock
        self._meter = meter
        self.sessions = UploadSessions(blobs, index, settings.upload_takeover_s, clock)

    async def FindMissingBlobs(  # noqa: N802  # the name of the method in the API
        self, request: upload_service_pb2.FindMissingBlobsRequest, context: Any
    ) -> upload_service_pb2.FindMissingBlobsResponse:
        project = check_project(parse_project(request.parent))
        blobs = check_digests("digests", request.digests)
        present = await self._present(project, blobs, touch_us=now_us())
        missing = [blob.to_digest() for blob in blobs if blob not in present]
        return upload_service_pb2.FindMissingBlobsResponse(missing=missing)

    async def CreateUpload(  # noqa: N802
        self, request: upload_service_pb2.CreateUploadRequest, context: Any
    ) -> upload_service_pb2.Upload:
        project = check_project(parse_project(request.parent))
        blob = check_digest("digest", request.digest)
        if blob.size_bytes > self._settings.max_blob_bytes:
            raise errors.UploadTooLargeError(
                f"The blob has {blob.size_bytes} bytes; this server takes at most {self._settings.max_blob_bytes}.",
                metadata={"max_blob_bytes": str(self._settings.max_blob_bytes)},
            )
        now = now_us()
        record = UploadRecord(
            project=project,
            id=new_id(),
            blob=blob,
            state=_State.STATE_ACTIVE,
            committed_size=0,
            create_time_us=now,
            expire_time_us=now + round(self._settings.upload_ttl_s * 1e6),
        )
        present = blob in await self._present(project, [blob], touch_us=now_us())
        try:
            return self._to_message(await self._create(record, present=present))
        except errors.StoredQuotaError:
            raise
        except errors.QuotaExceededError:
            if not await self._drop_idle(project, now):
                raise
        return self._to_message(await self._create(record, present=present))

    async def _create(self, record: UploadRecord, *, present: bool) -> UploadRecord:
        limits = self._projects.limits(record.project)
        most = StorageQuota(limits.max_open_uploads, limits.max_stored_bytes)
        async with self._space.left_for_uploads(record.blob.size_bytes) as left_bytes:
            return await self._index.create_upload(record, present=present, most=most, left_bytes=left_bytes)

    async def _drop_idle(self, project: str, now: int) -> bool:
        """Whether an upload could be dropped that nobody seems to send any more: the one that is idle longest."""
        ttl_s = self._settings.upload_ttl_s
        idle = await self._index.idle_uploads(project, now + round((ttl_s - MIN_IDLE_S) * 1e6))
        if not idle:
            return False
        await self._index.cancel_upload(project, idle[0])
        await self.sessions.discard(idle[0])
        return True

    async def GetUpload(  # noqa: N802
        self, request: upload_service_pb2.GetUploadRequest, context: Any
    ) -> upload_service_pb2.Upload:
        return self._to_message(await self._get(request.name))

    async def ListUploads(  # noqa: N802
        self, request: upload_service_pb2.ListUploadsRequest, context: Any
    ) -> upload_service_pb2.ListUploadsResponse:
        scope = check_projects(parse_projects(request.parent))
        asked = list_query(scope, request.page_size, request.page_token, "", Fields({}))
        page = await self._index.list_uploads(replace(asked, where=((Term("state", "=", _State.STATE_ACTIVE),),)))
        token = page_token(scope, "", page.items[-1].id) if page.has_more else ""
        uploads = [self._to_message(record) for record in page.items]
        return upload_service_pb2.ListUploadsResponse(uploads=uploads, next_page_token=token)

    async def CancelUpload(  # noqa: N802
        self, request: upload_service_pb2.CancelUploadRequest, context: Any
    ) -> upload_service_pb2.Upload:
        project, upload_id = parse_name(request.name, "uploads")
        record = await self._index.cancel_upload(check_project(project), upload_id)
        if record.state == _State.STATE_CANCELLED:
            await self.sessions.discard(upload_id)
        return self._to_message(record)

    async def WriteUpload(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        # A coroutine with context.read and context.write, since acknowledgements go out while messages come in.
        first = await next_message(context, None, self._settings.upload_idle_timeout_s, self._clock)
        if first is None:
            raise wrong_field("name", "the stream ended before its first message")
        note_resource(first.name)
        record = await self._get(first.name)
        if record.state == _State.STATE_COMPLETED:
            await context.write(self._completed(record))
            return
        try:
            response = await self._write(record, first, context)
        except errors.DigestMismatchError:
            await self._index.cancel_upload(record.project, record.id)
            await self.sessions.discard(record.id)
            raise
        await context.write(response)

    async def _write(
        self, record: UploadRecord, first: upload_service_pb2.WriteUploadRequest, context: Any
    ) -> upload_service_pb2.WriteUploadResponse:
        async with self.sessions.writing(record) as (session, current):
            if current.state == _State.STATE_COMPLETED:
                return self._completed(current)
            writer = UploadWriter(self._settings, self._index, session, current, context, self._clock, self._meter)
            finished = await writer.receive(first)
            return await uninterrupted(self._finish(session, current, finished))

    async def ReadBlob(  # noqa: N802
        self, request: upload_service_pb2.ReadBlobRequest, context: Any
    ) -> AsyncIterator[upload_service_pb2.ReadBlobResponse]:
        project = check_project(parse_project(request.parent))
        blob = check_digest("digest", request.digest)
        # Without extending its life: a full disk must not stand in the way of reading.
        if blob not in await self._present(project, [blob], touch_us=None):
            raise errors.ResourceNotFoundError(f"There is no blob {blob.sha256.hex()} in project {project}.")
        if request.read_offset < 0:
            raise wrong_field("read_offset", f"{request.read_offset} is negative")
        if request.read_offset > blob.size_bytes:
            raise errors.OffsetMismatchError(
                f"Offset {request.read_offset} is beyond the end of the blob at {blob.size_bytes}.",
                metadata={"size_bytes": str(blob.size_bytes)},
            )
        reader = await self._blobs.open_blob(blob)
        reading: asyncio.Task[upload_service_pb2.ReadBlobResponse] | None = None
        # A read from the start is verified on its way. A resumed one is not: hashing all that comes before would let
        # one small request cost the reading of a whole file. The client hashes what it has in either case.
        sha256 = hashlib.sha256() if request.read_offset == 0 else None
        try:
            offset = request.read_offset
            reading = asyncio.create_task(self._read_chunk(reader, offset, sha256))
            while offset < blob.size_bytes:
                response = await reading
                offset += len(response.data)
                if not response.data:
                    raise OSError(f"blob {blob.sha256.hex()} ends at {offset}, before its {blob.size_bytes} bytes")
                if offset < blob.size_bytes:
                    # The next chunk is read while this one is sent.
                    reading = asyncio.create_task(self._read_chunk(reader, offset, sha256))
                elif sha256 is not None and sha256.digest() != blob.sha256:
                    # Before the last chunk goes out: nobody gets a damaged file whole.
                    await self._blobs.quarantine(blob)
                    raise damaged(blob)
                yield response
                self._meter.bytes_sent(len(response.data))
        finally:
            if reading is not None:
                await uninterrupted(ended(reading))
            reader.close()

    async def _finish(
        self, session: UploadSession, record: UploadRecord, finished: bool
    ) -> upload_service_pb2.WriteUploadResponse:
        """Verifies and publishes, where the client called it finished."""
        blob, partial = record.blob, session.partial
        if not finished:
            return upload_service_pb2.WriteUploadResponse(committed_size=partial.size_bytes)
        if partial.size_bytes != blob.size_bytes:
            raise offset_mismatch(partial.size_bytes, blob.size_bytes)
        if partial.digest() != blob.sha256:
            raise errors.DigestMismatchError(
                f"The content has SHA-256 {partial.digest().hex()}, not {blob.sha256.hex()}. "
                "Create the upload again and send the right bytes.",
                metadata={"sha256": partial.digest().hex()},
            )
        await partial.sync()
        await self._blobs.publish(record.id, blob)
        completed = await self._index.complete_upload(record.id, now_us())
        if self._blobs.shared and not await self._blobs.has(blob):
            # Another server removed an unused copy of it between the two.
            await self._blobs.publish(record.id, blob)
        self.sessions.committed(record)
        self._meter.upload_completed()
        await self._blobs.remove_partial(record.id)
        return self._completed(completed)

    async def _read_chunk(
        self, reader: BlobReader, offset: int, sha256: hashlib._Hash | None
    ) -> upload_service_pb2.ReadBlobResponse:
        data = await reader.read(offset, READ_CHUNK_BYTES)
        return await self._blobs.run(_checked_chunk, data, offset, sha256)

    async def _get(self, name: str) -> UploadRecord:
        project, upload_id = parse_name(name, "uploads")
        return await self._index.get_upload(check_project(project), upload_id)

    async def _present(self, project: str, blobs: list[BlobKey], *, touch_us: int | None) -> set[BlobKey]:
        visible = await self._index.visible(project, blobs, touch_us=touch_us)
        return {blob for blob in visible if await self._blobs.has(blob)}

    def _completed(self, record: UploadRecord) -> upload_service_pb2.WriteUploadResponse:
        upload = self._to_message(record)
        return upload_service_pb2.WriteUploadResponse(committed_size=upload.committed_size, upload=upload)

    def _to_message(self, record: UploadRecord) -> upload_service_pb2.Upload:
        message = upload_service_pb2.Upload(
            name=format_name(record.project, "uploads", record.id),
            digest=record.blob.to_digest(),
            committed_size=record.committed_size,
            state=record.state,
            max_chunk_bytes=self._settings.max_chunk_bytes,
            ack_interval_bytes=self._settings.ack_interval_bytes,
        )
        message.create_time.FromMicroseconds(record.create_time_us)
        message.expire_time.FromMicroseconds(record.expire_time_us)
        return message


def _checked_chunk(data: bytes, offset: int, sha256: hashlib._Hash | None) -> upload_service_pb2.ReadBlobResponse:
    if sha256 is not None:
        sha256.update(data)
    return upload_service_pb2.ReadBlobResponse(offset=offset, crc32c=google_crc32c.value(data), data=data)
