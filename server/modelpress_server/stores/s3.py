"""Blobs in a bucket (S3 and what speaks like it), which servers share.

    blobs/ab/abcdef...            complete and verified
    uploads/{id}/{start}-{end}    parts of an upload, named by their range of bytes in hexadecimal
    quarantine/abcdef...          blobs whose bytes are no longer what their name says

An object appears when it is complete, so that a blob is there whole or not at all. An upload is made of parts, each
durable when it is acknowledged: any server goes on where the last one stopped. When all are there they are joined, and
checked on the way. Parts of two writers may overlap; they are taken for what they hold at their place.

Access keys come from the environment (AWS_ACCESS_KEY_ID and so on) or from the machine's role, as in AWS' own tools;
AWS_ENDPOINT_URL names another service. obstore repeats what fails for a moment.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar
from urllib.parse import urlsplit

from modelpress_server.config import SettingsError
from modelpress_server.errors import ServerBusyError
from modelpress_server.names import new_id
from modelpress_server.shortage import BUSY_RETRY_S
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.filesystem import damaged, full_disk_is_told, missing, take_file

if TYPE_CHECKING:
    from obstore import Bytes
    from obstore.store import S3Store

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

IO_THREADS = 16
# S3 takes parts of 5 MiB and more, at most 10,000 of them; so much of an upload, and of a download, is in memory.
PART_BYTES = 8 * 1024 * 1024
MAX_PARTS = 9_000
CONCURRENCY = 4  # parts under way at a time
MAX_RETRIES = 4
RETRY_TIMEOUT_S = 30.0
_BLOBS, _UPLOADS, _QUARANTINE, _PROBE = "blobs", "uploads", "quarantine", "probe"


class S3BlobStore:
    """BlobStore in a bucket. `tmp`: folder of this server for what is copied on its way."""

    shared = True

    def __init__(self, url: str, tmp: Path) -> None:
        self._url = url
        self._tmp = tmp
        self._store = _store_of(url)
        self._threads = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="blob")

    async def open(self) -> None:
        """Raises SettingsError where the bucket cannot be read and written."""
        shutil.rmtree(self._tmp, ignore_errors=True)
        self._tmp.mkdir(mode=0o700, parents=True)
        await self.run(self._try)

    async def close(self) -> None:
        """Waits for what runs."""
        await asyncio.to_thread(self._threads.shutdown)

    async def run(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*args, **kwargs))

    async def ping(self) -> None:
        await self.run(self.is_there, BlobKey(bytes(32), 0))

    def partial(self, upload_id: str) -> S3Partial:
        return S3Partial(self, upload_id)

    async def remove_partial(self, upload_id: str) -> None:
        await self.run(self._remove_partial, upload_id)

    async def partial_ids(self) -> set[str]:
        return await self.run(self._partial_ids)

    async def publish(self, upload_id: str, blob: BlobKey) -> None:
        await self.run(self._publish, upload_id, blob)

    async def has(self, blob: BlobKey) -> bool:
        return await self.run(self.is_there, blob)

    def is_there(self, blob: BlobKey) -> bool:
        import obstore

        with answers():
            try:
                return obstore.head(self._store, key_of(blob))["size"] == blob.size_bytes
            except FileNotFoundError:
                return False

    async def require(self, blobs: Collection[BlobKey]) -> None:
        for blob, present in zip(blobs, await asyncio.gather(*map(self.has, blobs)), strict=True):
            if not present:
                raise missing(blob)

    async def open_blob(self, blob: BlobKey) -> S3Reader:
        if not await self.has(blob):
            raise missing(blob)
        return S3Reader(self, blob)

    async def place(self, blob: BlobKey, target: Path, *, link: bool) -> None:
        await self.run(self._place, blob, target)

    async def ingest(self, folder: Path, path: str, *, max_bytes: int) -> BlobKey:
        return await self.run(self._ingest, folder, path, max_bytes)

    async def quarantine(self, blob: BlobKey) -> None:
        await self.run(self._set_aside, blob)

    async def empty_quarantine(self, time_s: float) -> None:
        await self.run(self._empty_quarantine, time_s)

    async def undo_future(self, now_s: float) -> None:
        """Times are the bucket's."""

    def remove_older_than(self, blob: BlobKey, time_s: float) -> None:
        import obstore

        with answers(), suppress(FileNotFoundError):
            if obstore.head(self._store, key_of(blob))["last_modified"].timestamp() < time_s:
                obstore.delete(self._store, key_of(blob))

    async def older_than(self, time_s: float) -> list[BlobKey]:
        return await self.run(lambda: list(self._older_than(time_s)))

    def put(self, key: str, data: bytes) -> None:
        """Writes an object."""
        import obstore

        with answers():
            obstore.put(self._store, key, data, use_multipart=False)

    def get(self, key: str, start: int, end: int) -> Bytes:
        """Bytes `start` to `end` of an object. Raises FileNotFoundError."""
        import obstore

        with answers():
            return obstore.get_range(self._store, key, start=start, end=end)

    def parts(self, upload_id: str) -> list[tuple[int, int]]:
        """The parts of an upload, as ranges of its bytes in order."""
        prefix = f"{_UPLOADS}/{upload_id}/"
        ranges = (key.removeprefix(prefix).partition("-") for key, _, _ in self._listed(prefix))
        return sorted((int(start, 16), int(end, 16)) for start, _, end in ranges)

    def _try(self) -> None:
        import obstore
        from obstore.exceptions import BaseError

        key = f"{_PROBE}/{new_id()}"
        try:
            obstore.put(self._store, key, b"")
            obstore.delete(self._store, key)
        except (BaseError, OSError, ValueError) as error:
            raise SettingsError(
                f"blobs: {self._url} cannot be written: {_first_line(error)}. Is the bucket there, and are AWS_REGION, "
                "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for other services than AWS, AWS_ENDPOINT_URL right?"
            ) from error

    def _listed(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """Key, size and time (s) of each object below a prefix."""
        import obstore

        with answers():
            for page in obstore.list(self._store, prefix):
                for item in page:
                    yield item["path"], item["size"], item["last_modified"].timestamp()

    def _partial_ids(self) -> set[str]:
        import obstore

        with answers():
            found = obstore.list_with_delimiter(self._store, _UPLOADS)
        return {prefix.rpartition("/")[2] for prefix in found["common_prefixes"]}

    def _remove_partial(self, upload_id: str) -> None:
        self.delete([key for key, _, _ in self._listed(f"{_UPLOADS}/{upload_id}/")])

    def delete(self, keys: Collection[str]) -> None:
        """Removes objects, if they are there."""
        import obstore

        with answers():
            for key in keys:
                obstore.delete(self._store, key)

    def _publish(self, upload_id: str, blob: BlobKey) -> None:
        import obstore

        chain = covering(self.parts(upload_id), blob.size_bytes)
        if chain is None:
            raise missing(blob)
        sha256 = hashlib.sha256()
        part_bytes = max(PART_BYTES, -(-blob.size_bytes // MAX_PARTS))
        with (
            answers(),
            obstore.open_writer(
                self._store, key_of(blob), buffer_size=part_bytes, max_concurrency=CONCURRENCY
            ) as writer,
        ):
            for part, start, end in chain:
                data = obstore.get_range(self._store, part_key(upload_id, part), start=start, end=end)
                sha256.update(data)
                writer.write(data)
            if sha256.digest() != blob.sha256:
                raise damaged(blob)  # which leaves nothing behind

    def _place(self, blob: BlobKey, target: Path) -> None:
        import obstore

        sha256 = hashlib.sha256()
        with answers(), full_disk_is_told():
            try:
                stream = obstore.get(self._store, key_of(blob)).stream(min_chunk_size=PART_BYTES)
            except FileNotFoundError:
                raise missing(blob) from None
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                for data in stream:
                    sha256.update(data)
                    file.write(data)
        if sha256.digest() != blob.sha256:
            target.unlink()
            self._set_aside(blob)
            raise damaged(blob)

    def _ingest(self, folder: Path, path: str, max_bytes: int) -> BlobKey:
        import obstore

        temporary = self._tmp / new_id()
        try:
            blob = take_file(folder, path, temporary, max_bytes)
            with answers():
                part_bytes = max(PART_BYTES, -(-blob.size_bytes // MAX_PARTS))
                obstore.put(self._store, key_of(blob), temporary, chunk_size=part_bytes, max_concurrency=CONCURRENCY)
            return blob
        finally:
            temporary.unlink(missing_ok=True)

    def _set_aside(self, blob: BlobKey) -> None:
        import obstore

        name = blob.sha256.hex()
        logger.error("blob %s is damaged; it is set aside in %s/", name, _QUARANTINE)
        with answers(), suppress(FileNotFoundError):
            obstore.copy(self._store, key_of(blob), f"{_QUARANTINE}/{name}")
            obstore.delete(self._store, key_of(blob))

    def _empty_quarantine(self, time_s: float) -> None:
        self.delete([key for key, _, modified_s in self._listed(f"{_QUARANTINE}/") if modified_s < time_s])

    def _older_than(self, time_s: float) -> Iterator[BlobKey]:
        for key, size_bytes, modified_s in self._listed(f"{_BLOBS}/"):
            if modified_s < time_s:
                yield BlobKey(bytes.fromhex(key.rpartition("/")[2]), size_bytes)


class S3Partial:
    """PartialBlob in parts."""

    def __init__(self, store: S3BlobStore, upload_id: str) -> None:
        self._store = store
        self._upload_id = upload_id
        self.size_bytes = 0
        self._hash = hashlib.sha256()
        self._waiting = bytearray()  # the end of what came, not written yet
        # An acknowledgement is written while the next chunk comes.
        self._lock = threading.Lock()

    async def open(self, committed_size: int) -> None:
        await self._store.run(self._open, committed_size)

    async def append(self, data: bytes) -> None:
        await self._store.run(self._append, data)

    async def sync(self) -> None:
        await self._store.run(self._sync)

    def digest(self) -> bytes:
        return self._hash.digest()

    def close(self) -> None:
        """Nothing is open."""

    def _open(self, committed_size: int) -> None:
        with self._lock:
            parts = self._store.parts(self._upload_id)
            # Never acknowledged, and may be anything.
            self._store.delete([part_key(self._upload_id, part) for part in parts if part[1] > committed_size])
            chain = covering([part for part in parts if part[1] <= committed_size], committed_size)
            if chain is None:
                raise FileNotFoundError(f"upload {self._upload_id} is shorter than what was acknowledged")
            self._waiting.clear()
            if self.size_bytes == committed_size:
                return
            self._hash, self.size_bytes = hashlib.sha256(), 0
            for part, start, end in chain:
                self._hash.update(self._store.get(part_key(self._upload_id, part), start, end))
                self.size_bytes += end - start

    def _append(self, data: bytes) -> None:
        with self._lock:
            self._hash.update(data)
            self._waiting += data
            self.size_bytes += len(data)
            if len(self._waiting) >= PART_BYTES:
                self._write()

    def _sync(self) -> None:
        with self._lock:
            if self._waiting:
                self._write()

    def _write(self) -> None:
        part = (self.size_bytes - len(self._waiting), self.size_bytes)
        self._store.put(part_key(self._upload_id, part), bytes(self._waiting))
        self._waiting.clear()


class S3Reader:
    """BlobReader that fetches a block at a time."""

    def __init__(self, store: S3BlobStore, blob: BlobKey) -> None:
        self._store = store
        self._blob = blob
        self._start = 0
        self._block = b""

    async def read(self, offset: int, size_bytes: int) -> bytes:
        end = min(offset + size_bytes, self._blob.size_bytes)
        if not self._start <= offset <= end <= self._start + len(self._block):
            self._block = await self._store.run(self._fetch, offset, end)
            self._start = offset
        return self._block[offset - self._start : end - self._start]

    def close(self) -> None:
        self._block = b""

    def _fetch(self, offset: int, end: int) -> bytes:
        if offset >= end:
            return b""
        end = min(max(end, offset + PART_BYTES), self._blob.size_bytes)
        try:
            return self._store.get(key_of(self._blob), offset, end).to_bytes()
        except FileNotFoundError:
            raise missing(self._blob) from None


def key_of(blob: BlobKey) -> str:
    """The key of a blob."""
    name = blob.sha256.hex()
    return f"{_BLOBS}/{name[:2]}/{name}"


def part_key(upload_id: str, part: tuple[int, int]) -> str:
    """The key of a part of an upload."""
    return f"{_UPLOADS}/{upload_id}/{part[0]:016x}-{part[1]:016x}"


def covering(parts: Collection[tuple[int, int]], size_bytes: int) -> list[tuple[tuple[int, int], int, int]] | None:
    """Which bytes of which parts are those from 0 to `size_bytes`, in order; None: some are missing.

    `parts` are sorted. Of several that go on from where one is, the one that leads furthest.
    """
    chain: list[tuple[tuple[int, int], int, int]] = []
    position, rest, best = 0, deque(parts), (0, 0)
    while position < size_bytes:
        while rest and rest[0][0] <= position:
            best = max(best, rest.popleft(), key=lambda part: part[1])
        if best[1] <= position:
            return None
        end = min(best[1], size_bytes)
        chain.append((best, position - best[0], end - best[0]))
        position = end
    return chain


@contextmanager
def answers() -> Iterator[None]:
    """Turns what the bucket could not do into ServerBusyError."""
    from obstore.exceptions import BaseError

    try:
        yield
    except BaseError as error:
        logger.warning("the bucket: %s", _first_line(error))
        raise ServerBusyError(
            "The server's blob store does not answer for the moment. Try again shortly.", retry_after_s=BUSY_RETRY_S
        ) from error


def _store_of(url: str) -> S3Store:
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise SettingsError("blobs: obstore is not installed. Run: pip install 'modelpress[s3]'") from error
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc or parts.query or "@" in parts.netloc:
        raise SettingsError("blobs: it must be a URL such as s3://BUCKET/PREFIX; keys go into the environment.")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        # A service of one's own, named as plain HTTP in the environment, is what its operator wants.
        client_options={"allow_http": endpoint.startswith("http://"), "timeout": timedelta(seconds=60)},
        retry_config={"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S)},
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
