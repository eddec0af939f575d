"""Which blobs a project has, and its uploads; `sql_blobs` implements it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from modelpress_protos.v1 import upload_service_pb2

from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.queries import ListQuery, Page


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """An upload; times in microseconds since the epoch."""

    project: str
    id: str
    blob: BlobKey
    state: upload_service_pb2.Upload.State.ValueType
    committed_size: int
    create_time_us: int
    expire_time_us: int


@dataclass(frozen=True, slots=True)
class StorageQuota:
    """Most unfinished uploads of a project, and most bytes that it has stored; 0: no limit."""

    uploads: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a clean-up of the records removed."""

    blobs: tuple[BlobKey, ...] = ()
    uploads: tuple[str, ...] = ()
    jobs_compacted: int = 0


class BlobIndex(Protocol):
    """Which project may see which blob, and the uploads under way."""

    async def visible(self, project: str, blobs: Collection[BlobKey], *, touch_us: int | None) -> set[BlobKey]:
        """Those of `blobs` that the project has; extends their life from `touch_us` on, unless it is None."""
        ...

    async def create_upload(
        self, record: UploadRecord, *, present: bool, most: StorageQuota, left_bytes: int
    ) -> UploadRecord:
        """Stores an upload, or returns the unfinished or completed one of the same digest.

        `present`: the project has the blob, so that the upload is complete from the start. `left_bytes`: room on the
        disk that is promised to nobody. Raises QuotaExceededError, StorageFullError.
        """
        ...

    async def list_uploads(self, query: ListQuery) -> Page[UploadRecord]:
        """One page, newest first."""
        ...

    async def idle_uploads(self, project: str, expire_before_us: int) -> list[str]:
        """Ids of the unfinished uploads of a project that expire before, those that have been idle longest first."""
        ...

    async def get_upload(self, project: str, upload_id: str) -> UploadRecord:
        """Raises UploadExpiredError."""
        ...

    async def take_upload(self, project: str, upload_id: str, writer: str) -> UploadRecord:
        """Makes `writer` the one whose bytes count, instead of one on another server. Raises UploadExpiredError."""
        ...

    async def commit_upload(self, upload_id: str, writer: str, committed_size: int, expire_time_us: int) -> bool:
        """Notes how many bytes are durable. False: another writer has the upload."""
        ...

    async def complete_upload(self, upload_id: str, now_us: int) -> UploadRecord:
        """The blob is stored: the upload is COMPLETED and the project sees the blob."""
        ...

    async def cancel_upload(self, project: str, upload_id: str) -> UploadRecord:
        """ACTIVE -> CANCELLED; a COMPLETED one is returned unchanged. Raises UploadExpiredError."""
        ...

    async def active_uploads(self) -> set[str]:
        """Ids of the uploads that take bytes."""
        ...

    async def awaited_bytes(self) -> int:
        """What the unfinished uploads of all projects still have to send."""
        ...

    async def known(self, blobs: Collection[BlobKey]) -> set[BlobKey]:
        """Those of `blobs` that any project has."""
        ...

    async def drop_unknown(self, blob: BlobKey, drop: Callable[[], None]) -> bool:
        """Calls `drop` if no project has the blob, and none can get it meanwhile; whether it was called."""
        ...

    async def renew(self, used_us: int, *, upload_expire_us: int) -> None:
        """Unused blobs and request ids count as used then, uploads expire then, where that is later than before."""
        ...

    async def undo_future(self, now_us: int, *, upload_expire_us: int) -> None:
        """Nothing was used later than `now_us`, and no upload lives longer than `upload_expire_us`: clocks err."""
        ...

    async def sweep(self, *, blobs_before_us: int, events_before_us: int, now_us: int) -> Sweep:
        """Forgets unused blobs, expired uploads, the events of old jobs and old request ids."""
        ...
