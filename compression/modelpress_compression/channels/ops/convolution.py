"""Conv, ConvTranspose and their fused and quantized forms: weights make channels and read channels."""

from __future__ import annotations

import numpy as np
import onnx_ir

from modelpress_compression.channels.fixes import Count
from modelpress_compression.channels.grids import Grid
from modelpress_compression.channels.labels import AxisLabels, Ints, ValueLabels
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import Tracer
from modelpress_compression.graph.read import MICROSOFT, input_of, int_attribute, label

_SPACE = "The axis is one of space: a kernel runs over it."


@rule("Conv")
@rule("FusedConv", domain=MICROSOFT)
def conv(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """X [N, C, space...], W [O, C / group, kernel...], B [O]; FusedConv adds Z, of the output's shape."""
    data, weight, shape = tracer.axes(node.inputs[0]), tracer.axes(node.inputs[1]), tracer.shape(node.inputs[1])
    if data is None or weight is None or shape is None or len(data) < 3:
        return "The shapes of the convolution are not known."
    freeze_space(data, weight, node, tracer)
    group = int_attribute(node, "group", 1)
    channels = data[1]
    made = weight[0]
    if group == 1:
        tracer.unify(channels, weight[1], node)
        tracer.mark(weight[1], "consumer", node)
    elif shape[1] == 1:
        made = _depthwise(channels, weight[0], group, node, tracer)
    else:
        _grouped(channels, weight[0], weight[1], group, node, tracer)
    tracer.mark(made, "passenger" if group > 1 and shape[1] == 1 else "producer", node)
    return finish(node, (data[0], made), len(data), tracer)


def finish(node: onnx_ir.Node, start: ValueLabels, rank: int, tracer: Tracer) -> str | None:
    """Bias, the sum of FusedConv, and the output's axes."""
    made = start[1]
    if input_of(node, 2) is not None:
        bias = tracer.axes(node.inputs[2])
        if bias is None or len(bias) != 1:
            return "The shape of the bias is not known."
        made = tracer.unify(made, bias[0], node)
    output: ValueLabels = (start[0], made, *(None,) * (rank - 2))
    if input_of(node, 3) is not None:
        summed = tracer.axes(node.inputs[3])
        if summed is None or len(summed) != rank:
            return "The shape of what is added is not known."
        output = tuple(tracer.unify(one, other, node) for one, other in zip(output, summed, strict=True))
    tracer.set(node.outputs[0], output)
    return None


def freeze_space(data: ValueLabels, weight: ValueLabels, node: onnx_ir.Node, tracer: Tracer) -> None:
    for axis in (*data[2:], *weight[2:]):
        tracer.freeze(axis, node, _SPACE)


def _depthwise(channels: AxisLabels, made: AxisLabels, group: int, node: onnx_ir.Node, tracer: Tracer) -> AxisLabels:
    """Every input channel has its own filters, which go with it."""
    if channels is None or made is None:
        tracer.unify(channels, made, node)
        return None
    tracer.unify(np.repeat(channels, made.size // group), made, node)
    tracer.fixes.append(Count(node, "group", channels))
    return made


def _grouped(
    channels: AxisLabels, made: AxisLabels, read: AxisLabels, group: int, node: onnx_ir.Node, tracer: Tracer
) -> None:
    """Either whole groups go, or channels at the same place of every group."""
    groups = tracer.labels.fresh(group)
    inner, outer = grid(channels, groups, node, tracer), grid(made, groups, node, tracer)
    tracer.unify(inner, read, node)
    tracer.mark(read, "consumer", node, "group")
    for axis in (inner, outer, groups):
        tracer.mark(axis, "producer", node, "group")
    tracer.fixes.append(Count(node, "group", groups))


def grid(whole: AxisLabels, groups: Ints, node: onnx_ir.Node, tracer: Tracer) -> AxisLabels:
    """Labels of the places inside of a group, where the whole axis consists of groups."""
    if whole is None:
        tracer.freeze(groups, node, "The groups of the convolution read an input that cannot be cut.")
        return None
    size = whole.size // groups.size
    places = tracer.labels.fresh(size) if size > 1 else None
    tracer.grids.append(Grid(whole, (groups, places), (groups.size, size), label(node)))
    return places


@rule("ConvTranspose")
def conv_transpose(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """X [N, C, space...], W [C, O / group, kernel...], B [O]."""
    data, weight, shape = tracer.axes(node.inputs[0]), tracer.axes(node.inputs[1]), tracer.shape(node.inputs[1])
    if data is None or weight is None or shape is None or len(data) < 3:
        return "The shapes of the convolution are not known."
    freeze_space(data, weight, node, tracer)
    group = int_attribute(node, "group", 1)
    tracer.unify(data[1], weight[0], node)
    made = weight[1]
    if group == 1:
        tracer.mark(weight[0], "consumer", node)
    elif group == shape[0] and shape[1] == 1:
        made = weight[0]
        if weight[0] is not None:
            tracer.fixes.append(Count(node, "group", weight[0]))
    else:
        groups = tracer.labels.fresh(group)
        grid(weight[0], groups, node, tracer)
        made = tracer.labels.fresh(group * shape[1])
        tracer.unify(grid(made, groups, node, tracer), weight[1], node)
        tracer.mark(weight[0], "consumer", node, "group")
        tracer.fixes.append(Count(node, "group", groups))
    tracer.mark(made, "producer", node)
    return finish(node, (data[0], made), len(data), tracer)
