"""Factors in the place of a layer: the last keeps the layer's name, bias and output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.linear import Convolution
from modelpress_compression.graph.read import graph_of, input_of, is_op, label, string_attribute
from modelpress_compression.inputs import Array
from modelpress_compression.passes.factorize.layers import Layer
from modelpress_compression.passes.factorize.methods import Stage


def stored(layer: Layer, stages: Sequence[Stage]) -> list[Array] | None:
    """The weights in the layer's own type; None where it cannot hold them."""
    dtype = (layer.weight.dtype or onnx_ir.DataType.FLOAT).numpy()
    with np.errstate(over="ignore"):
        arrays = [np.ascontiguousarray(stage.weight, dtype) for stage in stages]
    return arrays if all(np.isfinite(array).all() for array in arrays) else None


def write(editor: Editor, layer: Layer, stages: Sequence[Stage], arrays: Sequence[Array]) -> str:
    """Puts the stages in the place of each node of the layer; returns the name of the last weight."""
    graph, name = graph_of(layer.nodes[0]), layer.weight.name or layer.name
    weights = [editor.constant(graph, array, f"{name}_factor_{number}") for number, array in enumerate(arrays)]
    for node in layer.nodes:
        if layer.is_table:
            _write_table(editor, node, *weights)
            continue
        data = node.inputs[0]
        for stage, weight in zip(stages[:-1], weights[:-1], strict=True):
            attributes = attributes_of(layer, node, stage)
            (data,) = editor.emit(node, node.op_type, (data, weight), f"{label(node)}_factor", attributes=attributes)
        bias = input_of(node, 2)
        inputs = (data, weights[-1]) if bias is None else (data, weights[-1], bias)
        last = editor.make_like(node, node.op_type, inputs, attributes_of(layer, node, stages[-1]))
        editor.replace(node, [node], [last])
    return weights[-1].name or ""


def _write_table(editor: Editor, node: onnx_ir.Node, rows: onnx_ir.Value, projection: onnx_ir.Value) -> None:
    """Rows of a narrower table, and one product with what all of them share."""
    (data,) = editor.emit(node, "Gather", (rows, node.inputs[1]), f"{label(node)}_factor")
    editor.replace(node, [node], [editor.make_like(node, "MatMul", (data, projection))])


def attributes_of(layer: Layer, node: onnx_ir.Node, stage: Stage) -> dict[str, Any]:
    """Those of a node like `node` for this stage: it moves over the stage's axes as the layer does, on others not."""
    if not isinstance(layer.linear, Convolution) or not is_op(node, "Conv"):
        return {}
    linear, axes = layer.linear, range(len(layer.kernel))
    attributes: dict[str, Any] = {
        "group": stage.group,
        "kernel_shape": list(stage.weight.shape[2:]),
        "strides": [linear.strides[axis] if axis in stage.axes else 1 for axis in axes],
        "dilations": [linear.dilations[axis] if axis in stage.axes else 1 for axis in axes],
    }
    mode = string_attribute(node, "auto_pad", "NOTSET")
    if mode == "NOTSET":
        pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else (0,) * (2 * len(axes))
        attributes["pads"] = [pad if number % len(axes) in stage.axes else 0 for number, pad in enumerate(pads)]
    elif stage.axes:
        attributes["auto_pad"] = mode
    return attributes
