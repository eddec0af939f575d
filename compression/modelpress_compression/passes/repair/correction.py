"""Choosing a layer's correction by samples that no fit saw, for each of its answers by itself.

Candidates, from the least change to the most: the layer as it is; another bias; ridge regressions of falling penalty.
Of those whose error is within one standard error of the best one's, the first is taken (the rule of Breiman et al.,
1984; the standard error of the difference to the best, over samples, since the rows of one sample are alike). One
penalty for all answers would be that of the few with the largest variance.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.graph.linear import Matrix, Rows
from modelpress_compression.passes.repair.normal_equations import Ridge, Sums, finite_rows

RIDGES = (10.0, 1.0, 0.1, 1e-2, 1e-3)


@dataclass(frozen=True)
class Correction:
    """What is added to a weight [g, K, O] and to a bias [g, 1, O]; errors are sums of squares over what is held out."""

    weight: Matrix
    bias: Matrix
    error_before: float
    error_after: float


class HeldOut:
    """Rows of samples that are not fitted to, as they come: X [g, R, K] and what the answers lack, Z [g, R, O]."""

    def __init__(self) -> None:
        self._parts: dict[Hashable, list[tuple[Rows, Rows]]] = {}  # of each sample

    def __len__(self) -> int:
        """How many samples."""
        return len(self._parts)

    def add(self, inputs: Rows, answers: Rows, sample: Hashable) -> None:
        """Some of a sample's; rows that are not finite are left out."""
        inputs, answers = finite_rows(inputs, answers)
        if inputs.shape[1]:
            self._parts.setdefault(sample, []).append((inputs, answers))

    def errors(self, weight: Rows, bias: Matrix) -> Matrix:
        """Sums of squares of X E + b - Z [samples, g, O]."""
        shift = bias.astype(np.float32)
        return self._squares(lambda inputs, answers: inputs @ weight + shift - answers)

    def spreads(self) -> Matrix:
        """Sums of squares as they are [samples, g, O]: the errors of no correction."""
        return self._squares(lambda _, answers: answers)

    def _squares(self, lack: Callable[[Rows, Rows], Rows]) -> Matrix:
        sums = (
            [np.square(lack(*part)).sum(axis=1, dtype=np.float64) for part in parts] for parts in self._parts.values()
        )
        return np.stack([np.sum(found, axis=0) for found in sums])


def choose_correction(sums: Sums, held_out: HeldOut, *, intercept: bool) -> Correction:
    """`sums` of the rows to fit to; `held_out` has at least one sample; `intercept`: whether there can be a bias."""
    weights, biases = _candidates(sums, intercept=intercept)
    errors = np.stack(
        [
            held_out.spreads(),
            *(held_out.errors(weight, bias) for weight, bias in zip(weights[1:], biases[1:], strict=True)),
        ]
    )
    chosen = choose(errors)
    weight, bias = np.zeros(weights[0].shape), np.zeros(biases[0].shape)
    for number in np.unique(chosen).tolist():
        taken = (chosen == number)[:, None]
        np.copyto(weight, weights[number], where=taken)
        np.copyto(bias, biases[number], where=taken)
    after = np.take_along_axis(errors, chosen[None, None], axis=0)
    return Correction(weight, bias, float(errors[0].sum()), float(after.sum()))


def choose(errors: Matrix) -> NDArray[np.int64]:
    """The first candidate within one standard error of the best and not worse than the first of all; errors are
    [candidates, samples, ...]."""
    totals = errors.sum(axis=1)
    best = totals.argmin(axis=0)
    worse = errors - np.take_along_axis(errors, best[None, None], axis=0)
    standard_errors = worse.std(axis=1) * np.sqrt(errors.shape[1])
    fine = (worse.sum(axis=1) <= standard_errors) & (totals <= totals[0])
    chosen: NDArray[np.int64] = fine.argmax(axis=0)
    return chosen


def _candidates(sums: Sums, *, intercept: bool) -> tuple[list[Rows], list[Matrix]]:
    """Weights and biases; equations that cannot be solved give none."""
    nothing: Rows = np.zeros(sums.products.shape, np.float32)
    weights, biases = [nothing], [np.zeros(sums.answer_sums.shape)]
    if intercept:
        weights.append(nothing)
        biases.append(sums.best_bias(nothing))
    ridge = Ridge(sums, intercept=intercept)
    for penalty in RIDGES:
        weight = ridge.solve(penalty)
        if weight is not None:
            weights.append(weight)
            biases.append(sums.best_bias(weight) if intercept else biases[0])
    return weights, biases
