"""Products by a constant that are written otherwise, as MatMul, since only that can be quantized.

    FusedMatMul(A, W; alpha, transB)  =  alpha MatMul(A, W or W^T)
    Einsum("bc,w->bf"; A, W)          =  Reshape(MatMul(Reshape(A), W'))

    b, c, f   labels of A [b, c] that are in the result, labels that are summed up, labels of the result [b, f] that W
              brings; w has those of c and f in any order
    W'        [c, f], W transposed and reshaped by nodes, which `views` makes constants of

Dense layers of Flax and Keras, heads that share the table of an embedding ("btd,vd->btv"), and projections that put
heads in front ("bsd,dhe->bhse", "bhse,hed->bsd") are such an Einsum; where labels of A or of the result stand in
another order, there is a Transpose. One stays as it is where a label of W is one of A's and of the result's too, and
where a label stands twice in one operand. Reference of FusedMatMul: onnxruntime's
docs/ContribOperators.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir

from modelpress_compression.graph.edit import Editor, Spot
from modelpress_compression.graph.read import (
    MICROSOFT,
    attribute,
    constant_tensor,
    graph_of,
    input_of,
    is_op,
    label,
    required,
)
from modelpress_compression.model import Model

_UNKNOWN = ("transA", "transBatchA", "transBatchB")


@dataclass(frozen=True)
class _Product:
    """Labels of an Einsum by a constant, as above. `open`: A has further axes before them, which "..." stands for."""

    first: str
    weight: str
    result: str
    open: bool

    @property
    def batch(self) -> str:
        """Those of A that are in the result."""
        return "".join(name for name in self.first if name in self.result)

    @property
    def summed(self) -> str:
        """The others of A."""
        return "".join(name for name in self.first if name not in self.result)

    @property
    def free(self) -> str:
        """Those of the result that A has not."""
        return "".join(name for name in self.result if name not in self.first)

    @property
    def is_plain(self) -> bool:
        """Whether A and the result have the axes of a MatMul."""
        return len(self.summed) == len(self.free) == 1


def expand_products(model: Model, editor: Editor) -> int:
    """Rewrites in place; returns how many nodes."""
    found = 0
    for node in list(model.nodes()):
        if is_op(node, "FusedMatMul", domain=MICROSOFT):
            found += _expand_fused(node, editor)
        elif is_op(node, "Einsum"):
            found += _expand_einsum(node, editor)
    return found


def _expand_fused(node: onnx_ir.Node, editor: Editor) -> bool:
    weight = _weight(node)
    if weight is None or any(attribute(node, name, 0) for name in _UNKNOWN):
        return False
    spot = Spot(editor, node, label(node))
    if attribute(node, "transB", 0):
        weight = spot.emit("Transpose", weight, perm=[1, 0])
    result = _product(node, input_of(node, 0), weight, editor)
    if (alpha := attribute(node, "alpha", 1.0)) != 1.0:
        result = spot.emit("Mul", result, spot.constant(np.float32(alpha), "alpha"))
    return _put(node, result, editor)


def _expand_einsum(node: onnx_ir.Node, editor: Editor) -> bool:
    weight, product = _weight(node), _labels(str(attribute(node, "equation", "")))
    if weight is None or product is None or weight.shape is None or len(weight.shape) != len(product.weight):
        return False
    extents = dict(zip(product.weight, weight.shape.numpy(), strict=True))
    order = [product.weight.index(name) for name in product.summed + product.free]
    spot = Spot(editor, node, label(node))
    factor = required(node, 0)
    if order != sorted(order):
        weight = spot.emit("Transpose", weight, perm=order)
    factor = _reordered(factor, product.first, product.batch + product.summed, spot)
    if not product.is_plain:
        sizes = [math.prod(extents[name] for name in names) for names in (product.summed, product.free)]
        weight = spot.emit("Reshape", weight, spot.constant(np.asarray(sizes, np.int64), "matrix"))
    kept = [0] * len(product.batch)
    if len(product.summed) > 1:
        rows = [*kept, math.prod(extents[name] for name in product.summed)]
        factor = spot.emit("Reshape", factor, spot.constant(np.asarray(rows, np.int64), "rows"))
    result = _product(node, factor, weight, editor)
    if len(product.free) > 1:
        shape = [*kept, *(extents[name] for name in product.free)]
        result = spot.emit("Reshape", result, spot.constant(np.asarray(shape, np.int64), "axes"))
    return _put(node, _reordered(result, product.batch + product.free, product.result, spot), editor)


def _reordered(value: onnx_ir.Value, labels: str, wanted: str, spot: Spot) -> onnx_ir.Value:
    return value if labels == wanted else spot.emit("Transpose", value, perm=[labels.index(name) for name in wanted])


def _labels(equation: str) -> _Product | None:
    """None: it is no product of the kind that the module's docstring describes."""
    operands, arrow, result = equation.replace(" ", "").partition("->")
    first, comma, weight = operands.partition(",")
    if not arrow or not comma or "," in weight:
        return None
    is_open = first.startswith("...") and result.startswith("...")
    if is_open:
        first, result = first[3:], result[3:]
    product = _Product(first, weight, result, is_open)
    in_order = first == product.batch + product.summed and result == product.batch + product.free
    fits = sorted(weight) == sorted(product.summed + product.free) and product.summed and product.free
    unique = all(len(set(names)) == len(names) for names in (first, result, weight)) and "." not in first + result
    return product if fits and unique and (not is_open or (product.is_plain and in_order)) else None


def _weight(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """The second factor, where it is a float32 constant of two axes or more."""
    value = input_of(node, 1)
    tensor = constant_tensor(value)
    is_weight = tensor is not None and tensor.dtype == onnx_ir.DataType.FLOAT and len(tensor.shape) > 1
    return value if is_weight and len(node.inputs) == 2 and constant_tensor(input_of(node, 0)) is None else None


def _product(node: onnx_ir.Node, factor: onnx_ir.Value | None, weight: onnx_ir.Value, editor: Editor) -> onnx_ir.Value:
    made = editor.make("MatMul", [factor, weight], label(node))
    made.name = node.name  # globs of the recipe go on matching
    graph_of(node).insert_before(node, made)
    return made.outputs[0]


def _put(node: onnx_ir.Node, result: onnx_ir.Value, editor: Editor) -> bool:
    editor.hand_over(node.outputs[0], result)
    graph_of(node).remove(node, safe=True)
    return True
