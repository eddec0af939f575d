"""Names, element types and shapes of a model's inputs and outputs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelpress_compression.errors import InvalidInputsError

# NumPy spelling; the types that ONNX tensors can have and onnxruntime takes as inputs.
DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64", "bool", "string",
)  # fmt: skip

# TensorFlow's names have a colon themselves: `input:0`.
_SPEC = re.compile(r"(?P<name>[^\[\]]+):(?P<dtype>\w+)\[(?P<shape>[^\[\]]*)\]")
_SYMBOL = re.compile(r"[A-Za-z_][\w.]*")
# 4 Gi elements, 16 GiB of float32: nobody gives a model a larger input, and no machine here could make one up.
MAX_ELEMENTS = 2**32


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `shape`: a number is fixed, a word is a dynamic dimension of that name, None is unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """Reads `NAME:DTYPE[DIM,...]`, for example `x:float32[batch,1,28,28]`. Raises InvalidInputsError."""
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise InvalidInputsError(
                f"Input {text!r} is not of the form NAME:DTYPE[DIM,...], e.g. 'x:float32[batch,3,224,224]'."
            )
        if match["dtype"] not in DTYPES:
            raise InvalidInputsError(
                f"Input {text!r}: unknown type {match['dtype']!r}; use one of {', '.join(DTYPES)}."
            )
        dims = [dim.strip() for dim in match["shape"].split(",")] if match["shape"].strip() else []
        return cls(match["name"], match["dtype"], tuple(_parse_dim(dim, text) for dim in dims))

    def __str__(self) -> str:
        return f"{self.name}:{self.dtype}[{','.join('?' if dim is None else str(dim) for dim in self.shape)}]"

    @property
    def array_dtype(self) -> np.dtype[np.generic]:
        """What an array of such values has in NumPy; strings are Unicode of any length."""
        return np.dtype(np.str_ if self.dtype == "string" else self.dtype)

    def concrete_shape(self, dynamic: int = 1) -> tuple[int, ...]:
        """The shape with every dynamic dimension at `dynamic`."""
        return tuple(dim if isinstance(dim, int) else dynamic for dim in self.shape)


def parse_specs(inputs: Sequence[str | TensorSpec]) -> tuple[TensorSpec, ...]:
    """Specs from texts or specs; names must differ. Raises InvalidInputsError."""
    specs = tuple(item if isinstance(item, TensorSpec) else TensorSpec.parse(item) for item in inputs)
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise InvalidInputsError(f"Two inputs have the same name: {', '.join(names)}.")
    check_elements(specs)
    return specs


def check_elements(specs: Sequence[TensorSpec]) -> None:
    """Raises InvalidInputsError where the fixed dimensions alone make an input that no memory holds."""
    for spec in specs:
        elements = math.prod(spec.concrete_shape())
        if elements > MAX_ELEMENTS:
            raise InvalidInputsError(
                f"Input {str(spec)[:200]!r} has {elements} elements; at most {MAX_ELEMENTS} can be given."
            )


def _parse_dim(dim: str, text: str) -> int | str | None:
    if dim.isascii() and dim.isdigit() and len(dim) < 12:
        return int(dim)
    if dim == "?":
        return None
    if _SYMBOL.fullmatch(dim):
        return dim
    raise InvalidInputsError(f"Input {text!r}: dimension {dim!r} is neither a number nor a name such as 'batch'.")
