"""What each input of a quantized operator is, by the names that its operands have here.

x                           numbers that are quantized, or activations in integers
w, r                        weights in integers; r: the recurrent ones
bias                        in float or in integers of 32 bits
w_scale, w_zero, w_order    what goes with w: scales, zero points, and of which group each row is
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir

from modelpress_compression.graph.read import input_of, int_attribute, is_constant

_UNARY = "x x_scale x_zero y_scale y_zero"
_BINARY = "x x_scale x_zero w w_scale w_zero y_scale y_zero"
# By operator alone: no name means two things in different domains.
_OPERANDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        operator: tuple(names.split())
        for operator, names in {
            "QuantizeLinear": "x x_scale x_zero",
            "DequantizeLinear": "w w_scale w_zero",
            "MatMulNBits": "x w w_scale w_zero w_order bias",
            "GatherBlockQuantized": "w indices w_scale w_zero",
            "DynamicQuantizeLinear": "x",
            "ConvInteger": "x w x_zero w_zero",
            "MatMulInteger": "x w x_zero w_zero",
            "QLinearConv": "x x_scale x_zero w w_scale w_zero y_scale y_zero bias",
            "QLinearMatMul": _BINARY,
            "QGemm": "x x_scale x_zero w w_scale w_zero bias y_scale y_zero",
            "MatMulIntegerToFloat": "x w x_scale w_scale x_zero w_zero bias",
            "DynamicQuantizeMatMul": "x w w_scale w_zero bias",
            "DynamicQuantizeLSTM": "x w r bias lengths h c p w_scale w_zero r_scale r_zero",
            "QAttention": "x w bias x_scale w_scale mask x_zero w_zero past",
            "QLinearAdd": _BINARY,
            "QLinearMul": _BINARY,
            "QLinearSigmoid": _UNARY,
            "QLinearLeakyRelu": _UNARY,
            "QLinearSoftmax": _UNARY,
            "QLinearAveragePool": _UNARY,
            "QLinearGlobalAveragePool": _UNARY,
            "QLinearReduceMean": _UNARY,
            "QLinearConcat": "y_scale y_zero",  # then x x_scale x_zero for each part
        }.items()
    }
)
# These make floats of integers, or integers of floats; the others compute with integers.
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "MatMulNBits", "GatherBlockQuantized")
# The axis of the weight that scales and zero points by channel run along, where it is not the last.
_CHANNEL_AXES: Mapping[str, int] = MappingProxyType({"QLinearConv": 0, "ConvInteger": 0})


def is_quantized(node: onnx_ir.Node) -> bool:
    """Whether it is an operator of quantized models."""
    return node.op_type in _OPERANDS


def computes_in_integers(node: onnx_ir.Node) -> bool:
    """Whether it is an operator of quantized models whose result depends on integers in steps: it has no gradient."""
    return is_integer_operator(node.op_type)


def is_integer_operator(op_type: str) -> bool:
    """Whether nodes of this operator compute with integers."""
    return op_type in _OPERANDS and op_type not in _CONVERSIONS


def arranged(op_type: str, **operands: onnx_ir.Value | None) -> list[onnx_ir.Value | None]:
    """Inputs of a new node, given by the names of its operands; those that the operator does not take are left out."""
    inputs = [operands.get(name) for name in _OPERANDS[op_type]]
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def operand(node: onnx_ir.Node, name: str) -> onnx_ir.Value | None:
    """The input of this name; None where the operator has none or the node leaves it out."""
    names = _OPERANDS.get(node.op_type, ())
    return input_of(node, names.index(name)) if name in names else None


def quantized_weights(node: onnx_ir.Node) -> dict[str, onnx_ir.Value]:
    """The constant operands that are weights in integers, by name."""
    found = {name: operand(node, name) for name in _OPERANDS.get(node.op_type, ()) if name in ("w", "r")}
    return {name: value for name, value in found.items() if value is not None and is_constant(value)}


def is_quantization_parameter(node: onnx_ir.Node, position: int) -> bool:
    """Whether input `position` holds a scale, a zero point or the like."""
    if node.op_type == "QLinearConcat":
        return position < 2 or (position - 2) % 3 != 0
    return "_" in _name(node, position)


def is_stored_weight(node: onnx_ir.Node, position: int) -> bool:
    """Whether a constant at input `position` is a weight or a bias, of whatever type."""
    return _name(node, position) in ("w", "r", "bias")


def channel_axis(node: onnx_ir.Node) -> int:
    """The axis of the node's weight that scales and zero points by channel run along."""
    if node.op_type == "DequantizeLinear":
        return int_attribute(node, "axis", 1)
    if node.op_type == "QGemm" and int_attribute(node, "transB", 0):
        return 0
    return _CHANNEL_AXES.get(node.op_type, -1)


def _name(node: onnx_ir.Node, position: int) -> str:
    names = _OPERANDS.get(node.op_type, ())
    return names[position] if position < len(names) else ""
