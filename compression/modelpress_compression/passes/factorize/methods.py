"""The factorizations of a weight W [K, O]: features T [K, F] that depend on the rank, and mixing P [F, O] of them.

    W ~ T P,    error = tr (W - TP)^T H (W - TP) / tr W^T H W

H is the second moment of the layer's inputs, X^T X, so that the error is that of the answers; the identity without
data. In each the mixing is a 1x1 product (of `spatial` a row of the kernel), and T is made of:

    svd         any K -> r. Exactly the best of its rank: T = W U, P = U^T with the leading eigenvectors U of W^T H W,
                or, where K < O, T = S^-T V, P = V^T S^T W with those of S^T W W^T S, S S^T = H: what ASVD
                (arXiv:2312.05821) and SVD-LLM (arXiv:2403.07378) do. Of a convolution with a kernel the first of the
                pair keeps the kernel (Zhang et al., arXiv:1505.06798); groups stay groups.
    tucker      1x1 C -> r1, kernel r1 -> r2, 1x1 r2 -> O: Tucker-2 (Kim et al., arXiv:1511.06530) from a higher-order
                SVD and a few rounds of orthogonal iteration, channels whitened by their second moments.
    spatial     kh x 1 C -> r, then 1 x kw r -> O (Jaderberg et al., arXiv:1405.3866; Tai et al., arXiv:1511.06067).
    depthwise   t depthwise filters for each channel, then 1x1: a sum of t depthwise-separable convolutions, from an
                SVD of rank t of every channel's part (Guo et al., arXiv:1808.05517).

Where there is data, P is fitted once more with T fixed: P = (T^T H T)^-1 T^T H W, which has a closed form for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from modelpress_compression.graph.linear import Convolution, Matrix
from modelpress_compression.passes.factorize.layers import MAX_SIDE, Layer

Ranks = tuple[int, ...]
# What is added to the diagonal of H, as a share of its mean: what the data never showed must not go wild.
DAMPING = 1e-2
_ITERATIONS = 4  # of orthogonal iteration; more change the fourth digit
_STEPS = 64  # by which the two ranks of Tucker-2 grow together
_TINY = 1e-9  # keeps equations of features that repeat each other solvable; a share of their mean


@dataclass(frozen=True)
class Stage:
    """One of the products in the place of a layer. `weight`: [K, O] of a product, [O, C / group, kernel...] of a
    convolution; `axes`: those on which it has the layer's kernel, strides, pads and dilations."""

    weight: Matrix
    axes: tuple[int, ...] = ()
    group: int = 1


@dataclass(frozen=True)
class Factors:
    """`error`: the share of the energy of the answers (of the weight, without data) that is lost."""

    method: str
    ranks: Ranks
    stages: tuple[Stage, ...]
    error: float


class Method(Protocol):
    """One of the factorizations."""

    def why_not(self, layer: Layer) -> str:
        """Why it is none for this layer; "" where it is one."""
        ...

    def cost(self, layer: Layer, ranks: Ranks) -> tuple[int, int]:
        """MACs on one sample, and parameters."""
        ...

    def ranks(self, layer: Layer, share: float, round_to: int) -> Ranks | None:
        """The highest ranks whose factors cost at most this share of the layer; None where none do."""
        ...

    def factors(self, layer: Layer, ranks: Ranks, moments: Matrix | None) -> Factors:
        """`moments`: H [g, K, K], damped; None: no data."""
        ...


def damped(moments: Matrix) -> Matrix | None:
    """H [g, K, K] with something on its diagonal, each group of trace K; None where a group saw nothing."""
    size = moments.shape[1]
    means = np.trace(moments, axis1=1, axis2=2) / size
    if not np.isfinite(moments).all() or (means <= 0).any():
        return None
    result: Matrix = moments / means[:, None, None] + DAMPING * np.eye(size)
    return result


def rounded(rank: float, round_to: int) -> int:
    """Down to a multiple, where the rank is at least that."""
    whole = int(rank)
    return whole - whole % round_to if whole >= round_to else whole


