"""QuantizeLinear and DequantizeLinear: scales and zero points by channel go with the channels."""

from __future__ import annotations

import onnx_ir

from modelpress_compression.channels.ops.layout import axis_of
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import UNKNOWN_SHAPES, Tracer
from modelpress_compression.graph.read import MICROSOFT, int_attribute


@rule("QuantizeLinear", "DequantizeLinear")
@rule("QuantizeLinear", "DequantizeLinear", domain=MICROSOFT)
def linear(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """X, and scale and zero point of one element or [extent of the axis]."""
    axes = tracer.axes(node.inputs[0])
    if axes is None:
        return UNKNOWN_SHAPES
    if int_attribute(node, "block_size", 0):
        return "The weight is quantized in blocks."
    output = list(axes)
    along = axis_of(node, 1, len(axes))
    for value in node.inputs[1:]:
        if value is None:
            continue
        parameter, shape = tracer.axes(value), tracer.shape(value)
        if parameter is None or shape is None or len(shape) > 1:
            return UNKNOWN_SHAPES
        if shape and shape[0] > 1:
            output[along] = tracer.unify(output[along], parameter[0], node)
    tracer.set(node.outputs[0], tuple(output))
    return None
