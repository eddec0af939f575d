"""What a pickle would import, read from its opcodes; nothing is executed.

A pickle is a program: `GLOBAL` names any importable object and `REDUCE` calls it. The scan follows the few opcodes that
can lead a name to STACK_GLOBAL, and refuses what it cannot follow.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from modelpress_compression.errors import CompressionError, RejectedModelError, UnsupportedFormatError
from modelpress_compression.loaders.formats.refusals import refused

MAX_OPCODES = 5_000_000
MAX_PICKLE_BYTES = 256 * 1024 * 1024  # 256 MiB; weights lie beside the pickle, not in it

# Opcodes whose argument is a string, the only ones that may feed STACK_GLOBAL.
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING"}
_MEMO_PUTS = {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}
_MEMO_GETS = {"GET", "BINGET", "LONG_BINGET"}
_EXTENSIONS = {"EXT1", "EXT2", "EXT4"}

_STORAGES = (
    "FloatStorage", "DoubleStorage", "HalfStorage", "BFloat16Storage", "LongStorage", "IntStorage", "ShortStorage",
    "CharStorage", "ByteStorage", "BoolStorage", "ComplexFloatStorage", "ComplexDoubleStorage",
)  # fmt: skip
_DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
    "uint64", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip

# What rebuilding tensors takes; none of these calls anything else that the pickle names.
TENSOR_GLOBALS = frozenset(
    {f"torch {name}" for name in (*_STORAGES, *_DTYPES)}
    | {
        "collections OrderedDict",
        "torch Size",
        "torch device",
        "torch.storage UntypedStorage",
        "torch.storage TypedStorage",
        "torch UntypedStorage",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch.nn.parameter Parameter",
        "torch.serialization _get_layout",
    }
)


@dataclass(frozen=True)
class PickleScan:
    """`globals`: every `module name` that the pickle may import. `end`: where its STOP opcode ends, in bytes."""

    globals: frozenset[str]
    end: int

    def outside(self, allowed: Iterable[str]) -> list[str]:
        """Globals that are not allowed, sorted."""
        return sorted(self.globals - set(allowed))


def scan_pickle(data: bytes, what: str) -> PickleScan:
    """Names that one pickle may import. Raises UnsupportedFormatError, RejectedModelError (PICKLE_GLOBAL)."""
    with warnings.catch_warnings():
        # Python warns of escapes that it does not know in the strings of protocol 0, and reads them all the same.
        warnings.simplefilter("ignore", DeprecationWarning)
        return _scan(data, what)


def _scan(data: bytes, what: str) -> PickleScan:
    found: set[str] = set()
    memo: dict[int, str | None] = {}
    strings: list[str | None] = []  # what the last opcodes pushed, None for anything but a string
    end = 0
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(io.BytesIO(data))):
            if count > MAX_OPCODES:
                raise refused("PICKLE_SIZE", subject=what, most=MAX_OPCODES)
            name = opcode.name
            end = (position or 0) + 1
            if name in ("GLOBAL", "INST"):
                found.add(str(argument))
                strings.append(None)
            elif name == "STACK_GLOBAL":
                found.add(_stack_global(strings, what))
                strings[-2:] = [None]
            elif name in _EXTENSIONS:
                raise refused("PICKLE_EXTENSION", subject=what)
            elif name in _MEMO_PUTS:
                memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = strings[-1] if strings else None
            elif name in _MEMO_GETS:
                strings.append(memo.get(int(argument or 0)))
            elif name in _STRINGS:
                strings.append(argument if isinstance(argument, str) else None)
            elif name not in ("PROTO", "FRAME"):
                strings.append(None)
            del strings[:-2]
    except RejectedModelError:
        raise
    except (ValueError, OverflowError, UnicodeDecodeError, IndexError, AttributeError) as error:
        raise UnsupportedFormatError(f"{what} is no readable pickle ({error}); write the file again.") from error
    return PickleScan(frozenset(found), end)


def _stack_global(strings: list[str | None], what: str) -> str:
    if len(strings) < 2 or strings[-1] is None or strings[-2] is None:
        raise refused("PICKLE_NAMES", subject=what)
    return f"{strings[-2]} {strings[-1]}"


def foreign_global(what: str, names: list[str]) -> CompressionError:
    """The refusal of a pickle that imports `names`."""
    return refused("PICKLE_GLOBAL", subject=what, globals=", ".join(name.replace(" ", ".")[:80] for name in names[:5]))
