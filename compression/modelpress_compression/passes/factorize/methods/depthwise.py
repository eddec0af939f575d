"""Depthwise-separable convolutions: t filters for each channel, then 1x1 over all of them."""

from __future__ import annotations

import numpy as np

from modelpress_compression.graph.linear import Matrix
from modelpress_compression.passes.factorize.layers import Layer
from modelpress_compression.passes.factorize.methods.base import (
    Factors,
    Ranks,
    Stage,
    all_axes,
    mixing_stage,
    why_no_kernel,
)
from modelpress_compression.passes.factorize.methods.problem import Decomposition, Problem, total_lost


class Depthwise:
    """t filters for each channel, then 1x1 over all of them."""

    def why_not(self, layer: Layer) -> str:
        return why_no_kernel(layer)

    def cost(self, layer: Layer, ranks: Ranks) -> tuple[int, int]:
        parameters = ranks[0] * layer.channels * (layer.points + layer.answers)
        return parameters * layer.positions.outputs, parameters

    def ranks(self, layer: Layer, share: float, round_to: int) -> Ranks | None:
        filters = int(share * layer.points * layer.answers / (layer.points + layer.answers))
        return (filters,) if filters else None

    def factors(self, problem: Problem, ranks: Ranks) -> Factors:
        layer, channels, points = problem.layer, problem.layer.channels, problem.layer.points
        filters = min(ranks[0], points, layer.answers)
        parts = problem.decompositions("depthwise", _of_channels)
        # The first filter of every channel, then the second: fewer filters are the first of these.
        depth = np.stack([part.features(filters).T for part in parts], axis=1)  # [t, C, points]

        def project(matrix: Matrix) -> Matrix:
            projected: Matrix = np.matmul(depth[:, :, None], matrix.reshape(channels, points, -1))
            return projected.reshape(filters * channels, -1)

        plain = np.stack([part.mixing(filters) for part in parts], axis=1), total_lost(parts, filters)
        mixing, error = problem.nested_least_squares("depthwise", filters * channels, project) or plain
        # onnxruntime wants the filters of a channel side by side.
        mixing = mixing.reshape(filters, channels, -1).swapaxes(0, 1).reshape(filters * channels, -1)
        kernel = depth.swapaxes(0, 1).reshape(channels * filters, 1, *layer.kernel)
        stages = (Stage(kernel, all_axes(layer), channels), mixing_stage(layer, mixing[None]))
        return Factors("depthwise", (filters,), stages, error)


def _of_channels(problem: Problem) -> list[Decomposition]:
    """Of each channel's part of the weight [points, O]."""
    channels, points = problem.layer.channels, problem.layer.points
    weight = problem.matrix[0].reshape(channels, points, -1)
    if problem.moments is None:
        return [Decomposition(part, None) for part in weight]
    own = problem.moments[0].reshape(channels, points, channels, points)
    return [Decomposition(part, own[channel, :, channel]) for channel, part in enumerate(weight)]
