"""Uploads and downloads against a server that misbehaves."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from modelpress_client import downloads
from modelpress_client.connection import Connection
from modelpress_client.downloads import download_file, download_files
from modelpress_client.errors import (
    AuthenticationError,
    QuotaError,
    ServerUnreachableError,
    TransferError,
    UsageError,
)
from modelpress_client.settings import RetryPolicy, Settings
from modelpress_client.transfers import TransferProgress, hash_file
from modelpress_client.uploads import upload_blobs
from modelpress_protos.v1.common_pb2 import FileEntry

CONTENT = os.urandom(1_000_000)


@pytest.fixture
def blob_file(tmp_path: Path) -> Path:
    path = tmp_path / "blob.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
async def connection(fake_server: Any, patient: RetryPolicy) -> Any:
    connection = Connection(Settings(server=fake_server.address, retry=patient))
    yield connection
    await connection.close()


async def test_sends_a_blob_whole(connection: Any, fake_server: Any, blob_file: Path) -> None:
    """The content arrives, progress rises to the end, and a second upload sends nothing."""
    seen: list[TransferProgress] = []
    blob = await hash_file(blob_file)
    await upload_blobs(connection, [blob], seen.append)
    assert fake_server.blobs[hashlib.sha256(CONTENT).digest()] == CONTENT
    done = [item.done_bytes for item in seen]
    assert done == sorted(done)
    assert done[-1] == len(CONTENT)
    await upload_blobs(connection, [blob])
    assert fake_server.received_bytes == len(CONTENT)


async def test_sends_an_empty_blob(connection: Any, fake_server: Any, tmp_path: Path) -> None:
    """Nothing is content as well."""
    (tmp_path / "empty").touch()
    await upload_blobs(connection, [await hash_file(tmp_path / "empty")])
    assert fake_server.blobs[hashlib.sha256(b"").digest()] == b""


async def test_resumes_after_cuts(connection: Any, fake_server: Any, blob_file: Path) -> None:
    """A cut stream goes on from the committed size: no byte is sent to the store twice."""
    fake_server.script.cut_upload_after_bytes = [300_000, 1, 200_000]
    await upload_blobs(connection, [await hash_file(blob_file)])
    assert fake_server.blobs[hashlib.sha256(CONTENT).digest()] == CONTENT
    assert fake_server.received_bytes == len(CONTENT)
    assert fake_server.seen.count("WriteUpload") == 4


async def test_resumes_what_an_earlier_process_sent(connection: Any, fake_server: Any, blob_file: Path) -> None:
    """What the server has committed is not sent again."""
    fake_server.partial[hashlib.sha256(CONTENT).digest()] = bytearray(CONTENT[:700_001])
    await upload_blobs(connection, [await hash_file(blob_file)])
    assert fake_server.received_bytes == len(CONTENT) - 700_001


@pytest.mark.parametrize("fault", ["refuse_chunks", "busy_uploads", "unavailable_calls"])
async def test_tries_again(connection: Any, fake_server: Any, blob_file: Path, fault: str) -> None:
    """Damaged chunks, a second writer and a draining server are overcome."""
    setattr(fake_server.script, fault, 1)
    await upload_blobs(connection, [await hash_file(blob_file)])
    assert fake_server.blobs[hashlib.sha256(CONTENT).digest()] == CONTENT


async def test_tries_again_where_a_stream_stands_still(fake_server: Any, blob_file: Path, patient: RetryPolicy) -> None:
    """Without a sign of life for idle_timeout_s it is opened anew. Where a busy machine makes other streams look idle,
    they are opened anew as well, and the blob is there in the end all the same."""
    fake_server.script.stall_uploads = 1
    connection = Connection(Settings(server=fake_server.address, retry=replace(patient, idle_timeout_s=1.5)))
    await upload_blobs(connection, [await hash_file(blob_file)])
    await connection.close()
    assert fake_server.blobs[hashlib.sha256(CONTENT).digest()] == CONTENT
    assert fake_server.seen.count("WriteUpload") > 1


async def test_gives_up_in_the_end(fake_server: Any, blob_file: Path, patient: RetryPolicy) -> None:
    """Without progress for give_up_s the cause is raised."""
    fake_server.script.refuse_chunks = 10**6
    connection = Connection(Settings(server=fake_server.address, retry=replace(patient, give_up_s=0.5)))
    with pytest.raises(TransferError, match="A chunk is damaged"):
        await upload_blobs(connection, [await hash_file(blob_file)])
    await connection.close()


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[::-1]])
async def test_notices_a_file_that_changes(connection: Any, fake_server: Any, blob_file: Path, content: bytes) -> None:
    """A file that is written to after it was hashed is refused in words, not sent over and over."""
    blob = await hash_file(blob_file)
    await asyncio.to_thread(blob_file.write_bytes, content)
    with pytest.raises(TransferError, match="changed while it was being uploaded") as caught:
        await upload_blobs(connection, [blob])
    assert caught.value.reason == "FILE_CHANGED"


async def test_wrong_token_is_not_retried(connection: Any, fake_server: Any, blob_file: Path) -> None:
    """Trying again would change nothing."""
    fake_server.script.token = "secret"
    with pytest.raises(AuthenticationError, match="COMPRESS_TOKEN"):
        await upload_blobs(connection, [await hash_file(blob_file)])
    assert fake_server.seen == ["FindMissingBlobs"]


async def failure_at(server: str, **policy: float) -> str:
    """What `reach` says of an address without a server."""
    connection = Connection(Settings(server=server, retry=RetryPolicy(**policy)))
    with pytest.raises(ServerUnreachableError, match="compress-server") as caught:
        await connection.reach()
    await connection.close()
    return str(caught.value)


async def test_no_server() -> None:
    """A refused connection is not waited for as long as one that is not answered: that would take 600 s here."""
    assert "the connection is refused" in await failure_at("127.0.0.1:1", connect_timeout_s=600, starting_s=0.1)


async def test_a_server_that_speaks_something_else() -> None:
    """One that ends each connection may want TLS."""
    closing = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = closing.sockets[0].getsockname()[1]
    assert "--ca FILE" in await failure_at(f"127.0.0.1:{port}", connect_timeout_s=600, starting_s=0.1)
    closing.close()


async def test_a_server_that_says_nothing() -> None:
    """One that takes the connection and is silent is given up after the connect timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = f"127.0.0.1:{silent.getsockname()[1]}"
        assert "nothing came within 0.3 s" in await failure_at(server, connect_timeout_s=0.3, starting_s=600)


