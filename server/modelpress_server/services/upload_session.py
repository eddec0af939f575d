"""Who writes which upload: one writer at a time, and a dead one does not stand in the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from modelpress_protos.v1 import upload_service_pb2

from modelpress_server.clock import Clock
from modelpress_server.errors import ServiceError, UploadBusyError, UploadExpiredError
from modelpress_server.names import new_id
from modelpress_server.stores.blob_index import BlobIndex, UploadRecord
from modelpress_server.stores.blobs import BlobStore, PartialBlob
from modelpress_server.waiting import uninterrupted

# A stream that was cut needs moments to store what it had: a new one waits so long before it is turned away.
RELEASE_WAIT_S = 1.0
BUSY_RETRY_S = 2.0


def upload_busy() -> UploadBusyError:
    """Somebody else writes it."""
    return UploadBusyError(
        "Another writer holds the upload. Wait for it, then resume from committed_size.", retry_after_s=BUSY_RETRY_S
    )


class UploadSession:
    """An upload that has a writer, or had one in this process: then its hash need not be computed again."""

    def __init__(self, partial: PartialBlob, now_s: float) -> None:
        self.partial = partial
        self.writer = ""  # its name in the store, against writers on other servers
        self.active_at_s = now_s
        self.evicted: asyncio.Future[None] | None = None
        self.released = asyncio.Event()
        self.released.set()

    def evict(self, error: ServiceError) -> None:
        """Makes the present writer end with `error`."""
        if self.evicted is not None and not self.evicted.done():
            self.evicted.set_exception(error)


class UploadSessions:
    """All uploads that are or were written in this process."""

    def __init__(self, blobs: BlobStore, index: BlobIndex, takeover_s: float, clock: Clock) -> None:
        self._blobs = blobs
        self._index = index
        self._takeover_s = takeover_s
        self._clock = clock
        self._sessions: dict[str, UploadSession] = {}

    @asynccontextmanager
    async def writing(self, record: UploadRecord) -> AsyncIterator[tuple[UploadSession, UploadRecord]]:
        """Makes the caller the writer. Raises UploadBusyError while another one is alive."""
        fresh = UploadSession(self._blobs.partial(record.id), self._clock.now_s())
        session = self._sessions.setdefault(record.id, fresh)
        await self._wait_for_release(session)
        session.released.clear()
        session.evicted = asyncio.get_running_loop().create_future()
        session.active_at_s = self._clock.now_s()
        try:
            # Read again: the writer before may have got further, or finished.
            session.writer = new_id()
            record = await self._current(record, session.writer)
            if record.state == upload_service_pb2.Upload.STATE_ACTIVE:
                await self._open(session, record)
            yield session, record
        finally:
            session.evicted.cancel()
            if session.evicted.done() and not session.evicted.cancelled():
                session.evicted.exception()  # marks it as seen
            session.evicted = None
            session.partial.close()
            session.released.set()

    def committed(self, record: UploadRecord) -> None:
        """Forgets a completed upload."""
        self._sessions.pop(record.id, None)

    async def discard(self, upload_id: str) -> None:
        """Ends the writer, if there is one, and frees the space."""
        session = self._sessions.pop(upload_id, None)
        if session is not None:
            session.evict(UploadExpiredError("The upload was cancelled. Create it again."))
            await session.released.wait()
        await self._blobs.remove_partial(upload_id)

    async def close(self) -> None:
        """Waits until every writer has stored what it had."""
        await asyncio.gather(*(session.released.wait() for session in self._sessions.values()))

    async def _wait_for_release(self, session: UploadSession) -> None:
        silent_s = self._clock.now_s() - session.active_at_s
        busy = upload_busy()
        if silent_s >= self._takeover_s:
            session.evict(busy)
        deadline_s = self._clock.now_s() + RELEASE_WAIT_S
        # Several may wait: only the first to wake finds it released.
        while not session.released.is_set():
            released = asyncio.ensure_future(session.released.wait())
            try:
                if not await self._clock.wait({released}, deadline_s - self._clock.now_s()):
                    raise busy
            finally:
                released.cancel()

    async def _current(self, record: UploadRecord, writer: str) -> UploadRecord:
        try:
            return await self._index.take_upload(record.project, record.id, writer)
        except UploadExpiredError:
            self._sessions.pop(record.id, None)
            raise

    async def _open(self, session: UploadSession, record: UploadRecord) -> None:
        try:
            await uninterrupted(session.partial.open(record.committed_size))
        except FileNotFoundError:
            await self._lose(record)

    async def _lose(self, record: UploadRecord) -> None:
        # Somebody removed the file below us: the acknowledged bytes are gone, and saying so beats a wrong digest.
        await self._index.cancel_upload(record.project, record.id)
        raise UploadExpiredError("The bytes of the upload are gone. Create it again.")
