"""Blobs and where their bytes are; `filesystem` and `s3` implement it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol

from modelpress_protos.v1 import common_pb2

from modelpress_server.stores.queries import Item

Parameters = ParamSpec("Parameters")


@dataclass(frozen=True, slots=True)
class BlobKey:
    """Identity of a blob: SHA-256 (32 bytes) and length."""

    sha256: bytes
    size_bytes: int

    @classmethod
    def of(cls, digest: common_pb2.Digest) -> BlobKey:
        return cls(digest.sha256, digest.size_bytes)

    def to_digest(self) -> common_pb2.Digest:
        return common_pb2.Digest(sha256=self.sha256, size_bytes=self.size_bytes)


class PartialBlob(Protocol):
    """The bytes of an unfinished upload with the hash of them; one writer at a time."""

    @property
    def size_bytes(self) -> int:
        """How many bytes there are, durable or not."""
        ...

    async def open(self, committed_size: int) -> None:
        """Goes on at the durable length, also where another server wrote what is there.

        Raises FileNotFoundError where less is there.
        """
        ...

    async def append(self, data: bytes) -> None:
        """Writes and hashes. Raises StorageFullError, ServerBusyError; then nothing of `data` counts."""
        ...

    async def sync(self) -> None:
        """Returns when all bytes so far are durable. Raises StorageFullError, ServerBusyError."""
        ...

    def digest(self) -> bytes:
        """SHA-256 of all bytes so far."""
        ...

    def close(self) -> None:
        """Nobody writes for now; the hash is kept for the next writer."""
        ...


class BlobReader(Protocol):
    """A blob that is open to be read."""

    async def read(self, offset: int, size_bytes: int) -> bytes:
        """So many bytes from `offset` on, fewer at the end."""
        ...

    def close(self) -> None:
        """Lets go of it."""
        ...


class BlobStore(Protocol):
    """Blobs: there whole or not at all. A folder of one server, or a bucket that servers share."""

    @property
    def shared(self) -> bool:
        """Whether other servers use it as well, and nothing of it lies on this machine's disk."""
        ...

    async def open(self) -> None:
        """Gets ready. Raises SettingsError where it cannot be used."""
        ...

    async def close(self) -> None:
        """Waits for what runs."""
        ...

    async def run(
        self, function: Callable[Parameters, Item], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Item:
        """Runs file work in one of the store's threads."""
        ...

    async def ping(self) -> None:
        """Returns when the store has answered. Raises ServerBusyError, StorageFullError."""
        ...

    def partial(self, upload_id: str) -> PartialBlob:
        """An unfinished upload."""
        ...

    async def remove_partial(self, upload_id: str) -> None:
        """Frees what an upload takes."""
        ...

    async def partial_ids(self) -> set[str]:
        """Uploads that take anything."""
        ...

    async def publish(self, upload_id: str, blob: BlobKey) -> None:
        """Makes a verified, complete, durable upload the blob."""
        ...

    async def has(self, blob: BlobKey) -> bool:
        """Whether the blob is there."""
        ...

    def is_there(self, blob: BlobKey) -> bool:
        """`has` for a thread that may wait."""
        ...

    async def require(self, blobs: Collection[BlobKey]) -> None:
        """Raises BlobMissingError where one of them is not there: it was damaged and set aside, or is lost."""
        ...

    async def open_blob(self, blob: BlobKey) -> BlobReader:
        """Opens a blob to read it. Raises BlobMissingError."""
        ...

    async def place(self, blob: BlobKey, target: Path, *, link: bool) -> None:
        """Gives a blob another name, or copies it, and verifies what lies there then.

        Raises BlobMissingError, BlobDamagedError, StorageFullError.
        """
        ...

    async def ingest(self, folder: Path, path: str, *, max_bytes: int) -> BlobKey:
        """Takes a worker's file: regular files below `folder` only. Raises ArtifactError, StorageFullError."""
        ...

    async def quarantine(self, blob: BlobKey) -> None:
        """Sets a damaged blob aside: from now on it is missing, and uploading it again heals it."""
        ...

    async def empty_quarantine(self, time_s: float) -> None:
        """Removes what was set aside before `time_s`."""
        ...

    async def undo_future(self, now_s: float) -> None:
        """No blob was published later than `now_s`: clocks err."""
        ...

    def remove_older_than(self, blob: BlobKey, time_s: float) -> None:
        """Removes a blob unless it was published since `time_s`; for a thread that may wait."""
        ...

    async def older_than(self, time_s: float) -> list[BlobKey]:
        """Blobs that were published before `time_s`."""
        ...
