"""Einsum: axes of one letter are tied; a letter that is summed over is an axis of a matrix product."""

from __future__ import annotations

import onnx_ir

from modelpress_compression.channels.labels import Axis
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import Tracer
from modelpress_compression.graph.read import string_attribute


@rule("Einsum")
def einsum(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    equation = string_attribute(node, "equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != len(node.inputs) or any(len(set(t)) != len(t) for t in terms):
        return "The equation of the Einsum is not traced."
    found: dict[str, list[tuple[Axis, bool]]] = {}
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
