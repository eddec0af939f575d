"""Weights as rows along their input axis: [outputs, inputs], the way that sparse kernels read them.

    Conv            [O, I/g, k...]     rows O          columns k..., I/g    input channels are neighbours (NHWC order)
    ConvTranspose   [I, O/g, k...]     rows g, O/g     columns k..., I/g
    Gemm            [K, N]             rows N          columns K            with transB the weight is [N, K] already
    MatMul          [..., K, N]        rows ..., N     columns K            as first operand [..., M, K]: columns K
    LSTM, GRU, RNN  [d, gates*H, I]    rows d, gates*H columns I
    Attention       [K, 3N]            as MatMul

Sparse tensor cores group four neighbours of that axis (Mishra et al., arXiv:2104.08378); with fewer input channels than
m the groups of a Conv run on into the next position of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelpress_compression.graph.read import int_attribute
from modelpress_compression.inputs import Array
from modelpress_compression.passes.prune.selection import Mask, Scores
from modelpress_compression.passes.prune.targets import Target


@dataclass(frozen=True)
class Layout:
    """How a weight becomes rows: reshape to `split`, transpose by `perm`; the last `columns` axes form a row."""

    split: tuple[int, ...]
    perm: tuple[int, ...]
    columns: int

    def rows(self, array: Scores) -> Scores:
        moved = array.reshape(self.split).transpose(self.perm)
        outer = moved.shape[: moved.ndim - self.columns]
        result: Scores = np.ascontiguousarray(moved).reshape(int(np.prod(outer)), -1)
        return result

    def back(self, mask: Mask, shape: tuple[int, ...]) -> Mask:
        moved = tuple(self.split[axis] for axis in self.perm)
        inverse = np.argsort(self.perm)
        return np.ascontiguousarray(mask.reshape(moved).transpose(inverse)).reshape(shape)


def layout_of(target: Target) -> Layout:
    """The layout of a weight by the operator that uses it."""
    node, shape = target.node, tuple(int(dim) for dim in target.tensor.shape.numpy())
    axes = len(shape)
    kernel = tuple(range(2, axes))
    if node.op_type in ("Conv", "FusedConv"):
        return Layout(shape, (0, *kernel, 1), axes - 1)
    if node.op_type == "ConvTranspose":
        group = int_attribute(node, "group", 1)
        split = (group, shape[0] // group, *shape[1:])
        return Layout(split, (0, 2, *range(3, axes + 1), 1), axes - 1)
    straight = Layout(shape, tuple(range(axes)), 1)
    if node.op_type in ("LSTM", "GRU", "RNN") or _inputs_last(target):
        return straight
    return Layout(shape, (*range(axes - 2), axes - 1, axes - 2), 1)


def _inputs_last(target: Target) -> bool:
    """Whether the input axis of a two-dimensional weight is its last one."""
    node = target.node
    if node.op_type in ("Gemm", "FusedGemm"):
        return bool(int_attribute(node, "transB", 0))
    if node.op_type in ("MatMul", "FusedMatMul"):
        transposed = bool(int_attribute(node, "transA" if target.position == 0 else "transB", 0))
        return (target.position == 0) != transposed
    return False


def smallest_of_groups(scores: Array, n: int, m: int) -> Mask:
    """The n smallest of every m neighbours in each row [rows, columns]; a remainder of a row is left alone."""
    mask: Mask = np.zeros(scores.shape, np.bool_)
    groups = scores.shape[1] // m
    if groups == 0:
        return mask
    # Indices take eight bytes each; some rows at a time keep that small.
    step = max(1, (1 << 20) // max(1, scores.shape[1]))
    for start in range(0, scores.shape[0], step):
        part = scores[start : start + step, : groups * m].reshape(-1, groups, m)
        order = np.argsort(part, axis=-1, kind="stable")[..., :n]
        chosen = np.zeros(part.shape, np.bool_)
        np.put_along_axis(chosen, order, True, axis=-1)
        mask[start : start + step, : groups * m] = chosen.reshape(-1, groups * m)
    return mask
