"""Weights in the standard's form, DequantizeLinear(Q, scale, zero point), and operators that take Q, scale and zero
point as they are.

    scale and zero point    one; [extent of the axis]; or, with block_size, one for each block along the axis
    Q                       2 to 16 bits; 32 bits, without a zero point, for the biases of integer products
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings.operands import arranged, channel_axis, operand, quantized_weights
from modelpress_compression.encodings.packed import packed_levels, read_packed, write_packed
from modelpress_compression.encodings.weight import Levels, QuantizedWeight, StoredWeight
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import constant_array, constant_tensor, graph_of, int_attribute
from modelpress_compression.inputs import Array

_INT32 = np.iinfo(np.int32)


def store(editor: Editor, graph: onnx_ir.Graph, weight: QuantizedWeight, name: str) -> StoredWeight:
    """The constants of a weight: levels, scale, and a zero point of the scale's shape."""
    dtype = onnx_ir.DataType[f"{'' if weight.signed else 'U'}INT{weight.bits}"].numpy()
    zero_point = np.broadcast_to(weight.zero_point, weight.scale.shape).astype(dtype)
    values = editor.constant(graph, weight.levels.astype(dtype, copy=False), f"{name}_quantized")
    scale = editor.constant(graph, weight.scale, f"{name}_scale")
    return StoredWeight(weight, values, scale, editor.constant(graph, zero_point, f"{name}_zero_point"))


def store_packed(editor: Editor, graph: onnx_ir.Graph, weight: QuantizedWeight, name: str) -> StoredWeight:
    """The same of a weight whose signed levels of 4 bits are even in number and have a zero point of 0: as int8 that is
    unpacked when the model is loaded (encodings/packed.py), so that the kernels for 8 bits take it. `values` is what
    users read."""
    values = write_packed(editor, graph, weight.levels, name)
    scale = editor.constant(graph, weight.scale, f"{name}_scale")
    zero_point = editor.constant(graph, np.zeros(weight.scale.shape, np.int8), f"{name}_zero_point")
    return StoredWeight(weight, values, scale, zero_point, pack=packed_levels)


def write(editor: Editor, before: onnx_ir.Node, stored: StoredWeight, name: str) -> onnx_ir.Value:
    """A DequantizeLinear of the weight before a node; each user wants its own, by onnxruntime's patterns."""
    weight = stored.weight
    attributes = {} if weight.axis is None else {"axis": weight.axis}
    if weight.block:
        attributes["block_size"] = weight.block
    inputs = arranged("DequantizeLinear", **stored.operands())
    return editor.emit(before, "DequantizeLinear", inputs, name, attributes=attributes)[0]


def write_bias(
    editor: Editor, before: onnx_ir.Node, bias: NDArray[np.float32], scale: NDArray[np.float32], name: str
) -> onnx_ir.Value:
    """A bias [N] in 32 bits, of one scale or [N]; without a zero point, which would be as large as the bias."""
    levels = np.clip(np.rint(bias.astype(np.float64) / scale), _INT32.min, _INT32.max).astype(np.int32)
    weight = QuantizedWeight(levels, scale, np.zeros((), np.int32), 0 if scale.ndim else None, bits=32)
    values = editor.constant(graph_of(before), levels, f"{name}_quantized")
    factor = editor.constant(graph_of(before), scale, f"{name}_scale")
    return write(editor, before, StoredWeight(weight, values, factor), name)


def make_pair(
    editor: Editor, value: onnx_ir.Value, scale: onnx_ir.Value, zero_point: onnx_ir.Value
) -> tuple[onnx_ir.Node, onnx_ir.Node]:
    """QuantizeLinear and DequantizeLinear of an activation, in no graph yet."""
    name = value.name or "activation"
    quantize = editor.make("QuantizeLinear", [value, scale, zero_point], name)
    return quantize, editor.make("DequantizeLinear", [quantize.outputs[0], scale, zero_point], name)


def read(node: onnx_ir.Node) -> tuple[StoredWeight, ...]:
    """The constant weights of an operator that takes them as they are; where it takes no scale for them, that is 1."""
    found = [_read(node, name, values) for name, values in quantized_weights(node).items()]
    found += [_read_packed(node, name) for name in ("w", "r")]
    return tuple(stored for stored in found if stored is not None)


def _read(node: onnx_ir.Node, name: str, values: onnx_ir.Value) -> StoredWeight | None:
    tensor = constant_tensor(values)
    if tensor is None or not tensor.dtype.is_integer():
        return None
    return _stored(node, name, values, whole(tensor.numpy()), tensor.dtype.bitwidth)


def _read_packed(node: onnx_ir.Node, name: str) -> StoredWeight | None:
    found = read_packed(operand(node, name))
    stored = _stored(node, name, *found, 4) if found is not None else None
    return replace(stored, pack=packed_levels) if stored is not None else None


def _stored(node: onnx_ir.Node, name: str, values: onnx_ir.Value, levels: Levels, bits: int) -> StoredWeight | None:
    """Levels with the scale and the zero point that the node has for them; None where these are computed."""
    given = [operand(node, f"{name}_{what}") for what in ("scale", "zero")]
    numbers = [constant_array(value) for value in given]
    computed = any(value is not None and array is None for value, array in zip(given, numbers, strict=True))
    if computed:
        return None
    scale, zero_point = (_along_weight(node, levels, array) for array in numbers)
    weight = QuantizedWeight(
        levels,
        np.ones((), np.float32) if scale is None else scale,
        np.zeros((), levels.dtype) if zero_point is None else whole(zero_point),
        channel_axis(node) % max(1, levels.ndim),
        int_attribute(node, "block_size", 0),
        bits,
    )
    return StoredWeight(weight, values, given[0], given[1])


def whole(array: NDArray[Any]) -> Levels:
    """Integers in a type that numpy can calculate with; those of less than 8 bits are types of ml_dtypes."""
    if array.dtype.kind in "iu":
        return array
    return array.astype(np.uint8 if array.dtype.name.startswith("u") else np.int8)


def _along_weight(node: onnx_ir.Node, levels: Levels, parameter: Array | None) -> Array | None:
    if parameter is None or (parameter.size == 1 and levels.ndim != parameter.ndim):
        return None if parameter is None else parameter.reshape(())
    # Weights [directions, inputs, columns] of an LSTM have a scale for each direction, or for each of its columns.
    return parameter.reshape(len(levels), 1, -1) if node.op_type == "DynamicQuantizeLSTM" else parameter
