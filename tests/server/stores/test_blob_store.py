"""What every BlobStore does, tried on a folder and on S3."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from modelpress_server.config import SettingsError
from modelpress_server.errors import BlobDamagedError, BlobMissingError, ServerBusyError
from modelpress_server.names import new_id
from modelpress_server.stores.blobs import BlobKey, BlobStore
from modelpress_server.stores.filesystem import ArtifactError, FileBlobStore
from modelpress_server.stores.s3 import PART_BYTES, S3BlobStore, covering, key_of, part_key
from store_rows import blob_of

CONTENT = random.Random(7).randbytes(3 * PART_BYTES + 12345)


@pytest.fixture(params=["files", "s3"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BlobStore]:
    """An empty store of each kind."""
    made: BlobStore
    if request.param == "files":
        made = FileBlobStore(tmp_path / "data")
    else:
        made = S3BlobStore(request.getfixturevalue("s3"), tmp_path / "tmp")
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def bucket(s3: str, tmp_path: Path) -> AsyncIterator[S3BlobStore]:
    """An empty one in a bucket."""
    made = S3BlobStore(s3, tmp_path / "tmp")
    await made.open()
    yield made
    await made.close()


async def upload(store: BlobStore, content: bytes, upload_id: str = "") -> BlobKey:
    """Through a partial blob, in chunks of 1 MiB."""
    upload_id, blob = upload_id or new_id(), blob_of(content)
    partial = store.partial(upload_id)
    await partial.open(0)
    for start in range(0, len(content), 1 << 20):
        await partial.append(content[start : start + (1 << 20)])
    await partial.sync()
    assert (partial.size_bytes, partial.digest()) == (blob.size_bytes, blob.sha256)
    partial.close()
    await store.publish(upload_id, blob)
    await store.remove_partial(upload_id)
    return blob


async def content_of(store: BlobStore, blob: BlobKey) -> bytes:
    reader = await store.open_blob(blob)
    found = bytearray()
    while data := await reader.read(len(found), 1 << 20):
        found += data
    reader.close()
    return bytes(found)


@pytest.mark.parametrize("content", [b"", b"x", CONTENT[:PART_BYTES], CONTENT], ids=["none", "one", "a part", "parts"])
async def test_what_was_uploaded_is_read(store: BlobStore, tmp_path: Path, content: bytes) -> None:
    """Of any length: there, read in order, and laid out as a file of one's own."""
    await store.ping()
    blob = blob_of(content)
    assert not await store.has(blob)
    assert await upload(store, content) == blob
    assert await store.has(blob)
    assert store.is_there(blob)
    await store.require([blob])
    assert await content_of(store, blob) == content
    await store.place(blob, tmp_path / "copy", link=False)
    assert (tmp_path / "copy").read_bytes() == content
    with pytest.raises(FileExistsError):
        await store.place(blob, tmp_path / "copy", link=False)
    assert await store.partial_ids() == set()


async def test_ranges(store: BlobStore) -> None:
    """Any range, forwards and backwards, and fewer bytes at the end."""
    reader = await store.open_blob(await upload(store, CONTENT))
    for start, size in ((0, 5), (PART_BYTES - 3, 7), (2, 3), (len(CONTENT) - 4, 100), (len(CONTENT), 10)):
        assert await reader.read(start, size) == CONTENT[start : start + size]
    reader.close()


async def test_an_upload_goes_on_elsewhere(store: BlobStore) -> None:
    """Another server goes on at the acknowledged length; what came after it does not count, whatever it was."""
    upload_id, committed = new_id(), PART_BYTES + 1000
    first = store.partial(upload_id)
    await first.open(0)
    await first.append(CONTENT[:committed])
    await first.sync()
    await first.append(b"never acknowledged" * 1_000_000)
    first.close()
    assert await store.partial_ids() == {upload_id}
    second = store.partial(upload_id)
    await second.open(committed)
    assert second.digest() == hashlib.sha256(CONTENT[:committed]).digest()
    await second.append(CONTENT[committed:])
    await second.sync()
    second.close()
    await store.publish(upload_id, blob_of(CONTENT))
    assert await content_of(store, blob_of(CONTENT)) == CONTENT


