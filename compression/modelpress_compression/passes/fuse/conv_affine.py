"""A multiplication or addition with constants behind Conv, ConvTranspose or Gemm becomes part of the weights.

    c * (W x + b) = (c W) x + c b          (W x + b) + c = W x + (b + c)

for Mul, Div (c = 1 / constant), Add and Sub, where c is one number or one for each channel (axis 1): [C, 1, 1] for
two spatial axes. The rules of `linear_operators` hold. It must not fire when c varies along another axis or adds axes,
when the weight is shared or not constant, or when the product's operand is used elsewhere.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir

from modelpress_compression.graph.read import constant_tensor, only_consumer
from modelpress_compression.passes.fuse.linear_operators import LINEAR, linear_operator_of, per_channel
from modelpress_compression.passes.fuse.rewriting import FIRED, Floats, Outcome, Scope, float_array


class FuseConvAffine:
    """Merges Mul, Div, Add or Sub with a constant per channel into the linear operator before it."""

    name: ClassVar[str] = "conv_affine"
    op_types: ClassVar[frozenset[str]] = frozenset({"Mul", "Div", "Add", "Sub"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:  # noqa: PLR0911 - a return for each reason
        position = 0 if constant_tensor(node.inputs[1]) is not None else 1
        source = scope.producer(node.inputs[position], *LINEAR)
        constant = float_array(node.inputs[1 - position])
        if source is None or constant is None or source.graph is not node.graph:
            return None
        if position == 1 and node.op_type == "Div":
            return None  # c / y is not linear
        if only_consumer(source.outputs[0]) is None:
            return f"{node.op_type} with a constant stays: the output of {source.op_type} is used elsewhere as well."
        linear = linear_operator_of(source)
        if isinstance(linear, str):
            return f"{node.op_type} with a constant stays: {linear}."
        numbers = per_channel(constant, linear.channels, linear.rank)
        if numbers is None:
            return f"{node.op_type} with a constant stays: it is not one number for each output channel."
        scale, shift = _affine(node.op_type, numbers, reverse=position == 1)
        # A scale of 0 or infinity would lose the weights or make NaN of them.
        if not np.isfinite(scale).all() or not np.isfinite(shift).all():
            return f"{node.op_type} with a constant stays: the constant is not a finite number."
        scope.replace(node, [source, node], [linear.scaled(scale, shift, scope)])
        return FIRED


def _affine(op_type: str, numbers: Floats, *, reverse: bool) -> tuple[Floats, Floats]:
    """(scale, shift) of the node; `reverse`: the constant is the first operand."""
    ones, zeros = np.ones_like(numbers), np.zeros_like(numbers)
    if op_type == "Mul":
        return numbers, zeros
    if op_type == "Div":
        with np.errstate(divide="ignore"):
            return ones / numbers, zeros
    if op_type == "Add":
        return ones, numbers
    return (-ones, numbers) if reverse else (ones, -numbers)
