"""MatMul followed by BatchNormalization or by products and sums with constants over the last axis.

With W [in, out], and b, s, t of shape [out],

    s * (x W + b) + t  =  x (W s) + (s b + t)        W s scales the columns

so MatMul, Add(b), Mul(s), Add(t) become MatMul, Add. BatchNormalization normalizes axis 1, which is the last axis for
inputs of two axes only. It must not fire when W is shared or not constant, or when a value between is used elsewhere.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir

from modelpress_compression.graph.read import (
    constant_tensor,
    float_attribute,
    graph_of,
    int_attribute,
    only_consumer,
    rank,
)
from modelpress_compression.passes.fuse.rewriting import FIRED, Floats, Outcome, Scope, float_array


class FuseMatMulAffine:
    """Merges a scale (Mul, Div or BatchNormalization) over the last axis into MatMul, or MatMul and Add, before it."""

    name: ClassVar[str] = "matmul_affine"
    op_types: ClassVar[frozenset[str]] = frozenset({"Mul", "Div", "BatchNormalization"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        first = node.inputs[0]
        position = 1 if node.op_type == "Mul" and constant_tensor(first) is not None else 0
        found = _matmul_add(node.inputs[position], scope)
        if found is None:
            return None
        matmul, add, bias = found
        weight = float_array(matmul.inputs[1])
        affine = _affine(node, node.inputs[1 - position])
        if weight is None or weight.ndim != 2 or affine is None:
            return None
        between = [matmul.outputs[0]] if add is None else [matmul.outputs[0], add.outputs[0]]
        if any(only_consumer(value) is None for value in between):
            return f"{node.op_type} stays: the output of MatMul is used elsewhere as well."
        shared = matmul.inputs[1]
        if shared is None or len(shared.uses()) > 1 or shared.is_graph_output():
            return f"{node.op_type} stays: the weight of MatMul is shared; changing it would change its other users."
        scale, shift = (np.broadcast_to(a, (weight.shape[1],)) if a.size == 1 else a for a in affine)
        if scale.size != weight.shape[1] or not np.isfinite(scale).all() or matmul.graph is not node.graph:
            return f"{node.op_type} stays: it is not one finite number for each column of the weight."
        _rewrite(node, matmul, add, weight, (scale, bias * scale + shift), scope)
        return FIRED


def _matmul_add(value: onnx_ir.Value | None, scope: Scope) -> tuple[onnx_ir.Node, onnx_ir.Node | None, Floats] | None:
    """MatMul with a constant second operand, and the Add of a bias [out] behind it if there is one."""
    add = scope.producer(value, "Add")
    if add is None:
        matmul = scope.producer(value, "MatMul")
        return None if matmul is None else (matmul, None, np.zeros(1))
    for position in (0, 1):
        matmul, bias = scope.producer(add.inputs[position], "MatMul"), float_array(add.inputs[1 - position])
        if matmul is not None and bias is not None and bias.ndim <= 1:
            return matmul, add, bias.reshape(-1).astype(np.float64)
    return None


def _affine(node: onnx_ir.Node, other: onnx_ir.Value | None) -> tuple[Floats, Floats] | None:
    """(scale, shift), each [out] or one number; None where the node is no constant affine map of the last axis."""
    if node.op_type == "BatchNormalization":
        numbers = [float_array(value) for value in node.inputs[1:5]]
        gamma, beta, mean, variance = (None if a is None else a.astype(np.float64).reshape(-1) for a in numbers)
        if gamma is None or beta is None or mean is None or variance is None or rank(node.inputs[0]) != 2:
            return None
        if int_attribute(node, "training_mode", 0):
            return None
        scale = gamma / np.sqrt(variance + float_attribute(node, "epsilon", 1e-5))
        return scale, beta - scale * mean
    array = float_array(other)
    if array is None or array.ndim > 1:
        return None
    numbers64 = array.reshape(-1).astype(np.float64)
    with np.errstate(divide="ignore"):
        return (1 / numbers64 if node.op_type == "Div" else numbers64), np.zeros(1)


def _rewrite(
    last: onnx_ir.Node,
    matmul: onnx_ir.Node,
    add: onnx_ir.Node | None,
    weight: Floats,
    affine: tuple[Floats, Floats],
    scope: Scope,
) -> None:
    scale, shift = affine
    graph = graph_of(last)
    old = matmul.inputs[1]
    columns = (weight * scale.astype(weight.dtype)).astype(weight.dtype)
    made = [
        scope.make_like(
            matmul,
            "MatMul",
            [matmul.inputs[0], scope.constant(graph, columns, (old.name if old else None) or "weight")],
        )
    ]
    if add is not None or np.any(shift):
        full = np.broadcast_to(shift, (weight.shape[1],)).astype(weight.dtype)
        bias = scope.constant(graph, full, f"{matmul.name or 'MatMul'}.bias")
        made.append(scope.make_like(add or last, "Add", [made[0].outputs[0], bias]))
    scope.replace(last, [matmul, *([] if add is None else [add]), last], made)
