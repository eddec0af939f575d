"""The yardstick of `transfer.py`: one gRPC stream without resuming, chunk checksums, database or acknowledgements.

Same language, same runtime (grpc.aio), same chunk of 1 MiB, same work with the bytes: the sender reads a file, the
receiver takes the SHA-256 and writes, with one fsync in the end. Run by `transfer.py` as `bare_stream.py serve FOLDER`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from modelpress_protos.v1 import upload_service_pb2

CHUNK_BYTES = 1024 * 1024
OPTIONS = (("grpc.max_receive_message_length", 4 * CHUNK_BYTES), ("grpc.max_send_message_length", 4 * CHUNK_BYTES))
NAME = "file"

Chunk = upload_service_pb2.ReadBlobResponse


class Receiver:
    """Writes and hashes chunks in a thread while the next one is on its way."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._last: asyncio.Future[None] | None = None

    async def take(self, data: bytes) -> None:
        """The next chunk."""
        if self._last is not None:
            await self._last
        self._last = asyncio.ensure_future(asyncio.to_thread(self._append, data))

    async def finish(self) -> str:
        """The digest of everything."""
        if self._last is not None:
            await self._last
        await asyncio.to_thread(os.fsync, self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)


async def chunks_of(path: Path) -> AsyncIterator[Chunk]:
    """The file's chunks, each read in a thread."""
    with path.open("rb", buffering=0) as file:
        while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield Chunk(data=data)


async def _serve(folder: Path) -> None:
    async def upload(requests: AsyncIterator[Chunk], _context: Any) -> Chunk:
        receiver = Receiver(folder / NAME)
        async for request in requests:
            await receiver.take(request.data)
        return Chunk(data=(await receiver.finish()).encode())

    async def download(_request: Chunk, _context: Any) -> AsyncIterator[Chunk]:
        async for chunk in chunks_of(folder / NAME):
            yield chunk

    server = grpc.aio.server(options=OPTIONS)
    codec: dict[str, Any] = {"request_deserializer": Chunk.FromString, "response_serializer": Chunk.SerializeToString}
    handlers = {
        "Upload": grpc.stream_unary_rpc_method_handler(upload, **codec),
        "Download": grpc.unary_stream_rpc_method_handler(download, **codec),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


async def upload(address: str, path: Path) -> str:
    """Sends a file; returns the digest that the receiver found."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        call = channel.stream_unary("/Bare/Upload", Chunk.SerializeToString, Chunk.FromString)
        answer = await call(chunks_of(path))
        return bytes(answer.data).decode()


async def download(address: str, target: Path) -> str:
    """Fetches the file that was sent last; returns its digest."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        call = channel.unary_stream("/Bare/Download", Chunk.SerializeToString, Chunk.FromString)
        receiver = Receiver(target)
        async for chunk in call(Chunk()):
            await receiver.take(chunk.data)
        return await receiver.finish()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[2])))