async def test_a_server_that_is_starting(fake_server: Any) -> None:
    """An address that refuses at first is tried again."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    connection = Connection(Settings(server=f"127.0.0.1:{port}", retry=RetryPolicy(600, starting_s=600)))
    reaching = asyncio.create_task(connection.reach())
    while (state := connection._channel.get_state()) is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
        await connection._channel.wait_for_state_change(state)
    server = grpc.aio.server()
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await reaching
    await connection.close()
    await server.stop(None)


async def test_a_full_disk_of_the_server_is_told_at_once(connection: Any, fake_server: Any, blob_file: Path) -> None:
    """Whatever the server says of coming back: space does not come by itself while a person waits."""
    error = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="The server has no room.")
    for detail in (
        error_details_pb2.ErrorInfo(domain="modelpress", reason="STORAGE_FULL"),
        error_details_pb2.RetryInfo(retry_delay=Duration(seconds=60)),
    ):
        packed = AnyMessage()
        packed.Pack(detail)
        error.details.append(packed)
    fake_server.script.create_upload_error = error
    with pytest.raises(QuotaError, match="no room") as caught:
        await upload_blobs(connection, [await hash_file(blob_file)])
    assert caught.value.reason == "STORAGE_FULL"
    assert fake_server.seen == ["FindMissingBlobs", "CreateUpload"]


# --- downloads ---------------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_fetches_a_blob(connection: Any, fake_server: Any, tmp_path: Path) -> None:
    """The file is there under its name, and nothing else."""
    digest = fake_server.add_blob(CONTENT)
    await download_file(connection, digest, tmp_path / "new" / "out.bin")
    assert (tmp_path / "new" / "out.bin").read_bytes() == CONTENT
    assert leftovers(tmp_path / "new") == ["out.bin"]


async def test_resumes_a_cut_download(connection: Any, fake_server: Any, tmp_path: Path) -> None:
    """A cut stream goes on from what was fetched; damaged chunks are fetched again."""
    digest = fake_server.add_blob(CONTENT)
    fake_server.script.damage_chunks = 1  # ends the first stream
    fake_server.script.cut_download_after_bytes = [10**9, 200_000]
    await download_file(connection, digest, tmp_path / "out.bin")
    assert (tmp_path / "out.bin").read_bytes() == CONTENT
    assert fake_server.seen == ["ReadBlob 0", "ReadBlob 0", "ReadBlob 262144"]


async def test_takes_up_a_part_file(connection: Any, fake_server: Any, tmp_path: Path) -> None:
    """What an interrupted process has fetched is continued, and thrown away when it is wrong."""
    digest = fake_server.add_blob(CONTENT)
    part = tmp_path / f".out.bin.{digest.sha256.hex()[:16]}.part"
    part.write_bytes(CONTENT[:500_000])
    await download_file(connection, digest, tmp_path / "out.bin")
    assert fake_server.seen == ["ReadBlob 500000"]
    part.write_bytes(b"rubbish")
    await download_file(connection, digest, tmp_path / "out.bin")
    part.write_bytes(CONTENT + b"more")
    await download_file(connection, digest, tmp_path / "out.bin")
    assert (tmp_path / "out.bin").read_bytes() == CONTENT
    assert leftovers(tmp_path) == ["out.bin"]


async def test_wrong_bytes_never_get_the_name(connection: Any, fake_server: Any, tmp_path: Path) -> None:
    """A server that sends other bytes than it promised leaves the old file as it was."""
    digest = fake_server.add_blob(CONTENT)
    fake_server.script.wrong_content = True
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with pytest.raises(TransferError, match="other bytes"):
        await download_file(connection, digest, target)
    assert target.read_bytes() == b"old"
    assert leftovers(tmp_path) == ["out.bin"]


async def test_full_disk(connection: Any, fake_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, takes its own temporary file away, and touches nothing else."""
    digest = fake_server.add_blob(CONTENT)
    (tmp_path / "out.bin").write_bytes(b"old")

    def write_to_full_disk(descriptor: int, data: bytes, sha256: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads, "_append", write_to_full_disk)
    with pytest.raises(TransferError, match="disk is full") as caught:
        await download_file(connection, digest, tmp_path / "out.bin")
    assert caught.value.reason == "DISK_FULL"
    assert (tmp_path / "out.bin").read_bytes() == b"old"
    assert leftovers(tmp_path) == ["out.bin"]


