"""Arithmetic of two or more values, broadcast against each other."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from modelpress_compression.executor.registry import Function, operator, stateless
from modelpress_compression.executor.site import Site

stateless(torch.add, "Add")
stateless(torch.sub, "Sub")
stateless(torch.mul, "Mul")


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


@operator("CumSum", "CumProd")
def cumulative(site: Site) -> Function:
    """Sums or products along an axis; `exclusive` leaves the element itself out, `reverse` goes from the end."""
    exclusive, reverse = site.flag("exclusive"), site.flag("reverse")
    read = site.reader(1)
    function = torch.cumsum if site.node.op_type == "CumSum" else torch.cumprod
    neutral = 0 if site.node.op_type == "CumSum" else 1

    def run(x: Tensor, axis: Tensor) -> Tensor:
        (dim,) = read(x, axis)
        x = x.flip(dim) if reverse else x
        if exclusive:
            first = torch.full_like(x.narrow(dim, 0, 1), neutral)
            x = torch.cat([first, x.narrow(dim, 0, x.shape[dim] - 1)], dim)
        result = function(x, dim, dtype=x.dtype)
        return result.flip(dim) if reverse else result

    return run
