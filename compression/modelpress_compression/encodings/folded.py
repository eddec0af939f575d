"""Weights in fewer bits for operators that take floats alone: onnxruntime makes float32 of them when it loads a model.

    half     W = Cast(H)                                               float16
    levels   W = Cast(Q) * scale                                       8 or 16 bits, a scale a channel
    blocks   W = Reshape(Cast(Q) * scale)                              Q [rows, blocks, size], scale [rows, blocks, 1]
    rows     W = Cast(Gather(Q, index)) * Gather(scale, index)         rows of a table, a scale each
    4 bits   F = Cast(P);  high = floor(F / 16);  low = F - 16 high    P [rows, blocks, size / 2]: two levels a byte
             V = (Concat(low, high) - zero_point) * scale              both [rows, blocks, 1]
             W = Reshape(V), or Reshape(Slice(Reshape(V)))             where the last block of a row is filled up

All but the lookup is constant, and folded away when the model is loaded: the file shrinks, memory and latency are
float32's. A DequantizeLinear in its place is never folded, which costs a 3x3 Conv 1.24 times its time and a depthwise
one 3.8 times. The nodes stand at the head of the graph that owns the weight, for all its users.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings.weight import Levels, QuantizedWeight, StoredWeight, pack, unpack
from modelpress_compression.graph.edit import Editor, Spot
from modelpress_compression.graph.read import (
    constant_array,
    constant_scalar,
    constant_tensor,
    input_of,
    is_op,
    label,
    only_consumer,
    required,
)

_NO_OFFSET = np.zeros((), np.int8)


def write_half(editor: Editor, graph: onnx_ir.Graph, array: NDArray[np.float32], name: str) -> onnx_ir.Value:
    """A value that stands for the array, stored in float16."""
    head = Spot(editor, graph[0], name)
    return head.real(head.constant(array.astype(np.float16), "float16"))


def write_levels(
    editor: Editor, graph: onnx_ir.Graph, weight: QuantizedWeight, name: str, shape: Sequence[int] | None = None
) -> onnx_ir.Value:
    """A value that stands for the weight of 8 or 16 bits, whose zero point is 0 and whose scale is of its rank; in
    another `shape` where that is given."""
    head = Spot(editor, graph[0], name)
    real = head.real(head.constant(weight.levels, "quantized"))
    product = head.emit("Mul", real, head.constant(weight.scale, "scale"))
    return product if shape is None else head.emit("Reshape", product, head.constant(np.asarray(shape), "shape"))


def write_4_bits(
    editor: Editor, graph: onnx_ir.Graph, weight: QuantizedWeight, shape: Sequence[int], name: str
) -> onnx_ir.Value:
    """The same of a weight [rows, columns] in blocks along its rows, in another shape."""
    rows, columns = weight.levels.shape
    head = Spot(editor, graph[0], name)
    packed = head.real(head.constant(_halves(weight.levels, weight), "quantized"))
    high = head.emit("Floor", head.emit("Mul", packed, head.constant(np.float32(1 / 16), "sixteenth")))
    low = head.emit("Sub", packed, head.emit("Mul", high, head.constant(np.float32(16), "sixteen")))
    levels = head.emit("Concat", low, high, axis=2)
    zero_point = head.real(head.constant(weight.zero_point[:, :, None], "zero_point"))
    scale = head.constant(weight.scale[:, :, None], "scale")
    real = head.emit("Mul", head.emit("Sub", levels, zero_point), scale)
    if columns % weight.block:
        real = head.emit("Reshape", real, head.constant(np.asarray([rows, -1]), "rows"))
        bounds = (np.asarray([number]) for number in (0, columns, 1))
        real = head.emit("Slice", real, *(head.constant(bound, "slice") for bound in bounds))
    return head.emit("Reshape", real, head.constant(np.asarray(shape), "shape"))


def store_rows(editor: Editor, graph: onnx_ir.Graph, weight: QuantizedWeight, name: str) -> StoredWeight:
    """The constants of a table with a scale [rows, 1] for each row; its zero point is 0."""
    values = editor.constant(graph, weight.levels, f"{name}_quantized")
    return StoredWeight(weight, values, editor.constant(graph, weight.scale, f"{name}_scale"))


def write_rows(editor: Editor, node: onnx_ir.Node, stored: StoredWeight) -> onnx_ir.Value:
    """Rows of a table before a node, of that node's second input as indices."""
    index, name = required(node, 1), label(node)
    row = Spot(editor, node, f"{name}_quantized").emit("Gather", stored.values, index)
    factor = Spot(editor, node, f"{name}_scale").emit("Gather", stored.scale, index)
    spot = Spot(editor, node, name)
    return spot.emit("Mul", spot.real(row), factor)


