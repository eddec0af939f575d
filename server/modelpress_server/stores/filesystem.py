"""Blobs as files, named by their SHA-256.

    blobs/ab/abcdef...   complete and verified, mode 0444
    uploads/{id}         what came of an upload so far
    tmp/                 artifacts while they are copied and hashed
    quarantine/          blobs whose bytes are no longer what their name says

A blob appears by `link`, after its bytes are on the disk: it is there whole or not at all. The link is made before the
record in SQL and the partial file goes after it, so a kill in between leaves an upload that can be finished, never one
whose bytes are gone.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from modelpress_server.errors import BlobDamagedError, BlobMissingError, ServerBusyError, StorageFullError
from modelpress_server.names import new_id
from modelpress_server.shortage import FULL_BYTES, shortage_of
from modelpress_server.stores.blobs import BlobKey

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

COPY_BYTES = 1024 * 1024
IO_THREADS = 8


class ArtifactError(Exception):
    """A worker left something that is not a plain file of a permitted size."""


class PartialFile:
    """The bytes of an unfinished upload with the hash of them; used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._hash = hashlib.sha256()
        self._fd = -1

    def open(self, committed_size: int) -> None:
        """Opens the file at its durable length; what lies beyond was never acknowledged and may not be on the disk."""
        flags = os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(self.path, flags | os.O_RDWR | os.O_CREAT, 0o600)
        except PermissionError:
            # Published, then killed before the record was written: all bytes are there, and the file is read-only.
            self._fd = os.open(self.path, flags | os.O_RDONLY)
        present = os.fstat(self._fd).st_size
        if present < committed_size:
            self.close()
            raise FileNotFoundError(errno.ENOENT, "an upload is shorter than what was acknowledged", str(self.path))
        if present > committed_size:
            os.ftruncate(self._fd, committed_size)
        if self.size_bytes != committed_size:
            self._hash_again(committed_size)

    def append(self, data: bytes) -> None:
        """Writes and hashes. Raises StorageFullError; then nothing of `data` counts."""
        view, offset = memoryview(data), self.size_bytes
        with full_disk_is_told():
            while view:
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written
        self._hash.update(data)
        self.size_bytes = offset

    def sync(self) -> None:
        """Returns when the bytes are on the disk."""
        with full_disk_is_told():
            os.fdatasync(self._fd)

    def digest(self) -> bytes:
        """SHA-256 of all bytes so far."""
        return self._hash.digest()

    def close(self) -> None:
        """Closes the file; the hash is kept for the next writer."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _hash_again(self, size_bytes: int) -> None:
        self._hash, self.size_bytes = hashlib.sha256(), 0
        while self.size_bytes < size_bytes:
            data = os.pread(self._fd, min(COPY_BYTES, size_bytes - self.size_bytes), self.size_bytes)
            self._hash.update(data)
            self.size_bytes += len(data)


class FilePartial:
    """PartialBlob in a file."""

    def __init__(self, store: FileBlobStore, file: PartialFile) -> None:
        self._store = store
        self._file = file

    @property
    def size_bytes(self) -> int:
        return self._file.size_bytes

    async def open(self, committed_size: int) -> None:
        await self._store.run(self._file.open, committed_size)

    async def append(self, data: bytes) -> None:
        await self._store.run(self._file.append, data)

    async def sync(self) -> None:
        await self._store.run(self._file.sync)

    def digest(self) -> bytes:
        return self._file.digest()

    def close(self) -> None:
        self._file.close()


class FileReader:
    """BlobReader of a file."""

    def __init__(self, store: FileBlobStore, fd: int) -> None:
        self._store = store
        self._fd = fd

    async def read(self, offset: int, size_bytes: int) -> bytes:
        return await self._store.run(os.pread, self._fd, size_bytes, offset)

    def close(self) -> None:
        os.close(self._fd)


class FileBlobStore:
    """BlobStore in a folder. File work runs in threads of its own, since an fsync may take seconds."""

    shared = False

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._uploads = root / "uploads"
        self._tmp = root / "tmp"
        self._quarantine = root / "quarantine"
        self._root = root
        self._threads = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="blob")
        # A blob that is wanted again must not be removed between the janitor's look at its age and the removal.
        self._naming = threading.Lock()

    async def open(self) -> None:
        """Makes the folders; what a dead server left in tmp/ goes."""
        await self.run(self._make_folders)

    async def ping(self) -> None:
        await self.run(self._check_folders)

    def _check_folders(self) -> None:
        if not os.access(self._blobs, os.R_OK | os.W_OK | os.X_OK):
            raise ServerBusyError("The folder of the stored files cannot be read and written.")
        if shutil.disk_usage(self._root).free < FULL_BYTES:
            raise StorageFullError("The disk is full.")

    def _make_folders(self) -> None:
        shutil.rmtree(self._tmp, ignore_errors=True)
        for folder in (self._blobs, self._uploads, self._tmp, self._quarantine):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def close(self) -> None:
        """Waits for what runs."""
        await asyncio.to_thread(self._threads.shutdown)

    async def run(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Runs file work in one of the store's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*args, **kwargs))

    def partial(self, upload_id: str) -> FilePartial:
        """The file of an unfinished upload."""
        return FilePartial(self, PartialFile(self._uploads / upload_id))

    async def remove_partial(self, upload_id: str) -> None:
        """Frees the space of an upload."""
        await self.run((self._uploads / upload_id).unlink, missing_ok=True)

    async def partial_ids(self) -> set[str]:
        """Uploads that have a file."""
        return set(await self.run(os.listdir, self._uploads))

    async def publish(self, upload_id: str, blob: BlobKey) -> None:
        """Makes a verified, complete partial file the blob."""
        await self.run(self._publish, self._uploads / upload_id, blob)

    async def has(self, blob: BlobKey) -> bool:
        return await self.run(self._has, blob)

    def is_there(self, blob: BlobKey) -> bool:
        """`has` for a thread that may wait for the disk."""
        return self._has(blob)

    async def require(self, blobs: Collection[BlobKey]) -> None:
        """Raises BlobMissingError where one of them is not there: it was damaged and set aside, or is lost."""
        absent = await self.run(lambda: [blob for blob in blobs if not self._has(blob)])
        if absent:
            raise missing(absent[0])

    async def open_blob(self, blob: BlobKey) -> FileReader:
        """Opens a blob to read it. Raises BlobMissingError."""
        return FileReader(self, await self.run(self._open, blob))

    async def place(self, blob: BlobKey, target: Path, *, link: bool) -> None:
        await self.run(self._place, blob, target, link)

    async def quarantine(self, blob: BlobKey) -> None:
        """Sets a damaged blob aside: from now on it is missing, and uploading it again heals it."""
        await self.run(self._set_aside, blob)

    async def check(self, blob: BlobKey, pace: Callable[[int], Awaitable[None]]) -> bool | None:
        """Whether a blob is what it was; if not, it is set aside. None: it is gone.

        After each block `pace` is told its bytes, and may take its time.
        """
        try:
            fd = await self.run(self._open, blob)
        except BlobMissingError:
            return None
        sha256, offset = hashlib.sha256(), 0
        try:
            while size_bytes := await self.run(_hash_block, fd, offset, sha256):
                offset += size_bytes
                await pace(size_bytes)
            whole = sha256.digest() == blob.sha256
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            whole = False
        finally:
            os.close(fd)
        if not whole:
            await self.quarantine(blob)
        return whole

    async def ingest(self, folder: Path, path: str, *, max_bytes: int) -> BlobKey:
        return await self.run(self._ingest, folder, path, max_bytes)

    async def empty_quarantine(self, time_s: float) -> None:
        """Removes what was set aside before `time_s`."""
        await self.run(self._empty_quarantine, time_s)

    async def undo_future(self, now_s: float) -> None:
        """No blob was published later than `now_s`: clocks err."""
        await self.run(self._undo_future, now_s)

    async def older_than(self, time_s: float) -> list[BlobKey]:
        """Blobs whose file was made before `time_s`."""
        return await self.run(lambda: list(self._older_than(time_s)))

    def _path(self, blob: BlobKey) -> Path:
        name = blob.sha256.hex()
        return self._blobs / name[:2] / name

    def _has(self, blob: BlobKey) -> bool:
        try:
            return self._path(blob).lstat().st_size == blob.size_bytes
        except FileNotFoundError:
            return False

    def _open(self, blob: BlobKey) -> int:
        try:
            fd = os.open(self._path(blob), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise missing(blob) from None
        if os.fstat(fd).st_size != blob.size_bytes:
            os.close(fd)
            raise missing(blob)
        return fd

    def _publish(self, source: Path, blob: BlobKey) -> None:
        target = self._path(blob)
        with full_disk_is_told():
            if not target.parent.is_dir():
                target.parent.mkdir(mode=0o700, exist_ok=True)
                _sync_folder(self._blobs)
            source.chmod(0o444)
            with self._naming:
                with suppress(FileExistsError):
                    os.link(source, target)
                # The janitor goes by this time; a blob that was there already is wanted again.
                now_ns = time.time_ns()
                os.utime(target, ns=(now_ns, now_ns))
            _sync_folder(target.parent)

    def _place(self, blob: BlobKey, target: Path, link: bool) -> None:
        source_fd = self._open(blob)
        try:
            with full_disk_is_told():
                if not (link and _linked(self._path(blob), target)):
                    _copy(source_fd, target, blob.size_bytes)
            # What the worker will read, not what was written once: disks forget.
            whole = _sha256_of(target) == blob.sha256
        finally:
            os.close(source_fd)
        if not whole:
            target.unlink()
            self._set_aside(blob)
            raise damaged(blob)

    def _set_aside(self, blob: BlobKey) -> None:
        path = self._path(blob)
        logger.error("blob %s is damaged; it is set aside in %s", path.name, self._quarantine)
        with self._naming, suppress(FileNotFoundError):
            path.rename(self._quarantine / path.name)

    def _ingest(self, folder: Path, path: str, max_bytes: int) -> BlobKey:
        temporary = self._tmp / new_id()
        try:
            blob = take_file(folder, path, temporary, max_bytes)
            self._publish(temporary, blob)
            return blob
        finally:
            temporary.unlink(missing_ok=True)

    def remove_older_than(self, blob: BlobKey, time_s: float) -> None:
        path = self._path(blob)
        with self._naming, suppress(FileNotFoundError):
            if path.lstat().st_mtime < time_s:
                path.unlink()

    def _empty_quarantine(self, time_s: float) -> None:
        for entry in os.scandir(self._quarantine):
            if entry.stat(follow_symlinks=False).st_ctime < time_s:
                Path(entry.path).unlink(missing_ok=True)

    def _undo_future(self, now_s: float) -> None:
        for path in self._blobs.glob("??/*"):
            with suppress(FileNotFoundError):
                if path.lstat().st_mtime > now_s:
                    os.utime(path, (now_s, now_s))

    def _older_than(self, time_s: float) -> Iterator[BlobKey]:
        for shard in os.scandir(self._blobs):
            for entry in os.scandir(shard.path):
                found = entry.stat(follow_symlinks=False)
                if found.st_mtime < time_s:
                    yield BlobKey(bytes.fromhex(entry.name), found.st_size)


def take_file(folder: Path, path: str, target: Path, max_bytes: int) -> BlobKey:
    """Copies what a worker left below a folder to the new file `target`; what it is.

    Raises ArtifactError for what is no plain file of at most `max_bytes`, StorageFullError.
    """
    source_fd = _open_below(folder, path)
    try:
        found = os.fstat(source_fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise ArtifactError(f"artifact {path!r} is not a plain file")
        if found.st_size > max_bytes:
            raise ArtifactError(f"artifact {path!r} has {found.st_size} bytes; at most {max_bytes} are allowed")
        return _copy_and_hash(source_fd, target, max_bytes)
    finally:
        os.close(source_fd)


def place_file(source: Path, target: Path, *, link: bool) -> None:
    """Puts a stored file where a task finds it: `link`, the file itself where that is possible, else a copy.

    Raises FileNotFoundError, StorageFullError.
    """
    source_fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with full_disk_is_told():
            if not (link and _linked(source, target)):
                _copy(source_fd, target, os.fstat(source_fd).st_size)
    finally:
        os.close(source_fd)


@contextmanager
def full_disk_is_told() -> Iterator[None]:
    """Turns "no space left" into StorageFullError, "too many open files" into ServerBusyError."""
    try:
        yield
    except OSError as error:
        raise shortage_of(error) or error from error


def missing(blob: BlobKey) -> BlobMissingError:
    """What those are told who wanted a blob that is not there."""
    sha256 = blob.sha256.hex()
    return BlobMissingError(f"Blob {sha256} is not there. Upload it, then call again.", metadata={"sha256": sha256})


def damaged(blob: BlobKey) -> BlobDamagedError:
    """What those are told who wanted a blob that was set aside."""
    sha256 = blob.sha256.hex()
    return BlobDamagedError(
        f"The stored copy of blob {sha256} was damaged on the server's disk and has been set aside. Upload the file "
        "again, which heals it; if it was a result, run its job again with skip_cache.",
        metadata={"sha256": sha256},
    )


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        # Another file system, one without links, or too many of them.
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _copy(source_fd: int, target: Path, size_bytes: int) -> None:
    # The kernel copies: on btrfs and xfs it shares the extents, elsewhere it goes at the speed of the disk.
    target_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _copy_range(source_fd, target_fd, size_bytes)
    finally:
        os.close(target_fd)


def _sha256_of(path: Path) -> bytes:
    """SHA-256 of a file; nothing where the disk cannot read it."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        if error.errno == errno.EIO:
            return b""
        raise


