"""Masks: which weights become zero, the k smallest of many or n of every m neighbours.

The k smallest, exactly, of scores that never lie in memory together: scores are non-negative float32 numbers, whose
bit patterns order like the numbers themselves. A histogram over the upper 16 bits, then one over the lower 16 bits
inside of the bin where the k-th smallest lies, give its exact value in two passes and 512 KiB; scores equal to it are
taken in order until k are reached (a radix selection). So the share is exact, and zeros, which are smallest, go first:
pruning twice changes nothing.

n of every m neighbours (semi-structured sparsity) are neighbours along the input axis, in the way that sparse kernels
read weights as rows [outputs, inputs]:

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

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.graph.read import int_attribute
from modelpress_compression.inputs import Array
from modelpress_compression.passes.prune.prunable import PrunableWeight

Scores = NDArray[np.float32]
Mask = NDArray[np.bool_]

_Key = Callable[[NDArray[np.uint32]], NDArray[np.integer[Any]]]

_BINS = 1 << 16
_CHUNK = 1 << 20  # elements that are looked at together


@dataclass
class Selector:
    """Takes scores below `threshold`, and as many that equal it as are left in `ties`; call in the same order."""

    threshold: int
    ties: int

    def take(self, scores: Scores) -> Mask:
        """The mask of what is selected, of the same shape."""
        bits = _bits(scores)
        chosen: Mask = bits < self.threshold
        equal = np.flatnonzero(bits == self.threshold)[: self.ties]
        chosen[equal] = True
        self.ties -= len(equal)
        return chosen.reshape(scores.shape)


def smallest(k: int, scores: Callable[[], Iterable[Scores]]) -> Selector:
    """A selector of the k smallest; `scores` starts a fresh pass, and is called twice."""
    if k <= 0:
        return Selector(threshold=0, ties=0)
    upper = _histogram(scores(), lambda bits: bits >> 16)
    high, below = _bin_of(upper, k)
    lower = _histogram(scores(), lambda bits: bits[(bits >> 16) == high] & 0xFFFF)
    low, below_low = _bin_of(lower, k - below)
    return Selector(threshold=(high << 16) | low, ties=k - below - below_low)


def _bits(scores: Scores) -> NDArray[np.uint32]:
    return np.ascontiguousarray(scores, dtype=np.float32).reshape(-1).view(np.uint32)


def _histogram(passes: Iterable[Scores], key: _Key) -> NDArray[np.int64]:
    counts = np.zeros(_BINS, np.int64)
    for scores in passes:
        bits = _bits(scores)
        for start in range(0, bits.size, _CHUNK):
            counts += np.bincount(key(bits[start : start + _CHUNK]), minlength=_BINS)
    return counts


def _bin_of(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin that holds the k-th smallest, and how many lie in the bins below it."""
    totals = np.cumsum(counts)
    index = int(np.searchsorted(totals, k))
    return index, int(totals[index] - counts[index])


@dataclass(frozen=True)
class Layout:
    """How a weight becomes rows: reshape to `split`, transpose by `perm`; the last `columns` axes form a row."""

    split: tuple[int, ...]
    perm: tuple[int, ...]
    columns: int

    @property
    def row_length(self) -> int:
        return int(np.prod([self.split[axis] for axis in self.perm[-self.columns :]]))

    def rows(self, array: Scores) -> Scores:
        moved = array.reshape(self.split).transpose(self.perm)
        outer = moved.shape[: moved.ndim - self.columns]
        result: Scores = np.ascontiguousarray(moved).reshape(int(np.prod(outer)), -1)
        return result

    def back(self, mask: Mask, shape: tuple[int, ...]) -> Mask:
        moved = tuple(self.split[axis] for axis in self.perm)
        inverse = np.argsort(self.perm)
        return np.ascontiguousarray(mask.reshape(moved).transpose(inverse)).reshape(shape)


def layout_of(weight: PrunableWeight) -> Layout:
    """The layout of a weight by the operator that uses it."""
    node, shape = weight.node, tuple(int(dim) for dim in weight.tensor.shape.numpy())
    axes = len(shape)
    kernel = tuple(range(2, axes))
    if node.op_type in ("Conv", "FusedConv"):
        return Layout(shape, (0, *kernel, 1), axes - 1)
    if node.op_type == "ConvTranspose":
        group = int_attribute(node, "group", 1)
        split = (group, shape[0] // group, *shape[1:])
        return Layout(split, (0, 2, *range(3, axes + 1), 1), axes - 1)
    straight = Layout(shape, tuple(range(axes)), 1)
    if node.op_type in ("LSTM", "GRU", "RNN") or _inputs_last(weight):
        return straight
    return Layout(shape, (*range(axes - 2), axes - 1, axes - 2), 1)


def _inputs_last(weight: PrunableWeight) -> bool:
    """Whether the input axis of a two-dimensional weight is its last one."""
    node = weight.node
    if node.op_type in ("Gemm", "FusedGemm"):
        return bool(int_attribute(node, "transB", 0))
    if node.op_type in ("MatMul", "FusedMatMul"):
        transposed = bool(int_attribute(node, "transA" if weight.position == 0 else "transB", 0))
        return (weight.position == 0) != transposed
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
