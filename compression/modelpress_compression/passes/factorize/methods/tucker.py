"""Tucker-2: 1x1, the kernel between fewer channels, 1x1."""

from __future__ import annotations

import numpy as np

from modelpress_compression.graph.linear import Matrix
from modelpress_compression.passes.factorize.layers import MAX_SIDE, Layer
from modelpress_compression.passes.factorize.methods.base import (
    Factors,
    Ranks,
    Stage,
    all_axes,
    fits,
    mixing_stage,
    rounded,
    why_no_kernel,
)
from modelpress_compression.passes.factorize.methods.problem import Problem, leading, share_lost

_ITERATIONS = 2  # of orthogonal iteration; two more win a thousandth of the energy at most, and take as long again
_STEPS = 64  # by which the two ranks grow together


class Tucker:
    """1x1 C -> r1, the kernel r1 -> r2, 1x1 r2 -> O."""

    def why_not(self, layer: Layer) -> str:
        return why_no_kernel(layer) or (
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
            if fits(self, layer, found, share):
                return found
        return None

    def factors(self, problem: Problem, ranks: Ranks) -> Factors:
        layer, moments = problem.layer, problem.moments
        one, two = min(ranks[0], layer.channels), min(ranks[1], layer.answers)
        weight = problem.matrix[0].reshape(layer.channels, layer.points, layer.answers)
        lower = np.eye(layer.channels) if moments is None else np.linalg.cholesky(_of_channels(layer, moments[0]))
        whitened = np.tensordot(lower, weight, (0, 0))
        inner, outer = _orthogonal_iteration(whitened, one, two)
        core = np.tensordot(np.tensordot(inner, whitened, (0, 0)), outer, (2, 0))  # [r1, points, r2]
        read = np.linalg.solve(lower.T, inner)  # [C, r1]

        def project(matrix: Matrix) -> Matrix:
            cube = matrix.reshape(layer.channels, layer.points, -1)
            return np.tensordot(core, np.tensordot(read, cube, (0, 0)), ((0, 1), (0, 1)))

        plain = outer.T, share_lost(float(np.square(whitened).sum()), float(np.square(core).sum()))
        mixing, error = problem.least_squares(project) or plain
        ones = (1,) * len(layer.kernel)
        stages = (
            Stage(read.T.reshape(one, layer.channels, *ones)),
            Stage(core.transpose(2, 0, 1).reshape(two, one, *layer.kernel), all_axes(layer)),
            mixing_stage(layer, mixing[None]),
        )
        return Factors("tucker", (one, two), stages, error)


def _orthogonal_iteration(cube: Matrix, one: int, two: int) -> tuple[Matrix, Matrix]:
    """Orthonormal factors [C, one] and [O, two] of a weight [C, points, O]."""
    _, outer = leading(_gram(cube, 2), two)
    inner = np.empty(0)
    for _ in range(_ITERATIONS):
        _, inner = leading(_gram(np.tensordot(cube, outer, (2, 0)), 0), one)
        _, outer = leading(_gram(np.tensordot(inner, cube, (0, 0)), 2), two)
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