def _hash_block(fd: int, offset: int, sha256: hashlib._Hash) -> int:
    """Bytes hashed. From the disk, where the kernel does as it is asked, and without keeping them in memory."""
    data = os.pread(fd, COPY_BYTES, offset)
    sha256.update(data)
    os.posix_fadvise(fd, offset, len(data), os.POSIX_FADV_DONTNEED)
    return len(data)


def _copy_range(source_fd: int, target_fd: int, size_bytes: int) -> None:
    left = size_bytes
    try:
        while left and (copied := os.copy_file_range(source_fd, target_fd, min(left, 1 << 30))):
            left -= copied
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    while left:
        data = os.read(source_fd, min(left, COPY_BYTES))
        os.write(target_fd, data)
        left -= len(data)


def _open_below(folder: Path, path: str) -> int:
    """Opens a file below a folder; no part of the path may be a link."""
    *parents, name = path.split("/")
    if any(part in ("", ".", "..") for part in (*parents, name)) or "\0" in path:
        raise ArtifactError(f"artifact {path!r} is not a relative path")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    current = os.open(folder, flags | os.O_DIRECTORY)
    try:
        for part in parents:
            inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=current)
            os.close(current)
            current = inner
        # O_NONBLOCK: opening a pipe that nobody writes to must not hang.
        return os.open(name, flags | os.O_NONBLOCK, dir_fd=current)
    except OSError as error:
        raise ArtifactError(f"artifact {path!r} cannot be read: {error.strerror}") from error
    finally:
        os.close(current)


def _copy_and_hash(source_fd: int, target: Path, max_bytes: int) -> BlobKey:
    sha256, size_bytes = hashlib.sha256(), 0
    with full_disk_is_told(), target.open("xb") as output:
        while data := os.read(source_fd, COPY_BYTES):
            size_bytes += len(data)
            if size_bytes > max_bytes:
                raise ArtifactError(f"an artifact grew beyond {max_bytes} bytes while it was read")
            sha256.update(data)
            output.write(data)
        output.flush()
        os.fsync(output.fileno())
    return BlobKey(sha256.digest(), size_bytes)
