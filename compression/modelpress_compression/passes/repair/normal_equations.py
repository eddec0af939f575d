"""Ridge regression from sums that are gathered row by row: min |X E + b - Z|^2 + lambda sum_k d_k |E_k|^2.

Z is what a layer's answers lack, E and b are what is added to its weight and bias: the penalty draws towards the layer
that is there, not to zero. d_k is the energy of input k, so that a fit does not depend on the scale of single inputs
(as of the few huge ones of a transformer's hidden state). Only X^T X [g, K, K], X^T Z [g, K, O] and sums of columns are
kept, in float64, however many rows come.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelpress_compression.graph.linear import Matrix, Rows

# Inputs that hardly vary are penalized like those of this share of the mean energy.
_LEAST_ENERGY = 1e-2


@dataclass
class Sums:
    """Over the rows so far: g groups, K inputs, O answers. Adds in place."""

    inputs: Matrix  # X^T X [g, K, K]
    products: Matrix  # X^T Z [g, K, O]
    input_sums: Matrix  # [g, 1, K]
    answer_sums: Matrix  # [g, 1, O]
    rows: int = 0

    @classmethod
    def zeros(cls, groups: int, inputs: int, answers: int) -> Sums:
        """No rows yet."""
        return cls(
            np.zeros((groups, inputs, inputs)),
            np.zeros((groups, inputs, answers)),
            np.zeros((groups, 1, inputs)),
            np.zeros((groups, 1, answers)),
        )

    @staticmethod
    def size_bytes(groups: int, inputs: int, answers: int) -> int:
        """Memory of one set of sums."""
        return 8 * groups * (inputs * (inputs + answers + 1) + answers)

    def add(self, inputs: Rows, answers: Rows) -> None:
        """Rows X [g, R, K] and Z [g, R, O]; rows that are not finite are left out."""
        inputs, answers = finite_rows(inputs, answers)
        turned, ones = inputs.transpose(0, 2, 1), np.ones((1, inputs.shape[1]), np.float32)
        self.inputs += turned @ inputs
        self.products += turned @ answers
        self.input_sums += ones @ inputs
        self.answer_sums += ones @ answers
        self.rows += inputs.shape[1]

    def best_bias(self, weight: Matrix | Rows) -> Matrix:
        """The bias of the least error for this weight [g, 1, O]."""
        return (self.answer_sums - self.input_sums @ weight) / max(1, self.rows)


class Ridge:
    """Solves for one set of sums and any number of penalties."""

    def __init__(self, sums: Sums, *, intercept: bool) -> None:
        inputs, products = sums.inputs, sums.products
        if intercept:
            means = sums.input_sums.transpose(0, 2, 1) / max(1, sums.rows)
            inputs = inputs - means * sums.input_sums
            products = products - means * sums.answer_sums
        energies = np.diagonal(inputs, axis1=1, axis2=2)
        floors = np.maximum(_LEAST_ENERGY * energies.mean(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        scales = 1 / np.sqrt(np.maximum(energies, floors))[:, :, None]
        # With a unit diagonal and the penalty on it, float32 is exact enough.
        self._inputs = (inputs * scales * scales.transpose(0, 2, 1)).astype(np.float32)
        self._products = (products * scales).astype(np.float32)
        self._scales = scales.astype(np.float32)

    def solve(self, ridge: float) -> Rows | None:
        """E [g, K, O] for lambda = `ridge`, which is relative to the energies; None where there is no solution."""
        penalized = self._inputs + np.float32(ridge) * np.eye(self._inputs.shape[1], dtype=np.float32)
        try:
            solution: Rows = self._scales * np.linalg.solve(penalized, self._products)
        except np.linalg.LinAlgError:
            return None
        return solution if np.isfinite(solution).all() else None


def finite_rows(inputs: Rows, answers: Rows) -> tuple[Rows, Rows]:
    """The rows that hold neither NaN nor infinity."""
    with np.errstate(invalid="ignore", over="ignore"):
        good = np.isfinite(inputs.sum(axis=(0, 2))) & np.isfinite(answers.sum(axis=(0, 2)))
    return (inputs, answers) if good.all() else (inputs[:, good], answers[:, good])
