"""Constants, shapes, ranges and one-hot rows: values that depend on no numbers of a tensor, or only on a few."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site


@operator("Constant", carries_unsigned=True)
def constant(site: Site) -> Function:
    name = next((name for name in _CONSTANTS if name in site.node.attributes), None)
    if name is None:
        site.refuse("sparse tensors")
    value = _CONSTANTS[name](site)
    return lambda: value


_CONSTANTS: dict[str, Callable[[Site], Any]] = {
    "value": lambda site: site.tensor("value"),
    "value_float": lambda site: torch.tensor(site.number("value_float", 0.0)),
    "value_int": lambda site: torch.tensor(site.integer("value_int", 0)),
    "value_floats": lambda site: torch.tensor(site.floats("value_floats")),
    "value_ints": lambda site: torch.tensor(site.ints("value_ints"), dtype=torch.int64),
    "value_string": lambda site: np.array(site.string("value_string", ""), dtype=object),
    "value_strings": lambda site: np.array(site.strings("value_strings"), dtype=object),
}


@operator("ConstantOfShape", carries_unsigned=True)
def constant_of_shape(site: Site) -> Function:
    read, value = site.reader(0), site.tensor("value")
    content = torch.zeros(1) if value is None else value.reshape(1)
    # Integers are mostly parts of shapes, which stay on the CPU.
    content = content.to(site.device if content.dtype.is_floating_point else "cpu")
    return lambda shape: content.expand(torch.Size(read(shape)).numel()).reshape(read(shape)).clone()


@operator("Shape")
def shape_of(site: Site) -> Function:
    start, stop = site.integer("start", 0), site.integer("end", 0) if "end" in site.node.attributes else None
    if start == 0 and stop is None:
        return lambda x: torch.tensor(x.shape, dtype=torch.int64)
    return lambda x: torch.tensor(tuple(x.shape)[_bound(start, x) : _stop(stop, x)], dtype=torch.int64)


def _bound(position: int, x: Tensor) -> int:
    return min(max(position + x.dim() if position < 0 else position, 0), x.dim())


def _stop(position: int | None, x: Tensor) -> int:
    return x.dim() if position is None else _bound(position, x)


@operator("Size")
def size_of(site: Site) -> Function:
    return lambda x: torch.tensor(math.prod(x.shape))


@operator("Range")
def range_of(site: Site) -> Function:
    """start + i * delta; floats by this formula, so that no rounding adds an element."""

    def run(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        first, step = start.item(), delta.item()
        count = max(math.ceil((limit.item() - first) / step), 0)
        return torch.arange(count, dtype=start.dtype, device=start.device) * step + first

    return run


@operator("EyeLike")
def eye_like(site: Site) -> Function:
    offset, dtype = site.integer("k", 0), site.torch_type("dtype")

    def run(x: Tensor) -> Tensor:
        ones = torch.ones(x.shape, dtype=dtype or x.dtype, device=x.device)
        return torch.tril(torch.triu(ones, offset), offset)

    return run


@operator("OneHot")
def one_hot(site: Site) -> Function:
    """values = (off, on); an index outside [-depth, depth) gives a row of off."""
    axis, read = site.integer("axis", -1), site.reader(1)

    def run(indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
        (count,) = read(indices, depth, values)
        places = indices.to(torch.int64)
        places = torch.where(places < 0, places + count, places)
        shape = [1] * (places.dim() + 1)
        position = axis if axis >= 0 else axis + places.dim() + 1
        shape[position] = count
        classes = torch.arange(count, device=places.device).reshape(shape)
        return torch.where(places.unsqueeze(position) == classes, values[1], values[0])

    return run
