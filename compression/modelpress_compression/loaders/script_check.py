"""What a TorchScript archive may contain, checked before torch reads it.

TorchScript's interpreter is a sandbox but for a few operators: `aten::save` writes any file, `aten::from_file` maps any
file into memory. `__setstate__` runs while the archive is being loaded, so the code is checked as text.
"""

from __future__ import annotations

import ast
import io
import tokenize

from modelpress_compression.archive import Archive
from modelpress_compression.errors import UnsupportedFormatError
from modelpress_compression.loaders.formats.pickle_scan import (
    MAX_PICKLE_BYTES,
    TENSOR_GLOBALS,
    foreign_global,
    scan_pickle,
)
from modelpress_compression.loaders.formats.refusals import refused
from modelpress_compression.loaders.formats.torch_archive import inner_members

MAX_CODE_BYTES = 64 * 1024 * 1024  # 64 MiB, all code files together
# Operators that reach files, other processes or the network.
_FORBIDDEN = frozenset({"save", "from_file", "load_library", "rpc_async", "rpc_sync", "rpc_remote", "to_here"})
# Of torch.jit.optimize_for_inference; written without its value.
_UNSAVED_CONSTANT = "ConstantMKLDNNTensor"
# TorchScript's own unpickler, in C++, imports nothing; it knows these and the classes of the archive.
_GLOBALS = TENSOR_GLOBALS | frozenset(
    f"torch.jit._pickle {name}"
    for name in (
        "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "build_complexlist",
        "build_tensor_from_id", "restore_type_tag",
    )
) | {
    f"torch.{name}" if name.startswith("_utils") else f"torch {name}"
    for name in (
        "_utils _rebuild_qtensor", "per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams",
        "QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage", "qint8", "quint8",
        "qint32", "quint4x2",
    )
}  # fmt: skip
_CLASSES = "__torch__"
# Classes written in C++; only the packed weights of quantized layers and cells belong into a model.
_NATIVE_CLASSES = "__torch__.torch.classes."
_NATIVE_ALLOWED = ("__torch__.torch.classes.quantized", "__torch__.torch.classes.rnn")


def check_script(archive: Archive) -> None:
    """Raises RejectedModelError for code or pickles that do not belong into a model, UnsupportedFormatError for code
    that torch cannot read."""
    code_bytes = 0
    for inner, member in inner_members(archive).items():
        if inner.endswith(".pkl"):
            check_pickle(archive.read(member, MAX_PICKLE_BYTES), f"The archive's {inner[:80]}")
        elif inner.startswith("code/") and not inner.endswith(".debug_pkl"):
            code_bytes += member.size_bytes
            check_code(archive.read(member, MAX_CODE_BYTES), inner)
    if code_bytes > MAX_CODE_BYTES:
        raise refused("CODE_SIZE", bytes=code_bytes, most=MAX_CODE_BYTES)


def check_pickle(data: bytes, what: str) -> None:
    """Refuses a pickle that TorchScript's writer would not write. Raises RejectedModelError."""
    outside = []
    for name in scan_pickle(data, what).outside(_GLOBALS):
        module = name.split(" ", maxsplit=1)[0]
        own = module == _CLASSES or module.startswith(_CLASSES + ".")
        native = f"{module}.".startswith(_NATIVE_CLASSES) and module not in _NATIVE_ALLOWED
        if not own or native:
            outside.append(name)
    if outside:
        raise foreign_global(what, outside)


def check_code(code: bytes, what: str) -> None:
    """Raises RejectedModelError (finding=SCRIPT_OPERATOR) where the code names a forbidden operator as an attribute."""
    try:
        tokens = [
            token
            for token in tokenize.tokenize(io.BytesIO(code).readline)
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.STRING)
        ]
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError) as error:
        raise UnsupportedFormatError(
            f"The archive's {what[:80]} is no readable TorchScript ({error}); save it again with torch.jit.save."
        ) from error
    for index, token in enumerate(tokens):
        before = tokens[index - 1].string if index else ""
        name = token.string if token.type == tokenize.NAME and before == "." else ""
        if token.type == tokenize.NAME and token.string == "getattr":
            name = _getattr_name(tokens[index + 1 :])
        if name in _FORBIDDEN:
            raise refused("SCRIPT_OPERATOR", operator=name, where=what[:80])
        if name == _UNSAVED_CONSTANT:
            raise refused("SCRIPT_INFERENCE")


def _getattr_name(tokens: list[tokenize.TokenInfo]) -> str:
    """The name that `getattr(..., "name")` spells, put together from adjacent literals."""
    name, depth = "", 0
    for token in tokens:
        depth += {"(": 1, ")": -1}.get(token.string, 0)
        if token.type == tokenize.STRING and depth == 1:
            try:
                name += str(ast.literal_eval(token.string))
            except (ValueError, SyntaxError):
                return "save"  # what cannot be read is treated as forbidden
        if depth == 0:
            break
    return name
