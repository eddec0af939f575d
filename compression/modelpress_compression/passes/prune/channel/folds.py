"""Choosing a layer's correction by cross-validation over samples, for each of its answers by itself.

Candidates, from the least change to the most: the layer as it is; another bias; ridge regressions of falling penalty.
Of those whose error is within one standard error of the best one's, the first is taken (the rule of Breiman et al.,
1984; standard errors over the folds, of the difference to the best). One penalty for all answers would be that of the
few with the largest variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.passes.prune.channel.linear import Matrix
from modelpress_compression.passes.prune.channel.normal_equations import Ridge, Sums

RIDGES = (10.0, 1.0, 0.1, 1e-2, 1e-3)


@dataclass(frozen=True)
class Correction:
    """What is added to a weight [g, K, O] and to a bias [g, 1, O]."""

    weight: Matrix
    bias: Matrix


@dataclass(frozen=True)
class Fitted:
    """`folds`: what each fold's copy gets, fitted without that fold; `whole`: fitted to all rows.

    Errors are sums of squares over all rows, each predicted without its fold.
    """

    folds: tuple[Correction, ...]
    whole: Correction
    error_before: float
    error_after: float


class _Candidates:
    """All corrections that one set of sums gives."""

    def __init__(self, sums: Sums, *, intercept: bool) -> None:
        shape = sums.products.shape
        self._biases = [np.zeros((shape[0], 1, shape[2]))]
        self._weights: list[NDArray[np.float32] | None] = [None]
        self._shape = shape
        ridge = Ridge(sums, intercept=intercept)
        if intercept:
            self._take(None, sums.best_bias(np.zeros(shape)))
        for penalty in RIDGES:
            weight = _solve(ridge, penalty, shape)
            self._take(weight.astype(np.float32), sums.best_bias(weight) if intercept else self._biases[0])

    def _take(self, weight: NDArray[np.float32] | None, bias: Matrix) -> None:
        self._weights.append(weight)
        self._biases.append(bias)

    def errors(self, sums: Sums) -> Matrix:
        """Of every candidate, on other rows [candidates, g, 1, O]."""
        return np.stack([sums.errors(self._weight(number), bias) for number, bias in enumerate(self._biases)])

    def correction(self, chosen: NDArray[np.int64]) -> Correction:
        """The chosen candidate [g, 1, O] for each answer."""
        weight, bias = np.zeros(self._shape), np.zeros(self._biases[0].shape)
        for number in np.unique(chosen).tolist():
            taken = chosen == number
            np.copyto(weight, self._weight(number), where=taken)
            np.copyto(bias, self._biases[number], where=taken)
        return Correction(weight, bias)

    def _weight(self, number: int) -> Matrix:
        weight = self._weights[number]
        return np.zeros(self._shape) if weight is None else weight.astype(np.float64)


def _solve(ridge: Ridge, penalty: float, shape: tuple[int, ...]) -> Matrix:
    """Zero where the equations cannot be solved: no correction."""
    try:
        weight = ridge.solve(penalty)
    except np.linalg.LinAlgError:
        return np.zeros(shape)
    return weight if np.isfinite(weight).all() else np.zeros(shape)


def cross_validate(folds: Sequence[Sums], *, intercept: bool) -> Fitted:
    """From the sums of at least two folds; `intercept`: whether there can be a bias."""
    candidates = [
        _Candidates(Sums.total([*folds[:number], *folds[number + 1 :]]), intercept=intercept)
        for number in range(len(folds))
    ]
    errors = np.stack([made.errors(sums) for made, sums in zip(candidates, folds, strict=True)], axis=1)
    chosen = choose(errors)
    whole = _Candidates(Sums.total(folds), intercept=intercept).correction(chosen)
    after = np.take_along_axis(errors, chosen[None, None], axis=0)
    return Fitted(
        tuple(made.correction(chosen) for made in candidates), whole, float(errors[0].sum()), float(after.sum())
    )


def choose(errors: Matrix) -> NDArray[np.int64]:
    """The first candidate within one standard error of the best; errors are [candidates, folds, ...]."""
    best = errors.sum(axis=1).argmin(axis=0)
    worse = errors - np.take_along_axis(errors, best[None, None], axis=0)
    standard_errors = worse.std(axis=1, ddof=1) * np.sqrt(errors.shape[1])
    return (worse.sum(axis=1) <= standard_errors).argmax(axis=0)
