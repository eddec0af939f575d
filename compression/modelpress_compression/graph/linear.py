"""Layers that are a matrix product, seen as one: inputs as rows X [g, R, K], weight W [g, K, O], answers Y [g, R, O].

    Conv, 1 to 3 dimensions     g groups; a row is the patch under one position of the output (im2col)
    Gemm, MatMul                g = 1; a row is a sample, or a position of a sequence

Rows are a random part of those that a sample has. `Places` says which, so that inputs and answers agree. Memory holds
the rows that are asked for: large activations are neither copied nor turned, and `pieces` bounds how many rows there
are at a time, of which each may have some thousand numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
Mask = NDArray[np.bool_]  # of channels

PIECE_BYTES = 16 * 1024**2  # 16 MiB: of rows at a time
# Turned so that channels come last, each position's are one piece of memory: many rows are found in half the time. Of
# larger activations a part is read, and the turned copy would cost more than it saves.
_TURNED_BYTES = 16 * 1024**2  # 16 MiB


class Linear(Protocol):
    """How one node is a matrix product; arrays of activations are of any float type.

    `channel_axis`: of the node's output.
    """

    @property
    def channel_axis(self) -> int: ...

    def extents(self, data: Sequence[int]) -> tuple[int, ...]:
        """Those of the node's output but its channels, for an input of the shape `data`: each position is a row."""
        ...

    def inputs(self, data: Array, places: Places, channels: Mask | None = None) -> Rows:
        """Rows of the layer's input [g, R, K]; `channels`: which of the input's are read, all if None."""
        ...

    def answers(self, output: Array, places: Places, channels: Mask | None = None) -> Rows:
        """The same rows of its output [g, R, O]; `channels`: which of the output's count, all if None."""
        ...

    def matrix(self, weight: Array) -> Matrix:
        """The weight as [g, K, O]."""
        ...

    def weight(self, matrix: Matrix, shape: tuple[int, ...]) -> Matrix:
        """A matrix [g, K, O] in the weight's shape."""
        ...


