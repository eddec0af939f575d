"""Integers of 4 bits for operators that take 8: onnxruntime makes int8 of them when it loads a model.

    F = Cast(P);  high = Floor(F / 16);  low = F - 16 high       P uint8 [count / 2]: two levels a byte, each + 8
    Q = Cast(Reshape(Concat(low, high) - 8, shape))              int8, -8 to 7

All of it is constant, and folded away: the file has half a byte for each level, and the kernels of 8-bit integers run
as if Q lay there. DequantizeLinear of the standard's INT4 in its place is computed in every run, and its products in
float32. The nodes stand at the head of the graph that owns the weight.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings.weight import Levels, pack, unpack
from modelpress_compression.graph.edit import Editor, Spot
from modelpress_compression.graph.read import constant_array, input_of, is_op

_OFFSET = 8


def can_pack(shape: tuple[int, ...]) -> bool:
    """Whether levels of this shape fill whole bytes."""
    return math.prod(shape) % 2 == 0


def write_packed(editor: Editor, graph: onnx_ir.Graph, levels: Levels, name: str) -> onnx_ir.Value:
    """An int8 value of the levels' shape, which are -8 to 7 and even in number."""
    head = Spot(editor, graph[0], name)
    packed = head.real(head.constant(packed_levels(levels), "packed"))
    high = head.emit("Floor", head.emit("Mul", packed, head.constant(np.float32(1 / 16), "sixteenth")))
    low = head.emit("Sub", packed, head.emit("Mul", high, head.constant(np.float32(16), "sixteen")))
    centred = head.emit("Sub", head.emit("Concat", low, high, axis=0), head.constant(np.float32(_OFFSET), "offset"))
    shaped = head.emit("Reshape", centred, head.constant(np.asarray(levels.shape, np.int64), "shape"))
    whole = head.emit("Cast", shaped, to=int(onnx_ir.DataType.INT8))
    whole.type = onnx_ir.TensorType(onnx_ir.DataType.INT8)
    whole.shape = onnx_ir.Shape(levels.shape)
    return whole


def read_packed(value: onnx_ir.Value | None) -> tuple[onnx_ir.Value, Levels] | None:
    """The constant that holds the levels of an int8 value, and the levels; None: it is none of these."""
    shaped = _behind(value, ("Cast", 0))
    shape = constant_array(_input(shaped, "Reshape", 1))
    held = _behind(shaped, ("Reshape", 0), ("Sub", 0), ("Concat", 1), ("Floor", 0), ("Mul", 0), ("Cast", 0))
    array = constant_array(held)
    if held is None or array is None or shape is None or array.dtype != np.uint8 or array.ndim != 1:
        return None
    extents = tuple(int(extent) for extent in shape)
    if min(extents, default=0) < 1 or math.prod(extents) != 2 * array.size:
        return None
    # The first half of all levels lies in the low halves of the bytes, so that unpacking is one Concat.
    levels = unpack(array, 4).reshape(-1, 2).T.reshape(extents)
    return held, levels.astype(np.int8) - np.int8(_OFFSET)


def packed_levels(levels: Levels) -> NDArray[np.uint8]:
    """The bytes that hold these levels."""
    halves = (levels.astype(np.int16) + _OFFSET).astype(np.uint8).reshape(2, -1)
    return pack(halves.T, 4).reshape(-1)


def _behind(value: onnx_ir.Value | None, *path: tuple[str, int]) -> onnx_ir.Value | None:
    for op_type, position in path:
        value = _input(value, op_type, position)
    return value


def _input(value: onnx_ir.Value | None, op_type: str, position: int) -> onnx_ir.Value | None:
    """An input of the node that makes the value, where that is of this operator."""
    node = value.producer() if value is not None else None
    return input_of(node, position) if node is not None and is_op(node, op_type) else None
