"""Truncated SVD: K -> r -> O, each group by itself."""

from __future__ import annotations

import numpy as np

from modelpress_compression.graph.linear import Convolution
from modelpress_compression.passes.factorize.layers import Layer
from modelpress_compression.passes.factorize.methods.base import Factors, Ranks, Stage, all_axes, mixing_stage, rounded
from modelpress_compression.passes.factorize.methods.problem import Decomposition, Problem, total_lost


class Svd:
    """K -> r -> O, each group by itself."""

    def why_not(self, layer: Layer) -> str:
        return ""

    def cost(self, layer: Layer, ranks: Ranks) -> tuple[int, int]:
        parameters = layer.groups * ranks[0] * (layer.inputs + layer.answers)
        multiplied = ranks[0] * layer.answers if layer.is_table else parameters
        return multiplied * layer.positions.outputs, parameters

    def ranks(self, layer: Layer, share: float, round_to: int) -> Ranks | None:
        rank = rounded(share * layer.inputs * layer.answers / (layer.inputs + layer.answers), round_to)
        return (rank,) if rank else None

    def factors(self, problem: Problem, ranks: Ranks) -> Factors:
        layer, rank = problem.layer, min(ranks[0], problem.layer.inputs, problem.layer.answers)
        parts = problem.decompositions("svd", _of_groups)
        first = np.stack([part.features(rank) for part in parts])
        last = np.stack([part.mixing(rank) for part in parts])
        stages: tuple[Stage, ...] = (Stage(first[0]), Stage(last[0]))
        if isinstance(layer.linear, Convolution):
            kernel = first.transpose(0, 2, 1).reshape(layer.groups * rank, layer.channels, *layer.kernel)
            stages = (Stage(kernel, all_axes(layer), layer.groups), mixing_stage(layer, last))
        return Factors("svd", (rank,), stages, total_lost(parts, rank))


def _of_groups(problem: Problem) -> list[Decomposition]:
    moments = problem.moments
    return [
        Decomposition(weight, None if moments is None else moments[group])
        for group, weight in enumerate(problem.matrix)
    ]
