"""What kind of file a model is, as far as the client must know: content decides, never the name.

The server decides the format for itself. The client looks only for files that the server would refuse although there is
a way: state dicts and pickled modules, which are converted on the user's own machine. Nothing is unpickled here.
"""

from __future__ import annotations

import enum
import pickletools
import struct
import zipfile
from pathlib import Path

from modelpress_client.errors import UnusableInputError

MAX_PICKLE_BYTES = 64 * 1024 * 1024  # 64 MiB: the pickle names the tensors; their bytes lie beside it
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
# `torch.save` before 1.6 starts with a pickle of this magic number.
LEGACY_TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_TENSOR_GLOBALS = (
    "torch._utils ",
    "collections OrderedDict",
    "torch._tensor ",
    "torch.serialization ",
    "torch.storage ",
)


class FileKind(enum.Enum):
    """What the client does with a file depends on this alone."""

    ONNX = "ONNX"
    ARCHIVE = "an archive with its own code"  # TorchScript or torch.export: the server reads it
    STATE_DICT = "a PyTorch state dict"
    SAFETENSORS = "safetensors weights"
    PICKLED_MODULE = "a pickled PyTorch module"
    UNKNOWN = "of no known format"  # the server says so


def kind_of(path: Path) -> FileKind:
    """Looks at the first bytes, and into zip archives. Raises OSError when the file cannot be read."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if head[:1] == b"\x80" and LEGACY_TORCH_MAGIC in head:
        return _kind_of_legacy(path)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return FileKind.PICKLED_MODULE
    if len(head) > 8 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= MAX_SAFETENSORS_HEADER_BYTES:
        return FileKind.SAFETENSORS
    # ModelProto starts with ir_version in every known writer; others may start with producer or graph.
    return FileKind.ONNX if head[:1] in (b"\x08", b"\x12", b"\x3a") else FileKind.UNKNOWN


def check_sendable(path: Path, kind: FileKind) -> None:
    """Refuses what the server would refuse, with the way out. Raises UnusableInputError."""
    if kind in (FileKind.STATE_DICT, FileKind.SAFETENSORS):
        raise UnusableInputError(
            f"{path} is {kind.value}: weights without the network they belong to. Name the code that builds it with "
            "--architecture PACKAGE.MODULE:FACTORY and --input NAME:DTYPE[DIM,...] (in Python: architecture=, "
            "inputs=); it is then converted on this machine. Or export it with torch.onnx.export or torch.export.save.",
            details={"path": str(path)},
        )
    if kind is FileKind.PICKLED_MODULE:
        raise UnusableInputError(
            f"{path} is {kind.value}; reading it runs the code in it, so no server does. If you trust the file, pass "
            "--trust-pickle and --input NAME:DTYPE[DIM,...] (in Python: trust_pickle=True, inputs=): it is then "
            "converted on this machine. Or export the model with torch.onnx.export or torch.export.save.",
            details={"path": str(path)},
        )


def _kind_of_zip(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inner = [name.split("/", 1)[1] if "/" in name else name for name in names]
            if any(name.startswith(("code/", "models/")) or name == "archive_format" for name in inner):
                return FileKind.ARCHIVE
            pickles = [name for name in names if name.endswith("data.pkl")]
            if not pickles:
                return FileKind.UNKNOWN
            if archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
                return FileKind.PICKLED_MODULE
            return _kind_of_pickle(archive.read(pickles[0]))
    # A damaged archive: the server's answer is as good as ours.
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError):
        return FileKind.UNKNOWN


def _kind_of_legacy(path: Path) -> FileKind:
    """Three pickles (magic, version, system), then the one that counts."""
    with path.open("rb") as file:
        try:
            for _ in range(3):
                for opcode, _argument, _position in pickletools.genops(file):
                    if opcode.name == "STOP":
                        break
            return _kind_of_pickle(file.read(MAX_PICKLE_BYTES))
        except (ValueError, EOFError):
            return FileKind.PICKLED_MODULE


def _kind_of_pickle(content: bytes) -> FileKind:
    """A state dict names nothing but tensors and their containers; anything else needs a module's code."""
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                return FileKind.PICKLED_MODULE
            if opcode.name == "GLOBAL" and not _names_tensors(str(argument)):
                return FileKind.PICKLED_MODULE
    except (ValueError, EOFError):
        return FileKind.PICKLED_MODULE
    return FileKind.STATE_DICT


def _names_tensors(name: str) -> bool:
    module, _, attribute = name.partition(" ")
    # torch FloatStorage, torch float32, torch.nn.parameter Parameter, collections OrderedDict ...
    return (
        name.startswith(_TENSOR_GLOBALS)
        or module == "torch"
        or (module, attribute) == ("torch.nn.parameter", "Parameter")
    )
