"""Fetches blobs: into a temporary file beside the target, checked, then renamed.

A file is there whole under its final name, or not at all. What an interrupted download has fetched stays in
`.NAME.DIGEST.part` and is continued by the next attempt.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path, PurePosixPath

import google_crc32c
from modelpress_protos.v1.common_pb2 import Digest, FileEntry
from modelpress_protos.v1.upload_service_pb2 import ReadBlobRequest

from modelpress_client.connection import Connection, stalled
from modelpress_client.errors import ModelpressError, Retry, TransferError, UsageError
from modelpress_client.onnx_files import NotOnnxError, external_locations
from modelpress_client.transfers import HASH_BLOCK_BYTES, OnProgress, TransferProgress

MAX_IN_MEMORY_BYTES = 64 * 1024 * 1024  # 64 MiB: report.json and report.html, never a model


async def read_blob(connection: Connection, digest: Digest, offset: int = 0) -> AsyncIterator[bytes]:
    """The bytes of a blob from `offset`, checked chunk by chunk, across cuts."""
    await connection.reach()
    patience = connection.patience()
    while offset < digest.size_bytes:
        request = ReadBlobRequest(parent=connection.settings.parent, digest=digest, read_offset=offset)
        try:
            async for data in _stream(connection, request):
                offset += len(data)
                patience.progressed()
                yield data
            if offset < digest.size_bytes:
                raise stalled("The server ended a download early", 0)
        except ModelpressError as error:
            await patience.wait(error)


async def _stream(connection: Connection, request: ReadBlobRequest) -> AsyncIterator[bytes]:
    idle_timeout_s = connection.settings.retry.idle_timeout_s
    offset = request.read_offset
    call = connection.uploads.ReadBlob(request, metadata=connection.metadata)
    responses = aiter(call)
    try:
        while True:
            try:
                async with connection.translated(), asyncio.timeout(idle_timeout_s):
                    response = await anext(responses, None)
            except TimeoutError:
                raise stalled("Downloading", idle_timeout_s) from None
            if response is None:
                return
            too_long = offset + len(response.data) > request.digest.size_bytes
            if response.offset != offset or too_long or google_crc32c.value(response.data) != response.crc32c:
                raise TransferError("A downloaded chunk was damaged on the way.", retry=Retry())
            offset += len(response.data)
            yield response.data
    finally:
        call.cancel()


async def read_blob_into_memory(connection: Connection, digest: Digest) -> bytes:
    """A small blob. Raises TransferError when its digest is wrong."""
    if digest.size_bytes > MAX_IN_MEMORY_BYTES:
        raise TransferError(f"The file has {digest.size_bytes} bytes; too large to be read into memory.")
    content = b"".join([data async for data in read_blob(connection, digest)])
    if hashlib.sha256(content).digest() != digest.sha256:
        raise TransferError("The server sent other bytes than it promised.", reason="DIGEST_MISMATCH")
    return content


async def download_file(
    connection: Connection, digest: Digest, target: Path, on_progress: OnProgress | None = None
) -> None:
    """Writes one blob to `target`, replacing a file there.

    Raises UsageError when the folder cannot be written to, and TransferError when the disk is full or the bytes are not
    what the server promised.
    """
    part = target.with_name(f".{target.name}.{digest.sha256.hex()[:16]}.part")
    for attempt in range(2):
        try:
            if await _fetch(connection, digest, part, target, on_progress):
                return
        except OSError as error:
            raise _disk_error(error, part, target) from error
        # An old .part may have been damaged; what was fetched in one go cannot be.
        part.unlink(missing_ok=True)
        if attempt:
            raise TransferError(f"The server sent other bytes for {target.name} than it promised.")


async def _fetch(
    connection: Connection, digest: Digest, part: Path, target: Path, on_progress: OnProgress | None
) -> bool:
    """Fills `part` and renames it; False when its digest is wrong."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    writing: asyncio.Future[None] | None = None
    try:
        _lock(descriptor, target)
        sha256, offset = await asyncio.to_thread(_hash_existing, descriptor, digest.size_bytes)
        async for data in read_blob(connection, digest, offset):
            # The next chunk comes while this one is hashed and written.
            if writing is not None:
                await asyncio.shield(writing)
            writing = asyncio.ensure_future(asyncio.to_thread(_append, descriptor, data, sha256))
            offset += len(data)
            if on_progress is not None:
                on_progress(TransferProgress("download", target, offset, digest.size_bytes))
        if writing is not None:
            await asyncio.shield(writing)
        if sha256.digest() != digest.sha256:
            return False
        await asyncio.to_thread(os.fsync, descriptor)
        await asyncio.to_thread(part.replace, target)
    finally:
        if writing is not None:
            # Its thread goes on after a cancellation, and must not write to whatever gets this descriptor next.
            await asyncio.wait([writing])
            writing.exception()  # marks it as seen: what stopped the download is already on its way
        os.close(descriptor)
    await asyncio.to_thread(_sync_folder, target.parent)
    return True


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TransferError(f"Another command is downloading {target} at this moment.") from None


def _hash_existing(descriptor: int, size_bytes: int) -> tuple[hashlib._Hash, int]:
    """Takes up what an earlier attempt has left; more than there can be is thrown away."""
    sha256 = hashlib.sha256()
    if os.fstat(descriptor).st_size > size_bytes:
        os.ftruncate(descriptor, 0)
    offset = 0
    while data := os.read(descriptor, HASH_BLOCK_BYTES):
        sha256.update(data)
        offset += len(data)
    return sha256, offset


def _append(descriptor: int, data: bytes, sha256: hashlib._Hash) -> None:
    sha256.update(data)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(error: OSError, part: Path, target: Path) -> ModelpressError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        # Our own temporary file alone goes, so that the disk is not left full.
        part.unlink(missing_ok=True)
        return TransferError(
            f"The disk is full: {target} was not written. Make room, or choose another place with -o.",
            reason="DISK_FULL",
            details={"path": str(target)},
        )
    return UsageError(f"Cannot write {target}: {error.strerror}.", details={"path": str(target)})


async def download_files(
    connection: Connection, files: Sequence[FileEntry], target: Path, on_progress: OnProgress | None = None
) -> list[Path]:
    """Writes an artifact: its first file to `target`, the others beside it under their own names.

    The main file of an ONNX model refers to its data files by name, so only the main one can be renamed. A data file
    never replaces one of another model. Returns the paths written, the main one first.
    """
    main, *others = files
    beside = [(entry, target.parent / _safe(entry.path)) for entry in others]
    replaceable = await asyncio.to_thread(_data_files_of, target)
    for entry, path in beside:
        if path == target or (path.exists() and entry.path not in replaceable and not _is_same(path, entry.digest)):
            raise UsageError(
                f"{path} is in the way: the result keeps weights in a file of that name. Choose another folder.",
                details={"path": str(path)},
            )
    # The main file comes last: where it is, the model is complete.
    for entry, path in beside:
        await download_file(connection, entry.digest, path, on_progress)
    await download_file(connection, main.digest, target, on_progress)
    return [target, *(path for _, path in beside)]


def _safe(name: str) -> PurePosixPath:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in name or not name.isprintable():
        raise TransferError(f"The server names a file {name!r}; it was not written.")
    return pure


def _data_files_of(target: Path) -> set[str]:
    """Data files of the model that is about to be replaced: they go with it."""
    try:
        return external_locations(target)
    except (OSError, NotOnnxError):
        return set()


def _is_same(path: Path, digest: Digest) -> bool:
    if not path.is_file() or path.stat().st_size != digest.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest() == digest.sha256
