"""Layers that are a matrix product, seen as one: inputs as rows X [g, R, K], weight W [g, K, O], answers Y [g, R, O].

    Conv, 1 to 3 dimensions     g groups; a row is the patch under one position of the output (im2col)
    Gemm, MatMul                g = 1; a row is a sample, or a position of a sequence

Rows are a random part of those that a sample has. `Places` says which, so that inputs and answers agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.read import (
    constant_tensor,
    float_attribute,
    input_of,
    int_attribute,
    ints_attribute,
    is_op,
    string_attribute,
)
from modelpress_compression.inputs import Array

Matrix = NDArray[np.float64]
Rows = NDArray[np.float32]
Places = NDArray[np.int64]  # flat positions, of all that an output has but its channels


class Linear(Protocol):
    """How one node is a matrix product; arrays of activations are of any float type.

    `channel_axis`: of the node's output.
    """

    @property
    def channel_axis(self) -> int: ...

    def positions(self, output: Array) -> int:
        """How many rows this output has."""
        ...

    def inputs(self, data: Array, output: Array, places: Places) -> Rows:
        """Rows of the layer's input [g, R, K]; of `output` only the shape is looked at."""
        ...

    def answers(self, output: Array, places: Places) -> Rows:
        """The same rows of its output [g, R, O]."""
        ...

    def matrix(self, weight: Array) -> Matrix:
        """The weight as [g, K, O]."""
        ...

    def weight(self, matrix: Matrix, shape: tuple[int, ...]) -> Matrix:
        """A matrix [g, K, O] in the weight's shape."""
        ...


@dataclass(frozen=True)
class Dense:
    """MatMul and Gemm with a constant right operand. `transposed`: the weight is [O, K]."""

    transposed: bool

    @property
    def channel_axis(self) -> int:
        return -1

    def positions(self, output: Array) -> int:
        return int(output.size // output.shape[-1])

    def inputs(self, data: Array, output: Array, places: Places) -> Rows:
        return data.reshape(-1, data.shape[-1])[places].astype(np.float32)[None]

    def answers(self, output: Array, places: Places) -> Rows:
        return output.reshape(-1, output.shape[-1])[places].astype(np.float32)[None]

    def matrix(self, weight: Array) -> Matrix:
        matrix: Matrix = (weight.T if self.transposed else weight).astype(np.float64)[None]
        return matrix

    def weight(self, matrix: Matrix, shape: tuple[int, ...]) -> Matrix:
        numbers: Matrix = (matrix[0].T if self.transposed else matrix[0]).reshape(shape)
        return numbers


@dataclass(frozen=True)
class Convolution:
    """Conv; `pads`: those before each axis, or None where they follow from the shapes (`upper`: SAME_UPPER)."""

    groups: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    upper: bool = True

    @property
    def channel_axis(self) -> int:
        return 1

    def positions(self, output: Array) -> int:
        return int(output.size // output.shape[1])

    def inputs(self, data: Array, output: Array, places: Places) -> Rows:
        spatial = output.shape[2:]
        sample, *position = np.unravel_index(places, (output.shape[0], *spatial))
        offsets = [grid.reshape(-1) for grid in np.meshgrid(*(np.arange(size) for size in self.kernel), indexing="ij")]
        before = self._pads_before(data.shape[2:], spatial)
        index, inside = [], np.ones((len(places), len(offsets[0])), np.bool_)
        for axis, (at, offset) in enumerate(zip(position, offsets, strict=True)):
            where = (at * self.strides[axis] - before[axis])[:, None] + offset * self.dilations[axis]
            inside &= (where >= 0) & (where < data.shape[2 + axis])
            index.append(np.clip(where, 0, data.shape[2 + axis] - 1))
        # With channels last, each position's are one piece of memory: half the time, the turning included.
        patches = np.ascontiguousarray(np.moveaxis(data, 1, -1))[(sample[:, None], *index)]  # [R, kernel, C]
        patches = patches.astype(np.float32, copy=False)
        patches[~inside] = 0  # also where what lies at the border is not finite
        rows, kernel, channels = patches.shape
        grouped = patches.reshape(rows, kernel, self.groups, channels // self.groups).transpose(2, 0, 3, 1)
        return np.ascontiguousarray(grouped).reshape(self.groups, rows, -1)

    def answers(self, output: Array, places: Places) -> Rows:
        rows = np.moveaxis(output, 1, -1).reshape(-1, output.shape[1])[places].astype(np.float32)
        return np.ascontiguousarray(rows.reshape(len(rows), self.groups, -1).transpose(1, 0, 2))

    def matrix(self, weight: Array) -> Matrix:
        split = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        return np.ascontiguousarray(split.transpose(0, 2, 1)).astype(np.float64)

    def weight(self, matrix: Matrix, shape: tuple[int, ...]) -> Matrix:
        return matrix.transpose(0, 2, 1).reshape(shape)

    def _pads_before(self, extents: Sequence[int], outputs: Sequence[int]) -> Sequence[int]:
        if self.pads is not None:
            return self.pads
        spans = ((size - 1) * dilation + 1 for size, dilation in zip(self.kernel, self.dilations, strict=True))
        totals = [
            max((output - 1) * stride + span - extent, 0)
            for output, stride, span, extent in zip(outputs, self.strides, spans, extents, strict=True)
        ]
        return [total // 2 if self.upper else total - total // 2 for total in totals]


def linear_of(node: onnx_ir.Node) -> Linear | str:
    """How the node is a matrix product with a constant float weight as second input, or why it is none."""
    tensor = constant_tensor(input_of(node, 1))
    if tensor is None or tensor.dtype not in (
        onnx_ir.DataType.FLOAT,
        onnx_ir.DataType.FLOAT16,
        onnx_ir.DataType.DOUBLE,
    ):
        return "its weight is no float constant"
    shape = tuple(int(extent) for extent in tensor.shape.numpy())
    if is_op(node, "MatMul") and len(shape) == 2:
        return Dense(transposed=False)
    if is_op(node, "Gemm"):
        scaled = any(float_attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta"))
        if scaled or int_attribute(node, "transA", 0):
            return "it scales its product or transposes its input"
        return Dense(bool(int_attribute(node, "transB", 0)))
    if is_op(node, "Conv"):
        return _convolution(node, shape)
    return f"{node.op_type} is no plain product with one weight"


def _convolution(node: onnx_ir.Node, shape: tuple[int, ...]) -> Linear | str:
    groups, axes = int_attribute(node, "group", 1), len(shape) - 2
    if not 1 <= axes <= 3:
        return f"a convolution over {axes} axes"
    mode = string_attribute(node, "auto_pad", "NOTSET")
    pads = (ints_attribute(node, "pads") or (0,) * (2 * axes)) if mode == "NOTSET" else (0,) * axes
    return Convolution(
        groups,
        shape[2:],
        ints_attribute(node, "strides") or (1,) * axes,
        ints_attribute(node, "dilations") or (1,) * axes,
        None if mode.startswith("SAME") else pads[:axes],
        mode != "SAME_LOWER",
    )
