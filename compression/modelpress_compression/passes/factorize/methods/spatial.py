"""A column of the kernel, then a row."""

from __future__ import annotations

import numpy as np

from modelpress_compression.graph.linear import Matrix
from modelpress_compression.passes.factorize.layers import MAX_SIDE, Layer
from modelpress_compression.passes.factorize.methods.base import Factors, Ranks, Stage, rounded, why_no_kernel
from modelpress_compression.passes.factorize.methods.problem import Decomposition, Problem, total_lost


class Spatial:
    """kh x 1 C -> r, then 1 x kw r -> O."""

    def why_not(self, layer: Layer) -> str:
        if reason := why_no_kernel(layer):
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

    def factors(self, problem: Problem, ranks: Ranks) -> Factors:
        layer, channels, answers = problem.layer, problem.layer.channels, problem.layer.answers
        rows, columns = layer.kernel
        rank = min(ranks[0], channels * rows, columns * answers)
        parts = problem.decompositions("spatial", _of_columns)
        column = parts[0].features(rank)

        def project(matrix: Matrix) -> Matrix:
            cube = matrix.reshape(channels * rows, columns, -1)
            return np.tensordot(column, cube, (0, 0)).reshape(rank * columns, -1)

        fitted = problem.nested_least_squares("spatial", rank * columns, project)
        mixing, error = fitted or (parts[0].mixing(rank), total_lost(parts, rank))
        row = mixing.reshape(rank, columns, answers).transpose(2, 0, 1)[:, :, None, :]
        stages = (Stage(column.T.reshape(rank, channels, rows, 1), (0,)), Stage(row, (1,)))
        return Factors("spatial", (rank,), stages, error)


def _of_columns(problem: Problem) -> list[Decomposition]:
    """Of the weight as [channels and rows, columns and answers], weighed by the moments of the former."""
    rows, columns = problem.layer.kernel
    side = problem.layer.channels * rows
    weight = problem.matrix[0].reshape(side, -1)
    if problem.moments is None:
        return [Decomposition(weight, None)]
    whole = problem.moments[0].reshape(side, columns, side, columns)
    return [Decomposition(weight, np.einsum("iaja->ij", whole) / columns)]
