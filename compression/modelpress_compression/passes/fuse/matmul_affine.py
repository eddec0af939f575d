"""MatMul followed by BatchNormalization or by products and sums with constants over the last axis.

With W [in, out], and b, s, t of shape [out],

    s * (x W + b) + t  =  x (W s) + (s b + t)        W s scales the columns

so MatMul, Add(b), Mul(s), Add(t) become MatMul, Add. BatchNormalization normalizes axis 1, which is the last axis for
inputs of two axes only. It must not fire when W is shared or not constant, or when a value between is used elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir

from modelpress_compression.graph.read import (
    constant_tensor,
    graph_of,
    int_attribute,
    only_consumer,
    rank,
    required,
)
from modelpress_compression.passes.fuse.linear_operators import batchnorm_affine, why_fixed
from modelpress_compression.passes.fuse.rewriting import FIRED, Floats, Outcome, Scope, float_array


@dataclass(frozen=True)
class _Product:
    """MatMul with a constant weight [in, out], and the Add of a bias [out] behind it if there is one."""

    matmul: onnx_ir.Node
    weight: Floats
    add: onnx_ir.Node | None = None
    bias: Floats | None = None


class FuseMatMulAffine:
    """Merges a scale (Mul, Div or BatchNormalization) over the last axis into MatMul, or MatMul and Add, before it."""

    name: ClassVar[str] = "matmul_affine"
    op_types: ClassVar[frozenset[str]] = frozenset({"Mul", "Div", "BatchNormalization"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        position = 1 if node.op_type == "Mul" and constant_tensor(node.inputs[0]) is not None else 0
        product = _product_of(node.inputs[position], scope)
        affine = _affine(node, node.inputs[1 - position])
        if product is None or affine is None:
            return None
        between = [one.outputs[0] for one in (product.matmul, product.add) if one is not None]
        if any(only_consumer(value) is None for value in between):
            return f"{node.op_type} stays: the output of MatMul is used elsewhere as well."
        if (reason := why_fixed(product.matmul)) is not None:
            return f"{node.op_type} stays: {reason}."
        columns = product.weight.shape[1]
        scale, shift = (np.broadcast_to(a, (columns,)) if a.size == 1 else a for a in affine)
        if scale.size != columns or not np.isfinite(scale).all() or product.matmul.graph is not node.graph:
            return f"{node.op_type} stays: it is not one finite number for each column of the weight."
        _rewrite(node, product, scale, shift, scope)
        return FIRED


def _product_of(value: onnx_ir.Value | None, scope: Scope) -> _Product | None:
    add = scope.producer(value, "Add")
    if add is None:
        matmul = scope.producer(value, "MatMul")
        weight = None if matmul is None else _matrix(matmul)
        return None if matmul is None or weight is None else _Product(matmul, weight)
    for position in (0, 1):
        matmul, bias = scope.producer(add.inputs[position], "MatMul"), float_array(add.inputs[1 - position])
        weight = None if matmul is None else _matrix(matmul)
        if matmul is not None and weight is not None and bias is not None and bias.ndim <= 1:
            return _Product(matmul, weight, add, bias.reshape(-1).astype(np.float64))
    return None


def _matrix(matmul: onnx_ir.Node) -> Floats | None:
    weight = float_array(matmul.inputs[1])
    return weight if weight is not None and weight.ndim == 2 else None


def _affine(node: onnx_ir.Node, other: onnx_ir.Value | None) -> tuple[Floats, Floats] | None:
    """(scale, shift), each [out] or one number; None where the node is no constant affine map of the last axis."""
    if node.op_type == "BatchNormalization":
        usable = rank(node.inputs[0]) == 2 and not int_attribute(node, "training_mode", 0)
        return batchnorm_affine(node) if usable else None
    array = float_array(other)
    if array is None or array.ndim > 1:
        return None
    numbers = array.reshape(-1).astype(np.float64)
    with np.errstate(divide="ignore"):
        return (1 / numbers if node.op_type == "Div" else numbers), np.zeros(1)


def _rewrite(last: onnx_ir.Node, product: _Product, scale: Floats, shift: Floats, scope: Scope) -> None:
    """MatMul with the scaled weight, and Add of s b + t where there is any; both names stay."""
    matmul, add, graph = product.matmul, product.add, graph_of(last)
    dtype = product.weight.dtype
    weight = scope.constant(
        graph, (product.weight * scale.astype(dtype)).astype(dtype), required(matmul, 1).name or "weight"
    )
    made = [scope.make_like(matmul, "MatMul", [matmul.inputs[0], weight])]
    total = shift if product.bias is None else product.bias * scale + shift
    if add is not None or np.any(total):
        full = np.broadcast_to(total, scale.shape).astype(dtype)
        bias = scope.constant(graph, full, f"{matmul.name or 'MatMul'}.bias")
        made.append(scope.make_like(add or last, "Add", [made[0].outputs[0], bias]))
    scope.replace(last, [matmul, *([] if add is None else [add]), last], made)
