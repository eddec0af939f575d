"""What a TorchScript archive may contain, checked before torch reads it.

TorchScript's interpreter is a sandbox but for a few operators: `aten::save` writes any file, `aten::from_file` maps any
file into memory. `__setstate__` runs while the archive is being loaded, so the code is checked as text.
"""

from __future__ import annotations

import ast
import io
import tokenize
import zipfile
from pathlib import Path

from modelpress_compression.errors import RejectedModelError, UnsupportedFormatError
from modelpress_compression.loaders.pickle_scan import MAX_PICKLE_BYTES, check_torchscript
from modelpress_compression.loaders.zip_check import check_zip, read_member

MAX_CODE_BYTES = 64 * 1024 * 1024  # 64 MiB, all code files together
# Operators that reach files, other processes or the network.
_FORBIDDEN = frozenset({"save", "from_file", "load_library", "rpc_async", "rpc_sync", "rpc_remote", "to_here"})


def check_script(path: Path) -> None:
    """Raises RejectedModelError for code or pickles that do not belong into a model."""
    members = check_zip(path, "The TorchScript archive")
    code_bytes = 0
    with zipfile.ZipFile(path) as archive:
        for info in members:
            inner = info.filename.split("/", 1)[-1]
            if inner.endswith(".pkl"):
                check_torchscript(read_member(archive, info, MAX_PICKLE_BYTES), f"The archive's {inner[:80]}")
            elif inner.startswith("code/") and not inner.endswith(".debug_pkl"):
                code_bytes += info.file_size
                check_code(read_member(archive, info, MAX_CODE_BYTES), inner)
    if code_bytes > MAX_CODE_BYTES:
        raise RejectedModelError(f"The archive has {code_bytes} bytes of code.", finding="ARCHIVE")


def check_code(code: bytes, what: str) -> None:
    """Raises RejectedModelError (finding=SCRIPT_OPERATOR) where the code names a forbidden operator as an attribute."""
    try:
        tokens = [
            token
            for token in tokenize.tokenize(io.BytesIO(code).readline)
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.STRING)
        ]
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError) as error:
        raise UnsupportedFormatError(f"The archive's {what[:80]} is no readable TorchScript ({error}).") from error
    for index, token in enumerate(tokens):
        before = tokens[index - 1].string if index else ""
        name = token.string if token.type == tokenize.NAME and before == "." else ""
        if token.type == tokenize.NAME and token.string == "getattr":
            name = _getattr_name(tokens[index + 1 :])
        if name in _FORBIDDEN:
            raise RejectedModelError(
                f"The model's code calls {name!r} ({what[:80]}), which reaches outside of the model; "
                f"a model may only compute.",
                finding="SCRIPT_OPERATOR",
                operator=name,
            )


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
