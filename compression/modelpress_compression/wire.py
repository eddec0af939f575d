"""ONNX protobufs as rows of fields: the weights are taken out, or put in, and the rest is copied as it is.

A protobuf message is a row of fields, each a key (number << 3 | kind of payload) and a payload. Weights lie in fields
of kind 2, whose payload is a length and as many bytes, a few messages deep:

    ModelProto.graph.initializer.raw_data        and in graphs within nodes, in tensors of Constant nodes, in functions

Python's protobuf reads and writes whole messages only, and takes two copies of a file for it. Here a file's weights are
never touched: `without_weights` leaves each as a reference to its place (ONNX's external data), and `with_weights` says
in which order a file is to be written. Both walk each field once.

Source: https://protobuf.dev/programming-guides/encoding, and onnx.proto for the numbers of fields.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import onnx
import onnx_ir
from google.protobuf.message import DecodeError

Bytes = bytes | mmap.mmap
# What stands in a file: bytes, or the number of a weight.
Piece = bytes | int

MAX_DEPTH = 100  # protobuf's own limit
_MAX_VARINT_BYTES = 10
_LENGTH_DELIMITED = 2
_FIXED_BYTES = {1: 8, 5: 4}


class _Kind(Enum):
    MODEL, GRAPH, NODE, ATTRIBUTE, FUNCTION, TENSOR = range(6)


# The fields that lead to weights; what no model of size has is left out (lists of tensors, defaults of functions).
_WITHIN: dict[_Kind, dict[int, _Kind]] = {
    _Kind.MODEL: {7: _Kind.GRAPH, 25: _Kind.FUNCTION},
    _Kind.GRAPH: {1: _Kind.NODE, 5: _Kind.TENSOR},
    _Kind.NODE: {5: _Kind.ATTRIBUTE},
    _Kind.ATTRIBUTE: {5: _Kind.TENSOR, 6: _Kind.GRAPH, 11: _Kind.GRAPH},
    _Kind.FUNCTION: {7: _Kind.NODE},
}
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
# Fields of TensorProto whose payload, where it is one block, has the bytes of `raw_data`; and the element type.
_PLAIN_DATA = {
    onnx.TensorProto.FLOAT_DATA_FIELD_NUMBER: onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE_DATA_FIELD_NUMBER: onnx.TensorProto.DOUBLE,
}


class _Field(NamedTuple):
    """`start` to `stop` in the file is the whole field, `payload` to `stop` what it holds."""

    number: int
    kind: int
    start: int
    payload: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.payload


def without_weights(data: Bytes, location: str, least_bytes: int) -> bytes:
    """A serialized ModelProto whose weights of `least_bytes` and more are external data in `location`, at the places
    where they lie in `data`.

    Weights whose bytes do not fit their shape stay, as do those that are external already. Raises DecodeError.
    """
    return b"".join(_Remover(data, location, least_bytes).message(_Kind.MODEL, 0, len(data), 0))


@dataclass(frozen=True)
class _Remover:
    data: Bytes
    location: str
    least_bytes: int

    def message(self, kind: _Kind, start: int, stop: int, depth: int) -> Iterator[bytes]:
        _check_depth(depth)
        for field in _fields(self.data, start, stop):
            within = _WITHIN[kind].get(field.number) if field.kind == _LENGTH_DELIMITED else None
            if within is None or field.size < self.least_bytes:
                yield self.data[field.start : field.stop]
                continue
            if within is _Kind.TENSOR:
                body = self._tensor(field.payload, field.stop)
            else:
                body = b"".join(self.message(within, field.payload, field.stop, depth + 1))
            yield _key(field.number) + _varint(len(body)) + body

    def _tensor(self, start: int, stop: int) -> bytes:
        fields = list(_fields(self.data, start, stop))
        weights = [field for field in fields if field.kind == _LENGTH_DELIMITED and field.size >= self.least_bytes]
        if len(weights) != 1 or weights[0].number not in (_RAW_DATA, *_PLAIN_DATA):
            return self.data[start:stop]
        (weight,) = weights
        rest = (self.data[field.start : field.stop] for field in fields if field is not weight)
        tensor = onnx.TensorProto.FromString(b"".join(rest))
        if not _is_plain(tensor, weight):
            return self.data[start:stop]
        refer(tensor, self.location, weight.payload, weight.size)
        return tensor.SerializeToString()


def _is_plain(tensor: onnx.TensorProto, weight: _Field) -> bool:
    """Whether the field holds all numbers of the tensor, as they lie in external data."""
    others = [field.name for field, _ in tensor.ListFields() if field.name.endswith("_data")]
    if others or tensor.data_location != onnx.TensorProto.DEFAULT or tensor.HasField("segment"):
        return False
    if weight.number != _RAW_DATA and tensor.data_type != _PLAIN_DATA[weight.number]:
        return False
    try:
        return weight.size == size_bytes(tensor)
    except (TypeError, ValueError):
        return False


def size_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of the tensor's numbers. Raises TypeError or ValueError for element types that have no fixed size."""
    elements = 1
    for extent in tensor.dims:
        elements *= extent
    return (elements * onnx_ir.DataType(tensor.data_type).bitwidth + 7) // 8


def refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Makes the tensor's data external."""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def with_weights(data: bytes, location: str) -> list[Piece]:
    """The pieces of the file that comes of a serialized ModelProto when each weight in `location` is put into it.

    Such a weight's offset in `location` is its number.
    """
    return _merged(_Inserter(data, location.encode()).message(_Kind.MODEL, 0, len(data), 0)[0])


@dataclass(frozen=True)
class _Inserter:
    data: bytes
    location: bytes

    def message(self, kind: _Kind, start: int, stop: int, depth: int) -> tuple[list[Piece], int]:
        """The pieces, and the bytes that they have together."""
        _check_depth(depth)
        pieces: list[Piece] = []
        total = 0
        for field in _fields(self.data, start, stop):
            within = _WITHIN[kind].get(field.number) if field.kind == _LENGTH_DELIMITED else None
            if within is None or self.data.find(self.location, field.payload, field.stop) < 0:
                pieces.append(self.data[field.start : field.stop])
                total += field.stop - field.start
                continue
            if within is _Kind.TENSOR:
                inner, size = self._tensor(self.data[field.payload : field.stop])
            else:
                inner, size = self.message(within, field.payload, field.stop, depth + 1)
            head = _key(field.number) + _varint(size)
            pieces += [head, *inner]
            total += len(head) + size
        return pieces, total

    def _tensor(self, body: bytes) -> tuple[list[Piece], int]:
        tensor = onnx.TensorProto.FromString(body)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location", "").encode() != self.location:
            return [body], len(body)
        number, length = int(entries["offset"]), int(entries["length"])
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        head = tensor.SerializeToString() + _key(_RAW_DATA) + _varint(length)
        return [head, number], len(head) + length


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring bytes as one piece."""
    merged: list[Piece] = []
    run: list[bytes] = []
    for piece in pieces:
        if isinstance(piece, bytes):
            run.append(piece)
        else:
            merged += [b"".join(run), piece]
            run = []
    return [*merged, b"".join(run)]


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise DecodeError(f"messages lie more than {MAX_DEPTH} deep in each other")


def _fields(data: Bytes, start: int, stop: int) -> Iterator[_Field]:
    """The fields of a message. Raises DecodeError where they do not end with it."""
    position = start
    while position < stop:
        key, payload = _read_varint(data, position, stop)
        kind = key & 7
        if kind == 0:
            _, end = _read_varint(data, payload, stop)
        elif kind == _LENGTH_DELIMITED:
            length, payload = _read_varint(data, payload, stop)
            end = payload + length
        elif kind in _FIXED_BYTES:
            end = payload + _FIXED_BYTES[kind]
        else:
            raise DecodeError(f"a field has the unknown kind {kind}")
        if end > stop:
            raise DecodeError("a field reaches beyond the end of its message")
        yield _Field(key >> 3, kind, position, payload, end)
        position = end


def _read_varint(data: Bytes, position: int, stop: int) -> tuple[int, int]:
    """The number, and where it ends."""
    value = shift = 0
    for place in range(position, min(stop, position + _MAX_VARINT_BYTES)):
        byte = data[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place + 1
        shift += 7
    raise DecodeError("a number has no end")


def _key(number: int) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
