"""Sends blobs: only the missing ones, in checked chunks, resumed from what the server has on its disk.

Reading and checksums run in a thread, one chunk ahead of the sending; a chunk is read only when the one before was
handed to the transport, so that memory stays at a few chunks however slow the server is.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import google_crc32c
import grpc
from modelpress_protos.v1.upload_service_pb2 import (
    CreateUploadRequest,
    FindMissingBlobsRequest,
    Upload,
    WriteUploadRequest,
    WriteUploadResponse,
)

from modelpress_client.connection import Connection, stalled
from modelpress_client.errors import ModelpressError, TransferError, UsageError
from modelpress_client.transfers import LocalBlob, OnProgress, TransferProgress

CHUNK_BYTES = 1024 * 1024  # 1 MiB: 16 KiB costs six times the CPU
WATCH_INTERVAL_S = 1.0  # how often a stream is checked for standstill
MAX_DIGESTS_PER_CALL = 1000

WriteCall = grpc.aio.StreamStreamCall[WriteUploadRequest, WriteUploadResponse]


async def upload_blobs(
    connection: Connection, blobs: Sequence[LocalBlob], on_progress: OnProgress | None = None
) -> None:
    """Brings every blob to the server that it does not have yet.

    Raises TransferError when a file changes meanwhile, QuotaError when the server takes no more, and
    ServerUnreachableError when it stays away for longer than the retry policy allows.
    """
    missing: set[bytes] = set()
    for start in range(0, len(blobs), MAX_DIGESTS_PER_CALL):
        digests = [blob.digest for blob in blobs[start : start + MAX_DIGESTS_PER_CALL]]
        request = FindMissingBlobsRequest(parent=connection.settings.parent, digests=digests)
        answer = await connection.call(connection.uploads.FindMissingBlobs, request)
        missing |= {digest.sha256 for digest in answer.missing}
    for blob in blobs:
        if blob.sha256 in missing:
            await _upload_blob(connection, blob, on_progress)
        elif on_progress is not None:
            on_progress(TransferProgress("upload", blob.path, blob.size_bytes, blob.size_bytes))


async def _upload_blob(connection: Connection, blob: LocalBlob, on_progress: OnProgress | None) -> None:
    patience = connection.patience()
    committed = -1
    while True:
        request = CreateUploadRequest(parent=connection.settings.parent, digest=blob.digest)
        upload = await connection.call(connection.uploads.CreateUpload, request)
        if upload.state == Upload.STATE_COMPLETED:
            return
        if upload.committed_size > committed:
            patience.progressed()
            committed = upload.committed_size
        try:
            await _Writer(connection, upload, blob, on_progress).run()
        except ModelpressError as error:
            if blob.has_changed() or error.reason == "DIGEST_MISMATCH":
                raise TransferError(
                    f"{blob.path} changed while it was being uploaded. Upload it again when nothing writes to it.",
                    reason="FILE_CHANGED",
                ) from error
            await patience.wait(error)
        else:
            return


@dataclass
class _Writer:
    """One attempt: a stream from the committed size to the end."""

    connection: Connection
    upload: Upload
    blob: LocalBlob
    on_progress: OnProgress | None
    moved_at: float = field(default_factory=time.monotonic)
    completed: bool = False

    async def run(self) -> None:
        """Raises a ModelpressError when the stream ends before the blob is stored."""
        call = self.connection.uploads.WriteUpload(None, metadata=self.connection.metadata)
        sender = asyncio.create_task(self._send(call))
        receiver = asyncio.create_task(self._receive(call))
        try:
            await self._watch(sender, receiver)
        finally:
            call.cancel()
            sender.cancel()
            receiver.cancel()
            await asyncio.gather(sender, receiver, return_exceptions=True)
        if not self.completed:
            raise stalled(f"The server ended the upload of {self.blob.path} early", 0)

    async def _watch(self, sender: asyncio.Task[None], receiver: asyncio.Task[None]) -> None:
        idle_timeout_s = self.connection.settings.retry.idle_timeout_s
        while not receiver.done():
            waiting = {task for task in (sender, receiver) if not task.done()}
            await asyncio.wait(waiting, timeout=WATCH_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
            if sender.done() and (failure := sender.exception()) is not None:
                raise failure
            if time.monotonic() - self.moved_at > idle_timeout_s:
                raise stalled(f"Uploading {self.blob.path}", idle_timeout_s)
        receiver.result()

    async def _receive(self, call: WriteCall) -> None:
        async with self.connection.translated():
            async for response in call:
                self.moved_at = time.monotonic()
                self.completed = self.completed or response.upload.state == Upload.STATE_COMPLETED
                self._report(response.committed_size)

    async def _send(self, call: WriteCall) -> None:
        """Raises UsageError when the file cannot be read; what the server says, `_receive` raises."""
        chunk_bytes = min(self.upload.max_chunk_bytes or CHUNK_BYTES, CHUNK_BYTES)
        reader = await asyncio.to_thread(_ChunkReader, self.blob, chunk_bytes)
        try:
            request = await asyncio.to_thread(reader.request, self.upload.committed_size)
            request.name = self.upload.name
            while not request.finish_write:
                offset = request.write_offset + len(request.data)
                ahead = asyncio.create_task(asyncio.to_thread(reader.request, offset))
                # When the stream ends first, nobody asks for the chunk or its failure any more.
                ahead.add_done_callback(lambda task: task.cancelled() or task.exception())
                await self._write(call, request)
                request = await ahead
            await self._write(call, request)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the stream has ended; its status reaches _receive
        finally:
            reader.close()

    async def _write(self, call: WriteCall, request: WriteUploadRequest) -> None:
        await call.write(request)
        self.moved_at = time.monotonic()

    def _report(self, done_bytes: int) -> None:
        if self.on_progress is not None:
            self.on_progress(TransferProgress("upload", self.blob.path, done_bytes, self.blob.size_bytes))


class _ChunkReader:
    """Chunks of a file as requests, read in threads.

    A cancelled task leaves its thread behind: the lock keeps `close` from pulling the descriptor away under a read,
    which could then hit another file that got the same number.
    """

    def __init__(self, blob: LocalBlob, chunk_bytes: int) -> None:
        self._blob = blob
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        try:
            self._descriptor = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"Cannot read {blob.path}: {error.strerror}.") from error

    def close(self) -> None:
        """Waits for a read that is on its way, of one chunk at most."""
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = -1

    def request(self, offset: int) -> WriteUploadRequest:
        """The chunk at `offset` with its checksum; nothing after `close`."""
        with self._lock:
            if self._descriptor < 0:
                return WriteUploadRequest()
            data = self._read(offset, min(self._chunk_bytes, self._blob.size_bytes - offset))
        return WriteUploadRequest(
            write_offset=offset,
            data=data,
            crc32c=google_crc32c.value(data),
            finish_write=offset + len(data) >= self._blob.size_bytes,
        )

    def _read(self, offset: int, wanted: int) -> bytes:
        """Exactly `wanted` bytes: a short read means that the file was cut meanwhile."""
        path = self._blob.path
        try:
            data = os.pread(self._descriptor, wanted, offset)
            while len(data) < wanted:
                more = os.pread(self._descriptor, wanted - len(data), offset + len(data))
                if not more:
                    raise TransferError(f"{path} became shorter while it was being uploaded.", reason="FILE_CHANGED")
                data += more
        except OSError as error:
            raise UsageError(f"Cannot read {path}: {error.strerror}.") from error
        return data