class Svd:
    """K -> r -> O, each group by itself."""

    def why_not(self, layer: Layer) -> str:
        return ""

    def cost(self, layer: Layer, ranks: Ranks) -> tuple[int, int]:
        parameters = layer.groups * ranks[0] * (layer.inputs + layer.answers)
        return parameters * layer.positions.outputs, parameters

    def ranks(self, layer: Layer, share: float, round_to: int) -> Ranks | None:
        rank = rounded(share * layer.inputs * layer.answers / (layer.inputs + layer.answers), round_to)
        return (rank,) if rank else None

    def factors(self, layer: Layer, ranks: Ranks, moments: Matrix | None) -> Factors:
        rank = min(ranks[0], layer.inputs, layer.answers)
        found = [
            _low_rank(weight, None if moments is None else moments[group], rank)
            for group, weight in enumerate(layer.matrix)
        ]
        first, last = np.stack([one.features for one in found]), np.stack([one.mixing for one in found])
        stages: tuple[Stage, ...] = (Stage(first[0]), Stage(last[0]))
        if isinstance(layer.linear, Convolution):
            kernel = first.transpose(0, 2, 1).reshape(layer.groups * rank, layer.channels, *layer.kernel)
            stages = (Stage(kernel, _all_axes(layer), layer.groups), _mixing(layer, last))
        return Factors("svd", (rank,), stages, _share_lost(found))


class Tucker:
    """1x1 C -> r1, the kernel r1 -> r2, 1x1 r2 -> O."""

    def why_not(self, layer: Layer) -> str:
        return _why_no_kernel(layer) or (
            f"over {MAX_SIDE} channels" if max(layer.channels, layer.answers) > MAX_SIDE else ""
        )

    def cost(self, layer: Layer, ranks: Ranks) -> tuple[int, int]:
        one, two = ranks
        positions = layer.positions
        first, core, last = layer.channels * one, one * two * layer.points, two * layer.answers
        return first * positions.inputs + (core + last) * positions.outputs, first + core + last

    def ranks(self, layer: Layer, share: float, round_to: int) -> Ranks | None:
        for step in range(_STEPS, 0, -1):
            each = (rounded(step * extent / _STEPS, round_to) for extent in (layer.channels, layer.answers))
            found = tuple(max(1, rank) for rank in each)
            if _fits(self, layer, found, share):
                return found
        return None

    def factors(self, layer: Layer, ranks: Ranks, moments: Matrix | None) -> Factors:
        one, two = min(ranks[0], layer.channels), min(ranks[1], layer.answers)
        weight = layer.matrix[0].reshape(layer.channels, layer.points, layer.answers)
        lower = np.eye(layer.channels) if moments is None else np.linalg.cholesky(_of_channels(layer, moments[0]))
        whitened = np.tensordot(lower, weight, (0, 0))
        inner, outer = _orthogonal_iteration(whitened, one, two)
        core = np.tensordot(np.tensordot(inner, whitened, (0, 0)), outer, (2, 0))  # [r1, points, r2]
        read = np.linalg.solve(lower.T, inner)  # [C, r1]

        def project(matrix: Matrix) -> Matrix:
            cube = matrix.reshape(layer.channels, layer.points, -1)
            return np.tensordot(core, np.tensordot(read, cube, (0, 0)), ((0, 1), (0, 1)))

        mixing, error = outer.T, _lost(np.square(whitened).sum(), np.square(core).sum())
        if moments is not None:
            mixing, error = _least_squares(layer.matrix[0], moments[0], project)
        ones = (1,) * len(layer.kernel)
        stages = (
            Stage(read.T.reshape(one, layer.channels, *ones)),
            Stage(core.transpose(2, 0, 1).reshape(two, one, *layer.kernel), _all_axes(layer)),
            _mixing(layer, mixing[None]),
        )
        return Factors("tucker", (one, two), stages, error)


