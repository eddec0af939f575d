"""Ridge least squares from sums that are gathered row by row: min |X W + b - Y|^2 + lambda |W - W0|^2.

The penalty draws towards the weights that are there, not to zero: with little data the layer stays what it was. Only
X^T X [g, K, K], X^T Y [g, K, O] and column sums are kept, in float64, however many rows come. The error of any W and b
on those rows follows from the same sums, so a second set of them, gathered on other samples, validates a fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelpress_compression.analysis.linear import Matrix


@dataclass
class Sums:
    """Over the rows so far: g groups, K inputs, O answers. Adds in place."""

    inputs: Matrix  # X^T X [g, K, K]
    products: Matrix  # X^T Y [g, K, O]
    input_sums: Matrix  # [g, 1, K]
    answer_sums: Matrix  # [g, 1, O]
    answer_squares: Matrix  # [g, 1, O]
    rows: int = 0

    @classmethod
    def zeros(cls, groups: int, inputs: int, answers: int) -> Sums:
        """No rows yet."""
        return cls(
            np.zeros((groups, inputs, inputs)),
            np.zeros((groups, inputs, answers)),
            np.zeros((groups, 1, inputs)),
            np.zeros((groups, 1, answers)),
            np.zeros((groups, 1, answers)),
        )

    @staticmethod
    def size_bytes(groups: int, inputs: int, answers: int) -> int:
        """Memory of one set of sums."""
        return 8 * groups * (inputs * (inputs + answers + 1) + 2 * answers)

    def add(self, inputs: Matrix, answers: Matrix) -> None:
        """Rows X [g, R, K] and Y [g, R, O]; rows that are not finite are left out."""
        good = np.isfinite(inputs).all(axis=(0, 2)) & np.isfinite(answers).all(axis=(0, 2))
        if not good.all():
            inputs, answers = inputs[:, good], answers[:, good]
        turned = inputs.transpose(0, 2, 1)
        self.inputs += turned @ inputs
        self.products += turned @ answers
        self.input_sums += inputs.sum(axis=1, keepdims=True)
        self.answer_sums += answers.sum(axis=1, keepdims=True)
        self.answer_squares += np.square(answers).sum(axis=1, keepdims=True)
        self.rows += inputs.shape[1]

    def merge(self, other: Sums) -> None:
        """Takes over another set's rows."""
        self.inputs += other.inputs
        self.products += other.products
        self.input_sums += other.input_sums
        self.answer_sums += other.answer_sums
        self.answer_squares += other.answer_squares
        self.rows += other.rows

    def error(self, weight: Matrix, bias: Matrix) -> float:
        """Sum of squares of X W + b - Y; `bias` is [g, 1, O]."""
        total = (
            self.answer_squares.sum()
            - 2 * (weight * self.products).sum()
            + (weight * (self.inputs @ weight)).sum()
            + 2 * (bias * (self.input_sums @ weight - self.answer_sums)).sum()
            + self.rows * np.square(bias).sum()
        )
        return max(0.0, float(total))

    def spread(self) -> float:
        """Sum of squares of Y about its mean: the error of the best constant answer."""
        rows = max(1, self.rows)
        return max(0.0, float((self.answer_squares - np.square(self.answer_sums) / rows).sum()))

    def best_bias(self, weight: Matrix) -> Matrix:
        """The bias of the least error for this weight."""
        return (self.answer_sums - self.input_sums @ weight) / max(1, self.rows)

    def solve(self, start: Matrix, ridge: float, *, intercept: bool) -> Matrix:
        """The weight; `ridge` is relative to the mean of the diagonal. Raises numpy.linalg.LinAlgError."""
        inputs, products = self.inputs, self.products
        if intercept:
            means = self.input_sums / max(1, self.rows)
            inputs = inputs - means.transpose(0, 2, 1) * self.input_sums
            products = products - means.transpose(0, 2, 1) * self.answer_sums
        diagonal = np.diagonal(inputs, axis1=1, axis2=2).mean(axis=1)
        penalty = (ridge * np.maximum(diagonal, np.finfo(np.float64).tiny))[:, None, None] * np.eye(start.shape[1])
        return start + np.linalg.solve(inputs + penalty, products - inputs @ start)
