"""In which order onnxruntime's x86 kernels sum up the products of each operator.

Matrices are packed in groups of four successive rows k of [K, N], of which each half is a pair. A convolution runs on
its input with the channels last: k counts the channels of the group, then the positions of the kernel. Where the number
of channels is odd, pairs reach across positions; a tail is filled with zeros, padding with the zero point, and both lie
within 0 to 255.

What sums up single products in 32 bits has no pairs: depthwise convolutions, and unsigned weights, which are widened to
16 bits first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.read import int_attribute

_CHUNK = 1 << 21  # elements: bounds the temporary arrays


@dataclass(frozen=True)
class Summation:
    """Which axes of a weight a kernel sums over, slowest first, and the axis that has a scale for each slice.

    `axis` None: one scale for all. Terms 0 and 1 of the sum make a pair, 2 and 3, and so on; an odd one stays alone.
    `paired`: whether the kernels without VNNI add up pairs in 16 bits; False: single products in 32 bits.
    """

    summed: tuple[int, ...]
    axis: int | None = None
    paired: bool = True

    def slices(self, shape: tuple[int, ...]) -> int:
        """How many scales there are."""
        return 1 if self.axis is None else shape[self.axis]

    def pair_count(self, shape: tuple[int, ...]) -> int:
        """Pairs that make up one output."""
        return -(-math.prod(shape[axis] for axis in self.summed) // 2)

    def pairs(self, weight: NDArray[Any]) -> NDArray[Any]:
        """[slices, pairs, 2]; an odd rest is paired with zero."""
        terms = math.prod(weight.shape[axis] for axis in self.summed)
        rows = weight.transpose(self._order(weight.ndim)).reshape(-1, terms)
        if terms % 2:
            rows = np.pad(rows, ((0, 0), (0, 1)))
        return rows.reshape(self.slices(weight.shape), -1, 2)

    def restore(self, pairs: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The inverse of `pairs`."""
        order = self._order(len(shape))
        terms = math.prod(shape[axis] for axis in self.summed)
        rows = pairs.reshape(-1, 2 * self.pair_count(shape))[:, :terms]
        return rows.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))

    def chunks(self, shape: tuple[int, ...]) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """Slices of the scales, and the parts of the weight that belong to them, of bounded size."""
        count = self.slices(shape)
        step = max(1, _CHUNK * count // max(math.prod(shape), 1))
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            yield part, tuple(part if axis == self.axis else slice(None) for axis in range(len(shape)))

    def _order(self, rank: int) -> tuple[int, ...]:
        first = () if self.axis is None else (self.axis,)
        others = tuple(axis for axis in range(rank) if axis not in (*first, *self.summed))
        return (*first, *others, *self.summed)


def of_matrix(rank: int, axis: int | None) -> Summation:
    """[..., K, N]."""
    return Summation((rank - 2,), axis)


def of_node(node: onnx_ir.Node, shape: tuple[int, ...], axis: int | None) -> Summation:
    """How a Conv, MatMul or Gemm sums over its weight of this shape and with these scales."""
    rank = len(shape)
    if node.op_type == "Conv":
        depthwise = shape[1] == 1 and shape[0] == int_attribute(node, "group", 1)
        return Summation((*range(2, rank), 1), axis, paired=not depthwise)
    if node.op_type == "Gemm" and int_attribute(node, "transB", 0):
        return Summation((1,), axis)
    return of_matrix(rank, axis)


def output_axis(node: onnx_ir.Node, rank: int) -> int:
    """The axis of a Conv's, MatMul's or Gemm's weight that counts its output channels."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and int_attribute(node, "transB", 0)):
        return 0
    return rank - 1
