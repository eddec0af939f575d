"""Normalizations: their scales and biases go with the channels, their statistics are taken over what is left."""

from __future__ import annotations

import onnx_ir

from modelpress_compression.channels.fixes import Count
from modelpress_compression.channels.grids import Grid
from modelpress_compression.channels.ops.elementwise import broadcast
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import Tracer
from modelpress_compression.graph.read import MICROSOFT, int_attribute, label

_UNKNOWN = "The shapes of the normalization are not known."
_WEIGHT = "A computed weight is normalized."


@rule("BatchNormalization", "InstanceNormalization")
def per_channel(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """X [N, C, space...]; all parameters [C]."""
    if tracer.is_derived(node.inputs[0]):
        return _WEIGHT
    axes = tracer.axes(node.inputs[0])
    if axes is None or len(axes) < 2:
        return _UNKNOWN
    if len(node.outputs) > 1 and int_attribute(node, "training_mode", 0):
        return "The normalization is in training mode."
    channels = axes[1]
    for value in node.inputs[1:]:
        parameter = tracer.axes(value)
        if parameter is None or len(parameter) != 1:
            return _UNKNOWN
        channels = tracer.unify(channels, parameter[0], node)
    output = (axes[0], channels, *axes[2:])
    if node.op_type == "InstanceNormalization":
        # Channels that a Reshape merged with space are normalized together: only those left count.
        output = axes if channels is not None else (axes[0], None, *axes[2:])
    tracer.set(node.outputs[0], output)
    return None


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
@rule("SimplifiedLayerNormalization", domain=MICROSOFT)
def over_last_axes(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Scale and bias are broadcast to X; further outputs hold the statistics."""
    if tracer.is_derived(node.inputs[0]):
        return _WEIGHT
    values = [value for value in node.inputs if value is not None]
    axes = broadcast(values, node, tracer)
    if axes is None:
        return _UNKNOWN
    tracer.plain_outputs(node)
    tracer.set(node.outputs[0], axes)
    for output in node.outputs[1:]:
        if output.uses() or output.is_graph_output():
            for axis in axes:
                tracer.freeze(axis, node, "The statistics of the normalization are used elsewhere.")
    return None


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def with_skip(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Input, skip, scale, bias(es); output 3 is the sum of input and skip."""
    if tracer.is_derived(node.inputs[0]):
        return _WEIGHT
    axes = broadcast([value for value in node.inputs if value is not None], node, tracer)
    if axes is None:
        return _UNKNOWN
    tracer.plain_outputs(node)
    tracer.set(node.outputs[0], axes)
    if len(node.outputs) > 3:
        tracer.set(node.outputs[3], axes)
    return None


@rule("GroupNormalization")
def group_normalization(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """X [N, C, space...], num_groups; scale and bias are [num_groups] up to opset 20, [C] since."""
    if tracer.is_derived(node.inputs[0]):
        return _WEIGHT
    axes, shape = tracer.axes(node.inputs[0]), tracer.shape(node.inputs[0])
    groups = int_attribute(node, "num_groups", 1)
    if axes is None or shape is None or len(axes) < 2:
        return _UNKNOWN
    channels = axes[1]
    outer = tracer.labels.fresh(groups) if groups > 1 else None
    size = shape[1] // groups
    if channels is not None and groups > 1 and size > 1:
        inner = tracer.labels.fresh(size)
        tracer.grids.append(Grid(channels, (outer, inner), (groups, size), label(node)))
    elif channels is not None and outer is not None:
        tracer.unify(channels, outer, node)
    else:
        tracer.freeze(outer, node, "The channels of the normalization cannot be cut.")
    for value in node.inputs[1:]:
        parameter, extent = tracer.axes(value), tracer.shape(value)
        if parameter is None or extent is None or len(parameter) != 1:
            return _UNKNOWN
        tracer.unify(channels if extent[0] == shape[1] else outer, parameter[0], node)
    if outer is not None:
        tracer.fixes.append(Count(node, "num_groups", outer))
    tracer.set(node.outputs[0], axes)
    return None
