"""Values from nothing or from shapes: constants, ranges, random numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from onnx_ir import DataType
from torch import Tensor

from modelpress_compression.executor.dtypes import torch_type
from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site


@operator("Constant", carries_unsigned=True)
def constant(site: Site) -> Function:
    value = _constant(site)
    return lambda: value


def _constant(site: Site) -> Any:
    if (tensor := site.tensor("value")) is not None:
        return tensor
    attributes = site.node.attributes
    if "value_float" in attributes:
        return torch.tensor(site.float("value_float", 0.0))
    if "value_int" in attributes:
        return torch.tensor(site.int("value_int", 0))
    if "value_floats" in attributes:
        return torch.tensor(site.floats("value_floats"))
    if "value_ints" in attributes:
        return torch.tensor(site.ints("value_ints"), dtype=torch.int64)
    if "value_string" in attributes:
        return np.array(site.string("value_string", ""), dtype=object)
    if "value_strings" in attributes:
        return np.array(site.strings("value_strings"), dtype=object)
    return site.refuse("sparse tensors")


@operator("ConstantOfShape", carries_unsigned=True)
def constant_of_shape(site: Site) -> Function:
    read, value = site.reader(0), site.tensor("value")
    content = torch.zeros(1) if value is None else value.reshape(1)
    # Integers are mostly shapes in the making, which stay with the CPU.
    content = content.to(site.device if content.dtype.is_floating_point else "cpu")
    return lambda shape: content.expand(torch.Size(read(shape)).numel()).reshape(read(shape)).clone()


@operator("Shape")
def shape_of(site: Site) -> Function:
    start, stop = site.int("start", 0), site.int("end", 0) if "end" in site.node.attributes else None
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
    offset, dtype = site.int("k", 0), site.torch_type("dtype")

    def run(x: Tensor) -> Tensor:
        ones = torch.ones(x.shape, dtype=dtype or x.dtype, device=x.device)
        return torch.tril(torch.triu(ones, offset), offset)

    return run


@operator("OneHot")
def one_hot(site: Site) -> Function:
    """values = (off, on); an index outside [-depth, depth) gives a row of off."""
    axis, read = site.int("axis", -1), site.reader(1)

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


def _generator(site: Site, device: torch.device) -> torch.Generator | None:
    """With a seed: the same numbers in every run. Without one: those of torch's own generator."""
    if "seed" not in site.node.attributes:
        return None
    return torch.Generator(device).manual_seed(int(site.node.attributes["seed"].value))


@operator("RandomNormal", "RandomUniform", deterministic=False)
def random(site: Site) -> Function:
    shape, dtype = site.ints("shape", ()) or (), site.torch_type("dtype", torch.float32)
    fill = _filler(site)
    return lambda: fill(torch.empty(shape, dtype=dtype, device=site.device))


@operator("RandomNormalLike", "RandomUniformLike", deterministic=False)
def random_like(site: Site) -> Function:
    dtype, fill = site.torch_type("dtype"), _filler(site)
    return lambda x: fill(torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device))


def _filler(site: Site) -> Function:
    def fill(empty: Tensor) -> Tensor:
        generator = _generator(site, empty.device)
        if "Normal" in site.node.op_type:
            return empty.normal_(site.float("mean", 0.0), site.float("scale", 1.0), generator=generator)
        return empty.uniform_(site.float("low", 0.0), site.float("high", 1.0), generator=generator)

    return fill


@operator("Bernoulli", deterministic=False)
def bernoulli(site: Site) -> Function:
    dtype = site.torch_type("dtype")
    return lambda p: torch.bernoulli(p.detach(), generator=_generator(site, p.device)).to(dtype or p.dtype)


@operator("Multinomial", deterministic=False)
def multinomial(site: Site) -> Function:
    """From unnormalized log-probabilities [batch, classes]."""
    count, dtype = site.int("sample_size", 1), site.torch_type("dtype", torch.int32)

    def run(logits: Tensor) -> Tensor:
        chances = torch.softmax(logits.detach().float(), -1)
        return torch.multinomial(chances, count, replacement=True, generator=_generator(site, logits.device)).to(dtype)

    return run


@operator("Dropout", deterministic=False)
def dropout(site: Site) -> Function:
    """Does nothing, unless the graph itself asks for training mode (opset 12 on)."""
    fixed_ratio, seeded, outputs = site.float("ratio", 0.5), site, site.outputs

    def run(x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Any:
        chance = fixed_ratio if ratio is None else float(ratio)
        active = training is not None and bool(training) and chance > 0
        if not active:
            return (x, torch.ones_like(x, dtype=torch.bool)) if outputs > 1 else x
        generator = _generator(seeded, x.device)
        mask = torch.rand(x.shape, device=x.device, generator=generator) >= chance
        y = torch.where(mask, x / (1 - chance), torch.zeros_like(x)) if chance < 1 else torch.zeros_like(x)
        return (y, mask) if outputs > 1 else y

    return run


def _window_terms(site: Site, length: int) -> tuple[Tensor, torch.dtype]:
    periodic = site.flag("periodic", True)
    steps = torch.arange(length, dtype=torch.float64)
    angle = 2 * math.pi * steps / (length if periodic else length - 1)
    return angle, torch_type(DataType(site.int("output_datatype", 1)))


_WINDOWS = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25 / 46, 21 / 46, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}


@operator(*_WINDOWS)
def window(site: Site) -> Function:
    """a - b cos(t) + c cos(2t)."""
    a, b, c = _WINDOWS[site.node.op_type]
    read = site.reader(0)

    def run(size: Tensor) -> Tensor:
        angle, dtype = _window_terms(site, read(size)[0])
        return (a - b * torch.cos(angle) + c * torch.cos(2 * angle)).to(dtype)

    return run
