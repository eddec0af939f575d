"""A quantized weight as a matrix of levels, and the float weight behind it that training moves.

    real = scale * (level - zero_point)        levels [R, S], one scale and one zero point for each of the R rows

Training sees a float matrix W ("latent") through fake quantization with the grid as it is; gradients pass the rounding
as they are, and stop beyond the range:

    W -> Min, Max -> QuantizeLinear -> DequantizeLinear -> Reshape, Slice, Transpose -> the weight's own shape

The range is that of the levels in the file, about the zero point: levels that leave room in an accumulator keep it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.inputs import Array

Levels = NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """`levels` [R, S]; `scale`, `zero_point` [R]; `low` and `high` [R] bound what may be written."""

    levels: Levels
    scale: NDArray[np.float32]
    zero_point: Levels
    low: Levels
    high: Levels

    @classmethod
    def of(cls, levels: Array, scale: Array, zero_point: Array | None, bits: int, *, signed: bool) -> Grid:
        """Rows with their parameters. 8 bits stay within the largest distance from the zero point that the tensor has;
        4 bits use their whole range."""
        whole = levels.astype(np.int64)
        rows = len(whole)
        zero = np.zeros(rows, np.int64) if zero_point is None else np.resize(zero_point.astype(np.int64), rows)
        smallest, largest = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
        reach = np.abs(whole - zero[:, None]).max(initial=1) if bits > 4 else 1 << bits
        bounds = (np.clip(zero - reach, smallest, largest), np.clip(zero + reach, smallest, largest))
        return cls(whole, np.resize(scale.astype(np.float32), rows), zero, *bounds)

    @property
    def real(self) -> NDArray[np.float32]:
        return np.asarray((self.levels - self.zero_point[:, None]) * self.scale[:, None], np.float32)

    def quantize(self, latent: Array) -> Levels:
        """The levels of a float matrix [R, S]."""
        whole = np.rint(latent.astype(np.float64) / self.scale[:, None]) + self.zero_point[:, None]
        return np.clip(whole, self.low[:, None], self.high[:, None]).astype(np.int64)

    def bound(self, level: Levels) -> NDArray[np.float32]:
        """A bound as real numbers [R, 1]."""
        return np.asarray((level - self.zero_point) * self.scale, np.float32)[:, None]


class Emitter:
    """Adds nodes before `before`, and constants of the names that they are asked for."""

    def __init__(self, graph: onnx_ir.Graph, before: onnx_ir.Node, prefix: str) -> None:
        self._graph, self._before, self._prefix = graph, before, prefix
        self._count = 0

    def constant(self, array: Array, name: str = "") -> onnx_ir.Value:
        """An initializer; with a name, the one of that name where there is one already."""
        name = name or self._next()
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        value = onnx_ir.val(name, const_value=onnx_ir.tensor(np.ascontiguousarray(array), name=name))
        self._graph.register_initializer(value)
        return value

    def emit(
        self, op_type: str, inputs: Sequence[onnx_ir.Value | None], **attributes: int | Sequence[int]
    ) -> onnx_ir.Value:
        name = self._next()
        node = onnx_ir.node(op_type, inputs, attributes=dict(attributes), name=name)
        node.outputs[0].name = name
        self._graph.insert_before(self._before, [node])
        return node.outputs[0]

    def _next(self) -> str:
        self._count += 1
        return f"{self._prefix}__{self._count}"


def fake_quantized(emitter: Emitter, latent: onnx_ir.Value, grid: Grid) -> onnx_ir.Value:
    """[R, S]: the latent weight as the integers of its grid will have it."""
    low, high = (emitter.constant(grid.bound(level)) for level in (grid.low, grid.high))
    within = emitter.emit("Max", [emitter.emit("Min", [latent, high]), low])
    signed = bool((grid.low < 0).any())
    scale = emitter.constant(grid.scale)
    zero = emitter.constant(grid.zero_point.astype(np.int8 if signed else np.uint8))
    quantized = emitter.emit("QuantizeLinear", [within, scale, zero], axis=0)
    return emitter.emit("DequantizeLinear", [quantized, scale, zero], axis=0)


def reshaped(emitter: Emitter, value: onnx_ir.Value, shape: Sequence[int]) -> onnx_ir.Value:
    return emitter.emit("Reshape", [value, emitter.constant(np.asarray(shape, np.int64))])


def first_columns(emitter: Emitter, value: onnx_ir.Value, columns: int) -> onnx_ir.Value:
    """Of a matrix, without what fills up its last block."""
    bounds = (emitter.constant(np.asarray([number], np.int64)) for number in (0, columns, 1))
    return emitter.emit("Slice", [value, *bounds])
