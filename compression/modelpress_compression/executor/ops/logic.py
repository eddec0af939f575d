"""Comparisons, logic, bits and choice."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modelpress_compression.executor.registry import Function, operator, stateless
from modelpress_compression.executor.site import Site

for _op_type, _function in (
    ("Greater", torch.gt), ("GreaterOrEqual", torch.ge), ("Less", torch.lt), ("LessOrEqual", torch.le),
    ("And", torch.logical_and), ("Or", torch.logical_or), ("Xor", torch.logical_xor),
    ("BitwiseAnd", torch.bitwise_and), ("BitwiseOr", torch.bitwise_or), ("BitwiseXor", torch.bitwise_xor),
):  # fmt: skip
    stateless(_function, _op_type)


def equal(a: Tensor, b: Tensor) -> Tensor:
    """Strings are compared as numpy arrays."""
    if isinstance(a, np.ndarray):
        return torch.from_numpy(np.asarray(a == np.asarray(b)))
    return torch.eq(a, b)


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Strings are chosen as numpy arrays."""
    if isinstance(a, np.ndarray):
        return np.where(condition.cpu().numpy(), a, np.asarray(b))
    return torch.where(condition, a, b)


stateless(equal, "Equal")
stateless(where, "Where")


@operator("BitShift")
def bit_shift(site: Site) -> Function:
    """Of unsigned integers; uint8 is shifted as it is, wider ones in a signed type with room for the result."""
    if site.string("direction", "LEFT") == "LEFT":
        return torch.bitwise_left_shift
    return torch.bitwise_right_shift
