"""The blob store on its own: what it takes from a worker, and what it gives."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from modelpress_server.errors import BlobMissingError, StorageFullError
from modelpress_server.stores.blobs import BlobKey
from modelpress_server.stores.filesystem import ArtifactError, FileBlobStore, PartialFile


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FileBlobStore]:
    made = FileBlobStore(tmp_path / "data")
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a worker left."""
    made = tmp_path / "output"
    (made / "inner").mkdir(parents=True)
    (made / "inner" / "model.onnx").write_bytes(b"content")
    return made


async def test_ingests_and_copies(store: FileBlobStore, folder: Path, tmp_path: Path) -> None:
    """A file below the folder becomes a blob; a copy of it is private: changing it leaves the blob alone."""
    blob = await store.ingest(folder, "inner/model.onnx", max_bytes=7)
    assert await store.has(blob)
    target = tmp_path / "copy"
    await store.place(blob, target, link=False)
    target.write_bytes(b"changed")
    reader = await store.open_blob(blob)
    assert await reader.read(0, 100) == b"content"
    reader.close()
    with pytest.raises(FileExistsError):
        await store.place(blob, target, link=False)


async def test_takes_plain_files_only(store: FileBlobStore, folder: Path) -> None:
    """Links of any kind, pipes, folders, paths that lead out, and large files are refused; nothing is stored."""
    (folder / "link").symlink_to("/etc/hostname")
    (folder / "linked_folder").symlink_to("inner")
    os.link(folder / "inner" / "model.onnx", folder / "hard")
    os.mkfifo(folder / "pipe")
    for path in ("link", "linked_folder/model.onnx", "hard", "pipe", "inner", "../x", "/etc/hostname", "none", "a\0b"):
        with pytest.raises(ArtifactError):
            await store.ingest(folder, path, max_bytes=100)
    (folder / "hard").unlink()
    with pytest.raises(ArtifactError, match="at most 6"):
        await store.ingest(folder, "inner/model.onnx", max_bytes=6)
    assert [path for path in (store._root / "blobs").rglob("*") if path.is_file()] == []
    assert list((store._root / "tmp").iterdir()) == []


async def test_a_blob_of_another_size_is_not_there(store: FileBlobStore, folder: Path, tmp_path: Path) -> None:
    """The size is part of the identity."""
    blob = await store.ingest(folder, "inner/model.onnx", max_bytes=100)
    other = BlobKey(blob.sha256, blob.size_bytes + 1)
    assert not await store.has(other)
    with pytest.raises(BlobMissingError):
        await store.place(other, tmp_path / "x", link=False)
    with pytest.raises(BlobMissingError):
        await store.open_blob(BlobKey(bytes(32), 1))


async def test_a_full_disk_leaves_nothing(store: FileBlobStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC while an artifact is made durable: an error that says so, no blob, no temporary file."""

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFullError):
        await store.ingest(folder, "inner/model.onnx", max_bytes=100)
    assert [path for path in (store._root / "blobs").rglob("*") if path.is_file()] == []
    assert list((store._root / "tmp").iterdir()) == []


async def test_opening_clears_what_was_being_copied(store: FileBlobStore) -> None:
    """Temporary files of a dead server go."""
    (store._root / "tmp" / "left").write_bytes(b"x")
    await store.open()
    assert list((store._root / "tmp").iterdir()) == []


async def test_a_published_partial_file_can_be_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only after a kill at the last moment (as for a user who is not root): it is opened for its hash."""
    partial = PartialFile(tmp_path / "upload")
    partial.open(0)
    partial.append(b"content")
    partial.close()
    real = os.open

    def as_a_user(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", as_a_user)
    again = PartialFile(tmp_path / "upload")
    again.open(7)
    assert again.digest() == hashlib.sha256(b"content").digest()
    again.close()