class Spatial:
    """kh x 1 C -> r, then 1 x kw r -> O."""

    def why_not(self, layer: Layer) -> str:
        if reason := _why_no_kernel(layer):
            return reason
        if len(layer.kernel) != 2 or min(layer.kernel) < 2:
            return "its kernel has no two sides"
        rows, columns = layer.kernel
        sides = (layer.channels * rows, layer.answers * columns)
        return f"over {MAX_SIDE} numbers on each side" if min(sides) > MAX_SIDE else ""

    def cost(self, layer: Layer, ranks: Ranks) -> tuple[int, int]:
        rows, columns = layer.kernel
        first, last = ranks[0] * layer.channels * rows, ranks[0] * layer.answers * columns
        return first * layer.positions.between + last * layer.positions.outputs, first + last

    def ranks(self, layer: Layer, share: float, round_to: int) -> Ranks | None:
        macs, parameters = self.cost(layer, (1,))
        rank = rounded(share * min(layer.macs / macs, layer.parameters / parameters), round_to)
        return (rank,) if rank else None

    def factors(self, layer: Layer, ranks: Ranks, moments: Matrix | None) -> Factors:
        (rows, columns), channels, answers = layer.kernel, layer.channels, layer.answers
        rank = min(ranks[0], channels * rows, columns * answers)
        weight = layer.matrix[0].reshape(channels * rows, columns * answers)
        pair = _low_rank(weight, None if moments is None else self._of_columns(layer, moments), rank)
        column = pair.features

        def project(matrix: Matrix) -> Matrix:
            cube = matrix.reshape(channels * rows, columns, -1)
            return np.tensordot(column, cube, (0, 0)).reshape(rank * columns, -1)

        mixing, error = pair.mixing.reshape(rank * columns, answers), _share_lost([pair])
        if moments is not None:
            mixing, error = _least_squares(layer.matrix[0], moments[0], project)
        stages = (
            Stage(column.T.reshape(rank, channels, rows, 1), (0,)),
            Stage(mixing.reshape(rank, columns, answers).transpose(2, 0, 1)[:, :, None, :], (1,)),
        )
        return Factors("spatial", (rank,), stages, error)

    @staticmethod
    def _of_columns(layer: Layer, moments: Matrix) -> Matrix:
        """Second moments of channels and rows of the kernel, over its columns."""
        rows, columns = layer.kernel
        side = layer.channels * rows
        whole = moments[0].reshape(side, columns, side, columns)
        result: Matrix = np.einsum("iaja->ij", whole) / columns
        return result


class Depthwise:
    """t filters for each channel, then 1x1 over all of them."""

    def why_not(self, layer: Layer) -> str:
        return _why_no_kernel(layer)

    def cost(self, layer: Layer, ranks: Ranks) -> tuple[int, int]:
        parameters = ranks[0] * layer.channels * (layer.points + layer.answers)
        return parameters * layer.positions.outputs, parameters

    def ranks(self, layer: Layer, share: float, round_to: int) -> Ranks | None:
        filters = int(share * layer.points * layer.answers / (layer.points + layer.answers))
        return (filters,) if filters else None

    def factors(self, layer: Layer, ranks: Ranks, moments: Matrix | None) -> Factors:
        channels, points = layer.channels, layer.points
        filters = min(ranks[0], points, layer.answers)
        weight = layer.matrix[0].reshape(channels, points, layer.answers)
        own = None if moments is None else moments[0].reshape(channels, points, channels, points)
        parts = [
            _low_rank(part, None if own is None else own[channel, :, channel], filters)
            for channel, part in enumerate(weight)
        ]
        depth = np.stack([part.features for part in parts])  # [C, points, t]
        mixing, error = np.concatenate([part.mixing for part in parts]), _share_lost(parts)

        def project(matrix: Matrix) -> Matrix:
            cube = matrix.reshape(channels, points, -1)
            projected: Matrix = np.matmul(depth.transpose(0, 2, 1), cube)
            return projected.reshape(channels * filters, -1)

        if moments is not None:
            mixing, error = _least_squares(layer.matrix[0], moments[0], project)
        kernel = depth.transpose(0, 2, 1).reshape(channels * filters, 1, *layer.kernel)
        stages = (Stage(kernel, _all_axes(layer), channels), _mixing(layer, mixing[None]))
        return Factors("depthwise", (filters,), stages, error)


METHODS: Mapping[str, Method] = MappingProxyType(
    {"svd": Svd(), "tucker": Tucker(), "spatial": Spatial(), "depthwise": Depthwise()}
)


@dataclass(frozen=True)
class _Pair:
    """W ~ T P of one matrix: features T [K, r], mixing P [r, O]; `energy` of the answers, and what of it is `lost`."""

    features: Matrix
    mixing: Matrix
    energy: float
    lost: float


