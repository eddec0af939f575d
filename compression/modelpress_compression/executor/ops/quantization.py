"""QuantizeLinear and DequantizeLinear, with straight-through gradients.

    q = clamp(round(x / s) + z, low, high)        y = (q - z) * s

Where only DequantizeLinear reads q (fake quantization, as in training), q is carried as floats and rounding passes its
gradient on as it is (Bengio et al. 2013). The pair then has the gradients of LSQ (Esser et al. 2020, arXiv:1902.08153):
dy/dx is 1 within the range and 0 outside, dy/ds is round(x / s) - x / s within the range and the bound minus z outside.
LSQ's factor 1 / sqrt(n * high) on the scale's gradient is left to the optimizer's learning rate.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx_ir import DataType
from torch import Tensor

from modelpress_compression.executor.dtypes import INTEGER_RANGES, TORCH_TYPES, torch_type
from modelpress_compression.executor.ops.casting import cast
from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site
from modelpress_compression.graph.read import MICROSOFT


class RoundStraightThrough(torch.autograd.Function):
    """round(x), half to even, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def round_straight_through(x: Tensor) -> Tensor:
    """round(x) with the gradient of x; without gradients, as fast as round alone."""
    if not x.requires_grad:
        return torch.round(x)
    result: Tensor = RoundStraightThrough.apply(x)  # type: ignore[no-untyped-call]
    return result


def spread(value: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Scales or zero points, ready to be broadcast against x: one for all, one for each index of the axis, or one for
    each block of it."""
    if value.numel() == 1:
        return value.reshape(())
    if block:
        return value.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.dim()
    shape[axis] = -1
    return value.reshape(shape)


def quantized(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: DataType) -> Tensor:
    """q as floats, in an integer type's range; scale and zero point are already spread."""
    low, high = INTEGER_RANGES[dtype]
    whole = round_straight_through(x / scale)
    if zero_point is not None:
        whole = whole + zero_point.to(whole.dtype)
    return _clamp(whole, low, high)


def _clamp(x: Tensor, low: int, high: int) -> Tensor:
    """clamp(x) with gradient 1 on the bounds: the outermost levels belong to the range. torch.clamp gives 1 there up to
    torch 2.13 and 0 since."""
    if not x.requires_grad:
        return x.clamp(low, high)
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


# Where the graph does not tell the type of a zero point, the tensor does: no graph leaves 4-bit types open.
_BY_CARRIER = {torch_type(dtype): dtype for dtype in TORCH_TYPES if dtype.bitwidth >= 8}


def _quantized_type(site: Site) -> DataType | None:
    if site.has(2):
        return site.dtype(2)
    return DataType(site.integer("output_dtype", 0) or DataType.UINT8)


@operator("QuantizeLinear")
@operator("QuantizeLinear", domain=MICROSOFT)
def quantize_linear(site: Site) -> Function:
    """Integers, or 8-bit and 4-bit floats."""
    told, axis, block = _quantized_type(site), site.integer("axis", 1), site.integer("block_size", 0)
    precision = site.integer("precision", 0)
    working = torch_type(DataType(precision)) if precision else None
    saturate, keeps = site.flag("saturate", True), site.keeps_gradient

    def run(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        dtype = told or (DataType.UINT8 if zero_point is None else _BY_CARRIER[zero_point.dtype])
        factor = spread(scale, x, axis, block)
        if working is not None:
            x, factor = x.to(working), factor.to(working)
        elif x.element_size() < 4:
            x, factor = x.to(torch.float32), factor.to(torch.float32)
        zero = None if zero_point is None else spread(zero_point, x, axis, block)
        if dtype in INTEGER_RANGES:
            q = quantized(x, factor, zero, dtype)
            return q if keeps else q.to(torch_type(dtype))
        scaled = x / factor
        q = cast(scaled.detach(), dtype, saturate=saturate)
        return scaled + (q.to(scaled.dtype) - scaled).detach() if keeps else q

    return run


@operator("DequantizeLinear")
@operator("DequantizeLinear", domain=MICROSOFT)
def dequantize_linear(site: Site) -> Function:
    axis, block = site.integer("axis", 1), site.integer("block_size", 0)
    chosen = site.integer("output_dtype", 0)
    output = torch_type(DataType(chosen)) if chosen else None
    zero_is_zero = (zero := site.constant(2)) is not None and not bool(zero.to(torch.float32).any())

    def run(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        working = torch.float64 if scale.dtype == torch.float64 else torch.float32
        values = x.to(working)
        if zero_point is not None and not zero_is_zero:
            values = values - spread(zero_point, x, axis, block).to(working)
        return (values * spread(scale, x, axis, block)).to(output or scale.dtype)

    return run


def dynamic_parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero point) of uint8 for the range of x, 0 included."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.round((0 - low) / scale).clamp(0, 255)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(site: Site) -> Function:
    """uint8 by the range of the value itself; integers have no gradient."""

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, zero = dynamic_parameters(x)
        q = (torch.round(x / scale) + zero).clamp(0, 255)
        return q.to(torch.uint8), scale, zero.to(torch.uint8)

    return run
