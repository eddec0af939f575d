"""Matrix products, Einsum among them.

An axis that is summed over can be cut where a constant weight reads it: what is left out then is what a zero column
would leave out. The sum over an axis of two activations (queries times keys) is frozen.
"""

from __future__ import annotations

import onnx_ir

from modelpress_compression.channels.labels import AxisLabels, ValueLabels
from modelpress_compression.channels.ops.elementwise import broadcast
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import Tracer
from modelpress_compression.graph.read import MICROSOFT, input_of, int_attribute, string_attribute

_BOTH_COMPUTED = "Two computed values are multiplied along the axis."
_UNKNOWN = "The shapes of the factors are not known."


def contract(
    left: AxisLabels, right: AxisLabels, weights: tuple[bool, bool], node: onnx_ir.Node, tracer: Tracer
) -> None:
    """Ties the axis that is summed over; `weights`: whether the left, the right factor depends on constants alone."""
    tied = tracer.unify(left, right, node)
    if not any(weights):
        tracer.freeze(tied, node, _BOTH_COMPUTED)
    for axis, weight in ((left, weights[0]), (right, weights[1])):
        if weight:
            tracer.mark(axis, "consumer", node)


@rule("MatMul")
def matmul(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    return product(node, tracer, (False, False))


@rule("FusedMatMul", domain=MICROSOFT)
def fused_matmul(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    if int_attribute(node, "transBatchA", 0) or int_attribute(node, "transBatchB", 0):
        return "The batch axes of the product are transposed."
    return product(node, tracer, (bool(int_attribute(node, "transA", 0)), bool(int_attribute(node, "transB", 0))))


def product(node: onnx_ir.Node, tracer: Tracer, transposed: tuple[bool, bool]) -> str | None:
    """A [..., m, k] times B [..., k, n]; a vector has the axis k alone."""
    values = [value for value in node.inputs[:2] if value is not None]
    axes = [tracer.axes(value) for value in values]
    left, right = axes[0], axes[1]
    if not left or not right:
        return _UNKNOWN
    weights = (tracer.is_derived(values[0]), tracer.is_derived(values[1]))
    rows, first = _matrix(left, transposed[0], last=True)
    columns, second = _matrix(right, transposed[1], last=False)
    contract(first, second, weights, node, tracer)
    if weights[0] and len(left) > 1:
        tracer.mark(rows, "producer", node)
    if weights[1] and len(right) > 1:
        tracer.mark(columns, "producer", node)
    batch = broadcast(
        [value for value, own in zip(values, (left, right), strict=True) if len(own) > 2], node, tracer, 2
    )
    if batch is None:
        return _UNKNOWN
    if not any(weights):
        for axis in batch:
            tracer.mark(axis, "passenger", node, "head")
    kept: ValueLabels = ((rows,) if len(left) > 1 else ()) + ((columns,) if len(right) > 1 else ())
    tracer.set(node.outputs[0], (*batch, *kept))
    return None


def _matrix(axes: ValueLabels, transposed: bool, *, last: bool) -> tuple[AxisLabels, AxisLabels]:
    """(the axis that is kept, the axis that is summed over); `last`: the latter stands last."""
    if len(axes) == 1:
        return None, axes[0]
    return (axes[-2], axes[-1]) if last != transposed else (axes[-1], axes[-2])


@rule("Gemm")
@rule("FusedGemm", domain=MICROSOFT)
def gemm(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """A [m, k] times B [k, n] plus C, which is broadcast to [m, n]."""
    left, right = tracer.axes(node.inputs[0]), tracer.axes(node.inputs[1])
    if left is None or right is None or len(left) != 2 or len(right) != 2:
        return _UNKNOWN
    weights = (tracer.is_derived(node.inputs[0]), tracer.is_derived(node.inputs[1]))
    rows, first = _matrix(left, bool(int_attribute(node, "transA", 0)), last=True)
    columns, second = _matrix(right, bool(int_attribute(node, "transB", 0)), last=False)
    contract(first, second, weights, node, tracer)
    for axis, weight in ((rows, weights[0]), (columns, weights[1])):
        if weight:
            tracer.mark(axis, "producer", node)
    output: ValueLabels = (rows, columns)
    if input_of(node, 2) is not None:
        added, shape = tracer.axes(node.inputs[2]), tracer.shape(node.inputs[2])
        if added is None or shape is None:
            return _UNKNOWN
        output = _add_bias(output, added, shape, node, tracer)
    tracer.set(node.outputs[0], output)
    return None


def _add_bias(
    output: ValueLabels, added: ValueLabels, shape: tuple[int, ...], node: onnx_ir.Node, tracer: Tracer
) -> ValueLabels:
    result = list(output)
    for back in range(1, len(added) + 1):
        if shape[-back] > 1:
            result[-back] = tracer.unify(result[-back], added[-back], node)
        else:
            tracer.freeze(added[-back], node, "The axis of extent 1 is broadcast.")
    return tuple(result)


@rule("Einsum")
def einsum(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Axes of one letter are tied; a letter that is summed over is an axis of a matrix product."""
    equation = string_attribute(node, "equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != len(node.inputs) or any(len(set(t)) != len(t) for t in terms):
        return "The equation of the Einsum is not traced."
    found: dict[str, list[tuple[AxisLabels, bool]]] = {}
    for value, term in zip(node.inputs, terms, strict=True):
        axes, shape = tracer.axes(value), tracer.shape(value)
        if axes is None or shape is None or len(axes) != len(term):
            return "The shapes at the Einsum are not known."
        for letter, axis in zip(term, axes, strict=True):
            found.setdefault(letter, []).append((axis, tracer.is_derived(value)))
    output = []
    for letter, entries in found.items():
        tied = entries[0][0]
        for axis, _ in entries[1:]:
            tied = tracer.unify(tied, axis, node)
        summed = letter not in right
        if tied is None:
            for axis, _ in entries:
                tracer.freeze(axis, node, "The axis meets one that cannot be cut, such as that of an input.")
        if summed and (len(entries) < 2 or not any(weight for _, weight in entries)):
            tracer.freeze(tied, node, "Computed values are summed over the axis.")
        for axis, weight in entries:
            if weight and (summed or len(entries) == 1):
                tracer.mark(axis, "consumer" if summed else "producer", node)
        found[letter] = [(tied, False)]
    for letter in right:
        output.append(found[letter][0][0])
    tracer.set(node.outputs[0], tuple(output))
    return None