async def test_the_same_writer_goes_on(store: BlobStore) -> None:
    """A stream that was cut and comes back to the same server: nothing is hashed twice, nothing is lost."""
    upload_id = new_id()
    partial = store.partial(upload_id)
    await partial.open(0)
    await partial.append(CONTENT[:100])
    await partial.sync()
    partial.close()
    await partial.open(100)
    await partial.append(CONTENT[100:])
    await partial.sync()
    assert partial.digest() == blob_of(CONTENT).sha256
    partial.close()


async def test_lost_bytes_are_told(store: BlobStore) -> None:
    """An upload of which less is there than was acknowledged cannot go on."""
    with pytest.raises(FileNotFoundError):
        await store.partial(new_id()).open(10)
    upload_id = new_id()
    partial = store.partial(upload_id)
    await partial.open(0)
    await partial.append(b"0123456789")
    await partial.sync()
    partial.close()
    with pytest.raises(FileNotFoundError):
        await store.partial(upload_id).open(11)


async def test_takes_plain_files_of_workers(store: BlobStore, tmp_path: Path) -> None:
    """A file below the folder becomes a blob; links and large files are refused."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").write_bytes(CONTENT)
    (tmp_path / "out" / "link").symlink_to("model")
    with pytest.raises(ArtifactError):
        await store.ingest(tmp_path / "out", "link", max_bytes=1 << 30)
    with pytest.raises(ArtifactError):
        await store.ingest(tmp_path / "out", "model", max_bytes=len(CONTENT) - 1)
    blob = await store.ingest(tmp_path / "out", "model", max_bytes=1 << 30)
    assert await content_of(store, blob) == CONTENT
    assert await store.ingest(tmp_path / "out", "model", max_bytes=1 << 30) == blob


async def test_what_is_not_there(store: BlobStore, tmp_path: Path) -> None:
    """One that never came, and one of another size: the size is part of the identity."""
    blob = await upload(store, b"content")
    for absent in (BlobKey(bytes(32), 1), BlobKey(blob.sha256, blob.size_bytes + 1)):
        assert not await store.has(absent)
        with pytest.raises(BlobMissingError):
            await store.require([blob, absent])
        with pytest.raises(BlobMissingError):
            await store.open_blob(absent)
    with pytest.raises(BlobMissingError):
        await store.place(BlobKey(bytes(32), 1), tmp_path / "x", link=False)
    assert not (tmp_path / "x").exists()


async def test_quarantine(store: BlobStore) -> None:
    """A blob that is set aside is missing, until it is uploaded again."""
    blob = await upload(store, b"content")
    await store.quarantine(blob)
    assert not await store.has(blob)
    await store.quarantine(blob)
    await upload(store, b"content")
    assert await store.has(blob)
    await store.empty_quarantine(time.time() + 10)


async def test_removal_goes_by_age(store: BlobStore) -> None:
    """Only what is older than asked goes, and what is not there is no error."""
    blob = await upload(store, b"content")
    now_s = time.time()
    assert await store.older_than(now_s - 60) == []
    assert await store.older_than(now_s + 60) == [blob]
    await asyncio.to_thread(store.remove_older_than, blob, now_s - 60)
    assert await store.has(blob)
    await asyncio.to_thread(store.remove_older_than, blob, now_s + 60)
    assert not await store.has(blob)
    await asyncio.to_thread(store.remove_older_than, blob, now_s + 60)


async def test_many_at_once(store: BlobStore) -> None:
    """Twenty uploads at the same time, two of them of the same content."""
    contents = [b"%d" % (number % 19) * 100_000 for number in range(20)]
    blobs = await asyncio.gather(*(upload(store, content) for content in contents))
    assert [await content_of(store, blob) for blob in blobs] == contents


class TestBucket:
    """What only a bucket can do to one."""

    async def test_damage_is_found(self, bucket: S3BlobStore, tmp_path: Path) -> None:
        """An object with other bytes of the same length is set aside, and nobody gets it."""
        blob = await upload(bucket, b"content")
        await bucket.run(bucket.put, key_of(blob), b"damaged")
        with pytest.raises(BlobDamagedError):
            await bucket.place(blob, tmp_path / "x", link=False)
        assert not (tmp_path / "x").exists()
        assert not await bucket.has(blob)

    async def test_parts_with_other_bytes_make_no_blob(self, bucket: S3BlobStore) -> None:
        """What the parts hold is checked while they are joined; nothing appears under the name."""
        upload_id, blob = new_id(), blob_of(CONTENT)
        await bucket.run(bucket.put, part_key(upload_id, (0, len(CONTENT))), bytes(len(CONTENT)))
        with pytest.raises(BlobDamagedError):
            await bucket.publish(upload_id, blob)
        assert not await bucket.has(blob)

    async def test_two_writers(self, bucket: S3BlobStore) -> None:
        """Parts of one that was taken for dead overlap those of its successor: the upload is whole all the same."""
        upload_id = new_id()
        one, other = bucket.partial(upload_id), bucket.partial(upload_id)
        await one.open(0)
        await one.append(CONTENT[:1000])
        await one.sync()
        await other.open(1000)
        await other.append(CONTENT[1000:5000])
        await one.append(CONTENT[1000:3000])
        await other.sync()
        await one.sync()
        await other.append(CONTENT[5000:])
        await other.sync()
        await bucket.publish(upload_id, blob_of(CONTENT))
        assert await content_of(bucket, blob_of(CONTENT)) == CONTENT

    async def test_prefixes_are_apart(self, bucket: S3BlobStore, s3: str, tmp_path: Path) -> None:
        """Two stores in one bucket do not see each other's."""
        blob = await upload(bucket, b"content")
        other = S3BlobStore(f"{s3}-other", tmp_path / "other")
        await other.open()
        assert not await other.has(blob)
        assert await other.older_than(time.time() + 60) == []
        await other.close()

    async def test_a_bucket_that_is_not_there(self, s3: str, tmp_path: Path) -> None:
        """The start fails, with what to look at, and without a key."""
        with pytest.raises(SettingsError, match="AWS_ENDPOINT_URL") as caught:
            await S3BlobStore("s3://no-such-bucket/x", tmp_path / "tmp").open()
        assert "not-so-secret-key" not in str(caught.value)
        for wrong in ("http://bucket", "s3://", "s3://key:secret@bucket/x"):
            with pytest.raises(SettingsError, match="s3://BUCKET/PREFIX"):
                S3BlobStore(wrong, tmp_path / "tmp")

    async def test_a_service_that_is_away(
        self, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An error that says to try again; the log names no key."""
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setattr("modelpress_server.stores.s3.MAX_RETRIES", 0)
        store = S3BlobStore(s3, tmp_path / "tmp")
        with pytest.raises(ServerBusyError, match="blob store does not answer"):
            await store.ping()
        assert "not-so-secret-key" not in caplog.text
        assert "bucket" in caplog.text
        await store.close()


@pytest.mark.parametrize(
    ("parts", "size", "expected"),
    [
        ([], 0, []),
        ([], 1, None),
        ([(0, 5), (5, 9)], 9, [((0, 5), 0, 5), ((5, 9), 0, 4)]),
        ([(0, 5), (5, 9)], 7, [((0, 5), 0, 5), ((5, 9), 0, 2)]),
        ([(0, 5), (6, 9)], 9, None),
        ([(0, 5), (0, 8), (4, 6), (5, 9)], 9, [((0, 8), 0, 8), ((5, 9), 3, 4)]),
        ([(1, 5)], 5, None),
    ],
)
def test_covering(parts: list[tuple[int, int]], size: int, expected: object) -> None:
    """Ranges of parts in order, the one that leads furthest first; None where bytes are missing."""
    assert covering(parts, size) == expected
