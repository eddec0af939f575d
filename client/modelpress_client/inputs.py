"""`NAME:DTYPE[DIM,...]`: how a person spells an input.

x:float32[batch,1,28,28]    a word is a dynamic dimension
ids:int64[batch,?]          ? is a dynamic dimension without a name
step:int64[]                a scalar
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from modelpress_protos.v1.common_pb2 import Dim, TensorSpec

from modelpress_client.errors import UsageError

DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool", "complex64", "complex128", "string"),
)
MAX_DIMS = 32
EXAMPLE = "x:float32[batch,1,28,28]"

_SPEC = re.compile(r"\s*(?P<name>.+?)\s*:\s*(?P<dtype>[A-Za-z0-9_]+)\s*\[(?P<dims>[^\[\]]*)\]\s*", re.DOTALL)
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def parse_input(text: str) -> TensorSpec:
    """Parses one input. Raises UsageError that says which part is wrong."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise UsageError(f"'{text}' is not an input; write NAME:DTYPE[DIM,...], for example {EXAMPLE}")
    name, dtype = match["name"], match["dtype"]
    if not name.isprintable():
        raise UsageError(f"The name of input {name!r} has characters that cannot be printed.")
    if dtype not in DTYPES:
        raise UsageError(f"Input '{name}': '{dtype}' is not an element type; there are {', '.join(DTYPES)}")
    dims = match["dims"].split(",") if match["dims"].strip() else []
    if len(dims) > MAX_DIMS:
        raise UsageError(f"Input '{name}' has {len(dims)} dimensions; at most {MAX_DIMS} are possible.")
    return TensorSpec(name=name, dtype=dtype, shape=[_dim(name, dim.strip()) for dim in dims])


def parse_inputs(texts: Iterable[str | TensorSpec]) -> list[TensorSpec]:
    """Parses several inputs; no name may come twice."""
    specs = [parse_input(text) if isinstance(text, str) else text for text in texts]
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"Input '{twice[0]}' is given twice.")
    return specs


def format_input(spec: TensorSpec) -> str:
    """The text that parse_input reads."""
    dims = ",".join(dim.symbol if dim.WhichOneof("dim") == "symbol" else _extent(dim) for dim in spec.shape)
    return f"{spec.name}:{spec.dtype}[{dims}]"


def _extent(dim: Dim) -> str:
    return str(dim.value) if dim.WhichOneof("dim") == "value" else "?"


def _dim(name: str, text: str) -> Dim:
    if text == "?":
        return Dim()
    if text.isascii() and text.isdigit():
        if int(text) >= 2**63:
            raise UsageError(f"Input '{name}': dimension {text} is too large.")
        return Dim(value=int(text))
    if not _SYMBOL.fullmatch(text):
        shown = f"'{text}'" if text else "an empty text"
        raise UsageError(f"Input '{name}': {shown} is not a dimension; write a number, or a word for a dynamic one.")
    return Dim(symbol=text)
