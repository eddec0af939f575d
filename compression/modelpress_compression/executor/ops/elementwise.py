"""Functions of one value, element by element."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.registry import Function, operator, stateless
from modelpress_compression.executor.site import Site

for _op_type, _function in (
    ("Abs", torch.abs), ("Acos", torch.acos), ("Acosh", torch.acosh), ("Asin", torch.asin), ("Asinh", torch.asinh),
    ("Atan", torch.atan), ("Atanh", torch.atanh), ("Ceil", torch.ceil), ("Cos", torch.cos), ("Cosh", torch.cosh),
    ("Erf", torch.erf), ("Exp", torch.exp), ("Floor", torch.floor), ("IsNaN", torch.isnan), ("Log", torch.log),
    ("Neg", torch.neg), ("Reciprocal", torch.reciprocal), ("Round", torch.round), ("Sign", torch.sign),
    ("Sin", torch.sin), ("Sinh", torch.sinh), ("Sqrt", torch.sqrt), ("Tan", torch.tan), ("Tanh", torch.tanh),
    ("BitwiseNot", torch.bitwise_not), ("Not", torch.logical_not),
):  # fmt: skip
    stateless(_function, _op_type, since=1)


@operator("Identity", carries_unsigned=True)
def identity(site: Site) -> Function:
    """Tensors, sequences and optional values alike."""
    return lambda value: value


@operator("IsInf")
def is_inf(site: Site) -> Function:
    negative, positive = site.flag("detect_negative", True), site.flag("detect_positive", True)

    def run(x: Tensor) -> Tensor:
        if negative and positive:
            return torch.isinf(x)
        if positive:
            return torch.isposinf(x)
        return torch.isneginf(x) if negative else torch.zeros_like(x, dtype=torch.bool)

    return run


@operator("Clip", until=10)
def clip_attributes(site: Site) -> Function:
    """Bounds as attributes."""
    lowest = site.number("min", torch.finfo(torch.float32).min)
    highest = site.number("max", torch.finfo(torch.float32).max)
    return lambda x: torch.clamp(x, lowest, highest)


@operator("Clip", since=11)
def clip(site: Site) -> Function:
    """Bounds as scalars; where both are constant, as numbers, which is faster."""
    bounds = [site.constant(index) for index in (1, 2)]
    if all(bound is not None or not site.has(index) for index, bound in enumerate(bounds, 1)):
        low, high = (None if bound is None else bound.item() for bound in bounds)
        if low is None and high is None:
            return lambda x, *_: x
        if low == 0 and high is None:
            return lambda x, *_: torch.relu(x)
        if isinstance(low, float) and isinstance(high, float) and low <= high:
            # The same as clamp, with one pass instead of four in the gradient.
            return lambda x, *_: F.hardtanh(x, low, high)
        return lambda x, *_: torch.clamp(x, low, high)

    def run(x: Tensor, minimum: Tensor | None = None, maximum: Tensor | None = None) -> Tensor:
        # Where the bounds cross, the upper one holds.
        x = x if minimum is None else torch.maximum(x, minimum)
        return x if maximum is None else torch.minimum(x, maximum)

    return run
