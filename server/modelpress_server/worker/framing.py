"""Protobuf messages over a pipe: four bytes of length, big-endian, then the message. Never pickle.

Both ends refuse a frame over MAX_FRAME_BYTES before they take memory for it: the other end may have been taken over by
a hostile model.
"""

from __future__ import annotations

import asyncio
import struct
from typing import BinaryIO, TypeVar

from google.protobuf.message import DecodeError, Message

# The largest honest messages: a request with 1,000 files (under 1 MiB), an inspection of a model with many findings.
MAX_FRAME_BYTES = 4 * 1024 * 1024  # 4 MiB
_LENGTH = struct.Struct(">I")

AnyMessage = TypeVar("AnyMessage", bound=Message)


class FramingError(Exception):
    """The bytes on the pipe are not frames of the expected message."""


def encode_frame(message: Message) -> bytes:
    """The message as it goes over the pipe. Raises FramingError when it is too large."""
    body = message.SerializeToString()
    if len(body) > MAX_FRAME_BYTES:
        raise FramingError(f"A message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}.")
    return _LENGTH.pack(len(body)) + body


def read_frame(file: BinaryIO, message_type: type[AnyMessage]) -> AnyMessage | None:
    """The next message of a blocking pipe; None at its end. Raises FramingError."""
    head = file.read(_LENGTH.size)
    if not head:
        return None
    if len(head) < _LENGTH.size:
        raise FramingError("The pipe ended within a length.")
    body = file.read(_checked_length(head))
    if len(body) < _LENGTH.unpack(head)[0]:
        raise FramingError("The pipe ended within a message.")
    return _decode(body, message_type)


async def read_frame_async(reader: asyncio.StreamReader, message_type: type[AnyMessage]) -> AnyMessage | None:
    """The next message; None at the end of the stream. Raises FramingError."""
    try:
        head = await reader.readexactly(_LENGTH.size)
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise FramingError("The pipe ended within a length.") from error
    try:
        body = await reader.readexactly(_checked_length(head))
    except asyncio.IncompleteReadError as error:
        raise FramingError("The pipe ended within a message.") from error
    return _decode(body, message_type)


def _checked_length(head: bytes) -> int:
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise FramingError(f"A message claims {length} bytes; the limit is {MAX_FRAME_BYTES}.")
    return int(length)


def _decode(body: bytes, message_type: type[AnyMessage]) -> AnyMessage:
    try:
        return message_type.FromString(body)
    except DecodeError as error:
        raise FramingError(f"The bytes are no {message_type.DESCRIPTOR.name}.") from error
