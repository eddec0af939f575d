"""What the constant inputs of quantized operators are: weights, or the scales and zero points that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir

from modelpress_compression.graph.read import constant_tensor, input_of, int_attribute

# Inputs that hold scales, zero points or group indices. Where an operator is not listed, its inputs are what they seem.
QUANTIZATION_PARAMETERS: Mapping[str, frozenset[int]] = MappingProxyType(
    {
        "QuantizeLinear": frozenset((1, 2)),
        "DequantizeLinear": frozenset((1, 2)),
        "QLinearConv": frozenset((1, 2, 4, 5, 6, 7)),
        "QLinearMatMul": frozenset((1, 2, 4, 5, 6, 7)),
        "QGemm": frozenset((1, 2, 4, 5, 7, 8)),
        "ConvInteger": frozenset((2, 3)),
        "MatMulInteger": frozenset((2, 3)),
        "MatMulIntegerToFloat": frozenset((2, 3, 4, 5)),
        "DynamicQuantizeMatMul": frozenset((2, 3)),
        "DynamicQuantizeLSTM": frozenset((8, 9, 10, 11)),
        "MatMulNBits": frozenset((2, 3, 4)),
        "GatherBlockQuantized": frozenset((2, 3)),
        "QAttention": frozenset((3, 4, 6, 7)),
        "QLinearAdd": frozenset((1, 2, 4, 5, 6, 7)),
        "QLinearMul": frozenset((1, 2, 4, 5, 6, 7)),
        "QLinearSigmoid": frozenset((1, 2, 3, 4)),
        "QLinearLeakyRelu": frozenset((1, 2, 3, 4)),
        "QLinearSoftmax": frozenset((1, 2, 3, 4)),
        "QLinearAveragePool": frozenset((1, 2, 3, 4)),
        "QLinearGlobalAveragePool": frozenset((1, 2, 3, 4)),
        "QLinearReduceMean": frozenset((1, 2, 3, 4)),
    }
)

# (operator, input with the weight) -> (input with its zero point, the axis that a per-channel zero point runs along).
_ZERO_POINTS: Mapping[tuple[str, int], tuple[int, int]] = MappingProxyType(
    {
        ("DequantizeLinear", 0): (2, 1),
        ("QLinearConv", 3): (5, 0),
        ("QLinearMatMul", 3): (5, -1),
        ("QGemm", 3): (5, -1),
        ("ConvInteger", 1): (3, 0),
        ("MatMulInteger", 1): (3, -1),
        ("MatMulIntegerToFloat", 1): (5, -1),
        ("DynamicQuantizeMatMul", 1): (3, -1),
        ("QAttention", 1): (7, -1),
    }
)


def is_quantization_parameter(node: onnx_ir.Node, position: int) -> bool:
    """Whether input `position` holds a scale, a zero point or the like."""
    if node.op_type == "QLinearConcat":
        # y_scale, y_zero_point, then (tensor, scale, zero point) for each input.
        return position < 2 or (position - 2) % 3 != 0
    if node.op_type in ("Mul", "Gather"):
        return _is_scale(node, position)
    return position in QUANTIZATION_PARAMETERS.get(node.op_type, frozenset())


def _is_scale(node: onnx_ir.Node, position: int) -> bool:
    """Whether a Mul turns integers back into numbers by this input; a Gather may pick the scale of each row before."""
    if node.op_type == "Gather":
        picked = node.outputs[0]
        return position == 0 and any(user.op_type == "Mul" and _is_scale(user, place) for user, place in picked.uses())
    other = node.inputs[1 - position] if len(node.inputs) == 2 else None
    producer = other.producer() if other is not None else None
    if producer is None:
        return False
    # The weight's scale meets the activation's, found at run time, before the two rescale a product.
    return producer.op_type == "DynamicQuantizeLinear" or (
        producer.op_type == "Cast" and _is_integer(producer.inputs[0])
    )


def _is_integer(value: onnx_ir.Value | None) -> bool:
    """Whether these are the integers of quantized arithmetic."""
    producer = value.producer() if value is not None else None
    if producer is None:
        return False
    if producer.op_type in ("MatMulInteger", "ConvInteger"):
        return True
    table = constant_tensor(input_of(producer, 0))
    return producer.op_type == "Gather" and table is not None and table.dtype.is_integer() and table.dtype.bitwidth <= 8


def zero_point(node: onnx_ir.Node, position: int) -> tuple[onnx_ir.TensorProtocol, int] | None:
    """The constant zero point of the weight at input `position`, and its axis; None where zero is 0."""
    place = _ZERO_POINTS.get((node.op_type, position))
    tensor = None if place is None else constant_tensor(input_of(node, place[0]))
    if place is None or tensor is None:
        return None
    axis = place[1]
    if node.op_type == "DequantizeLinear":
        axis = int_attribute(node, "axis", axis)
    if node.op_type == "QGemm" and int_attribute(node, "transB", 0):
        axis = 0
    return tensor, axis
