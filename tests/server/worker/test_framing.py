"""Frames of the protocol between server and worker, from both ends."""

from __future__ import annotations

import asyncio
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_protos.internal.v1 import worker_pb2
from modelpress_server.worker.framing import (
    MAX_FRAME_BYTES,
    FramingError,
    encode_frame,
    read_frame,
    read_frame_async,
)

Event = worker_pb2.WorkerEvent


def line(text: str) -> worker_pb2.WorkerEvent:
    """A log event."""
    return Event(log=worker_pb2.LogLine(severity="INFO", text=text))


async def read_stream(data: bytes) -> worker_pb2.WorkerEvent | None:
    """What the asynchronous end makes of the bytes."""
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return await read_frame_async(reader, Event)


@given(st.lists(st.text(max_size=200), max_size=5))
def test_messages_survive_the_pipe(texts: list[str]) -> None:
    """Whatever is written is read again in order, then the end is None."""
    pipe = io.BytesIO(b"".join(encode_frame(line(text)) for text in texts))
    for text in texts:
        event = read_frame(pipe, Event)
        assert event is not None
        assert event.log.text == text
    assert read_frame(pipe, Event) is None


async def test_both_ends_read_the_same() -> None:
    """The server's end reads what the worker's end writes; an empty stream is its end."""
    assert await read_stream(encode_frame(line("hello"))) == line("hello")
    assert await read_stream(b"") is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x00\x00", "within a length"),
        (b"\x00\x00\x00\x05abc", "within a message"),
        (b"\xff\xff\xff\xff", "claims 4294967295 bytes"),
        ((MAX_FRAME_BYTES + 1).to_bytes(4, "big"), "the limit is"),
        (b"\x00\x00\x00\x04\xff\xff\xff\xff", "no WorkerEvent"),
    ],
)
async def test_bytes_that_are_no_frame(data: bytes, said: str) -> None:
    """Both ends refuse cut, oversized and undecodable frames, the oversized before taking memory for them."""
    with pytest.raises(FramingError, match=said):
        read_frame(io.BytesIO(data), Event)
    with pytest.raises(FramingError, match=said):
        await read_stream(data)


def test_a_message_over_the_limit_is_not_written() -> None:
    """The sender learns of it; the receiver would take it for an attack."""
    with pytest.raises(FramingError, match="over the limit"):
        encode_frame(line("x" * MAX_FRAME_BYTES))
