"""Which files belong to an ONNX model: finds the external data that its tensors name, without the onnx package.

Walks the protobuf wire format of ModelProto over a memory map, so a file of any size costs no memory: messages that may
hold tensors are entered, everything else is skipped by its length. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import mmap
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from modelpress_client.errors import UnusableInputError, UsageError

MAX_NESTED = 200  # subgraphs within subgraphs: far more than any exporter writes
MAX_PATH_BYTES = 240

# message -> {field number: message of that field}; only what leads to a tensor.
_LEADS_TO: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class NotOnnxError(ValueError):
    """The bytes are no ModelProto."""


def model_files(path: Path) -> dict[str, Path]:
    """The files of an ONNX model by their path in the manifest: the model itself first, then its external data.

    Raises UnusableInputError for a location that leaves the model's folder, and UsageError for a file that is missing.
    """
    files = {path.name: path}
    try:
        locations = external_locations(path)
    except NotOnnxError as error:
        raise UnusableInputError(f"{path} is not a readable ONNX file: {error}.") from error
    for location in sorted(locations):
        check_location(path, location)
        sibling = path.parent / location
        if not sibling.is_file():
            raise UsageError(
                f"{path} keeps weights in '{location}', which is not at {sibling}. Put the file beside the model."
            )
        files[str(PurePosixPath(location))] = sibling
    return files


def check_location(path: Path, location: str) -> None:
    """Refuses names that would leave the folder of the model."""
    pure = PurePosixPath(location)
    bad = (
        not location
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in location
        or not location.isprintable()
        or str(pure) == "."
    )
    if bad:
        raise UnusableInputError(
            f"{path} names external data outside its own folder ({location!r}). Save it again with relative names."
        )
    if len(location.encode()) > MAX_PATH_BYTES or unicodedata.normalize("NFC", location) != location:
        raise UnusableInputError(
            f"{path} names external data with a name that the server does not take ({location[:60]!r}...): at most "
            f"{MAX_PATH_BYTES} bytes, Unicode NFC."
        )
    if str(pure) == path.name:
        raise UnusableInputError(f"{path} names itself as its external data.")


def external_locations(path: Path) -> set[str]:
    """Every `location` of external data in the file. Raises NotOnnxError when it is no ModelProto."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise NotOnnxError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _walk(data)


def _walk(data: mmap.mmap) -> set[str]:
    found: set[str] = set()
    stack = [("Model", 0, len(data), 0)]
    while stack:
        kind, start, end, depth = stack.pop()
        if depth > MAX_NESTED:
            raise NotOnnxError("its subgraphs are nested too deeply")
        for number, low, high in _fields(data, start, end):
            child = _LEADS_TO[kind].get(number)
            if child == "Entry":
                key, value = _entry(data, low, high)
                if key == "location":
                    found.add(value)
            elif child is not None:
                stack.append((child, low, high, depth + 1))
    return found


def _entry(data: mmap.mmap, start: int, end: int) -> tuple[str, str]:
    texts = {number: data[low : min(high, low + 4096)] for number, low, high in _fields(data, start, end)}
    try:
        return texts.get(_ENTRY_KEY, b"").decode(), texts.get(_ENTRY_VALUE, b"").decode()
    except UnicodeDecodeError as error:
        raise NotOnnxError("a name of external data is not UTF-8") from error


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of every length-delimited field of a message; others are skipped."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _BYTES:
            length, position = _varint(data, position, end)
            if number == 0 or position + length > end:
                raise NotOnnxError("a field reaches beyond the end; the file may be cut off")
            yield number, position, position + length
            position += length
        elif wire_type == _VARINT:
            _, position = _varint(data, position, end)
        elif wire_type in (_FIXED64, _FIXED32):
            position += 8 if wire_type == _FIXED64 else 4
        else:
            raise NotOnnxError("the bytes are not protobuf")
    if position != end:
        raise NotOnnxError("a field reaches beyond the end; the file may be cut off")


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise NotOnnxError("a number reaches beyond the end; the file may be cut off")
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
    raise NotOnnxError("the bytes are not protobuf")