def read_levels(node: onnx_ir.Node) -> tuple[StoredWeight, ...]:
    """The weight of 8 or 16 bits that a Mul hands out; its scale has the rank of its levels."""
    if is_op(only_consumer(node.outputs[0]), "Floor"):
        return ()  # two levels a byte
    for real, scale in (node.inputs, node.inputs[::-1]):
        values = _behind(real, ("Cast", 0))
        levels, factors = _integers(values, onnx_ir.DataType.INT16), constant_array(scale)
        if values is None or scale is None or levels is None or factors is None or factors.ndim > levels.ndim:
            continue
        factors = factors.reshape((1,) * (levels.ndim - factors.ndim) + factors.shape)
        weight = QuantizedWeight(levels, factors, np.zeros((), levels.dtype), bits=8 * levels.itemsize)
        return (StoredWeight(weight, values, scale),)
    return ()


def read_rows(node: onnx_ir.Node) -> tuple[StoredWeight, ...]:
    """The table of a Gather whose rows are scaled behind it."""
    values, scale = input_of(node, 0), _behind(factor_behind(node.outputs[0]), ("Gather", 0))
    levels, factors = _integers(values), constant_array(scale)
    if values is None or scale is None or levels is None or factors is None:
        return ()
    return (StoredWeight(QuantizedWeight(levels, factors, _NO_OFFSET), values, scale),)


def read_4_bits(node: onnx_ir.Node) -> tuple[StoredWeight, ...]:
    """The weight [rows, columns] that a Reshape hands out in another shape."""
    real, columns = input_of(node, 0), constant_scalar(_behind(input_of(node, 0), ("Slice", 2)))
    if columns is not None:
        real = _behind(real, ("Slice", 0), ("Reshape", 0))
    elif is_op(only_consumer(node.outputs[0]), "Slice"):
        return ()  # the next Reshape is the last
    values = _behind(real, ("Mul", 0), ("Sub", 0), ("Concat", 1), ("Floor", 0), ("Mul", 0), ("Cast", 0))
    zero, scale = _behind(real, ("Mul", 0), ("Sub", 1), ("Cast", 0)), _behind(real, ("Mul", 1))
    packed, zero_point, factors = constant_array(values), constant_array(zero), constant_array(scale)
    if values is None or zero is None or scale is None or packed is None or zero_point is None or factors is None:
        return ()
    if packed.dtype != np.uint8 or packed.ndim != 3 or not factors.shape == zero_point.shape == (*packed.shape[:2], 1):
        return ()
    levels = _swapped(unpack(packed, 4), 2).reshape(len(packed), -1)
    levels = levels if columns is None else levels[:, : int(columns)]
    weight = QuantizedWeight(levels, factors[:, :, 0], zero_point[:, :, 0], 1, 2 * packed.shape[2], 4)
    return (StoredWeight(weight, values, scale, zero, pack=lambda new: _halves(new, weight)),)


def factor_behind(value: onnx_ir.Value) -> onnx_ir.Value | None:
    """What floats made of these integers are multiplied by."""
    cast = only_consumer(value)
    product = only_consumer(cast.outputs[0]) if cast is not None and is_op(cast, "Cast") else None
    if cast is None or product is None or not is_op(product, "Mul"):
        return None
    return product.inputs[1 if product.inputs[0] is cast.outputs[0] else 0]


def _halves(levels: Levels, weight: QuantizedWeight) -> NDArray[np.uint8]:
    """Bytes [rows, blocks, size / 2]: the first half of a block in their low halves, the second in their high ones.

    So unpacking is one Concat; neighbours in one byte would have to be interleaved.
    """
    blocks = weight.filled(levels).reshape(*weight.scale.shape, weight.block)
    return pack(_swapped(blocks, weight.block // 2), 4)


def _swapped(blocks: Levels, count: int) -> Levels:
    """[rows, blocks, size]: what is [size / count, count] along the last axis becomes [count, size / count]."""
    return blocks.reshape(*blocks.shape[:2], -1, count).swapaxes(2, 3).reshape(blocks.shape)


def _behind(value: onnx_ir.Value | None, *path: tuple[str, int]) -> onnx_ir.Value | None:
    """Upwards from a value through operators, each by one of its inputs; None where the graph goes another way."""
    for op_type, position in path:
        node = value.producer() if value is not None else None
        value = input_of(node, position) if node is not None and is_op(node, op_type) else None
    return value


def _integers(value: onnx_ir.Value | None, *wider: onnx_ir.DataType) -> Levels | None:
    """The numbers of a constant of 8-bit integers, or of `wider` ones."""
    tensor = constant_tensor(value)
    kinds = (onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8, *wider)
    return tensor.numpy() if tensor is not None and tensor.dtype in kinds else None