def pieces(places: Places, numbers: int, limit_bytes: int = PIECE_BYTES) -> Iterator[Places]:
    """The places in parts whose rows, of `numbers` float32 each, take at most `limit_bytes`; one row at least."""
    step = max(1, limit_bytes // (4 * max(1, numbers)))
    for start in range(0, len(places), step):
        yield places[start : start + step]


def drawn(places: Places | int, rows: int, seed: int) -> Places:
    """At most so many of the `places`, or of the first so many positions: at random, the same for the same seed."""
    count = places if isinstance(places, int) else len(places)
    if rows >= count:
        return np.arange(count) if isinstance(places, int) else places
    return np.random.default_rng(seed).choice(places, rows, replace=False, shuffle=False)


def rows_at(values: Array, axis: int, places: Places) -> Array:
    """Channels [R, C], which lie along `axis`, at flat positions over all other axes."""
    moved = np.moveaxis(values, axis, -1)
    rows: Array = moved[np.unravel_index(places, moved.shape[:-1])] if moved.ndim > 1 else moved[None][places]
    return rows


def parts_along(values: Array, axis: int, limit_bytes: int = PIECE_BYTES) -> Iterator[Array]:
    """Views of the values that together are all of them, with all channels, which lie along `axis`; each takes about
    `limit_bytes`, so that what is computed of it is small beside the activation."""
    others = np.delete(np.arange(values.ndim), axis).tolist()
    if not others or not values.size:
        yield values
        return
    longest = max(others, key=lambda other: values.shape[other])
    step = max(1, limit_bytes * values.shape[longest] // values.nbytes)
    for start in range(0, values.shape[longest], step):
        yield values[(slice(None),) * longest + (slice(start, start + step),)]


@dataclass(frozen=True)
class Dense:
    """MatMul and Gemm with a constant right operand. `transposed`: the weight is [O, K]."""

    transposed: bool

    @property
    def channel_axis(self) -> int:
        return -1

    def extents(self, data: Sequence[int]) -> tuple[int, ...]:
        return tuple(data[:-1])

    def inputs(self, data: Array, places: Places, channels: Mask | None = None) -> Rows:
        return _chosen(rows_at(data, -1, places), channels)[None]

    def answers(self, output: Array, places: Places, channels: Mask | None = None) -> Rows:
        return _chosen(rows_at(output, -1, places), channels)[None]

    def matrix(self, weight: Array) -> Matrix:
        matrix: Matrix = (weight.T if self.transposed else weight).astype(np.float64)[None]
        return matrix

    def weight(self, matrix: Matrix, shape: tuple[int, ...]) -> Matrix:
        numbers: Matrix = (matrix[0].T if self.transposed else matrix[0]).reshape(shape)
        return numbers


@dataclass(frozen=True)
class Convolution:
    """Conv; `pads`: those before each axis and then those behind each, or None where they follow from the shapes
    (`upper`: SAME_UPPER)."""

    groups: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    upper: bool = True

    @property
    def channel_axis(self) -> int:
        return 1

    def extents(self, data: Sequence[int]) -> tuple[int, ...]:
        if self.pads is None:
            spatial = (-(-extent // stride) for extent, stride in zip(data[2:], self.strides, strict=True))
            return (data[0], *spatial)
        axes = len(self.kernel)
        padded = (sum(parts) for parts in zip(data[2:], self.pads[:axes], self.pads[axes:], strict=True))
        parts = zip(padded, self._spans, self.strides, strict=True)
        return (data[0], *(max(0, (extent - span) // stride + 1) for extent, span, stride in parts))

    def inputs(self, data: Array, places: Places, channels: Mask | None = None) -> Rows:
        sample, *position = np.unravel_index(places, self.extents(data.shape))
        offsets = [grid.reshape(-1) for grid in np.meshgrid(*(np.arange(size) for size in self.kernel), indexing="ij")]
        before = self._pads_before(data.shape[2:])
        index, inside = [], np.ones((len(places), len(offsets[0])), np.bool_)
        for axis, (at, offset) in enumerate(zip(position, offsets, strict=True)):
            where = (at * self.strides[axis] - before[axis])[:, None] + offset * self.dilations[axis]
            inside &= (where >= 0) & (where < data.shape[2 + axis])
            index.append(np.clip(where, 0, data.shape[2 + axis] - 1))
        moved = np.moveaxis(data, 1, -1)
        turned = np.ascontiguousarray(moved) if data.nbytes <= _TURNED_BYTES else moved
        patches = _chosen(turned[(sample[:, None], *index)], channels)  # [R, kernel, C]
        patches[~inside] = 0  # also where what lies at the border is not finite
        rows, kernel, count = patches.shape
        grouped = patches.reshape(rows, kernel, self.groups, count // self.groups).transpose(2, 0, 3, 1)
        return np.ascontiguousarray(grouped).reshape(self.groups, rows, -1)

    def answers(self, output: Array, places: Places, channels: Mask | None = None) -> Rows:
        rows = _chosen(rows_at(output, 1, places), channels)
        return np.ascontiguousarray(rows.reshape(len(rows), self.groups, -1).transpose(1, 0, 2))

    def matrix(self, weight: Array) -> Matrix:
        split = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        return np.ascontiguousarray(split.transpose(0, 2, 1)).astype(np.float64)

    def weight(self, matrix: Matrix, shape: tuple[int, ...]) -> Matrix:
        return matrix.transpose(0, 2, 1).reshape(shape)

    @property
    def _spans(self) -> list[int]:
        """Of the kernel, dilations included."""
        return [(size - 1) * dilation + 1 for size, dilation in zip(self.kernel, self.dilations, strict=True)]

    def _pads_before(self, extents: Sequence[int]) -> Sequence[int]:
        if self.pads is not None:
            return self.pads[: len(self.kernel)]
        outputs = self.extents((1, 1, *extents))[1:]
        totals = [
            max((output - 1) * stride + span - extent, 0)
            for output, stride, span, extent in zip(outputs, self.strides, self._spans, extents, strict=True)
        ]
        return [total // 2 if self.upper else total - total // 2 for total in totals]


def _chosen(rows: Array, channels: Mask | None) -> Rows:
    """As float32, in memory of its own."""
    return (rows if channels is None else np.compress(channels, rows, axis=-1)).astype(np.float32, copy=False)


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
    pads = (ints_attribute(node, "pads") if mode == "NOTSET" else ()) or (0,) * (2 * axes)
    return Convolution(
        groups,
        shape[2:],
        ints_attribute(node, "strides") or (1,) * axes,
        ints_attribute(node, "dilations") or (1,) * axes,
        None if mode.startswith("SAME") else pads,
        mode != "SAME_LOWER",
    )
