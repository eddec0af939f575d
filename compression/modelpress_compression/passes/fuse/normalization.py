"""Normalizations written out in elementary operators, and how onnxruntime fuses them when it loads a model.

    d = x - mean(x)      LN(x) = d / sqrt(mean(d^2) + eps) * gamma + beta        means over the last axis

becomes LayerNormalization from opset 17 on, with d^2 as Pow(d, 2) or Mul(d, d); gamma and beta constants of shape
[last axis]. Ba et al., arXiv:1607.06450. Below opset 17 the operators stay as they are: onnxruntime recognizes them
itself when it loads a model, and a file with the operator in an older opset would be refused by everything else.

    x * Reciprocal(Sqrt(mean(x^2) + eps))    ->    x / Sqrt(mean(x^2) + eps)

torch.export writes RMSNorm (Zhang and Sennrich, arXiv:1910.07467) in the first form, and JAX layer normalization, with
x - mean for x. onnxruntime makes one node of the whole when it loads the second, and of the first it does not: small
decoders take 0.86 to 0.90 of the time (onnxruntime 1.31, one thread).

Neither must fire when a value between has another consumer or is an output of the graph, nor the first when the mean
goes over other axes.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir

from modelpress_compression.graph.read import (
    axes_of,
    constant_scalar,
    constant_tensor,
    int_attribute,
    is_op,
    other_operand,
    rank,
)
from modelpress_compression.passes.fuse.rewriting import FIRED, Outcome, Scope, float_array

LAYER_NORMALIZATION_OPSET = 17


class FuseLayerNormalization:
    """Recognizes layer normalization by the division at its end."""

    name: ClassVar[str] = "layer_normalization"
    op_types: ClassVar[frozenset[str]] = frozenset({"Div"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        found = _statistics(node, scope)
        if found is None:
            return None
        value, epsilon = found
        scaled = _then(node, "Mul", scope)
        shifted = None if scaled is None else _then(scaled[0], "Add", scope)
        if scaled is None or shifted is None:
            return "Layer normalization stays: no product and sum with a constant over the last axis follow it."
        if scope.opset < LAYER_NORMALIZATION_OPSET:
            return (
                f"Layer normalization stays: the operator needs opset {LAYER_NORMALIZATION_OPSET}, the model has opset "
                f"{scope.opset}; onnxruntime recognizes it when it loads the model."
            )
        made = scope.make_like(
            shifted[0], "LayerNormalization", [value, scaled[1], shifted[1]], {"axis": -1, "epsilon": epsilon}
        )
        scope.replace(shifted[0], [node, scaled[0], shifted[0]], [made])
        return FIRED


class DivideByRoot:
    """Recognizes the product by its reciprocal."""

    name: ClassVar[str] = "root_division"
    op_types: ClassVar[frozenset[str]] = frozenset({"Reciprocal"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        product, root = scope.follower(node, "Mul"), scope.producer(node.inputs[0], "Sqrt")
        if root is None or product is None:
            return None
        factor = other_operand(product, node.outputs[0])
        if factor is None or not _is_mean_square(root.inputs[0], factor, scope):
            return None
        made = scope.make_like(product, "Div", [factor, node.inputs[0]])
        scope.replace(product, [node, product], [made])
        return FIRED


def _statistics(division: onnx_ir.Node, scope: Scope) -> tuple[onnx_ir.Value, float] | None:
    """(x, eps) if the node is (x - mean) / sqrt(variance + eps)."""
    root = scope.inner(division.inputs[1], "Sqrt")
    sum_ = scope.inner(root.inputs[0], "Add") if root is not None else None
    difference = division.inputs[0]
    if sum_ is None or difference is None:
        return None
    position = 0 if constant_tensor(sum_.inputs[0]) is not None else 1
    epsilon = constant_scalar(sum_.inputs[position])
    variance = scope.inner(sum_.inputs[1 - position], "ReduceMean")
    square = scope.inner(variance.inputs[0], "Pow", "Mul") if variance is not None else None
    minus = scope.producer(difference, "Sub")
    if epsilon is None or variance is None or square is None or minus is None:
        return None
    users = {id(user) for user in difference.consumers()}
    mean, value = scope.inner(minus.inputs[1], "ReduceMean"), minus.inputs[0]
    if not is_square(square, difference) or users != {id(square), id(division)} or mean is None or value is None:
        return None
    if mean.inputs[0] is not value or not _last_axis(mean) or not _last_axis(variance):
        return None
    return (value, epsilon) if not difference.is_graph_output() else None


def is_square(node: onnx_ir.Node, base: onnx_ir.Value) -> bool:
    """Whether a Pow or Mul is base^2."""
    twice = constant_scalar(node.inputs[1]) == 2.0 if node.op_type == "Pow" else node.inputs[1] is base
    return twice and node.inputs[0] is base


def _last_axis(mean: onnx_ir.Node) -> bool:
    axes = axes_of(mean)
    if axes is None or len(axes) != 1 or not int_attribute(mean, "keepdims", 1):
        return False
    axes_count = rank(mean.inputs[0])
    return axes[0] == -1 or (axes_count is not None and axes[0] == axes_count - 1)


def _then(node: onnx_ir.Node, op_type: str, scope: Scope) -> tuple[onnx_ir.Node, onnx_ir.Value] | None:
    """The one consumer and its constant operand of shape [n], n > 1."""
    user = scope.follower(node, op_type)
    other = None if user is None else other_operand(user, node.outputs[0])
    array = float_array(other)
    if user is None or other is None or array is None or array.ndim != 1 or array.size < 2:
        return None
    return user, other


def _is_mean_square(value: onnx_ir.Value | None, base: onnx_ir.Value, scope: Scope) -> bool:
    """Whether the value is a mean of base^2, with or without a constant."""
    total = scope.producer(value, "Add")
    if total is not None:
        constants = [constant_scalar(operand) is not None for operand in total.inputs]
        value = total.inputs[0] if constants[1] else total.inputs[1] if constants[0] else None
    mean = scope.producer(value, "ReduceMean")
    square = scope.producer(mean.inputs[0], "Pow", "Mul") if mean is not None else None
    return square is not None and is_square(square, base)


def forget_residual_shapes(model: onnx_ir.Model) -> int:
    """Drops the shapes of all computed values, in place, if sums are normalized anywhere; how many such sums there are.

    It keeps onnxruntime from fusing Add and LayerNormalization into SkipLayerNormalization, which it does when it loads
    a model where it knows the shapes of both summands. On CPU its fused kernel is the slower one: a sentence encoder of
    six layers takes 0.93 of the time with that fusion disabled, and 0.90 together with the other rewrites of the group
    (onnxruntime 1.31, one thread, 128 tokens; 1.09 when shapes are written into a file that had none). Shapes of
    computed values are hints that nothing depends on. All of them go: from any one that is left, onnxruntime infers
    those of the sums. Where it infers them all the same, it fuses as before.
    """
    count = sum(_normalizes_a_sum(node) for node in model.graph.all_nodes())
    for node in model.graph.all_nodes() if count else ():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    return count


def _normalizes_a_sum(node: onnx_ir.Node) -> bool:
    """LayerNormalization of a sum, or a sum minus its mean, as normalization begins where it is written out."""
    source = node.inputs[0] if is_op(node, "LayerNormalization", "Sub") else None
    if source is None or not is_op(source.producer(), "Add"):
        return False
    mean = node.inputs[1].producer() if node.op_type == "Sub" and node.inputs[1] is not None else None
    return node.op_type == "LayerNormalization" or (
        mean is not None and is_op(mean, "ReduceMean") and mean.inputs[0] is source
    )