def _low_rank(weight: Matrix, moments: Matrix | None, rank: int) -> _Pair:
    """The best of its rank, by the eigenvectors of the smaller side."""
    inputs, answers = weight.shape
    if answers <= inputs:
        gram = weight.T @ weight if moments is None else weight.T @ moments @ weight
        vectors, kept = _leading(gram, rank)
        return _Pair(weight @ vectors, vectors.T, *_energies(gram, kept))
    lower = np.eye(inputs) if moments is None else np.linalg.cholesky(moments)
    whitened = lower.T @ weight
    gram = whitened @ whitened.T
    vectors, kept = _leading(gram, rank)
    return _Pair(np.linalg.solve(lower.T, vectors), vectors.T @ whitened, *_energies(gram, kept))


def _leading(gram: Matrix, rank: int) -> tuple[Matrix, float]:
    """Eigenvectors [n, rank] of the largest eigenvalues, and the sum of these."""
    values, vectors = np.linalg.eigh(gram)
    return vectors[:, : -rank - 1 : -1], float(values[-rank:].sum())


def _energies(gram: Matrix, kept: float) -> tuple[float, float]:
    energy = float(np.trace(gram))
    return energy, max(0.0, energy - kept)


def _lost(energy: float, kept: float) -> float:
    return max(0.0, 1.0 - float(kept / energy))


def _share_lost(pairs: Sequence[_Pair]) -> float:
    energy = sum(pair.energy for pair in pairs)
    return sum(pair.lost for pair in pairs) / energy if energy > 0 else 0.0


def _least_squares(weight: Matrix, moments: Matrix, project: Callable[[Matrix], Matrix]) -> tuple[Matrix, float]:
    """The mixing P [F, O] of the least error for features T, and the error; `project`: from M [K, n] to T^T M."""
    weighed = project(moments)  # T^T H [F, K]
    gram, right = project(weighed.T), weighed @ weight
    gram = gram + _TINY * np.trace(gram) / len(gram) * np.eye(len(gram))
    mixing: Matrix = np.linalg.solve(gram, right)
    energy = float(np.vdot(weight, moments @ weight))
    return mixing, _lost(energy, float(2 * np.vdot(mixing, right) - np.vdot(mixing, gram @ mixing)))


def _orthogonal_iteration(cube: Matrix, one: int, two: int) -> tuple[Matrix, Matrix]:
    """Orthonormal factors [C, one] and [O, two] of a weight [C, points, O]."""
    outer, _ = _leading(_gram(cube, 2), two)
    inner = np.empty(0)
    for _ in range(_ITERATIONS):
        inner, _ = _leading(_gram(np.tensordot(cube, outer, (2, 0)), 0), one)
        outer, _ = _leading(_gram(np.tensordot(inner, cube, (0, 0)), 2), two)
    return inner, outer


def _gram(cube: Matrix, axis: int) -> Matrix:
    """Inner products of the slices along an axis."""
    others = [other for other in range(cube.ndim) if other != axis]
    return np.tensordot(cube, cube, (others, others))


def _of_channels(layer: Layer, moments: Matrix) -> Matrix:
    """Second moments of the channels [C, C], over the points of the kernel."""
    whole = moments.reshape(layer.channels, layer.points, layer.channels, layer.points)
    result: Matrix = np.einsum("iaja->ij", whole) / layer.points
    return result


def _mixing(layer: Layer, mixing: Matrix) -> Stage:
    """The last product of a convolution, 1x1, from [g, F, O]."""
    groups, features, answers = mixing.shape
    return Stage(
        mixing.transpose(0, 2, 1).reshape(groups * answers, features, *(1 for _ in layer.kernel)), group=groups
    )


def _all_axes(layer: Layer) -> tuple[int, ...]:
    return tuple(range(len(layer.kernel)))


def _why_no_kernel(layer: Layer) -> str:
    if layer.points < 2:
        return "it has no kernel"
    return "its channels are in groups already" if layer.groups > 1 else ""


def _fits(method: Method, layer: Layer, ranks: Ranks, share: float) -> bool:
    """Whether the factors cost no more than a share of the layer."""
    macs, parameters = method.cost(layer, ranks)
    return macs <= share * layer.macs and parameters <= share * layer.parameters
