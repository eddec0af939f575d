"""Which constants training usually changes: weights, biases and scales, by the operators that read them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir

from modelpress_compression.graph.read import MICROSOFT, constant_tensor, is_op

# (operator, domain) -> inputs that hold weights, biases and scales. Statistics of BatchNormalization are not among
# them, nor are scales of quantization.
_POSITIONS: Mapping[tuple[str, str], frozenset[int]] = MappingProxyType(
    {
        **{(name, ""): frozenset((1, 2)) for name in (
            "Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GroupNormalization",
            "LayerNormalization",
        )},
        **{(name, ""): frozenset((1,)) for name in ("PRelu", "RMSNormalization", "SimplifiedLayerNormalization")},
        **{(name, ""): frozenset((1, 2, 3)) for name in ("LSTM", "GRU", "RNN")},
        ("DeformConv", ""): frozenset((1, 3)),
        ("MatMul", ""): frozenset((0, 1)),
        ("Einsum", ""): frozenset(range(8)),
        ("Gemm", ""): frozenset((0, 1, 2)),
        ("Gather", ""): frozenset((0,)),
        ("FusedConv", MICROSOFT): frozenset((1, 2)),
        ("FusedGemm", MICROSOFT): frozenset((0, 1, 2)),
        ("FusedMatMul", MICROSOFT): frozenset((0, 1)),
        ("Attention", MICROSOFT): frozenset((1, 2)),
        ("MultiHeadAttention", MICROSOFT): frozenset((3,)),
        ("BiasGelu", MICROSOFT): frozenset((1,)),
        ("FastGelu", MICROSOFT): frozenset((1,)),
        ("SkipLayerNormalization", MICROSOFT): frozenset((2, 3, 4)),
        ("SkipSimplifiedLayerNormalization", MICROSOFT): frozenset((2, 3)),
        ("EmbedLayerNormalization", MICROSOFT): frozenset((2, 3, 4, 5, 6)),
    }
)  # fmt: skip
# These only move, cast or quantize a weight on its way.
_CARRIERS = frozenset(("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity", "QuantizeLinear"))
_ELEMENTWISE = ("Add", "Mul", "Sub")
_MAX_HOPS = 4


def weights(value: onnx_ir.Value) -> bool:
    """Whether a constant is a weight, bias or scale that training changes.

    Those are the floating-point constants at the operators' positions for weights, directly or through a transposition
    or fake quantization, and vectors (more than one element) that are added or multiplied. Single numbers, as of
    sqrt(size) or epsilon, statistics of BatchNormalization and quantization parameters are not.
    """
    tensor = constant_tensor(value)
    if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
        return False
    return _is_used_as_weight(value, tensor.size, _MAX_HOPS)


def _is_used_as_weight(value: onnx_ir.Value, size: int, hops: int) -> bool:
    for node, position in value.uses():
        domain = "" if node.domain == "ai.onnx" else node.domain
        if position in _POSITIONS.get((node.op_type, domain), ()):
            return True
        if is_op(node, *_ELEMENTWISE) and size > 1:
            return True
        carried = is_op(node, *_CARRIERS, "DequantizeLinear") and position == 0 and hops > 0
        if carried and _is_used_as_weight(node.outputs[0], size, hops - 1):
            return True
    return False
