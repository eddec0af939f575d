"""Operators that work index by index, with broadcasting: axes that meet are tied."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

from modelpress_compression.channels.labels import AxisLabels, ValueLabels
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import Tracer
from modelpress_compression.graph.read import MICROSOFT

_UNARY = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Cos", "Cosh",
    "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log",
    "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus",
    "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_VARIADIC = (
    "Add", "Sub", "Mul", "Div", "Pow", "Mod", "PRelu", "Max", "Min", "Sum", "Mean", "Where", "And", "Or", "Xor",
    "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
)  # fmt: skip


@rule(*_UNARY)
@rule("Gelu", "QuickGelu", domain=MICROSOFT)
def unary(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """The output has the axes of input 0."""
    axes = tracer.axes(node.inputs[0])
    if axes is not None:
        tracer.set(node.outputs[0], axes)
    return None


@rule("Clip", "Dropout")
def first_of_many(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Bounds are scalars; a second output (the mask of Dropout) has the axes of the first."""
    axes = tracer.axes(node.inputs[0])
    if axes is not None:
        for output in node.outputs:
            tracer.set(output, axes)
    return None


@rule(*_VARIADIC)
@rule("BiasGelu", "FastGelu", domain=MICROSOFT)
def variadic(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """All inputs are broadcast against each other."""
    values = [value for value in node.inputs if value is not None]
    result = broadcast(values, node, tracer)
    if result is None:
        return "The shapes of the inputs are not known."
    if all(tracer.is_derived(value) for value in values):
        for value in values:
            for made, own in zip(reversed(result), reversed(tracer.axes(value) or ()), strict=False):
                tracer.pair(made, own)
    tracer.set(node.outputs[0], result)
    return None


def broadcast(values: Sequence[onnx_ir.Value], node: onnx_ir.Node, tracer: Tracer, skip: int = 0) -> ValueLabels | None:
    """Axes of values broadcast together, those that meet tied; `skip` axes at the end are left out."""
    entries: list[list[tuple[AxisLabels, int]]] = []
    for value in values:
        axes, shape = tracer.axes(value), tracer.shape(value)
        if axes is None or shape is None or len(axes) != len(shape):
            return None
        end = len(axes) - skip
        entries.append(list(zip(axes[:end], shape[:end], strict=True)))
    rank = max((len(entry) for entry in entries), default=0)
    result: list[AxisLabels] = []
    for back in range(rank, 0, -1):
        result.append(_meet([entry[-back] for entry in entries if len(entry) >= back], node, tracer))
    return tuple(result)


def _meet(axes: Sequence[tuple[AxisLabels, int]], node: onnx_ir.Node, tracer: Tracer) -> AxisLabels:
    widest = max(extent for _, extent in axes)
    full = [axis for axis, extent in axes if extent == widest]
    for axis, extent in axes:
        if extent < widest:
            tracer.freeze(axis, node, "The axis of extent 1 is broadcast.")
    result = full[0]
    for axis in full[1:]:
        result = tracer.unify(result, axis, node)
    if result is None:
        for axis in full:
            tracer.freeze(axis, node, "The axis meets one that cannot be cut, such as that of an input.")
    return result
