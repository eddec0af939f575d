"""Functions of elements: of one value, or of several that are broadcast; arithmetic, comparisons, logic and bits."""

from __future__ import annotations

from functools import reduce

import numpy as np
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
    """Bounds are inputs; where both are constant they are bound as numbers, which is faster."""
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


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Integers are divided towards zero."""
    if a.dtype.is_floating_point:
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


stateless(divide, "Div")


@operator("Pow")
def power(site: Site) -> Function:
    """The result has the type of the base."""
    exponent = site.constant(1)
    if exponent is not None and exponent.numel() == 1 and exponent.dim() == 0:
        number = exponent.item()
        if number == 2:
            return lambda x, _: x * x
        return lambda x, _: torch.pow(x, number).to(x.dtype)
    return lambda x, y: torch.pow(x, y).to(x.dtype)


@operator("Mod")
def modulo(site: Site) -> Function:
    """fmod: the sign of the dividend, as in C; else that of the divisor, as in Python."""
    return torch.fmod if site.flag("fmod") else torch.remainder


@operator("Max")
def maximum(site: Site) -> Function:
    return lambda *values: reduce(torch.maximum, values)


@operator("Min")
def minimum(site: Site) -> Function:
    return lambda *values: reduce(torch.minimum, values)


@operator("Sum")
def total(site: Site) -> Function:
    return lambda *values: reduce(torch.add, values)


@operator("Mean")
def mean(site: Site) -> Function:
    return lambda *values: reduce(torch.add, values) / len(values)


for _op_type, _binary in (
    ("Add", torch.add), ("Sub", torch.sub), ("Mul", torch.mul),
    ("Greater", torch.gt), ("GreaterOrEqual", torch.ge), ("Less", torch.lt), ("LessOrEqual", torch.le),
    ("And", torch.logical_and), ("Or", torch.logical_or), ("Xor", torch.logical_xor),
    ("BitwiseAnd", torch.bitwise_and), ("BitwiseOr", torch.bitwise_or), ("BitwiseXor", torch.bitwise_xor),
):  # fmt: skip
    stateless(_binary, _op_type)


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
    """For unsigned integers; uint8 is shifted as it is, wider ones in a signed type with room for the result."""
    if site.string("direction", "LEFT") == "LEFT":
        return torch.bitwise_left_shift
    return torch.bitwise_right_shift
