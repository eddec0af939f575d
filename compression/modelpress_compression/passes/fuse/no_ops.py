"""Operators that pass their input on unchanged.

    Identity; Dropout at inference; Cast to the type that the value has; Transpose that permutes nothing; Concat of one
    x * 1, x / 1, x + 0, x - 0, x ** 1 with a constant of one element that adds no axes
    Reshape, Expand and Flatten to the (static) shape that the value has
    Transpose after Transpose: one, or none

A node stays when it alone carries the name of a graph output that its input cannot take over.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir

from modelpress_compression.graph.read import (
    constant_scalar,
    input_of,
    int_attribute,
    ints_attribute,
    is_op,
)
from modelpress_compression.passes.fuse.rewriting import FIRED, Outcome, Scope, scalar_beside

_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0, "Pow": 1.0}
_SHAPING = ("Reshape", "Expand", "Flatten")


class RemoveNoOps:
    """Removes operators that change nothing."""

    name: ClassVar[str] = "no_op"
    op_types: ClassVar[frozenset[str]] = frozenset(
        {"Identity", "Dropout", "Cast", "Transpose", "Concat", *_SHAPING, *_NEUTRAL}
    )

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        value = _passed_on(node)
        return FIRED if value is not None and scope.bypass(node, value) else None


class MergeTransposes:
    """Transpose after Transpose becomes one: perm[i] = first[second[i]]."""

    name: ClassVar[str] = "transpose_transpose"
    op_types: ClassVar[frozenset[str]] = frozenset({"Transpose"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        first = scope.inner(node.inputs[0], "Transpose")
        if first is None or first.graph is not node.graph:
            return None
        one, two = ints_attribute(first, "perm"), ints_attribute(node, "perm")
        if one is None or two is None:
            return None
        perm = onnx_ir.AttrInt64s("perm", [one[axis] for axis in two])
        scope.replace(node, [first, node], [scope.make_like(node, "Transpose", [first.inputs[0]], [perm])])
        return FIRED


def _passed_on(node: onnx_ir.Node) -> onnx_ir.Value | None:  # noqa: PLR0911 - a return for each reason
    """The input that the node's (first) output equals, if it does."""
    first = node.inputs[0] if node.inputs else None
    if first is None:
        return None
    if node.op_type == "Identity" or (node.op_type == "Concat" and len(node.inputs) == 1):
        return first
    if node.op_type == "Dropout":
        return first if _at_inference(node) else None
    if node.op_type == "Cast":
        return first if first.dtype is not None and int_attribute(node, "to", 0) == first.dtype.value else None
    if node.op_type == "Transpose":
        perm = ints_attribute(node, "perm")
        return first if perm is not None and perm == tuple(range(len(perm))) else None
    if node.op_type in _SHAPING:
        return first if _same_static_shape(first, node.outputs[0]) else None
    return _without_neutral(node) if node.op_type in _NEUTRAL else None


def _at_inference(node: onnx_ir.Node) -> bool:
    """The mask unused, and training_mode (an input since opset 12) absent or false."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return False
    training = input_of(node, 2)
    return training is None or constant_scalar(training) == 0


def _same_static_shape(before: onnx_ir.Value, after: onnx_ir.Value) -> bool:
    if before.shape is None or after.shape is None or not before.shape.is_static():
        return False
    return after.shape.is_static() and before.shape == after.shape


def _without_neutral(node: onnx_ir.Node) -> onnx_ir.Value | None:
    for position in (1, 0) if is_op(node, "Mul", "Add") else (1,):
        value = node.inputs[1 - position]
        if scalar_beside(node.inputs[position], value) == _NEUTRAL[node.op_type]:
            return value
    return None
