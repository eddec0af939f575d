"""Who uses a constant weight, and in which form it can be stored for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir

from modelpress_compression.graph.read import (
    MICROSOFT,
    attribute,
    constant_array,
    constant_tensor,
    input_of,
    is_op,
    required,
)
from modelpress_compression.passes.quantize.dynamic import is_candidate
from modelpress_compression.passes.quantize.weights import why_not_matrix

# Inputs of a product from which on integers in blocks are no slower than float32, however many rows there are.
MIN_BLOCKED_INPUTS = 256
# Exporters write the gates of an LSTM in another order by such operators, inside an If even.
_REARRANGING = ("Slice", "Concat", "Unsqueeze", "Squeeze", "Transpose", "Reshape", "Identity")
_MAX_REARRANGED = 64  # values that are followed
# Operator and input -> the axes of the weight that have a scale each.
_SCALED_AXES: Mapping[tuple[str, str, int], tuple[int, ...]] = MappingProxyType(
    {
        ("", "Conv", 1): (0,),
        ("", "ConvTranspose", 1): (1,),
        ("", "MatMul", 0): (-2,),
        ("", "MatMul", 1): (-1,),
        ("", "Gemm", 0): (0,),
        ("", "Gemm", 1): (1,),
        ("", "LSTM", 1): (0, 1),
        ("", "LSTM", 2): (0, 1),
        ("", "GRU", 1): (0, 1),
        ("", "GRU", 2): (0, 1),
        ("", "RNN", 1): (0, 1),
        ("", "RNN", 2): (0, 1),
        ("", "Gather", 0): (0,),
        (MICROSOFT, "Attention", 1): (1,),
        (MICROSOFT, "FusedConv", 1): (0,),
        (MICROSOFT, "FusedGemm", 1): (1,),
    }
)


def uses_of(weight: onnx_ir.Value) -> list[tuple[onnx_ir.Node, int]]:
    """The nodes that multiply by the weight, and at which input; operators that only rearrange it may lie between."""
    found: list[tuple[onnx_ir.Node, int]] = []
    frontier, seen = [weight], {id(weight)}
    while frontier:
        for node, index in frontier.pop().uses():
            if (node.domain, node.op_type, index) in _SCALED_AXES:
                found.append((node, index))
            elif is_op(node, *_REARRANGING) and len(seen) < _MAX_REARRANGED:
                new = [output for output in node.outputs if id(output) not in seen]
                seen.update(id(output) for output in new)
                frontier += new
    return found


def is_blocked(node: onnx_ir.Node, index: int) -> bool:
    """Whether it becomes a MatMulNBits."""
    if not is_op(node, "MatMul", "Gemm") or index != 1 or why_not_matrix(node):
        return False
    tensor = constant_tensor(required(node, 1))
    if tensor is None or len(tensor.shape) != 2:
        return False
    inputs, outputs = extents_of(node, tensor)
    return inputs >= MIN_BLOCKED_INPUTS and _bias_fits(node, outputs)


def extents_of(node: onnx_ir.Node, tensor: onnx_ir.TensorProtocol) -> tuple[int, int]:
    """Inputs K and outputs N of a MatMul or Gemm with this weight."""
    first, second = (int(extent) for extent in tensor.shape.numpy())
    return (second, first) if is_transposed(node) else (first, second)


def is_transposed(node: onnx_ir.Node) -> bool:
    """Whether the weight is [N, K]."""
    return node.op_type == "Gemm" and bool(attribute(node, "transB", 0))


def _bias_fits(node: onnx_ir.Node, outputs: int) -> bool:
    bias = input_of(node, 2) if node.op_type == "Gemm" else None
    array = constant_array(bias)
    return bias is None or (
        array is not None and array.size in (1, outputs) and array.shape[-1:] in ((), (array.size,))
    )


def is_embedding(node: onnx_ir.Node, index: int) -> bool:
    """Whether it becomes a GatherBlockQuantized."""
    return is_op(node, "Gather") and index == 0 and is_candidate(node)


def axes_of(node: onnx_ir.Node, index: int) -> tuple[int, ...] | None:
    """Axes of the weight that have a scale each; None: it is no weight there."""
    axes = _SCALED_AXES.get((node.domain, node.op_type, index))
    return (0,) if axes and index == 1 and attribute(node, "transB", 0) else axes
