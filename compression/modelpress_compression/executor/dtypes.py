"""ONNX element types in torch, and arrays on their way in and out.

Types that torch cannot compute with are carried by a wider one that holds the same numbers: int4 and int2 by int8,
uint4 and uint2 by uint8, float4e2m1 by float32. Strings stay numpy arrays. What a carried value really is, the graph
alone knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
import torch
from onnx_ir import DataType
from torch import Tensor

from modelpress_compression.inputs import Array

TORCH_TYPES: Mapping[DataType, torch.dtype] = MappingProxyType(
    {
        DataType.FLOAT: torch.float32,
        DataType.DOUBLE: torch.float64,
        DataType.FLOAT16: torch.float16,
        DataType.BFLOAT16: torch.bfloat16,
        DataType.INT8: torch.int8,
        DataType.INT16: torch.int16,
        DataType.INT32: torch.int32,
        DataType.INT64: torch.int64,
        DataType.UINT8: torch.uint8,
        DataType.UINT16: torch.uint16,
        DataType.UINT32: torch.uint32,
        DataType.UINT64: torch.uint64,
        DataType.BOOL: torch.bool,
        DataType.COMPLEX64: torch.complex64,
        DataType.COMPLEX128: torch.complex128,
        DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
        DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
        DataType.FLOAT8E5M2: torch.float8_e5m2,
        DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
        DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
        DataType.INT4: torch.int8,
        DataType.INT2: torch.int8,
        DataType.UINT4: torch.uint8,
        DataType.UINT2: torch.uint8,
        DataType.FLOAT4E2M1: torch.float32,
    }
)
# Values that the narrow integer types can hold.
INTEGER_RANGES: Mapping[DataType, tuple[int, int]] = MappingProxyType(
    {
        DataType.INT2: (-2, 1),
        DataType.UINT2: (0, 3),
        DataType.INT4: (-8, 7),
        DataType.UINT4: (0, 15),
        DataType.INT8: (-128, 127),
        DataType.UINT8: (0, 255),
        DataType.INT16: (-(2**15), 2**15 - 1),
        DataType.UINT16: (0, 2**16 - 1),
        DataType.INT32: (-(2**31), 2**31 - 1),
    }
)
# torch stores these but has no arithmetic for them: they are computed in the signed type that holds their values
# (of uint64, those below 2**63; sums and products wrap as they should in any case).
SIGNED: Mapping[torch.dtype, torch.dtype] = MappingProxyType(
    {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
)
UNSIGNED = frozenset((DataType.UINT16, DataType.UINT32, DataType.UINT64))
# numpy has no such type of its own: the bits travel in an integer of the same width.
_BITS: Mapping[torch.dtype, tuple[torch.dtype, Any]] = MappingProxyType(
    {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
        torch.float8_e4m3fnuz: (torch.uint8, ml_dtypes.float8_e4m3fnuz),
        torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
        torch.float8_e5m2fnuz: (torch.uint8, ml_dtypes.float8_e5m2fnuz),
        torch.float8_e8m0fnu: (torch.uint8, ml_dtypes.float8_e8m0fnu),
    }
)
_FROM_NUMPY = {np.dtype(kind): (bits, carrier) for carrier, (bits, kind) in _BITS.items()}
_WIDENED = {
    np.dtype(ml_dtypes.int4): np.int8,
    np.dtype(ml_dtypes.int2): np.int8,
    np.dtype(ml_dtypes.uint4): np.uint8,
    np.dtype(ml_dtypes.uint2): np.uint8,
    np.dtype(ml_dtypes.float4_e2m1fn): np.float32,
}


def torch_type(dtype: DataType) -> torch.dtype:
    """The torch type that carries an ONNX type. Raises TypeError for strings and the like."""
    found = TORCH_TYPES.get(dtype)
    if found is None:
        raise TypeError(f"torch has no type for {dtype.name}")
    return found


def to_torch(array: Array, device: torch.device | str = "cpu") -> Any:
    """A copy of the array as a tensor; arrays of strings are returned as they are."""
    if array.dtype.kind in "OUS":
        return array
    if array.dtype in _WIDENED:
        array = array.astype(_WIDENED[array.dtype])
    if array.dtype in _FROM_NUMPY:
        bits, carrier = _FROM_NUMPY[array.dtype]
        view = array.astype(array.dtype, order="C", copy=True).view(np.dtype(f"i{array.dtype.itemsize}"))
        return torch.from_numpy(view).view(bits).view(carrier).to(device)
    return torch.from_numpy(np.array(array, order="C", copy=True)).to(device)


def to_numpy(tensor: Any, dtype: DataType | None = None) -> Any:
    """The numbers as numpy has them; `dtype` is the ONNX type where the tensor only carries it."""
    if not isinstance(tensor, Tensor):
        return tensor
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _BITS:
        bits, kind = _BITS[tensor.dtype]
        return tensor.view(bits).numpy().view(kind)
    array = tensor.numpy()
    if dtype is not None and (dtype.bitwidth or 8) < 8:
        return array.astype(dtype.numpy())
    return array


def tensor_of(source: onnx_ir.TensorProtocol, device: torch.device | str = "cpu") -> Any:
    """A constant of the graph as a torch tensor of its own."""
    if source.dtype == DataType.STRING:
        return np.asarray(source.numpy())
    return to_torch(np.asarray(source.numpy()), device)
