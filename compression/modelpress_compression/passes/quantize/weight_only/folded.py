"""Weights in 8 or 4 bits for operators without a kernel for them: onnxruntime makes float32 of them at load time.

    8 bits   W = Cast(Q) * scale                                       a scale a channel
    4 bits   F = Cast(P);  high = floor(F / 16);  low = F - 16 high    P holds two levels a byte
             W = (Concat(low, high) - zero_point) * scale              blocks.py: a scale and a zero point a block

All of it is constant, and folded away when the model is loaded: the file shrinks, memory and latency are float32's. A
DequantizeLinear in its place is never folded, which costs a 3x3 Conv 1.24 times its time and a depthwise one 3.8 times.
The nodes stand at the head of the graph that owns the weight, for all its users.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor
from modelpress_compression.passes.quantize.rounding.rounder import Numbers, Rounding
from modelpress_compression.passes.quantize.weight_only.blocks import Blocks, block_size, quantize_blocks, usable_scale
from modelpress_compression.passes.quantize.weights import WeightStore

# Shorter rows are those of depthwise convolutions and stems: few weights, on which much depends.
MIN_4_BIT_COLUMNS = 64


def columns_of(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """Elements of a row, where a row is a slice of the leading axes: two if both have scales of their own, or one."""
    return int(np.prod(shape[_leading(axes) :]))


def in_8_bits(
    editor: Editor, graph: onnx_ir.Graph, weight: onnx_ir.Value, axes: tuple[int, ...], rounding: Rounding
) -> onnx_ir.Value:
    """A value that stands for the weight, with a scale for each index of `axes` (one for everything where empty)."""
    array, name = WeightStore.array(weight), weight.name or "weight"
    kept = {axis % array.ndim for axis in axes}
    others = tuple(axis for axis in range(array.ndim) if axis not in kept)
    scale = usable_scale(np.abs(array).max(axis=others, keepdims=True) / np.float32(127))
    levels = rounding(array, scale, np.asarray(-127.0), np.asarray(127.0)).astype(np.int8)
    head = _Head(editor, graph, name)
    real = head.real(head.constant(levels, "quantized"))
    return head.emit("Mul", real, head.constant(scale, "scale"))


def in_4_bits(
    editor: Editor,
    graph: onnx_ir.Graph,
    weight: onnx_ir.Value,
    axes: tuple[int, ...],
    largest: int,
    rounding: Rounding,
) -> onnx_ir.Value:
    """The same in blocks of up to `largest` along the rows of `columns_of`."""
    array, name = WeightStore.array(weight), weight.name or "weight"
    columns = columns_of(array.shape, axes)
    size = block_size(columns, 4, largest)
    blocks = quantize_blocks(array.reshape(-1, columns), 4, size, _reshaped(rounding, array.shape))
    head = _Head(editor, graph, name)
    packed = head.real(head.constant(_halves(blocks), "quantized"))
    high = head.emit("Floor", head.emit("Mul", packed, head.constant(np.float32(1 / 16), "sixteenth")))
    low = head.emit("Sub", packed, head.emit("Mul", high, head.constant(np.float32(16), "sixteen")))
    levels = head.emit("Concat", low, high, axis=2)
    zero_point = head.real(head.constant(blocks.zero_point[:, :, None], "zero_point"))
    scale = head.constant(blocks.scale[:, :, None], "scale")
    real = head.emit("Mul", head.emit("Sub", levels, zero_point), scale)
    if columns % size:
        real = head.emit("Reshape", real, head.constant(np.asarray([len(blocks.levels), -1]), "rows"))
        bounds = (np.asarray([number]) for number in (0, columns, 1))
        real = head.emit("Slice", real, *(head.constant(bound, "slice") for bound in bounds))
    return head.emit("Reshape", real, head.constant(np.asarray(array.shape), "shape"))


def _leading(axes: tuple[int, ...]) -> int:
    return 2 if axes == (0, 1) else 1


def _halves(blocks: Blocks) -> NDArray[np.uint8]:
    """Levels [N, blocks, size / 2]: the first half of a block in the low halves of the bytes, the second in the high.

    So unpacking is one Concat; neighbours in one byte would have to be interleaved.
    """
    rows, count = blocks.scale.shape
    filled = np.repeat(blocks.zero_point, blocks.size, axis=1)
    filled[:, : blocks.levels.shape[1]] = blocks.levels
    low, high = np.split(filled.reshape(rows, count, blocks.size), 2, axis=2)
    return np.asarray(low | (high << 4), np.uint8)


def _reshaped(rounding: Rounding, shape: tuple[int, ...]) -> Rounding:
    """`rounding` of the weight in its own shape, for rows [N, K]."""

    def reshaped(weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
        parts = (part if part.ndim == 0 else part.reshape(shape) for part in (scale, low, high))
        return rounding(weight.reshape(shape), *parts).reshape(weight.shape)

    return reshaped


class _Head:
    """Adds nodes and constants for one weight at the head of a graph, in the order in which they are asked for."""

    def __init__(self, editor: Editor, graph: onnx_ir.Graph, name: str) -> None:
        self._editor, self._graph, self._name = editor, graph, name
        self._before = graph[0]

    def constant(self, array: NDArray[Any] | np.floating[Any], what: str) -> onnx_ir.Value:
        return self._editor.constant(self._graph, np.asarray(array), f"{self._name}_{what}")

    def real(self, integers: onnx_ir.Value) -> onnx_ir.Value:
        """As float32."""
        return self.emit("Cast", integers, to=int(onnx_ir.DataType.FLOAT))

    def emit(self, op_type: str, *operands: onnx_ir.Value, **attributes: int) -> onnx_ir.Value:
        return self._editor.emit(self._before, op_type, operands, self._name, attributes=attributes)[0]
