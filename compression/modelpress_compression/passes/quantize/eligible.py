"""Which weights can be held in fewer bits, and why others cannot: the reasons go into the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.decibels import decibels
from modelpress_compression.encodings.operands import is_quantized
from modelpress_compression.graph.read import (
    attribute,
    constant_tensor,
    input_of,
    is_constant,
    is_op,
)

# Rounding to float16 leaves about 70 dB; a weight that keeps less has values that overflow or vanish.
MIN_WEIGHT_SQNR_DB = 40.0
_FLOAT16_MAX = float(np.finfo(np.float16).max)
# A product with fewer weights costs less than the nodes around it.
MIN_WEIGHT_ELEMENTS = 256
# Smaller tables are not worth two more nodes.
MIN_EMBEDDING_ELEMENTS = 4096


def why_not_weight(node: onnx_ir.Node, index: int, least: int = MIN_WEIGHT_ELEMENTS) -> str | None:
    """Why the input at `index` is no weight, of at least `least` elements, that can be quantized; None: it is one."""
    tensor = constant_tensor(input_of(node, index))
    if tensor is None:
        quantized = _is_quantized_weight(input_of(node, index))
        return "its weight is quantized already" if quantized else "its weight is computed at run time"
    if tensor.dtype != onnx_ir.DataType.FLOAT:
        return f"its weight is {tensor.dtype}, not float32"
    if tensor.size < least:
        return f"its {tensor.size} weights are too few to pay for quantizing its input"
    if not is_finite(tensor):
        return "its weight holds infinite or NaN values"
    return None


def _is_quantized_weight(value: onnx_ir.Value | None) -> bool:
    """Whether a value is made of constant integers by a node of quantized models, and perhaps rearranged."""
    maker = value.producer() if value is not None else None
    while is_op(maker, "Transpose", "Reshape", "Cast", "Identity"):
        source = input_of(maker, 0)
        maker = source.producer() if source is not None else None
    return maker is not None and is_quantized(maker) and is_constant(input_of(maker, 0))


def why_not_matrix(node: onnx_ir.Node) -> str | None:
    """Why a MatMul's or Gemm's product cannot be taken in 8 bits."""
    if is_constant(input_of(node, 0)) and not is_constant(input_of(node, 1)):
        return "its weight is the first factor; only the second can be quantized"
    if node.op_type == "MatMul" and not is_constant(input_of(node, 1)) and not _is_quantized_weight(input_of(node, 1)):
        return "both factors are activations"
    if reason := why_not_weight(node, 1):
        return reason
    weight = constant_tensor(node.inputs[1])
    if weight is not None and len(weight.shape) < 2:
        return "its weight is a vector"
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return "its input is transposed (transA)"
    return None


def is_embedding(node: onnx_ir.Node) -> bool:
    """Whether a Gather looks up rows of a float32 table that is worth fewer bits."""
    table = constant_tensor(node.inputs[0])
    return (
        table is not None
        and not attribute(node, "axis", 0)
        and table.dtype == onnx_ir.DataType.FLOAT
        and len(table.shape) == 2
        and table.size >= MIN_EMBEDDING_ELEMENTS
    )


def is_finite(tensor: onnx_ir.TensorProtocol) -> bool:
    """Whether a tensor holds neither NaN nor infinities."""
    array: NDArray[Any] = tensor.numpy()
    # Extremes carry NaN and infinities through without a temporary of the weight's size.
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def why_not_float16(weight: NDArray[np.float32]) -> str | None:
    """Why an array cannot be float16; None: it can."""
    if not weight.size:
        return None
    largest = float(np.abs(weight).max())
    if not largest <= _FLOAT16_MAX:  # NaN too
        return f"holds values up to {largest:.3g}, beyond float16's {_FLOAT16_MAX:.0f}"
    signal = float(np.square(weight, dtype=np.float64).sum())
    noise = float(np.square(weight - weight.astype(np.float16), dtype=np.float64).sum())
    if decibels(noise, signal) < MIN_WEIGHT_SQNR_DB:
        return "holds values too small for float16"
    return None
