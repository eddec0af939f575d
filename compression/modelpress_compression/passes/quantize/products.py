"""In which order onnxruntime's x86 kernels sum up the products of each operator.

Matrices are packed in groups of four successive rows k of [K, N], of which each half is a pair. A convolution runs on
its input with the channels last: k counts the channels of the group, then the positions of the kernel. Where the number
of channels is odd, pairs reach across positions; a tail is filled with zeros, padding with the zero point, and both lie
within 0 to 255.

What sums up single products in 32 bits has no pairs: depthwise convolutions, and unsigned weights, which are widened to
16 bits first.
"""

from __future__ import annotations

import onnx_ir

from modelpress_compression.passes.quantize.edit import attribute
from modelpress_compression.passes.quantize.saturation import Summation

MATRIX_OPERATORS = ("MatMul", "Gemm", "MatMulInteger", "DynamicQuantizeLSTM", "QAttention")


def of_matrix(rank: int, axis: int | None) -> Summation:
    """[..., K, N]."""
    return Summation((rank - 2,), axis)


def of_node(node: onnx_ir.Node, shape: tuple[int, ...], axis: int | None) -> Summation | None:
    """How a node sums over its weight of this shape and with these scales; None: single products in 32 bits."""
    rank = len(shape)
    if node.op_type == "Conv":
        if is_depthwise(node, shape):
            return None
        return Summation((*range(2, rank), 1), axis)
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        return Summation((1,), axis)
    return of_matrix(rank, axis)


def is_depthwise(node: onnx_ir.Node, shape: tuple[int, ...]) -> bool:
    """Whether each output channel reads one input channel of its own."""
    return shape[1] == 1 and shape[0] == attribute(node, "group", 1)
