"""A layer's weight W and the second moments H of its inputs, and the decompositions that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property

import numpy as np

from modelpress_compression.graph.linear import Matrix
from modelpress_compression.passes.factorize.layers import Layer

# What is added to the diagonal of H, as a share of its mean: what the data never showed must not go wild.
DAMPING = 1e-2
_TINY = 1e-9  # keeps equations of features that repeat each other solvable; a share of their mean


class Problem:
    """Of one layer. `matrix`: W [g, K, O]; `moments`: H [g, K, K], damped, or of a table its diagonal [1, K]; None: no
    data."""

    def __init__(self, layer: Layer, moments: Matrix | None) -> None:
        self.layer = layer
        self.matrix = layer.matrix
        self.moments = moments
        self._kept: dict[Hashable, Sequence[Decomposition]] = {}
        self._fits: dict[Hashable, NestedFit] = {}

    def decompositions(
        self, name: Hashable, make: Callable[[Problem], Sequence[Decomposition]]
    ) -> Sequence[Decomposition]:
        """Those that `make` makes, once under this name."""
        if name not in self._kept:
            self._kept[name] = make(self)
        return self._kept[name]

    def least_squares(self, project: Callable[[Matrix], Matrix]) -> tuple[Matrix, float] | None:
        """The mixing P [F, O] of the least error for features T of a layer of one group, and the error; None without
        data. `project`: from M [K, n] to T^T M [F, n]."""
        fit = self._fit(project)
        return None if fit is None else self._fitted(fit, len(fit))

    def nested_least_squares(
        self, name: Hashable, count: int, project: Callable[[Matrix], Matrix]
    ) -> tuple[Matrix, float] | None:
        """The same for `count` features of which fewer are the first of them: what was found out under this name for
        more is enough."""
        if name not in self._fits or len(self._fits[name]) < count:
            fit = self._fit(project)
            if fit is None:
                return None
            self._fits[name] = fit
        return self._fitted(self._fits[name], count)

    def _fit(self, project: Callable[[Matrix], Matrix]) -> NestedFit | None:
        if self.moments is None:
            return None
        weighed = project(self.moments[0])  # T^T H [F, K]
        return NestedFit(project(weighed.T), weighed @ self.matrix[0])

    def _fitted(self, fit: NestedFit, count: int) -> tuple[Matrix, float]:
        return fit.mixing(count), share_lost(self._energy, fit.kept(count))

    @cached_property
    def _energy(self) -> float:
        """Of the answers of the first group."""
        weight = self.matrix[0]
        return float(np.vdot(weight, weight if self.moments is None else self.moments[0] @ weight))


class NestedFit:
    """The mixing P of least error for the first features T of an order, for any number of them, by one Cholesky factor:
    its first rows and columns are the factor of theirs.

    `gram`: T^T H T [F, F], which is used up; `right`: T^T H W [F, O].
    """

    def __init__(self, gram: Matrix, right: Matrix) -> None:
        import torch

        diagonal = np.einsum("ii->i", gram)
        diagonal += _TINY * diagonal.mean()
        self._lower = torch.linalg.cholesky(torch.from_numpy(np.ascontiguousarray(gram)))
        self._whitened = torch.linalg.solve_triangular(self._lower, torch.from_numpy(right), upper=False)

    def __len__(self) -> int:
        return len(self._whitened)

    def mixing(self, count: int) -> Matrix:
        """P [count, O]."""
        import torch

        upper = self._lower[:count, :count].mT
        mixing: Matrix = torch.linalg.solve_triangular(upper, self._whitened[:count], upper=True).numpy()
        return mixing

    def kept(self, count: int) -> float:
        """Of the energy."""
        return float(self._whitened[:count].square().sum())


class Decomposition:
    """W ~ T P of one matrix [K, O], the best of every rank at once: by the eigenvectors of the smaller side.

    `moments`: H [K, K], or its diagonal [K]. `energy`: of the answers.
    """

    def __init__(self, weight: Matrix, moments: Matrix | None) -> None:
        inputs, answers = weight.shape
        if answers <= inputs:
            gram = weight.T @ (weight if moments is None else _weighed(moments, weight))
            values, vectors = leading(gram, answers)
            self._features, self._mixing = weight @ vectors, vectors.T
        else:
            whole = moments if moments is None or moments.ndim == 2 else np.diag(moments)
            lower = np.eye(inputs) if whole is None else np.linalg.cholesky(whole)
            whitened = lower.T @ weight
            gram = whitened @ whitened.T
            values, vectors = leading(gram, inputs)
            self._features, self._mixing = np.linalg.solve(lower.T, vectors), vectors.T @ whitened
        self.energy = float(np.trace(gram))
        self._values = values

    def features(self, rank: int) -> Matrix:
        """T [K, rank]."""
        return self._features[:, :rank]

    def mixing(self, rank: int) -> Matrix:
        """P [rank, O]."""
        return self._mixing[:rank]

    def kept(self, rank: int) -> float:
        """Of the energy."""
        return float(self._values[:rank].sum())


def _weighed(moments: Matrix, weight: Matrix) -> Matrix:
    """H W."""
    weighed: Matrix = moments[:, None] * weight if moments.ndim == 1 else moments @ weight
    return weighed


def leading(gram: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """The largest eigenvalues [rank], falling, and their eigenvectors [n, rank]."""
    values, vectors = np.linalg.eigh(gram)
    return values[: -rank - 1 : -1], vectors[:, : -rank - 1 : -1]


def share_lost(energy: float, kept: float) -> float:
    """Of the energy, 0 to 1."""
    return max(0.0, 1.0 - kept / energy) if energy > 0 else 0.0


def total_lost(parts: Sequence[Decomposition], rank: int) -> float:
    """The share of the energy of all parts that is lost at a rank."""
    return share_lost(sum(part.energy for part in parts), sum(part.kept(rank) for part in parts))


def damped(moments: Matrix) -> Matrix | None:
    """H [g, K, K] with something on its diagonal, each group of trace K; None where a group saw nothing."""
    size = moments.shape[1]
    means = np.trace(moments, axis1=1, axis2=2) / size
    if not np.isfinite(moments).all() or (means <= 0).any():
        return None
    result: Matrix = moments / means[:, None, None]
    np.einsum("gii->gi", result)[:] += DAMPING
    return result
