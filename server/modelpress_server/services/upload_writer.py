"""One WriteUpload stream: checks, writes, hashes and acknowledges.

Receiving the next chunk overlaps with writing and hashing this one, and the fsync of an acknowledgement with both: at
most two chunks are in memory.
"""

from __future__ import annotations

import asyncio
from typing import Any

import google_crc32c
from modelpress_protos.v1 import upload_service_pb2

from modelpress_server import errors
from modelpress_server.clock import Clock, Waited
from modelpress_server.config import Settings
from modelpress_server.interceptors import check_readable
from modelpress_server.observation.meter import Meter
from modelpress_server.services.upload_session import UploadSession, upload_busy
from modelpress_server.stores.blob_index import BlobIndex, UploadRecord
from modelpress_server.stores.records import now_us
from modelpress_server.waiting import uninterrupted

MIN_PROGRESS_BYTES = 4096

Request = upload_service_pb2.WriteUploadRequest
Response = upload_service_pb2.WriteUploadResponse


async def next_message(
    context: Any, session: UploadSession | None, idle_timeout_s: float, clock: Clock
) -> Request | None:
    """The next message, None at the end of the stream. Raises UploadIdleError, or why the writer was evicted."""
    reading = asyncio.ensure_future(context.read())
    waited: Waited = {reading}
    if session is not None and session.evicted is not None:
        waited.add(session.evicted)
    try:
        done = await clock.wait(waited, idle_timeout_s)
    finally:
        if not reading.done():
            reading.cancel()
    if session is not None and session.evicted in done:
        await session.evicted  # raises
    if reading not in done:
        raise errors.UploadIdleError(
            "No bytes came for too long, or too few. Resume from committed_size.", retry_after_s=1.0
        )
    message = reading.result()
    check_readable(message)
    # grpc.aio.EOF, which the type stubs do not know
    return message if isinstance(message, Request) else None


class UploadWriter:
    """Takes the bytes of one stream into the partial file of one upload."""

    def __init__(
        self,
        settings: Settings,
        index: BlobIndex,
        session: UploadSession,
        record: UploadRecord,
        context: Any,
        clock: Clock,
        meter: Meter,
    ) -> None:
        self._settings = settings
        self._index = index
        self._session = session
        self._partial = session.partial
        self._record = record
        self._context = context
        self._clock = clock
        self._meter = meter
        self._offset = record.committed_size  # of the next byte to come
        self._durable = record.committed_size
        self._ack_from = record.committed_size
        self._busy_offset = record.committed_size  # where the stream last got on
        self._busy_at_s = clock.now_s()
        self._write: asyncio.Future[None] | None = None
        self._ack: asyncio.Task[None] | None = None

    async def receive(self, first: Request) -> bool:
        """Takes messages to the end of the stream; whether the client called it finished.

        However it ends, what came is durable and noted, so that a resumed stream sends nothing twice.
        """
        try:
            return await self._receive(first)
        finally:
            await uninterrupted(self._settle())

    async def _receive(self, first: Request) -> bool:
        message: Request | None = first
        while message is not None:
            self._check(message)
            await self._written()
            if message.data:
                self._write = asyncio.ensure_future(self._partial.append(message.data))
                self._offset += len(message.data)
                self._meter.bytes_received(len(message.data))
            if message.finish_write:
                await self._written()
                return True
            if self._offset - self._ack_from >= self._settings.ack_interval_bytes:
                await self._acknowledged()
                self._ack_from = self._offset
                self._ack = asyncio.create_task(self._acknowledge(self._write))
            message = await next_message(self._context, self._session, self._idle_left_s(), self._clock)
            self._session.active_at_s = self._clock.now_s()
        await self._written()
        return False

    def _check(self, message: Request) -> None:
        size_bytes, limit = len(message.data), self._settings.max_chunk_bytes
        if message.write_offset != self._offset:
            raise offset_mismatch(self._offset, message.write_offset)
        if size_bytes > limit:
            violation = errors.FieldViolation("data", f"has {size_bytes} bytes; at most {limit} are allowed")
            raise errors.InvalidFieldsError([violation])
        if google_crc32c.value(message.data) != message.crc32c:
            raise errors.ChunkChecksumError(
                f"The chunk at offset {self._offset} does not match its CRC-32C: it was damaged on the way. "
                "Resume from committed_size.",
                metadata={"committed_size": str(self._offset)},
            )
        if self._offset + size_bytes > self._record.blob.size_bytes:
            raise errors.DigestMismatchError(
                f"More bytes came than the {self._record.blob.size_bytes} of the digest. Create the upload again.",
            )

    def _idle_left_s(self) -> float:
        """How long the next message may take: a byte now and then does not keep a stream open."""
        now_s = self._clock.now_s()
        if self._offset - self._busy_offset >= MIN_PROGRESS_BYTES:
            self._busy_offset, self._busy_at_s = self._offset, now_s
        return max(self._settings.upload_idle_timeout_s - (now_s - self._busy_at_s), 0.0)

    async def _acknowledged(self) -> None:
        # A disk slower than the network slows the client down: what is not durable stays under two intervals.
        if self._ack is not None:
            await asyncio.shield(self._ack)

    async def _written(self) -> None:
        if self._write is not None:
            await asyncio.shield(self._write)

    async def _acknowledge(self, write: asyncio.Future[None] | None) -> None:
        if write is not None:
            await asyncio.shield(write)
        await self._commit()
        await self._context.write(Response(committed_size=self._durable))

    async def _commit(self) -> None:
        """Makes what is written durable and notes it."""
        size_bytes = self._partial.size_bytes
        if size_bytes > self._durable:
            await self._partial.sync()
            expire_us = now_us() + round(self._settings.upload_ttl_s * 1e6)
            if not await self._index.commit_upload(self._record.id, self._session.writer, size_bytes, expire_us):
                raise upload_busy()
            self._durable = size_bytes

    async def _settle(self) -> None:
        if self._ack is not None:
            # The client may be gone, so that the answer cannot be written; the bytes count all the same.
            await asyncio.wait([self._ack])
            if not self._ack.cancelled():
                self._ack.exception()
        if self._write is not None:
            await asyncio.wait([self._write])
            if not self._write.cancelled() and self._write.exception() is not None:
                return
        await self._commit()


def offset_mismatch(committed_size: int, given: int) -> errors.OffsetMismatchError:
    """Tells a client where to go on."""
    return errors.OffsetMismatchError(
        f"The upload stands at byte {committed_size}, not {given}. Resume from there.",
        metadata={"committed_size": str(committed_size)},
    )
