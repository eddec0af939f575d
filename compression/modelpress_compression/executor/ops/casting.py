"""Changes of the element type. Gradients pass between floating-point types."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from onnx_ir import DataType
from torch import Tensor

from modelpress_compression.executor.dtypes import INTEGER_RANGES, to_numpy, to_torch, torch_type
from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site

_FLOAT8 = (DataType.FLOAT8E4M3FN, DataType.FLOAT8E4M3FNUZ, DataType.FLOAT8E5M2, DataType.FLOAT8E5M2FNUZ)


def cast(x: Tensor, to: DataType, *, saturate: bool = True, round_mode: str = "up") -> Tensor:
    """`x` in the type that carries `to`; narrow integers wrap around, 8-bit floats saturate or become infinite."""
    target = torch_type(to)
    if to in _FLOAT8:
        return _to_float8(x, to, saturate)
    if to == DataType.FLOAT8E8M0:
        return _to_power_of_two(x, round_mode)
    if to == DataType.FLOAT4E2M1:
        return _to_float4(x)
    if to.bitwidth < 8:
        low, high = INTEGER_RANGES[to]
        span = high - low + 1
        whole = x.to(torch.float32).trunc().to(torch.int64)
        return ((whole - low) % span + low).to(target)
    return x.to(target)


def _to_float8(x: Tensor, to: DataType, saturate: bool) -> Tensor:
    target = torch_type(to)
    values = x.to(torch.float32)
    limit = torch.finfo(target).max
    if saturate:
        inside = torch.clamp(values, -limit, limit)
        return torch.where(torch.isnan(values), values, inside).to(target)
    exact = np.asarray(to_numpy(values)).astype(to.numpy())
    result: Tensor = to_torch(exact, x.device)
    return result


def _to_power_of_two(x: Tensor, round_mode: str) -> Tensor:
    """float8e8m0: an exponent alone; `up` and `down` round it, `nearest` takes the closer one, ties up."""
    values = x.to(torch.float64)
    exponent = torch.log2(values.abs())
    if round_mode == "up":
        exponent = torch.ceil(exponent)
    elif round_mode == "down":
        exponent = torch.floor(exponent)
    else:
        lower = torch.floor(exponent)
        exponent = torch.where(values.abs() >= 1.5 * torch.exp2(lower), lower + 1, lower)
    result: Tensor = torch.exp2(exponent.clamp(-127, 127)).to(torch.float32).to(torch.float8_e8m0fnu)
    return result


def _to_float4(x: Tensor) -> Tensor:
    exact = np.asarray(to_numpy(x.to(torch.float32))).astype(ml_dtypes.float4_e2m1fn)
    result: Tensor = to_torch(exact.astype(np.float32), x.device)
    return result


@operator("Cast", carries_unsigned=True)
def cast_to(site: Site) -> Function:
    to = DataType(site.integer("to", 1))
    saturate, mode = site.flag("saturate", True), site.string("round_mode", "up")
    if to == DataType.STRING or site.dtype(0) == DataType.STRING:
        site.refuse("strings cannot be converted in torch")
    return lambda x: cast(x, to, saturate=saturate, round_mode=mode)


@operator("CastLike", carries_unsigned=True)
def cast_like(site: Site) -> Function:
    saturate, mode = site.flag("saturate", True), site.string("round_mode", "up")
    to = site.dtype(1)
    if to is None:
        return lambda x, like: x.to(like.dtype)
    if to == DataType.STRING:
        site.refuse("strings cannot be converted in torch")
    return lambda x, _: cast(x, to, saturate=saturate, round_mode=mode)


@operator("BitCast", carries_unsigned=True)
def bit_cast(site: Site) -> Function:
    """The same bits as another type of the same width."""
    to = torch_type(DataType(site.integer("to", 1)))
    return lambda x: x.contiguous().view(to)