async def test_folder_that_cannot_be_written(connection: Any, fake_server: Any, tmp_path: Path) -> None:
    """A file where the folder should be is named."""
    digest = fake_server.add_blob(CONTENT)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"Cannot write .*out\.bin"):
        await download_file(connection, digest, tmp_path / "file" / "out.bin")


async def test_data_files_keep_their_names(connection: Any, fake_server: Any, tmp_path: Path) -> None:
    """Only the main file is renamed: it refers to the others by name."""
    files = [
        FileEntry(path="model.onnx", digest=fake_server.add_blob(b"main")),
        FileEntry(path="model.onnx.data", digest=fake_server.add_blob(b"weights")),
    ]
    written = await download_files(connection, files, tmp_path / "mine.onnx")
    assert written == [tmp_path / "mine.onnx", tmp_path / "model.onnx.data"]
    assert (tmp_path / "model.onnx.data").read_bytes() == b"weights"


async def test_data_files_replace_nothing_of_others(connection: Any, fake_server: Any, tmp_path: Path) -> None:
    """A file of the user that is in the way is refused before anything is written; the same bytes are no conflict."""
    files = [
        FileEntry(path="model.onnx", digest=fake_server.add_blob(b"main")),
        FileEntry(path="model.onnx.data", digest=fake_server.add_blob(b"weights")),
    ]
    (tmp_path / "model.onnx.data").write_bytes(b"of the user")
    with pytest.raises(UsageError, match="is in the way"):
        await download_files(connection, files, tmp_path / "mine.onnx")
    assert leftovers(tmp_path) == ["model.onnx.data"]
    (tmp_path / "model.onnx.data").write_bytes(b"weights")
    await download_files(connection, files, tmp_path / "mine.onnx")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a\\b", "a/../../b"])
async def test_hostile_names_are_not_written(connection: Any, fake_server: Any, tmp_path: Path, name: str) -> None:
    """A server cannot write outside the folder."""
    digest = fake_server.add_blob(b"main")
    files = [FileEntry(path="model.onnx", digest=digest), FileEntry(path=name, digest=digest)]
    with pytest.raises(TransferError, match="not written"):
        await download_files(connection, files, tmp_path / "out" / "mine.onnx")
    assert leftovers(tmp_path) == []
