"""Hard sigmoid and hard swish written as Add, Clip, Mul and Div become the operators of that name.

    hard sigmoid   h(x) = clip(x + 3, 0, 6) / 6 = max(0, min(1, x / 6 + 1 / 2))      HardSigmoid(alpha=1/6, beta=1/2)
    hard swish     x * h(x)                                                        HardSwish, from opset 14 on

Exporters write (x * clip(x + 3, 0, 6)) / 6, x * (clip(x + 3, 0, 6) / 6), and products with 1/6 instead of the division.
Howard et al., "Searching for MobileNetV3" (arXiv:1905.02244), section 5.2.

Why it pays: onnxruntime keeps HardSigmoid and Mul inside of its blocked convolutions (NCHWc), while Add, Clip and Div
with a scalar each cost a pass over memory and force the layout back and forth: four 1x1 convolutions of 64 channels on
56x56 with hard swish take 0.75 of the time (onnxruntime 1.31, one thread).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir

from modelpress_compression.graph.read import constant_scalar, float_attribute, input_of, other_operand
from modelpress_compression.passes.fuse.rewriting import FIRED, Outcome, Scope, scalar_beside

HARD_SWISH_OPSET = 14


class FuseHardSwish:
    """Recognizes hard swish, and hard sigmoid on its own."""

    name: ClassVar[str] = "hard_swish"
    op_types: ClassVar[frozenset[str]] = frozenset({"Clip", "HardSigmoid"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:  # noqa: PLR0911 - a return for each reason
        if node.op_type == "HardSigmoid":
            return _multiply_by_input(node, scope)
        shifted = scope.inner(node.inputs[0], "Add")
        if shifted is None or _bounds(node) != (0.0, 6.0) or shifted.graph is not node.graph:
            return None
        value, user = _plus_three(shifted), scope.follower(node, "Mul", "Div")
        if value is None or user is None:
            return None
        if _is_sixth(user, node.outputs[0]):
            made = _hard_sigmoid(value, node, scope)
            scope.replace(user, [shifted, node, user], [made])
            return _multiply_by_input(made, scope) or FIRED
        if user.op_type != "Mul" or set(user.inputs) != {value, node.outputs[0]}:
            return None
        sixth = scope.follower(user, "Mul", "Div")
        if sixth is None or not _is_sixth(sixth, user.outputs[0]):
            return "Hard swish stays: the product is not divided by 6, or is used elsewhere as well."
        scope.replace(sixth, [shifted, node, user, sixth], _hard_swish(value, node, scope))
        return FIRED


def _multiply_by_input(node: onnx_ir.Node, scope: Scope) -> Outcome:
    """HardSigmoid(x) * x becomes HardSwish(x) where the opset has it; below, that is the form we want."""
    user = scope.follower(node, "Mul")
    value = node.inputs[0]
    if user is None or value is None or scope.opset < HARD_SWISH_OPSET:
        return None
    alpha, beta = float_attribute(node, "alpha", 0.2), float_attribute(node, "beta", 0.5)
    if set(user.inputs) != {value, node.outputs[0]}:
        return None
    if not (np.isclose(alpha, 1 / 6, rtol=1e-4) and beta == 0.5):
        return None
    scope.replace(user, [node, user], [scope.make_like(node, "HardSwish", [value])])
    return FIRED


def _hard_sigmoid(value: onnx_ir.Value, like: onnx_ir.Node, scope: Scope) -> onnx_ir.Node:
    return scope.make_like(like, "HardSigmoid", [value], {"alpha": 1 / 6, "beta": 0.5})


def _hard_swish(value: onnx_ir.Value, like: onnx_ir.Node, scope: Scope) -> list[onnx_ir.Node]:
    if scope.opset >= HARD_SWISH_OPSET:
        return [scope.make_like(like, "HardSwish", [value])]
    gate = _hard_sigmoid(value, like, scope)
    return [gate, scope.make_like(like, "Mul", [value, gate.outputs[0]])]


def _bounds(clip: onnx_ir.Node) -> tuple[float | None, float | None]:
    """min and max: attributes up to opset 10, then inputs."""
    if "max" in clip.attributes:
        return float_attribute(clip, "min", -np.inf), float_attribute(clip, "max", np.inf)
    return constant_scalar(input_of(clip, 1)), constant_scalar(input_of(clip, 2))


def _plus_three(add: onnx_ir.Node) -> onnx_ir.Value | None:
    """x of x + 3, where 3 adds no axes."""
    for three, value in (tuple(add.inputs), tuple(reversed(add.inputs))):
        if scalar_beside(three, value) == 3.0:
            return value
    return None


def _is_sixth(node: onnx_ir.Node, value: onnx_ir.Value) -> bool:
    """Whether a Div or Mul computes value / 6 or value * (1/6) with a constant that adds no axes."""
    if node.op_type == "Div" and node.inputs[0] is not value:
        return False
    number = scalar_beside(other_operand(node, value), value)
    wanted = 6.0 if node.op_type == "Div" else 1 / 6
    return number is not None and bool(np.isclose(number, wanted, rtol=1e-4))
