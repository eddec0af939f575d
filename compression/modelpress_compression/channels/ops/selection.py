"""Operators that pick indices of an axis: Split, Slice, Gather and its kin."""

from __future__ import annotations

import onnx_ir

from modelpress_compression.channels.fixes import Parts, Positions, SliceBounds
from modelpress_compression.channels.integers import slice_of
from modelpress_compression.channels.labels import AxisLabels, Ints, ValueLabels
from modelpress_compression.channels.ops.layout import axis_of
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.ops.strided import identity_copy
from modelpress_compression.channels.tracer import UNKNOWN_SHAPES, Tracer
from modelpress_compression.graph.read import input_of, ints_attribute


@rule("Split")
def split(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    axes = tracer.axes(node.inputs[0])
    shapes = [tracer.shape(output) for output in node.outputs]
    if axes is None:
        return UNKNOWN_SHAPES
    along = axis_of(node, 0, len(axes))
    whole = axes[along]
    parts: list[Ints] = []
    start = 0
    for output, shape in zip(node.outputs, shapes, strict=True):
        if shape is None:
            return UNKNOWN_SHAPES
        part: AxisLabels = None
        if whole is not None:
            part = whole[start : start + shape[along]]
            parts.append(part)
        start += shape[along]
        tracer.set(output, (*axes[:along], part, *axes[along + 1 :]))
    if whole is not None:
        tracer.parts += parts
        tracer.fixes.append(Parts(node, tuple(parts)))
    elif len(node.inputs) > 1:
        tracer.use(node.inputs[1], node)
    return None


@rule("Slice")
def slice_(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Data, starts, ends, and perhaps axes and steps: one number for each axis that is sliced."""
    axes, extents, after = tracer.axes(node.inputs[0]), tracer.shape(node.inputs[0]), tracer.shape(node.outputs[0])
    if axes is None or extents is None or after is None:
        return UNKNOWN_SHAPES
    if ints_attribute(node, "starts") is not None or len(node.inputs) < 3:
        return "Slice with bounds as attributes is of an old opset."
    order = _sliced_axes(node, len(axes), tracer)
    if order is None:
        return "The axes of the slice are computed."
    bounds = _bounds(node, tracer)
    # A whole axis needs no mending, unless its bounds are computed from extents: then they must be those of this axis.
    computed = any(tracer.sources(value) for value in node.inputs[1:3])
    output, slices = list(axes), {}
    for number, axis in enumerate(order):
        labels = axes[axis]
        if labels is None:
            continue
        if bounds is None:
            return "The bounds of the slice are computed."
        part = slice_of(*bounds[number], extents[axis])
        if part == slice(0, extents[axis], 1) and not computed:
            continue
        if part.step != 1:
            tracer.freeze(labels, node, "The axis is sliced in steps.")
        else:
            slices[number] = (labels, part.start, part.stop)
            tracer.parts.append(labels[part])
        output[axis] = labels[part]
    tracer.set(node.outputs[0], tuple(output))
    if slices:
        tracer.fixes.append(SliceBounds(node, slices))
    else:
        # No fix will look after bounds that are computed from extents, so those must stay.
        for value in node.inputs[1:3]:
            tracer.use(value, node)
    return None


def _sliced_axes(node: onnx_ir.Node, rank: int, tracer: Tracer) -> list[int] | None:
    """The axes in the order of their bounds; None where they are not known before the model runs."""
    if input_of(node, 3) is None:
        return list(range(rank))
    chosen = _numbers(node, 3, tracer)
    return None if chosen is None else [axis % rank for axis in chosen]


def _bounds(node: onnx_ir.Node, tracer: Tracer) -> list[tuple[int, int, int]] | None:
    """(start, end, step) for each sliced axis; None where they may differ between runs."""
    starts, ends = _numbers(node, 1, tracer), _numbers(node, 2, tracer)
    steps = None if starts is None else [1] * len(starts) if input_of(node, 4) is None else _numbers(node, 4, tracer)
    if starts is None or ends is None or steps is None or not all(tracer.is_fixed(value) for value in node.inputs[1:]):
        return None
    return list(zip(starts, ends, steps, strict=True))


def _numbers(node: onnx_ir.Node, position: int, tracer: Tracer) -> list[int] | None:
    value = input_of(node, position)
    array = tracer.known(value)
    return None if array is None else [int(number) for number in array.reshape(-1)]


@rule("Gather")
def gather(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Rows of an embedding by computed indices, or constant indices of any axis."""
    axes, indices = tracer.axes(node.inputs[0]), tracer.axes(node.inputs[1])
    if axes is None or indices is None:
        return UNKNOWN_SHAPES
    if (copied := identity_copy(node, tracer)) is not None:
        tracer.set(node.outputs[0], copied)
        return None
    along = axis_of(node, 0, len(axes))
    whole = axes[along]
    picked: ValueLabels = (None,) * len(indices)
    if whole is not None:
        array = tracer.indices(node.inputs[1])
        if array is None:
            tracer.freeze(whole, node, "Rows of the axis are looked up by computed indices.")
        elif array.ndim == 1:
            chosen = whole[array]
            tracer.fixes.append(Positions(node, whole, chosen))
            tracer.parts.append(chosen)
            picked = (chosen,)
        else:
            tracer.freeze(whole, node, "One index of the axis is picked.")
    for axis in indices:
        # Indices are integers of shape [T] or such; labels of a constant one mean nothing but their own places.
        if not picked or picked[0] is None or len(indices) != 1:
            tracer.freeze(axis, node, "The axis is one of indices.")
    if tracer.is_derived(node.inputs[0]):
        for number, axis in enumerate(axes):
            if number != along:
                tracer.mark(axis, "producer", node)
    tracer.set(node.outputs[0], (*axes[:along], *picked, *axes[along + 1 :]))
    return None


@rule("GatherElements", "TopK", "CumSum", "Compress", "ArgMax", "ArgMin", "LpNormalization", "Hardmax")
def along_one_axis(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """The answer depends on every index of the axis, or on its number."""
    return f"{node.op_type} depends on every index of an axis."
