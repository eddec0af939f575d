"""Pooling, padding, resizing: axes of space change, channels pass."""

from __future__ import annotations

import onnx_ir

from modelpress_compression.channels.fixes import Extents
from modelpress_compression.channels.labels import AxisLabels
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import UNKNOWN_SHAPES, Tracer
from modelpress_compression.graph.read import input_of, ints_attribute

# The input with the extents of the result.
_SIZES = {"Resize": 3, "CenterCropPad": 1}
_SPACE = "The axis is one of space: windows run over it."


@rule("AveragePool", "MaxPool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def pool(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """[N, C, space...]; the indices of MaxPool count over channels and are frozen where they are used."""
    axes = tracer.axes(node.inputs[0])
    if axes is None or len(axes) < 3:
        return UNKNOWN_SHAPES
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return "The indices of the pooling count over all channels."
    for axis in axes[2:]:
        tracer.freeze(axis, node, _SPACE)
    for output in node.outputs:
        tracer.set(output, (*axes[:2], *(None,) * (len(axes) - 2)))
    return None


@rule("Pad", "Resize", "Upsample", "CenterCropPad")
def resize(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Axes whose extent stays pass; a labelled axis that gets another extent is frozen."""
    axes, before, after = tracer.axes(node.inputs[0]), tracer.shape(node.inputs[0]), tracer.shape(node.outputs[0])
    if axes is None or before is None or after is None:
        return UNKNOWN_SHAPES
    output: list[AxisLabels] = []
    for axis, old, new in zip(axes, before, after, strict=True):
        passes = old == new and not (node.op_type == "Pad" and _shifts(node, len(output), tracer))
        if not passes:
            tracer.freeze(axis, node, "The axis is resized or padded.")
        output.append(axis if passes else None)
    tracer.set(node.outputs[0], tuple(output))
    position = _SIZES.get(node.op_type)
    if position is None or input_of(node, position) is None:
        return None
    named = ints_attribute(node, "axes")
    sized = output if named is None else [output[axis] for axis in named]
    if tracer.known(node.inputs[position]) is None:
        return None if all(axis is None for axis in sized) else "The sizes of the resizing are not known."
    tracer.fixes.append(Extents(node, position, tuple(sized)))
    return None


def _shifts(node: onnx_ir.Node, axis: int, tracer: Tracer) -> bool:
    """Whether padding moves the axis though its extent stays (pads of opposite signs)."""
    if len(node.inputs) < 2:
        return False
    pads = tracer.known(node.inputs[1])
    if pads is None:
        return False
    begins = pads.reshape(-1)[: pads.size // 2]
    if input_of(node, 3) is None:
        return bool(begins[axis] != 0)
    padded, rank = tracer.known(node.inputs[3]), len(tracer.axes(node.inputs[0]) or ())
    return padded is None or any(
        int(begin) != 0 and int(named) % rank == axis for begin, named in zip(begins, padded.reshape(-1), strict=True)
    )


@rule("GridSample")
def grid_sample(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    axes, shape = tracer.axes(node.inputs[0]), tracer.shape(node.outputs[0])
    if axes is None or shape is None:
        return UNKNOWN_SHAPES
    for axis in (*axes[2:], *(tracer.axes(node.inputs[1]) or ())):
        tracer.freeze(axis, node, "The axis is one of space: it is sampled.")
    tracer.set(node.outputs[0], (*axes[:2], *(None,) * (len(shape) - 2)))
    return None
