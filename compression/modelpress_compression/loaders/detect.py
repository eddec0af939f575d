"""Which format a file is in, by its content alone: names lie, `.pt` is four different formats."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

from modelpress_compression.errors import UnsupportedFormatError
from modelpress_compression.loaders.pickle_scan import MAX_PICKLE_BYTES, TENSOR_GLOBALS, scan_pickle
from modelpress_compression.loaders.zip_check import check_zip, read_member

FORMATS = ("onnx", "torchscript", "torch_export", "state_dict", "safetensors", "pickled_module")

_READABLE = (
    "Readable are ONNX, TorchScript (torch.jit.save) and torch.export files; state dicts, safetensors and pickled "
    "modules after conversion on your own machine."
)
# First bytes of what people upload by mistake, at an offset; and what to do about it.
_STRANGERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?); export it to ONNX with tf2onnx or keras.Model.export"),
    (4, b"TFL3", "a TensorFlow Lite file; convert the original model with tf2onnx"),
    (0, b"\x93NUMPY", "a NumPy array, not a model"),
    (0, b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it first"),
    (0, b"BZh", "bzip2-compressed; unpack it first"),
    (0, b"\xfd7zXZ\x00", "xz-compressed; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it first"),
    (0, b"GGUF", "a GGUF file of llama.cpp, which holds weights that are quantized already"),
    (0, b"<!DOCTYPE", "a web page; the download went wrong"),
    (0, b"<html", "a web page; the download went wrong"),
    (0, b"<?xml", "an XML file (OpenVINO?); export the original model to ONNX"),
    (0, b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with 'git lfs pull'"),
    (257, b"ustar", "a tar archive; unpack it first"),
)
_MAX_SAFETENSORS_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the format's own reader


def detect(path: str | os.PathLike[str]) -> str:
    """One of FORMATS. Raises UnsupportedFormatError, and RejectedModelError for a deceitful archive."""
    path = Path(path)
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        raise UnsupportedFormatError("The file is empty; write or upload it again.")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _detect_zip(path)
    for offset, magic, what in _STRANGERS:
        if head[offset:].startswith(magic):
            raise UnsupportedFormatError(f"The file is {what}. {_READABLE}")
    if _is_safetensors(path, head, size_bytes):
        return "safetensors"
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _detect_pickle(path, size_bytes)
    if _looks_like_onnx(head):
        return "onnx"
    raise UnsupportedFormatError(f"The file is in no known format. {_READABLE}")


def _detect_zip(path: Path) -> str:
    _refuse_arrays(path)
    members = check_zip(path)
    names = {info.filename for info in members}
    # Every torch archive keeps its members under one folder; its name is the file's name at the time of writing.
    inner = {name.split("/", 1)[1] for name in names if "/" in name}
    if "serialized_exported_program.json" in names or any(name.startswith("models/") for name in inner):
        return "torch_export"
    if any(name.startswith("data/aotinductor/") for name in inner):
        return "torch_export"
    if "constants.pkl" in inner and "data.pkl" in inner:
        return "torchscript"
    if "data.pkl" in inner:
        with zipfile.ZipFile(path) as archive:
            pickles = [info for info in members if info.filename.split("/", 1)[-1] == "data.pkl"]
            data = read_member(archive, pickles[0], MAX_PICKLE_BYTES)
        outside = scan_pickle(data, "The file's pickle").outside(TENSOR_GLOBALS)
        return "pickled_module" if outside else "state_dict"
    if any(name.endswith(("config.json", "model.weights.h5")) for name in names):
        raise UnsupportedFormatError(f"The file is a Keras archive; export it to ONNX. {_READABLE}")
    raise UnsupportedFormatError(f"The file is a zip archive, but not one of torch's. {_READABLE}")


def _refuse_arrays(path: Path) -> None:
    """Data instead of a model is a common slip; said before anything is said about the archive itself."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return  # check_zip says it better
    if names and all(name.endswith(".npy") for name in names):
        raise UnsupportedFormatError("The file is an .npz of NumPy arrays, not a model; give it as --data or --eval.")


def _detect_pickle(path: Path, size_bytes: int) -> str:
    """torch.save before version 1.6: five pickles in a row (magic number, protocol, system, object, storage keys)."""
    with path.open("rb") as file:
        data = file.read(min(size_bytes, MAX_PICKLE_BYTES))
    found: set[str] = set()
    for _ in range(4):
        scan = scan_pickle(data, "The file's pickle")
        found |= scan.globals
        data = data[scan.end :]
        if not data.startswith(b"\x80"):
            break
    return "pickled_module" if found - TENSOR_GLOBALS else "state_dict"


def _is_safetensors(path: Path, head: bytes, size_bytes: int) -> bool:
    if len(head) < 10 or head[8:9] != b"{":
        return False
    header_bytes = int.from_bytes(head[:8], "little")
    if header_bytes > min(size_bytes - 8, _MAX_SAFETENSORS_HEADER_BYTES):
        raise UnsupportedFormatError(
            f"The file looks like safetensors, but its header claims {header_bytes} bytes "
            f"of {size_bytes}; it is damaged."
        )
    with path.open("rb") as file:
        file.seek(8)
        try:
            header = json.load(io.BytesIO(file.read(header_bytes)))
        except (ValueError, RecursionError) as error:
            raise UnsupportedFormatError("The file looks like safetensors, but its header is not JSON.") from error
    return isinstance(header, dict)


def _looks_like_onnx(head: bytes) -> bool:
    """Whether the first fields could be a ModelProto's: all its fields are varints (1, 5) or have a length (2-25)."""
    position = 0
    for _ in range(3):
        if position >= len(head):
            break
        key, position = _varint(head, position)
        field, wire = key >> 3, key & 7
        if (field, wire) not in _MODEL_PROTO_FIELDS:
            return False
        value, position = _varint(head, position)
        if position < 0:
            return False
        position += value if wire == 2 else 0
    return True


# (field number, wire type) of onnx.ModelProto: 0 is a varint, 2 a field with a length.
_MODEL_PROTO_FIELDS = {
    (1, 0),
    (2, 2),
    (3, 2),
    (4, 2),
    (5, 0),
    (6, 2),
    (7, 2),
    (8, 2),
    (14, 2),
    (20, 2),
    (25, 2),
    (26, 2),
}


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number and the position after it; position -1 where it is cut off or too long."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            return 0, -1
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    return 0, -1
